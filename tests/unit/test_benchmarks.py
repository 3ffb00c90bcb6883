"""Parts of the benchmarks that can be wrong without anybody noticing: readers of others' logs, and turns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.measure import in_turns
from benchmarks.memory import table
from benchmarks.sdcpp import StableDiffusionCpp, step_seconds

FAKE = """#!{python}
import json, sys, threading
json.dump(sys.argv[1:], open({told!r}, "w"))
def say(text, end="\\n"):
    sys.stdout.write(text + end)
    sys.stdout.flush()
say("\\r  |====>   | 554/1019 - 138.67MB/s\\x1b[K", "")
say("\\r  |=======>| 1019/1019 - 1.48GB/s\\x1b[K")
say("[INFO ] model.cpp:993  - loading tensors completed, taking 14.22s")
say("[INFO ] stable-diffusion.cpp:3876 - generate_video 480x256x9")
{steps}
"""


def fake(folder: Path, *steps: str) -> StableDiffusionCpp:
    """A program that writes a log as sd-cli does (its progress line ends in a line feed after the last step)."""
    program = folder / "sd-cli"
    lines = "\n".join(steps)
    program.write_text(FAKE.format(python=sys.executable, told=str(folder / "told.json"), steps=lines))
    program.chmod(0o755)
    return StableDiffusionCpp(program, folder / "dit.gguf", folder / "vae.safetensors", (480, 256, 9), 2)


FIRST = r'say("\r  |=====>     | 1/2 - 17.85s/it\x1b[K", "")'
LAST = r'say("\r  |==========| 2/2 - 19.12s/it\x1b[K")'


def test_the_second_step_is_what_counts(tmp_path: Path) -> None:
    case = fake(tmp_path, FIRST, LAST, "threading.Event().wait()  # decoding")
    assert case.step() == pytest.approx(2 * 19.12 - 17.85)
    told = (tmp_path / "told.json").read_text()
    for words in (
        '"--diffusion-fa"',
        '"--cfg-scale", "1"',
        '"--video-frames", "9"',
        '"-t", "2"',
        '"-M", "vid_gen"',
    ):
        assert words in told


def test_an_early_end_is_shown(tmp_path: Path) -> None:
    case = fake(tmp_path, FIRST, 'say("\\n[ERROR] GGML_ABORT: invalid num_layers(4) of wan")', "sys.exit(3)")
    with pytest.raises(SystemExit, match=r"ended with 3 before 2 steps:(.|\n)*invalid num_layers\(4\)"):
        case.step()


def test_steps_are_differences_of_averages() -> None:
    log = "\r |=> | 1/3 - 2.00s/it\x1b[K\r |==> | 2/3 - 1.00it/s\x1b[K\r |===| 3/3 - 1.50s/it\x1b[K\n"
    assert step_seconds(log) == pytest.approx([2.0, 0.0, 2.5])
    assert step_seconds("8/1019 - 3.2MB/s") == []


def test_turns_take_the_seconds_of_others_as_they_are() -> None:
    clock = iter(range(100))
    calls: list[str] = []
    seconds = in_turns(
        {"ours": lambda: calls.append("ours")},
        2,
        clock=lambda: float(next(clock)),
        others={"theirs": lambda: calls.append("theirs") or 40.0 + len(calls)},
    )
    assert calls == ["ours", "ours", "theirs", "theirs", "ours"], "a warm-up of ours only; then by turns"
    assert seconds["ours"].rounds == (1.0, 1.0)
    assert seconds["theirs"].rounds == (43.0, 44.0)


def test_the_table_of_memory_takes_kept_weights_off() -> None:
    gib = 1 << 30
    stages = {"text": {"own": 0, "at": 1.25}, "denoise": {"own": 3 * gib, "at": 2.0}}
    clip = {"size": "480x256x9", "all": 5 * gib, "stages": stages, "kept": gib, "seconds": 7.0}
    clip["estimate"] = {"denoise": 2 * gib, "decode": 4 * gib}
    assert table([clip]).splitlines()[2] == "| 480x256x9 | 5.00 | 2.00 (2.00) |  (4.00) | 1.2 s | 7 |"
