"""Untrusted files are opened in a process of their own, with limits on memory, processor time and wall time.

A decoder that crashes, eats memory or never ends takes nothing with it. The costly part, loading the decoders, is
done once in a helper process; each file then gets a fork of it that lives for that file only.

    probed = sandbox.probe(path)     # pictures are decoded whole, of clips the header and the first frame

Details that have caused bugs elsewhere: the answer of a process that read a hostile file is hostile too, so it is
small JSON and checked; a fork must happen before any thread starts, so the helper has none.
"""

from __future__ import annotations

import array
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mutoscope.errors import MediaError, ResourceError
from mutoscope.media import sniff

MEMORY_BYTES = 1 << 30
"""Above what the loaded decoders take: a picture of 64 million pixels needs about half of it."""
CPU_S = 20
WALL_S = 30.0
MAX_ANSWER_BYTES = 65536
AT_ONCE = 4
"""Files probed at the same time by one process; others wait."""

_HELPER = "mutoscope.media.sandbox_child"

Kind = Literal["image", "video", "animation"]
_KINDS: tuple[Kind, ...] = ("image", "video", "animation")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one probe."""

    memory_bytes: int = MEMORY_BYTES
    cpu_s: int = CPU_S
    wall_s: float = WALL_S


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a file holds, by its content. Sizes as shown, in pixels; fps is None for a still."""

    kind: Kind
    mime: str
    width: int
    height: int
    frames: int
    fps: float | None
    duration_s: float
    codec: str
    size_bytes: int

    def info(self) -> dict[str, Any]:
        """As kept with an upload."""
        return {
            "kind": self.kind, "width": self.width, "height": self.height, "frames": self.frames,
            "fps": self.fps, "seconds": round(self.duration_s, 3), "codec": self.codec,
        }  # fmt: skip


class Sandbox:
    """One helper process and the files that are being probed by forks of it. Safe to share between threads."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._helper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owner = os.getpid()

    def probe(self, path: str | Path) -> Probed:
        """What a file holds.

        Raises:
            MediaError: not a picture or clip, damaged, too large, or it makes the decoder crash or never end.
            ResourceError: the helper process cannot be started.
        """
        path = Path(path)
        mime = sniff.mime_of_file(path)
        if not mime:
            raise MediaError("is neither a picture nor a video.", hint=sniff.EXPECTED)
        with self._slots:
            answer = self._ask({"path": str(path.absolute()), "mime": mime})
        if "error" in answer:
            raise MediaError(str(answer["error"])[:500], hint=str(answer.get("hint", ""))[:200])
        return _checked(answer, mime, path.stat().st_size)

    def warm(self) -> None:
        """Start the helper now, so that the first file need not wait for it."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """Stop the helper."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """Of the helper process."""
        return self._helper.pid if self._helper is not None and self._helper.poll() is None else None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        limits = {
            "memory_bytes": self.limits.memory_bytes,
            "cpu_s": self.limits.cpu_s,
            "wall_s": self.limits.wall_s,
        }
        line = json.dumps({**request, **limits}).encode() + b"\n"
        for _ in range(2):
            mine, theirs = socket.socketpair()
            with mine:
                with theirs:
                    helper = self._hand_over(theirs)
                answer = self._exchange(mine, line)
                if answer is not None:
                    return answer
            with self._lock:  # the helper itself died: a new one gets the file
                if self._helper is helper:  # and no other thread has replaced it
                    self._stop()
        command = f"{Path(sys.executable).name} -m {_HELPER} 0"
        raise ResourceError(
            "The process that opens uploaded files does not start.", hint=f"{command} says why."
        )

    def _hand_over(self, theirs: socket.socket) -> subprocess.Popen[bytes] | None:
        """Give a socket to the helper, which forks for it; that helper."""
        with self._lock:
            control = self._started()
            rights = array.array("i", [theirs.fileno()])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever waits will notice
                control.sendmsg([b"p"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            return self._helper

    def _exchange(self, mine: socket.socket, line: bytes) -> dict[str, Any] | None:
        """The answer; None if the helper died before it forked."""
        pid = 0
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                mine.sendall(line)
            for received in _lines(mine, time.monotonic() + self.limits.wall_s + 2):
                if not pid:
                    pid = int(received)
                    continue
                answer = json.loads(received)
                return answer if isinstance(answer, dict) else {"error": _CRASHES}
        except TimeoutError:
            if pid > 1:
                with contextlib.suppress(OSError, OverflowError):
                    os.kill(pid, signal.SIGKILL)
            return {"error": f"takes longer than {self.limits.wall_s:g} s to open.", "hint": _RE_EXPORT}
        except (ValueError, OSError):
            return {"error": _CRASHES, "hint": _RE_EXPORT}
        return {"error": _CRASHES, "hint": _RE_EXPORT} if pid else None

    def _started(self) -> socket.socket:
        if self._owner != os.getpid():  # this process is a fork: the helper is its parent's
            self._helper, self._control, self._owner = None, None, os.getpid()
        if self._control is not None and self._helper is not None and self._helper.poll() is None:
            return self._control
        self._stop()
        ours, theirs = socket.socketpair()
        with theirs:
            self._helper = subprocess.Popen(
                [sys.executable, "-m", _HELPER, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )
        self._control = ours
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._helper is not None:
            self._helper.kill()
            self._helper.wait()
        self._helper = self._control = None


_CRASHES = "cannot be opened: it makes the decoder crash, or needs too much memory or time."
_RE_EXPORT = "Re-export the file with another program."

_shared: Sandbox | None = None
_shared_lock = threading.Lock()


def shared() -> Sandbox:
    """The sandbox of this process, made when first asked for."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Sandbox()
        return _shared


