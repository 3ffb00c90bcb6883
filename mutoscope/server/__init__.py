"""HTTP only: the app, who is asking, what went wrong, and one file for each vendor's dialect. No torch, no engine."""
