"""The other side of `sandbox.py`: loads the decoders once, then forks for each file. Run as a module, never imported.

Over the control socket come file descriptors, one for each file; the fork that serves it reads one line of JSON from
it and answers with its process id and one line of JSON. When the control socket closes, the helper ends.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from mutoscope.errors import MediaError
from mutoscope.media.read import probe, read_image

MAX_CORES = 4
"""Threads take address space, of which there is little here."""


def main(control_fd: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended forks leave nothing behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes the socket
    control = socket.socket(fileno=control_fd)
    load_decoders()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        for fd in fds:
            if os.fork() == 0:
                control.close()
                serve(fd)
            os.close(fd)


def load_decoders() -> None:
    """What Pillow would else load anew in each fork."""
    Image.init()
    for name in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, name)
        Image.open(file).load()


def serve(fd: int) -> None:
    """One file; never returns."""
    code = 1
    try:
        with socket.socket(fileno=fd) as sock:
            sock.sendall(b"%d\n" % os.getpid())
            request = json.loads(sock.makefile("rb").readline(65536))
            limit(request["memory_bytes"], request["cpu_s"], request["wall_s"])
            answer = describe(Path(request["path"]), request["mime"])
            sock.sendall(json.dumps(answer).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def limit(memory_bytes: int, cpu_s: int, wall_s: float) -> None:
    """What the rest of this process may take; beyond it there is an error or the end."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, wall_s)
    if hasattr(os, "sched_setaffinity"):  # also the number of threads that FFmpeg starts
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, random.sample(cores, min(MAX_CORES, len(cores))))
    lower(resource.RLIMIT_CPU, cpu_s)
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_FSIZE, 0)
    lower(resource.RLIMIT_NOFILE, 64)
    taken = memory_taken()
    if taken:
        lower(resource.RLIMIT_AS, taken + memory_bytes)


def lower(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def memory_taken() -> int:
    """Address space of this process; 0 where it cannot be told, and so not be limited."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def describe(path: Path, mime: str) -> dict[str, Any]:
    try:
        info = probe(path)
        if (info.kind == "video") != mime.startswith("video/"):
            return {
                "error": f"begins like {mime}, but is a{'n' if info.kind != 'video' else ''} {info.kind}."
            }
        if info.kind != "video":
            read_image(path)  # a header alone proves nothing
    except MediaError as e:
        return {"error": e.message.removeprefix(f"{path}: "), "hint": e.hint}
    except MemoryError:
        return {"error": "needs too much memory to open.", "hint": "Scale it down first."}
    except Exception as e:  # whatever a decoder comes up with: the file is to blame
        return {"error": f"cannot be decoded ({type(e).__name__})."}
    return {
        "kind": info.kind, "width": info.width, "height": info.height, "frames": info.frames, "fps": info.fps,
        "duration_s": info.duration_s, "codec": info.codec,
    }  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