def probe(path: str | Path) -> Probed:
    """What a file holds, found out by the sandbox of this process; see `Sandbox.probe`."""
    return shared().probe(path)


def close() -> None:
    """Stop the helper of this process, if there is one."""
    global _shared
    with _shared_lock:
        if _shared is not None:
            _shared.close()
        _shared = None


def _environment() -> dict[str, str]:
    """No secrets, and no threads in numpy's libraries."""
    kept = {
        k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG") if k in os.environ
    }
    paths = os.pathsep.join(str(Path(p or ".").absolute()) for p in sys.path)
    return {
        **kept,
        "PYTHONPATH": paths,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _lines(sock: socket.socket, deadline: float) -> Iterator[bytes]:
    buffer = b""
    while len(buffer) < MAX_ANSWER_BYTES:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            chunk = sock.recv(MAX_ANSWER_BYTES)
        except ConnectionResetError:
            return
        if not chunk:
            return
        buffer += chunk
        *whole, buffer = buffer.split(b"\n")
        yield from whole


def _checked(answer: dict[str, Any], mime: str, size_bytes: int) -> Probed:
    try:
        kind = next(k for k in _KINDS if k == answer["kind"])
        fps = answer["fps"]
        probed = Probed(
            kind=kind,
            mime=mime,
            width=int(answer["width"]),
            height=int(answer["height"]),
            frames=int(answer["frames"]),
            fps=None if fps is None else float(fps),
            duration_s=float(answer["duration_s"]),
            codec="".join(c for c in str(answer["codec"])[:32] if c.isalnum() or c in "_-"),
            size_bytes=size_bytes,
        )
    except (KeyError, TypeError, ValueError, StopIteration, OverflowError) as e:
        raise MediaError(_CRASHES, hint=_RE_EXPORT) from e
    numbers = (probed.width, probed.height, probed.frames, probed.duration_s, probed.fps or 0.0)
    if min(numbers) < 0 or not all(math.isfinite(n) for n in numbers):
        raise MediaError(_CRASHES, hint=_RE_EXPORT)
    return probed
