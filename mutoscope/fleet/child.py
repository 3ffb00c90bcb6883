"""Starts a module as a process that ends when its parent does, however that ends.

    python -m mutoscope.fleet.child PARENT_ID MODULE [ARGUMENT ...]

On Linux the kernel kills it with its parent. Everywhere, standard input is a pipe that only the parent holds open:
when it closes, the process ends at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """From now on this process does not outlive `parent`, the id of the process that started it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    threading.Thread(target=_wait_for_end, name="parent", daemon=True).start()


def _wait_for_end() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 64):
            pass
    os._exit(1)


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    end_with_parent(int(parent))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
