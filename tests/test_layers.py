"""Who may know whom. ARCHITECTURE.md gives the reasons; this holds it.

Imports are read from the source, so that those inside of functions count too. What must not load torch is imported
in a process of its own, so that indirect ways are seen.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mutoscope"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 750

MAY_IMPORT = {
    "errors": set(),
    "digests": {"errors"},
    "request": set(),
    "events": {"request"},
    "logs": set(),
    "manifest": {"errors"},
    "media": {"errors", "request"},
    "planning": {"digests", "errors", "manifest", "media", "request"},
    "loras": {"digests", "engine", "errors", "manifest"},
    "catalog": {"errors", "manifest"},
    "hub": {"errors", "manifest", "catalog"},
    "direction": {"errors", "request"},
    "prompts": {"errors", "request"},
    "engine": {"catalog", "errors", "events", "manifest", "media", "planning", "request"},
    "settings": {"errors", "manifest", "request"},
    "jobs": {
        "catalog",
        "digests",
        "direction",
        "errors",
        "loras",
        "manifest",
        "media",
        "planning",
        "prompts",
        "request",
        "settings",
    },
    "server": {
        "digests",
        "direction",
        "errors",
        "jobs",
        "logs",
        "manifest",
        "media",
        "prompts",
        "request",
        "settings",
    },
    "fleet": {"errors", "jobs", "settings"},
}
"""Parts of the package, and which others each may import; parts that are not listed (the edges) may import all."""

WITHOUT_TORCH = ("catalog", "digests", "direction", "errors", "events", "fleet", "hub", "jobs", "logs", "loras",
                 "manifest", "media", "planning", "prompts", "request", "server", "settings")  # fmt: skip
"""No torch, however indirectly, and so nothing of the engine but what does without it too: `loras` reads headers."""
ENGINE_WITHOUT_TORCH = ("cache_tables", "gguf", "gguf_writer", "headers", "lora_keys", "wan_names")


def part_of(name: str) -> str:
    """mutoscope.media.read to media."""
    return name.split(".")[1] if "." in name else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of all that a file imports, `from a import b` as both a and a.b; not what is for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return frozenset(found)


def parts_present() -> Iterator[str]:
    yield from sorted({part_of(module_name(path)) for path in MODULES} - {""})


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(module_name(path))
    if part in MAY_IMPORT:
        known = {part_of(name) for name in imports(path) if name.startswith("mutoscope.")}
        known &= set(parts_present())  # `from mutoscope import __version__` is fine
        assert known <= MAY_IMPORT[part] | {part}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_the_package_needs_nothing_from_beside_it(path: Path) -> None:
    top = {name.split(".")[0] for name in imports(path)}
    assert not top & {
        "tests",
        "training",
        "benchmarks",
        "scripts",
        "conftest",
        "pytest",
        "diffusers",
        "transformers",
    }


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def loads_torch(code: str) -> bool:
    """Whether torch is loaded after running `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport sys\nprint('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] == "True"


def test_torch_is_not_loaded_without_need() -> None:
    """All of them in one process: if torch comes in, the test below says by whom."""
    names = [module_name(p) for p in MODULES if part_of(module_name(p)) in WITHOUT_TORCH]
    names += ["mutoscope", *(f"mutoscope.engine.{name}" for name in ENGINE_WITHOUT_TORCH)]
    names.remove("mutoscope.jobs.migrations.env")  # a script that Alembic runs, not a module
    assert len(names) > 8
    code = "import sys\n" + "\n".join(
        f"import {name}\nassert 'torch' not in sys.modules, '{name} loads torch'" for name in names
    )
    assert not loads_torch(code)


def test_help_does_not_load_torch() -> None:
    code = "from mutoscope.cli import main\nimport sys\nsys.argv = ['mutoscope', '--help']\n"
    assert not loads_torch(code + "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code")


def test_loading_torch_would_be_noticed() -> None:
    assert loads_torch("import mutoscope\nmutoscope.Engine")


def test_the_tables_name_no_part_that_is_misspelt() -> None:
    """Parts that are planned (see ARCHITECTURE.md) may be missing, but nothing else."""
    planned = {"direction", "fleet", "prompts", "server"}
    assert set(MAY_IMPORT) | set(WITHOUT_TORCH) <= set(parts_present()) | planned
