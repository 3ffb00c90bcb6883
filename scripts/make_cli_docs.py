"""Write the help of every command into docs/cli.md, below its marker.

    python scripts/make_cli_docs.py            # write
    python scripts/make_cli_docs.py --check    # exit 1 if it is out of date

tests/unit/test_cli.py checks it too. What is above the marker is written by hand.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from mutoscope.cli import app, run

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
MARKER = "<!-- Below: written by scripts/make_cli_docs.py"
WIDTH = 100


def tools() -> str:
    """What the layout depends on."""
    return f"typer {version('typer')}, rich {version('rich')}"


def commands(group: Any = None, name: str = "") -> Iterator[str]:
    """The program itself (""), and all that it can be told, like "keys create"."""
    group = typer.main.get_command(app) if group is None else group
    yield name
    for word, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {word}".strip())


def help_of(command: str) -> str:
    """What `mutoscope COMMAND --help` prints on a terminal without colours, WIDTH wide."""
    before = dict(os.environ)
    os.environ.update(COLUMNS=str(WIDTH), NO_COLOR="1", TERM="dumb")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run([*command.split(), "--help"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def page() -> str:
    """docs/cli.md as it should be."""
    head = PAGE.read_text("utf-8").partition(MARKER)[0].rstrip()
    parts = [head, f"{MARKER} ({tools()}) -->", "## Help"]
    for command in commands():
        name = f"mutoscope {command}".strip()
        parts.append(f"### {name}\n\n```text\n{help_of(command)}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    wanted = page()
    if PAGE.read_text("utf-8") == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{PAGE} is out of date: python scripts/make_cli_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
