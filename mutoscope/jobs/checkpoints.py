"""Named places where a test may stop a process, to kill it just there.

`checkpoint("claimed")` does nothing unless MUTOSCOPE_TEST_STOP_AT names a folder. If that folder holds a file of this
name, the first process to come by takes it away, writes its process id into `hit.<name>`, and stops itself (SIGSTOP)
until it is killed or continued. tests/service/processes and scripts/soak.py arm and wait.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "MUTOSCOPE_TEST_STOP_AT"

POINTS = (
    "accepted",  # web: the job is committed, the answer is not sent
    "claimed",  # worker: the job is its own, nothing is done
    "loaded",  # worker: the model is there
    "step",  # worker: in the middle of denoising
    "decoded",  # worker: all frames are made, the file is not closed
    "before-rename",  # worker: files are complete in their temporary folder
    "before-commit",  # worker: files are in place, the job does not know
    "committed",  # worker: the job has succeeded
)


def checkpoint(name: str) -> None:
    """Stop here if a test wants it."""
    folder = os.environ.get(VARIABLE)
    if folder:
        _stop(Path(folder), name)


def _stop(folder: Path, name: str) -> None:
    taken = folder / f"taken.{name}.{os.getpid()}"
    try:
        os.rename(folder / name, taken)
    except OSError:
        return
    taken.write_text(str(os.getpid()))
    os.rename(taken, folder / f"hit.{name}")
    os.kill(os.getpid(), signal.SIGSTOP)
