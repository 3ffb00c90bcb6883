"""Where workers run: supervised processes of this machine."""
