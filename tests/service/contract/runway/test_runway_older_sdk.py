"""The same contract with the oldest SDK that we promise: its tests run in a process that imports that one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]
OLD = ROOT / ".venv" / "sdk" / "runwayml-5.13.0"


def test_the_contract_holds_with_5_13_0(tmp_path: Path) -> None:
    assert (OLD / "runwayml").is_dir(), f"{OLD} is missing: make .venv/.dev installs it"
    tests = Path(__file__).with_name("test_runway_sdk.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--basetemp={tmp_path / 'old'}",
            str(tests),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(OLD), "RUNWAY_SDK": "5.13.0"},
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 40
