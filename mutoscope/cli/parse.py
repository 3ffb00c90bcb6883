"""What is typed on the command line, as values; and names for files. Only looks what exists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from mutoscope.errors import FileError, RequestError
from mutoscope.request import Box, BoxTrack, Keyframe, Outpaint

LATENTS = ".latents.safetensors"
MAX_SLUG = 60


def size(text: str) -> tuple[int, int]:
    """832x480 to (832, 480)."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×*]\s*(\d+)\s*", text, re.IGNORECASE)
    if not match:
        raise RequestError(
            f"--size {text!r}: not a size.", hint="Expected width x height in pixels, like 832x480."
        )
    return int(match[1]), int(match[2])


def box(text: str) -> Box:
    """0.1,0.2,0.5,0.6 to four fractions."""
    numbers = _numbers(text)
    if numbers is None or len(numbers) != 4:
        hint = "Expected x0,y0,x1,y1 as fractions of the frame, like 0.1,0.2,0.5,0.6."
        raise RequestError(f"--box {text!r}: not a box.", hint=hint)
    return numbers[0], numbers[1], numbers[2], numbers[3]


def track(text: str) -> BoxTrack:
    """ "0:0,0,0.2,0.2 1:0.8,0,1,0.2" to a track of two points."""
    points = []
    for point in text.split():
        time, _, corners = point.partition(":")
        numbers = _numbers(f"{time},{corners}")
        if numbers is None or len(numbers) != 5:
            hint = 'Expected time:x0,y0,x1,y1, all from 0 to 1, like "0:0,0,0.2,0.2 1:0.8,0,1,0.2".'
            raise RequestError(f"--track: {point!r} is not a point of a track.", hint=hint)
        points.append((numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]))
    return BoxTrack(points=tuple(points))


def keyframe(text: str) -> Keyframe:
    """8=picture.png to a keyframe."""
    index, _, path = text.partition("=")
    if not re.fullmatch(r"-?\d+", index.strip()) or not path:
        hint = "Expected the frame's number and a picture, like 8=middle.png; -1 is the last frame."
        raise RequestError(f"--keyframe {text!r}: not a keyframe.", hint=hint)
    return Keyframe(image=path, index=int(index))


def lora(text: str) -> tuple[str, float | None]:
    """style.safetensors=0.8 to the file and its strength; without one, None."""
    name, equals, strength = text.rpartition("=")
    numbers = _numbers(strength) if equals and name else None
    return (name, numbers[0]) if numbers is not None and len(numbers) == 1 else (text, None)


def interval(text: str) -> tuple[float, float]:
    """0.2,0.8 to two fractions."""
    numbers = _numbers(text)
    if numbers is None or len(numbers) != 2:
        raise RequestError(f"--guidance-interval {text!r}: not an interval.",
                           hint="Expected two fractions of the steps, like 0.2,0.8.")  # fmt: skip
    return numbers[0], numbers[1]


def outpaint(text: str) -> Outpaint:
    """left=0.25,top=0.5 to margins."""
    sides = {f.name: 0.0 for f in fields(Outpaint)}
    for part in text.split(","):
        side, _, amount = part.partition("=")
        numbers = _numbers(amount)
        if side.strip() not in sides or numbers is None or len(numbers) != 1:
            raise RequestError(f"--outpaint {text!r}: {part!r} is not a margin.",
                               hint=f"Expected parts like left=0.25 for {', '.join(sides)}.")  # fmt: skip
        sides[side.strip()] = numbers[0]
    return Outpaint(**sides)


def prompts(path: Path) -> list[str]:
    """The lines of a file; empty ones and those that begin with # are left out."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise FileError(
            f"{path}: no such file.", hint="Expected a text file with one prompt a line."
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"{path}: is not a readable text file ({e}).", hint="Save it as UTF-8.") from e
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise RequestError(f"{path}: holds no prompt.", hint="Write one prompt a line.")
    return found


def slug(prompt: str) -> str:
    """A file name from a prompt: its words joined by hyphens."""
    words = re.findall(r"\w+", prompt.lower())
    name = ""
    for word in words:
        if name and len(name) + 1 + len(word) > MAX_SLUG:
            break
        name = f"{name}-{word}" if name else word[:MAX_SLUG]
    return name or "video"


def output_paths(output: Path | None, texts: Sequence[str], *, force: bool) -> list[Path]:
    """Where the videos of these prompts go: numbered if there are several; without `force`, free names."""
    paths = []
    digits = max(2, len(str(len(texts))))
    for n, text in enumerate(texts, 1):
        number = f"{n:0{digits}d}" if len(texts) > 1 else ""
        if output is None or output.is_dir():
            path = (output or Path()) / ("-".join(filter(None, (number, slug(text)))) + ".mp4")
        else:
            path = output.with_name("-".join(filter(None, (output.stem, number))) + output.suffix)
        paths.append(path if force else free(path))
    return paths


def free(path: Path) -> Path:
    """The path, or the next one with a number that does not exist. Of a picture pattern any match counts."""

    candidate, n = path, 1
    while existing(candidate):
        n += 1
        candidate = path.with_name(f"{path.stem}-{n}{path.suffix}")
    return candidate


def existing(path: Path) -> list[Path]:
    """The file, or those that match a picture pattern like frame-%04d.png."""
    if "%" in path.name:
        return list(path.parent.glob(re.sub(r"%0?\d*d", "*", path.name)))
    return [path] if path.exists() else []


def latents_path(output: Path) -> Path:
    """Beside the output; latents that an earlier run left there are kept."""
    return free(output.with_name(output.name.replace("%", "") + LATENTS))


def decoded_path(latents: Path) -> Path:
    """The output that latents were made for, from their name."""
    name = re.sub(r"(\.latents(-\d+)?)?\.safetensors$", "", latents.name)
    path = latents.with_name(name)
    return path if path.suffix else path.with_name(name + ".mp4")


def unknown_words(prompt: str, vocabulary: Sequence[str]) -> list[str]:
    """Words of a prompt that a model with this vocabulary has never seen, in order."""
    known = {word.casefold() for word in vocabulary}
    words = (word.casefold() for word in re.findall(r"[^\W_]+", prompt))
    return [word for word in dict.fromkeys(words) if word not in known]


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None
