"""What the pages say is what is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mutoscope
from training import evaluate

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def test_the_readme_names_the_two_commands_of_the_makefile() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    lines = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test"]


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_library_examples_run(page: str, tmp_path: Path) -> None:
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        if "base_url" in snippet:  # talks to the service: tests/service/contract/test_snippets.py runs it
            continue
        subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True, timeout=200)
    assert (tmp_path / "ball.mp4").stat().st_size > 1000


@pytest.mark.parametrize("page", ["README.md", "docs/starter.md"])
def test_the_evaluation_table_is_the_measured_one(page: str) -> None:
    measured = json.loads((ROOT / "docs" / "starter-evaluation.json").read_text())
    text = (ROOT / page).read_text()
    assert evaluate.with_table(text, evaluate.table(measured["rows"])) == text


def test_version_and_changelog_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## Unreleased" in changelog or f"## {mutoscope.__version__}" in changelog
    assert f'version = "{mutoscope.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_code_map_names_every_module() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    modules = [p for folder in ("mutoscope", "training") for p in (ROOT / folder).rglob("*.py")]
    missing = [p.name for p in modules if not p.name.startswith("__") and p.name not in page]
    assert not missing
