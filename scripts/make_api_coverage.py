"""Write docs/api-coverage.md from the dialects' tables.

.venv/bin/python scripts/make_api_coverage.py
.venv/bin/python scripts/make_api_coverage.py --check
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from mutoscope.server.dialects.coverage import IGNORED, REFUSED, SUPPORTED, Route

OUT = Path(__file__).parents[1] / "docs" / "api-coverage.md"
MARK = {SUPPORTED: "yes", IGNORED: "no effect", REFUSED: "refused"}


class Dialect(NamedTuple):
    module: str
    title: str
    page: str


DIALECTS = (
    Dialect("runway_coverage", "Runway", "runway.md"),
    Dialect("luma", "Luma Dream Machine", "luma.md"),
    Dialect("luma_agents", "Luma Agents", "luma.md"),
    Dialect("openai_videos", "OpenAI Videos", "openai.md"),
)

HEAD = """# What of each vendor's API is here

Made by `scripts/make_api_coverage.py` from the tables in `mutoscope/server/dialects/`; tests hold the tables against
the routes that exist and, for Runway, against the fields that the official SDKs type.

- **yes**: supported; a note says what differs.
- **no effect**: accepted, and the note says why it does nothing. Answers to create calls repeat it where the vendor's
  format leaves room (`warnings` at Runway).
- **refused**: answered with the vendor's own error and a sentence. Nothing is faked.

| dialect | routes | supported | refused | fields | supported | no effect | refused |
|---|---|---|---|---|---|---|---|
"""


def coverage(dialect: Dialect) -> tuple[str, tuple[Route, ...]]:
    """The prefix and the table of a dialect."""
    module = import_module(f"mutoscope.server.dialects.{dialect.module}")
    return module.PREFIX, module.COVERAGE


def summary(dialect: Dialect) -> str:
    _, routes = coverage(dialect)
    parts = [p for r in routes for p in r.fields]
    counts = [
        len(routes),
        *(sum(r.level == level for r in routes) for level in (SUPPORTED, REFUSED)),
        len(parts),
        *(sum(p.level == level for p in parts) for level in (SUPPORTED, IGNORED, REFUSED)),
    ]
    anchor = dialect.title.lower().replace(" ", "-")
    return f"| [{dialect.title}](#{anchor}) | {' | '.join(map(str, counts))} |\n"


def section(dialect: Dialect) -> str:
    prefix, routes = coverage(dialect)
    lines = [f"\n## {dialect.title}\n", f"How to use it: [{dialect.page}]({dialect.page}).\n"]
    plain = [r for r in routes if not r.fields]
    if plain:
        lines += ["| route | | note |", "|---|---|---|"]
        lines += [f"| `{r.method} {prefix}{r.path}` | {MARK[r.level]} | {_cell(r.note)} |" for r in plain]
    for route in routes:
        if not route.fields:
            continue
        lines.append(f"\n### {route.method} {prefix}{route.path}\n")
        if route.note or route.level != SUPPORTED:
            lines.append(f"{MARK[route.level].capitalize()}. {route.note}\n".replace("Yes. ", ""))
        lines += ["| field | | note | only for |", "|---|---|---|---|"]
        for part in route.fields:
            models = ", ".join(f"`{m}`" for m in part.models[:4])
            if len(part.models) > 4:
                models += f" and {len(part.models) - 4} more"
            lines.append(f"| `{part.name}` | {MARK[part.level]} | {_cell(part.note)} | {models} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def render() -> str:
    return HEAD + "".join(summary(d) for d in DIALECTS) + "".join(section(d) for d in DIALECTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is not up to date")
    options = parser.parse_args()
    text = render()
    if options.check:
        same = OUT.is_file() and OUT.read_text("utf-8") == text
        print(f"{OUT.name}: {'up to date' if same else 'differs, run scripts/make_api_coverage.py'}")
        return 0 if same else 1
    OUT.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
