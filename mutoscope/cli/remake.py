"""The command that makes a video again, from what is embedded in it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

_PLAIN = ("frames", "fps", "steps", "guidance", "shift", "sampler", "seed", "quality")


def command(info: Mapping[str, Any]) -> str | None:
    """One line for a shell, or None if the request has parts that only the library can express."""
    request = info.get("request")
    if not isinstance(request, Mapping) or not isinstance(request.get("prompt"), str):
        return None
    try:
        words = ["mutoscope", "generate", *_options(request, info.get("model"))]
        words += ["--precision", str(info["precision"])] if "precision" in info else []
        words += ["--", request["prompt"]]
    except (_OnlyLibrary, KeyError, TypeError, ValueError):
        return None
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


class _OnlyLibrary(Exception):
    """An array in place of a file, or a composition."""


def _options(request: Mapping[str, Any], model: Any) -> Iterator[str]:
    if model:
        yield from ("--model", str(model))
    if "width" in request:
        yield from ("--size", f"{request['width']}x{request['height']}")
    for name in _PLAIN:
        if name in request:
            yield from (f"--{name}", _number(request[name]))
    if "negative_prompt" in request:
        yield f"--negative={request['negative_prompt']}"
    if "guidance_interval" in request:
        yield f"--guidance-interval={_joined(request['guidance_interval'])}"
    if "guidance_kept" in request:
        yield from ("--guidance-kept", _number(request["guidance_kept"]))
    for name in ("guidance_kind", "cache"):
        if name in request:
            yield from (f"--{name.replace('_', '-')}", request[name])
    for file, strength in request.get("loras", ()):
        yield f"--lora={file}={_number(strength)}"
    yield from _conditioning(request.get("conditioning", {}))


def _conditioning(c: Mapping[str, Any]) -> Iterator[str]:
    if "compose" in c:
        raise _OnlyLibrary
    for keyframe in c.get("keyframes", ()):
        yield f"--keyframe={keyframe.get('index', 0)}={_file(keyframe['image'])}"
    for name in ("video", "mask", "extend_start", "extend_end"):
        if name in c:
            yield f"--{name.replace('_', '-')}={_file(c[name])}"
    for reference in c.get("references", ()):
        yield f"--ref={_file(reference)}"
    for box in c.get("boxes", ()):
        yield f"--box={_joined(box)}"
    for track in c.get("tracks", ()):
        yield "--track=" + " ".join(f"{_number(t)}:{_joined(corners)}" for t, *corners in track["points"])
    if "outpaint" in c:
        yield "--outpaint=" + ",".join(f"{side}={_number(n)}" for side, n in c["outpaint"].items())
    for name in ("control", "strength"):
        if name in c:
            yield from (f"--{name}", _number(c[name]))


def _file(value: str) -> str:
    if value.startswith("array ["):
        raise _OnlyLibrary
    return value


def _joined(numbers: list[float]) -> str:
    return ",".join(_number(n) for n in numbers)


def _number(value: Any) -> str:
    """As short as it can be without becoming another number: 8.0 is 8."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
