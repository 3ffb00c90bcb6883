"""Write the table of all settings into docs/settings.md.

    python scripts/make_settings_docs.py            # write
    python scripts/make_settings_docs.py --check    # exit 1 if it is out of date

tests/unit/test_settings_docs.py checks it too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mutoscope.settings import Settings

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings of the service

One object, read once at the start: the command line, then the environment, then the file of `--config`, then these
defaults. An unknown name anywhere is an error that suggests the nearest one. Durations are seconds, sizes bytes.

    # service.toml
    port = 8080
    devices = ["cuda:0", "cuda:1"]
    retention_days = 7

    [aliases]
    "gen4.5" = "wan2.1-vace-14b:q4_k_m"

In the environment a setting is `MUTOSCOPE_` and its name in capitals; lists are separated by commas, tables are written
`a=b,c=d`: `MUTOSCOPE_DEVICES=cuda:0,cuda:1`.

<!-- Below: written by scripts/make_settings_docs.py from mutoscope/settings.py -->

| setting | default | |
|---|---|---|
"""


def default_of(name: str) -> str:
    """As one would write it; folders of the user are described."""
    field = Settings.model_fields[name]
    if name == "data_dir":
        return "a folder of your user"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ("", (), {}):
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def page() -> str:
    """docs/settings.md as it should be."""
    rows = [
        f"| `{name}` | {default_of(name)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


def main() -> int:
    wanted = page()
    if PAGE.exists() and PAGE.read_text("utf-8") == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{PAGE} is out of date: python scripts/make_settings_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
