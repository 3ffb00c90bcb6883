"""The command line as its users meet it: what is printed, what is written, exit codes, and stopping.

Commands run through `cli.run`, which is all that the installed program calls, with a tiny random model. What needs
signals, pipes or a fresh interpreter runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_hub import FakeHub, content, serve

from mutoscope import __version__, errors, hub, machine
from mutoscope.catalog import known_model
from mutoscope.cli import parse, remake, run, running
from mutoscope.cli.common import Settings, say, size_text, tell_failure, time_text
from mutoscope.engine import latents, pipeline
from mutoscope.errors import MutoscopeError, RequestError
from mutoscope.media.read import probe, read_clip
from mutoscope.media.write import VideoWriter, read_metadata, write_image
from mutoscope.planning import SAMPLER_NAMES
from mutoscope.request import BoxTrack, Keyframe, Outpaint
from scripts import make_cli_docs
from tests.tiny import make_tiny_model


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of stdout; anything else there is a failure."""
        return [json.loads(line) for line in self.out.splitlines()]


Cli = Callable[..., Ran]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> Cli:
    """Run a command in an empty folder; `generate` and `decode` use the tiny model unless told otherwise."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(command: str, *arguments: object) -> Ran:
        words = [command, *map(str, arguments)]
        if command in ("generate", "decode") and not {"--model", "-m", "--help"} & set(words):
            words[1:1] = ["--model", str(tiny_model)]
        capfd.readouterr()
        code = run(words)
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return call


def picture(path: str, value: int = 200, size: int = 32) -> str:
    write_image(path, np.full((size, size, 3), value, np.uint8))
    return path


def clip(path: str, n: int = 9, size: int = 32) -> str:
    with VideoWriter(path, width=size, height=size, fps=8) as writer:
        for i in range(n):
            writer.write(np.full((size, size, 3), 20 * i, np.uint8))
    return path


# -- values --------------------------------------------------------------------------------------------------


def test_values_are_parsed() -> None:
    assert parse.size(" 832x480 ") == parse.size("832X480") == parse.size("832×480") == (832, 480)
    assert parse.box("0,.25,1,0.5") == (0, 0.25, 1, 0.5)
    assert parse.keyframe("8=a=b.png") == Keyframe(image="a=b.png", index=8)
    assert parse.keyframe("-1=c.png").index == -1
    assert parse.outpaint("left=0.25, top=1") == Outpaint(left=0.25, top=1)
    assert parse.track("0:0,0,.2,.2  1:.8,0,1,.2") == BoxTrack(
        points=((0, 0, 0, 0.2, 0.2), (1, 0.8, 0, 1, 0.2))
    )


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (parse.size, "832"), (parse.size, "-1x5"), (parse.size, "1x2x3"), (parse.box, "0,0,1"),
        (parse.box, "a,b,c,d"), (parse.keyframe, "pic.png"), (parse.keyframe, "1="), (parse.keyframe, "x=a.png"),
        (parse.outpaint, "left"), (parse.outpaint, "up=1"), (parse.outpaint, "left=1,2"),
        (parse.track, "0,0,1,1"), (parse.track, "0:0,0,1"), (parse.track, "0:0,0,1,1 nonsense"),
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused_with_an_example(function: Callable[[str], object], text: str) -> None:
    with pytest.raises(RequestError) as failure:
        function(text)
    assert "like" in failure.value.hint


def test_file_names() -> None:
    assert parse.slug("A red ball, falling -- and bouncing!") == "a-red-ball-falling-and-bouncing"
    assert parse.slug("Ein großer Käfer") == "ein-großer-käfer"
    assert parse.slug("?!") == "video"
    assert len(parse.slug("word " * 100)) <= parse.MAX_SLUG
    assert len(parse.slug("x" * 1000)) <= parse.MAX_SLUG
    assert "/" not in parse.slug("../../etc/passwd")


def test_output_paths(tmp_path: Path) -> None:
    def names(output: Path | None, n: int, **options: bool) -> list[str]:
        texts = ["a ball", "a box", "a star"][:n]
        found = parse.output_paths(output, texts, **{"force": False, **options})
        return [str(p.relative_to(tmp_path)) if p.is_absolute() else str(p) for p in found]

    assert names(None, 1) == ["a-ball.mp4"]
    assert names(None, 2) == ["01-a-ball.mp4", "02-a-box.mp4"]
    assert names(tmp_path / "c.gif", 2) == ["c-01.gif", "c-02.gif"]
    assert names(tmp_path, 2) == ["01-a-ball.mp4", "02-a-box.mp4"]
    assert names(tmp_path / "pictures", 1) == ["pictures"]
    for name in ("c.mp4", "c-2.mp4", "p-0001.png"):
        (tmp_path / name).touch()
    assert names(tmp_path / "c.mp4", 1) == ["c-3.mp4"]
    assert names(tmp_path / "c.mp4", 1, force=True) == ["c.mp4"]
    assert names(tmp_path / "p-%04d.png", 1) == ["p-%04d-2.png"]


@pytest.mark.parametrize("name", ["ball.mp4", "a.b.webm", "frames.gif"])
def test_latents_lie_beside_the_output_and_lead_back_to_it(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    latents = parse.latents_path(output)
    assert latents.parent == tmp_path
    assert parse.decoded_path(latents) == output
    latents.touch()
    other = parse.latents_path(output)  # what an earlier run left is not overwritten
    assert other != latents
    assert parse.decoded_path(other) == output


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\ufeffa ball\r\n\n# a comment\n  a box \n", "utf-8")
    assert parse.prompts(file) == ["a ball", "a box"]
    file.write_text("# nothing\n")
    with pytest.raises(RequestError, match="no prompt"):
        parse.prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(errors.FileError, match="UTF-8"):
        parse.prompts(file)


def test_unknown_words() -> None:
    words = ["a", "red", "ball"]
    assert parse.unknown_words("A RED ball, a dinosaur; Dinosaur's 3 red-hot", words) == [
        "dinosaur",
        "s",
        "3",
        "hot",
    ]
    assert parse.unknown_words("a red ball.", words) == []


def test_numbers_read_well() -> None:
    sizes = {0: "0 bytes", 999: "999 bytes", 34_400: "34 kB", 250_000_000: "250 MB", 4_140_000_000: "4.1 GB"}
    assert {n: size_text(n) for n in sizes} == sizes
    times = {0.04: "0.0 s", 9.94: "9.9 s", 9.97: "10 s", 59.4: "59 s", 59.6: "1 min 0 s", 7500.0: "2 h 5 min"}
    assert {s: time_text(s) for s in times} == times


# -- generate ------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_file_and_the_end_says_all_about_it(cli: Cli) -> None:
    ran = cli("generate", "a red ball", "--seed", 7, "-o", "ball.mp4")
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "ball.mp4"
    for fact in (
        "32x32",
        "5 frames, 0.6 s at 8 fps",
        "seed 7",
        "4 steps",
        "made in",
        "Next:",
        "--extend-start ball.mp4",
    ):
        assert fact in ran.out
    assert [s for s in ("Loading", "Reading", "Preparing", "Denoising", "Decoding") if s not in ran.err] == []
    assert "step 4/4" in ran.err
    info = probe("ball.mp4")
    assert (info.width, info.height, info.frames) == (32, 32, 5)
    assert os.listdir() == ["ball.mp4"]  # no latents, no parts


def test_the_default_name_and_seed_are_told(cli: Cli) -> None:
    first, second = cli("generate", "A red ball!"), cli("generate", "A red ball!")
    assert sorted(os.listdir()) == ["a-red-ball-2.mp4", "a-red-ball.mp4"]
    seeds = [re.search(r"seed (\d+)", ran.out) for ran in (first, second)]
    assert seeds[0]
    assert seeds[1]
    assert seeds[0][1] != seeds[1][1]


def test_json_lines(cli: Cli) -> None:
    ran = cli("generate", "a red dinosaur", "--seed", 1, "--json", "-o", "a.mp4", "--steps", 2)
    assert ran.code == 0
    assert ran.err == ""
    events = [line["event"] for line in ran.lines]
    assert events == ["note", *["stage"] * 4, "step", "step", "stage", "frames", "frames", "result"]
    assert "dinosaur" in ran.lines[0]["text"]
    result = ran.lines[-1]
    assert result["output"] == "a.mp4"
    assert (result["seed"], result["frames"], result["latents"]) == (1, 5, None)
    assert result["size_bytes"] == Path("a.mp4").stat().st_size


def test_quiet_prints_the_path_only(cli: Cli) -> None:
    ran = cli("generate", "a red dinosaur", "-q", "-o", "a.gif")
    assert (ran.out, ran.err) == ("a.gif\n", "")


def test_nothing_is_overwritten_unless_forced(cli: Cli) -> None:
    Path("a.mp4").write_text("precious")
    ran = cli("generate", "a red ball", "-o", "a.mp4")
    assert "a.mp4 exists and is kept; writing a-2.mp4" in ran.err
    assert Path("a.mp4").read_text() == "precious"
    assert probe("a-2.mp4").frames == 5
    assert cli("generate", "a red ball", "-o", "a.mp4", "--force").code == 0
    assert probe("a.mp4").frames == 5


def test_a_file_of_prompts_becomes_numbered_files(cli: Cli) -> None:
    Path("p.txt").write_text("a red ball\n\n# no\na blue square\n")
    ran = cli("generate", "--file", "p.txt", "--steps", 1, "--seed", 3)
    assert ran.code == 0
    assert sorted(os.listdir()) == ["01-a-red-ball.mp4", "02-a-blue-square.mp4", "p.txt"]
    metadata = read_metadata("02-a-blue-square.mp4")
    assert metadata
    assert metadata["request"]["prompt"] == "a blue square"


def test_one_bad_prompt_of_a_file_stops_all_before_the_first(cli: Cli) -> None:
    Path("p.txt").write_text("a red ball\n" + "x" * 30_000)
    assert cli("generate", "--file", "p.txt").code == 2
    assert os.listdir() == ["p.txt"]


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "pictures", "p-%03d.png"])
def test_other_formats(cli: Cli, name: str) -> None:
    ran = cli("generate", "a red ball", "--steps", 1, "-o", name, "--json")
    assert ran.code == 0
    assert ran.lines[-1]["size_bytes"] > 0
    assert not list(Path().glob("*.safetensors"))


def test_seconds_and_size(cli: Cli) -> None:
    ran = cli("generate", "a red ball", "--steps", 1, "--seconds", 1, "--size", "48x32", "--json")
    assert (ran.lines[-1]["frames"], ran.lines[-1]["width"], ran.lines[-1]["height"]) == (9, 48, 32)


def test_a_draft_takes_fewer_steps_and_says_how_to_go_on(cli: Cli, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace("steps = 4", "steps = 10"))
    ran = cli("generate", "a red ball", "--quality", "draft", "--seed", 5, "--model", folder)
    assert "4 steps" in ran.out
    assert "--seed 5 and without --quality draft" in ran.out


def test_words_that_the_model_does_not_know_are_named_once(cli: Cli) -> None:
    ran = cli("generate", "a red dinosaur and a blue dinosaur", "--steps", 1)
    assert "not trained on a word of this prompt: dinosaur\n" in ran.err
    assert "not trained" not in cli("generate", "a red ball", "--steps", 1).err


def test_conditioning_is_dumped(cli: Cli) -> None:
    picture("first.png", 250)
    ran = cli("generate", "a ball", "--image", "first.png", "--dump-conditioning", "seen", "--steps", 1)
    assert ran.code == 0
    frames, mask = (
        read_clip(f"seen/{part}/frame-0001.png", max_frames=1).frames for part in ("frames", "mask")
    )
    assert frames.mean() == 250
    assert mask.max() == 0
    assert read_clip("seen/mask/frame-0002.png", max_frames=1).frames.min() == 255


def lora(path: str) -> None:
    """A strong change of one layer."""
    rng = torch.Generator().manual_seed(0)
    stem = "diffusion_model.blocks.0.self_attn.o"
    save_file({f"{stem}.lora_A.weight": torch.randn(2, 32, generator=rng),
               f"{stem}.lora_B.weight": torch.randn(32, 2, generator=rng)}, path)  # fmt: skip


def test_a_lora_of_the_model_by_its_name(cli: Cli, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    lora(str(folder / "l.safetensors"))
    with (folder / "model.toml").open("a") as toml:
        toml.write('\n[loras.fast]\nfile = "l.safetensors"\nsteps = 2\nsampler = "euler"\n')
    options = ("a red ball", "--model", folder, "--seed", 1)
    ran = cli("generate", *options, "--lora", "fast", "-o", "a.mp4")
    assert ran.code == 0, ran.err
    request = (read_metadata("a.mp4") or {})["request"]
    assert (request["loras"], request["steps"], request["sampler"]) == ([["fast", 1.0]], 2, "euler")
    assert cli("generate", *options, "--steps", 2, "--sampler", "euler", "-o", "b.mp4").code == 0
    assert Path("a.mp4").read_bytes() != Path("b.mp4").read_bytes()
    ran = cli("generate", *options, "--lora", "fats")
    assert ran.code == 2
    assert "Did you mean fast?" in ran.err


EVERYTHING = (
    ("--image", "a.png", "--last-image", "b.png", "--keyframe", "2=a.png", "--ref", "b.png", "--ref", "a.png",
     "--track", "0:0,0,.5,.5 1:.5,.5,1,1", "--strength", "0.5", "--guidance-kept", "1.5"),
    ("--video", "c.mp4", "--control", "gray", "--guidance", "1", "--fps", "12.5", "--shift", "2.5"),
    ("--video", "c.mp4", "--box", "0,0,.5,.5", "--box", ".5,.5,1,1", "--sampler", "dpm++"),
    ("--video", "c.mp4", "--mask", "a.png", "--negative", "- it's \"bad\""),
    ("--video", "c.mp4", "--outpaint", "left=0.5,top=.25", "--negative", "", "--precision", "exact"),
    ("--extend-start", "c.mp4", "--extend-end", "c.mp4", "--frames", "9"),
    ("--lora", "x=1.safetensors", "--lora", "x=1.safetensors=0.5"),
    ("--guidance-interval", "0.5,1", "--guidance-kind", "zero-star=0", "--cache", "easy=0.1"),
)  # fmt: skip


@pytest.mark.parametrize("options", EVERYTHING, ids=lambda options: options[0][2:] + options[2])
def test_inspect_gives_the_command_that_makes_the_same_bytes(
    cli: Cli, tiny_model: Path, options: tuple[str, ...]
) -> None:
    picture("a.png", 255)
    picture("b.png", 40)
    clip("c.mp4")
    lora("x=1.safetensors")
    ran = cli("generate", *options, "--seed", 11, "--steps", 2, "-o", "one.mp4", "--", "-a 'red' ball")
    assert ran.code == 0, ran.err
    ran = cli("inspect", "one.mp4", "--json")
    words = shlex.split(ran.lines[0]["command"])
    assert words[:2] == ["mutoscope", "generate"]
    words = [str(tiny_model) if word == "tiny" else word for word in words[2:]]
    ran = cli("generate", "-o", "two.mp4", *words)
    assert ran.code == 0, ran.err
    assert read_metadata("one.mp4") == read_metadata("two.mp4")
    a, b = (read_clip(p, max_frames=99).frames.astype(int) for p in ("one.mp4", "two.mp4"))
    assert np.abs(a - b).max() == 0
    assert Path("one.mp4").read_bytes() == Path("two.mp4").read_bytes()
    ran = cli("generate", "-o", "three.mp4", "--seed", 12, *[w for w in words if w not in ("--seed", "11")])
    assert Path("one.mp4").read_bytes() != Path("three.mp4").read_bytes()


def test_what_only_the_library_can_express_has_no_command() -> None:
    request = {"prompt": "a", "conditioning": {"keyframes": [{"image": "array [8, 8, 3]"}]}}
    assert remake.command({"request": request}) is None
    assert remake.command({"request": {"prompt": "a", "conditioning": {"compose": {}}}}) is None
    assert remake.command({"request": "nonsense"}) is None
    assert remake.command({"request": {"prompt": "a", "conditioning": {"keyframes": [{}]}}}) is None
    assert remake.command({"request": {"prompt": "a"}}) == "mutoscope generate -- a"


# -- bad input -----------------------------------------------------------------------------------------------

BAD = [
    ((), 2, "There is no prompt."),
    (("a", "--file", "p.txt"), 2, "Both a prompt and a file"),
    (("a", "--size", "33x32"), 2, "The nearest is 32x32"),
    (("a", "--size", "0x0"), 2, "multiples of 16"),
    (("a", "--size", "256x256"), 2, "more than tiny can do"),
    (("a", "--frames", 6), 2, "Ask for 5 or 9"),
    (("a", "--frames", 0), 2, "4n+1"),
    (("a", "--frames", 101), 2, "more than tiny can do"),
    (("a", "--frames", 5, "--seconds", 1), 2, "Give one of them"),
    (("a", "--seconds", -1), 2, "more than 0"),
    (("a", "--seconds", "nan"), 2, "more than 0"),
    (("a", "--fps", 0), 2, "fps"),
    (("a", "--steps", 0), 2, "steps = 0"),
    (("a", "--guidance", "nan"), 2, "guidance"),
    (("a", "--seed", -1), 2, "seed = -1"),
    (("a", "--sampler", "unipcc"), 2, "Did you mean 'unipc'?"),
    (("a", "--strength", -1), 2, "strength"),
    (("a", "--image", "gone.png"), 3, "gone.png: no such file"),
    (("a", "--image", "p.txt"), 3, "neither a picture nor a video"),
    (("a", "--image", "c.mp4"), 3, "a picture expected"),
    (("a", "--ref", "gone.png"), 3, "gone.png: no such file"),
    (("a", "--keyframe", "7=a.png"), 2, "Keyframe 7 is outside"),
    (("a", "--video", "gone.mp4"), 3, "gone.mp4: no such file"),
    (("a", "--video", "c.mp4", "--frames", 33), 2, "33 are needed"),
    (("a", "--mask", "a.png"), 2, "without a source video"),
    (("a", "--video", "c.mp4", "--mask", "gone.png"), 3, "gone.png: no such file"),
    (("a", "--video", "c.mp4", "--box", "0,0,2,1"), 2, "Box (0.0, 0.0, 2.0, 1.0)"),
    (("a", "--outpaint", "left=1"), 2, "needs a source video"),
    (("a", "--video", "c.mp4", "--outpaint", "left=9"), 2, "Outpaint"),
    (("a", "--extend-start", "gone.mp4"), 3, "gone.mp4: no such file"),
    (("a", "--track", "0:0,0,1,1", "--video", "c.mp4"), 2, "base picture"),
    (("a", "--track", "9:0,0,1,1"), 2, "time"),
    (("a", "-o", "nowhere/a.mp4"), 3, "does not exist"),
    (("a", "-o", "a.xyz"), 3, "unknown format"),
    (("a", "-o", "one.png"), 2, "holds one picture"),
    (("a", "--model", "wan2.1-vace-41b"), 2, "Did you mean wan2.1-vace-14b"),
    (("a", "--model", "wan2.1-vace-14b"), 2, "mutoscope pull wan2.1-vace-14b:q4_k_m"),
    (("a", "--device", "abacus"), 2, "doctor"),
    (("a", "--colour", "red"), 2, "No such option"),
    (("a", "--steps", "many"), 2, "--steps"),
    (("a", "--quality", "best"), 2, "--quality"),
    (
        (
            "a",
            "--file",
        ),
        2,
        "--file",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "code", "told"), BAD, ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_bad_input_is_told_in_a_sentence_before_a_model_is_opened(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], code: int, told: str
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a weight file was opened")

    for loader in ("load_wan", "load_umt5", "load_vae"):
        monkeypatch.setattr(f"mutoscope.engine.weights.{loader}", opened)
    picture("a.png")
    clip("c.mp4")
    Path("p.txt").write_text("a ball\n")
    before = sorted(os.listdir())
    ran = cli("generate", *arguments)
    assert ran.code == code
    assert told in ran.err
    assert "Error: " in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert sorted(os.listdir()) == before


def test_the_same_failure_in_json(cli: Cli) -> None:
    ran = cli("generate", "a", "--json", "--size", "33x32")
    assert ran.lines[-1]["event"] == "error"
    assert ran.lines[-1]["exit_code"] == ran.code == 2
    assert ran.lines[-1]["hint"] == "The nearest is 32x32."


def test_a_model_for_text_only_refuses_pictures(cli: Cli, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, vace=False)
    ran = cli("generate", "a", "--image", picture("a.png"), "--model", folder)
    assert ran.code == 2
    assert "follows text only" in ran.err
    assert cli("generate", "a", "--model", folder, "--steps", 1).code == 0


def test_too_little_memory(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutoscope.engine.memory.available", lambda device: 1000)
    ran = cli("generate", "a")
    assert ran.code == 4
    assert "memory" in ran.err
    assert os.listdir() == []


def test_traceback_only_on_demand(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in cli("generate", "a", "--frames", 6).err
    assert "Traceback" in cli("generate", "a", "--frames", 6, "--debug").err
    monkeypatch.setenv("MUTOSCOPE_DEBUG", "1")
    assert "Traceback" in cli("generate", "a", "--frames", 6).err


def test_a_bug_is_called_a_bug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutoscope.planning.plan", lambda *_: 1 / 0)
    ran = cli("generate", "a")
    assert ran.code == 1
    assert ran.err == (
        "Error: An unexpected ZeroDivisionError: division by zero\nThis is a bug; --debug shows where.\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (MemoryError(), 4, "Error: Memory ran out."),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 4, "Error: Memory ran out."),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            4,
            "Error: Memory ran out.",
        ),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "Error: /x/y: Permission denied."),
        (errors.FileError("a.png: no such file."), 3, "Error: a.png: no such file."),
        (errors.RequestError("unknown model 'x'."), 2, "Error: Unknown model 'x'."),
        (
            errors.OutputError("The latents are not numbers any more."),
            6,
            "Error: The latents are not numbers any more.",
        ),
        (errors.Cancelled("Stopped after step 1 of 2."), 130, "Stopped after step 1 of 2."),
        (errors.RequestError("[bold]brackets[/] are kept"), 2, "Error: [bold]brackets[/] are kept"),
    ],
)
def test_how_failures_are_told(
    error: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tell_failure(error, Settings()) == code
    assert capsys.readouterr().err.splitlines()[0] == told


# -- stopping and failing ------------------------------------------------------------------------------------


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, its output in pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "mutoscope", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen(command, **{**pipes, **options})


def rescue_command(text: str) -> list[str]:
    """The `mutoscope decode` command that a message offers."""
    match = re.search(r"mutoscope (decode .*)", text)
    assert match
    return shlex.split(match[1])


def test_ctrl_c_stops_at_the_next_step_and_keeps_the_latents(
    cli: Cli, tmp_path: Path, tiny_model: Path
) -> None:
    process = start("generate", "a red ball", "--model", tiny_model, "--steps", 1000, "-o", "it's.mp4")
    assert process.stderr
    with process:
        told = ""
        for line in process.stderr:  # blocks until the first step is done
            told += line
            if "step 1/1000" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout
        assert process.stdout.read() == ""
    assert "Stopping after this step" in told
    stopped = re.search(r"Stopped after step (\d+) of 1000", told)
    assert stopped
    assert 1 <= int(stopped[1]) < 1000
    assert os.listdir() == ["it's.mp4.latents.safetensors"]
    ran = cli(*rescue_command(told))
    assert ran.code == 0, ran.err
    assert f"from step {stopped[1]} of 1000" in ran.err
    assert probe("it's.mp4").frames == 5
    assert f"no, step {stopped[1]} of 1000" in cli("inspect", "it's.mp4").out


def test_a_second_ctrl_c_stops_at_once() -> None:
    told: list[str] = []
    with running.Interrupt(lambda: told.append("stopping")) as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        assert told == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_when_writing_fails_the_denoised_latents_are_kept(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: VideoWriter, frame: object) -> None:
        raise errors.ResourceError("a.mp4: the disk is full after 0 frames.", hint="Free some space.")

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", full)
        ran = cli("generate", "a red ball", "--seed", 3, "-o", "a.mp4")
    assert ran.code == 4
    assert "Free some space. The denoised latents are kept." in ran.err
    assert os.listdir() == ["a.mp4.latents.safetensors"]
    assert cli(*rescue_command(ran.err)).code == 0
    assert cli("generate", "a red ball", "--seed", 3, "-o", "b.mp4").code == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()  # nothing was lost


def test_when_decoding_crashes_the_denoised_latents_are_kept(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "decode", lambda *_: 1 / 0)
    ran = cli("generate", "a red ball", "-o", "a.mp4")
    assert ran.code == 1
    assert "ZeroDivisionError" in ran.err
    assert "latents are kept" in ran.err
    assert os.listdir() == ["a.mp4.latents.safetensors"]


def test_latents_of_an_earlier_stop_survive_a_second_try(cli: Cli) -> None:
    Path("a.mp4.latents.safetensors").write_text("an hour of work")
    assert cli("generate", "a red ball", "-o", "a.mp4").code == 0
    assert Path("a.mp4.latents.safetensors").read_text() == "an hour of work"
    assert sorted(os.listdir()) == ["a.mp4", "a.mp4.latents.safetensors"]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_closed_pipe_is_no_failure(options: tuple[str, ...]) -> None:
    process = start("models", *options)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) == 0


# -- decode and inspect --------------------------------------------------------------------------------------


def test_kept_latents_decode_to_the_same_file(cli: Cli) -> None:
    ran = cli("generate", "a red ball", "--keep-latents", "-o", "a.mp4")
    assert "latents a.mp4.latents.safetensors" in ran.out
    Path("a.mp4").rename("b.mp4")
    ran = cli("decode", "a.mp4.latents.safetensors")
    assert ran.out == "a.mp4\n"
    assert "unfinished" not in ran.err
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    assert cli("decode", "a.mp4.latents.safetensors", "-q").out == "a-2.mp4\n"


def test_inspect_latents(cli: Cli) -> None:
    cli("generate", "a red ball", "--keep-latents", "-o", "a.mp4", "--seed", 9)
    out = cli("inspect", "a.mp4.latents.safetensors").out
    for fact in (
        "[1, 4, 2, 4, 4]",
        "a red ball",
        "seed       9",
        "mutoscope decode a.mp4.latents.safetensors",
    ):
        assert fact in out
    assert cli("inspect", "a.mp4.latents.safetensors", "--json").lines[0]["kind"] == "latents"


def test_decode_refuses_what_is_not_for_it(cli: Cli) -> None:
    assert cli("decode", "gone.safetensors").code == 3
    assert "not a latents file" in cli("decode", picture("a.png")).err
    latents.save(Path("other.safetensors"), torch.zeros(1, 16, 1, 4, 4), {"model": "tiny"})
    ran = cli("decode", "other.safetensors")
    assert ran.code == 3
    assert "has 16 channels, the VAE of tiny 4" in ran.err
    latents.save(Path("unnamed.safetensors"), torch.zeros(1, 4, 1, 4, 4), {})
    assert run(["decode", "unnamed.safetensors"]) == 2
    assert cli("decode", "unnamed.safetensors").out == "unnamed.mp4\n"


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "folder"])
def test_inspect_a_video(cli: Cli, name: str) -> None:
    cli("generate", "a red ball", "--seed", 9, "-o", name)
    out = cli("inspect", name).out
    for fact in (
        "32x32, 5 frames",
        "8 fps",
        "a red ball",
        "tiny",
        __version__,
        "mutoscope generate --model tiny",
        "--seed 9",
    ):
        assert fact in out
    facts = cli("inspect", name, "--json").lines[0]
    assert facts["frames"] == 5
    assert facts["mutoscope"]["seed"] == 9


def test_inspect_what_is_not_ours(cli: Cli) -> None:
    assert "Not made by Mutoscope" in cli("inspect", clip("c.mp4")).out
    Path("notes.txt").write_text("hello")
    assert cli("inspect", "notes.txt").code == 3
    assert cli("inspect", "gone.mp4").code == 3
    assert cli("inspect", ".").code == 3


def test_inspect_a_model_file(cli: Cli, tiny_model: Path) -> None:
    assert "wan_vace" in cli("inspect", tiny_model / "dit.gguf").out
    assert cli("inspect", tiny_model / "vae.gguf", "--json").lines[0]["architecture"] == "wan_vae"
    Path("broken.gguf").write_bytes(b"GGUF\x03\x00")
    ran = cli("inspect", "broken.gguf")
    assert ran.code == 3
    assert ran.out == ""


def test_quantize(cli: Cli, tiny_model: Path) -> None:
    ran = cli("quantize", tiny_model / "dit.gguf", "small.gguf", "--type", "q8_0")
    assert ran.code == 0
    assert re.fullmatch(r"small\.gguf: \d+ kB, \d+% of \d+ kB\n", ran.out)
    assert "Q8_0" in cli("inspect", "small.gguf").out
    assert "exists" in cli("quantize", tiny_model / "dit.gguf", "small.gguf", "--type", "Q8_0").err
    ran = cli("quantize", tiny_model / "dit.gguf", "other.gguf", "--type", "Q9")
    assert (ran.code, "Q4_K_M" in ran.err) == (2, True)
    assert cli("quantize", "gone.gguf", "other.gguf", "--type", "Q8_0").code == 3


# -- models, pull, doctor ------------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The small set of a real family, with files of some kilobytes, on a server here."""
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "RETRY_WAIT_S", 0.0)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    files = known_model("wan2.1-vace-1.3b:q4_0").files.values()
    fake = FakeHub({f"{f.repo}/{f.path}": content(i, 5000 + i) for i, f in enumerate(files)})
    yield from serve(fake)


def test_pull_shows_sizes_and_licence_first(cli: Cli, fake_hub: FakeHub) -> None:
    ran = cli("pull", "wan2.1-vace-1.3b:q4_0", "--endpoint", fake_hub.endpoint, "--dry-run")
    assert ran.code == 0
    for fact in (
        "Licence Apache-2.0",
        "15 kB to fetch",
        "text encoder",
        "calcuis/wan-1.3b-gguf",
        fake_hub.endpoint,
    ):
        assert fact in ran.out
    assert fake_hub.gets() == []


def test_pull_list_and_remove(cli: Cli, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", fake_hub.endpoint)
    ran = cli("pull", "wan2.1-vace-1.3b:q4_0", "--yes")
    assert ran.code == 0, ran.err
    assert (
        "wan2.1-vace-1.3b:q4_0 is installed. Try it:\nmutoscope generate --model wan2.1-vace-1.3b:q4_0"
        in ran.out
    )
    installed = cli("models", "--json").lines[0]["installed"]
    assert [m["name"] for m in installed] == ["pocket", "wan2.1-vace-1.3b:q4_0"]
    assert "are free again" in cli("models", "remove", "wan2.1-vace-1.3b:q4_0").out
    assert len(cli("models", "--json").lines[0]["installed"]) == 1
    ran = cli("models", "remove", "wan2.1-vace-1.3b:q4_0")
    assert (ran.code, "not installed" in ran.err) == (2, True)
    assert cli("models", "remove", "pocket").code == 2


def test_pull_asks_nobody_who_is_not_there(cli: Cli, fake_hub: FakeHub) -> None:
    for extra in ((), ("--json",)):
        ran = cli("pull", "wan2.1-vace-1.3b:q4_0", "--endpoint", fake_hub.endpoint, *extra)
        assert ran.code == 2
        assert "--yes" in ran.err
    assert fake_hub.gets() == []


def test_pull_in_json(cli: Cli, fake_hub: FakeHub) -> None:
    ran = cli("pull", "wan2.1-vace-1.3b:q4_0", "--endpoint", fake_hub.endpoint, "--json", "--yes")
    events = [line["event"] for line in ran.lines]
    assert events[0] == "plan"
    assert set(events[1:-1]) == {"progress"}
    assert events[-1] == "result"
    assert ran.lines[-2]["done_bytes"] == ran.lines[0]["total_bytes"] == 15_003


def test_pull_failures(cli: Cli, fake_hub: FakeHub) -> None:
    assert cli("pull", "wan2.1-vace-1.3b:q9", "--yes").code == 2
    fake_hub.files.clear()
    ran = cli("pull", "wan2.1-vace-1.3b:q4_0", "--endpoint", fake_hub.endpoint, "--yes")
    assert ran.code == 5
    assert "Error: " in ran.err


def test_models_says_what_fits(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory("memory", 14_000_000_000, 8_000_000_000))
    fits = {m["name"]: m["fits"] for m in cli("models", "--json").lines[0]["known"]}
    assert fits["wan2.1-vace-1.3b:q8_0"] == "yes"
    assert fits["wan2.1-vace-14b:q3_k_m"] == "tight"
    assert fits["wan2.1-vace-14b:q8_0"] == "no"
    out = cli("models").out
    assert "pocket" in out
    assert re.search(r"wan2.1-vace-14b:q4_k_m +16.0 GB +15.6 GB +no", out)
    assert "wan2.1-vace-14b:q8_0" not in out
    assert "wan2.1-vace-14b:q8_0" in cli("models", "--all").out


@pytest.mark.parametrize("width", [30, 60, 200])
def test_names_and_sizes_are_whole_at_any_width(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert re.search(r"wan2.1-vace-14b:q4_k_m +16.0 GB +15.6 GB", cli("models").out)


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATMUL_SECONDS", 0.0)
    ran = cli("doctor")
    assert ran.code == 0
    for row in (
        "mutoscope",
        "torch",
        "cpu",
        "memory",
        "models in",
        "libx264 ok",
        "not tried",
        "fits",
        "GFLOP/s",
    ):
        assert row in ran.out
    report = cli("doctor", "--json").lines[0]
    assert report["gflops"]["float32"] > 0.1
    assert report["endpoint"]["reachable"] is None
    assert report["memory"]["total_bytes"] >= report["memory"]["available_bytes"]


def test_doctor_says_what_to_do_and_fails_if_nothing_can_be_written(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MATMUL_SECONDS", 0.0)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setattr(machine, "_has_encoder", lambda name: name != "libx264")
    monkeypatch.setattr(machine, "free_disk", lambda folder: 1_000_000_000)
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory("memory", 1_000_000_000, 1_000_000_000))
    ran = cli("doctor", "--online")
    assert ran.code == 3
    for told in (
        "cannot write .mp4",
        "pip install",
        "MUTOSCOPE_HOME",
        "cannot be reached",
        "None of the known models fits",
    ):
        assert told in ran.out
    assert ran.out.index("cannot write .mp4") < ran.out.index("1.0 GB are free")  # the severe one first


# -- the whole -----------------------------------------------------------------------------------------------


def test_help_is_cheap() -> None:
    code = "import sys; from mutoscope.cli import run; run(['generate', '--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--image" in out
    loaded = set(out.splitlines()[-1].split())
    assert loaded & {"torch", "av", "huggingface_hub", "safetensors", "PIL"} == set()


def test_version_and_no_command(cli: Cli) -> None:
    assert cli("--version").out == f"mutoscope {__version__}\n"
    assert "generate" in cli("--help").out
    assert cli("generat").code == 2


def test_every_sampler_is_in_the_help(cli: Cli) -> None:
    text = cli("generate", "--help").out
    assert [name for name in SAMPLER_NAMES if name not in text] == []


def test_the_documented_help_is_the_real_one() -> None:
    text = make_cli_docs.PAGE.read_text("utf-8")
    if make_cli_docs.tools() in text:
        assert text == make_cli_docs.page(), "run: python scripts/make_cli_docs.py"
    for command in make_cli_docs.commands():  # with another version of typer only the options are compared
        options = set(re.findall(r"--[a-z][a-z-]+", make_cli_docs.help_of(command)))
        assert {option for option in options if option not in text} == set()


def test_every_exit_code_is_documented() -> None:
    def codes(kind: type[MutoscopeError]) -> set[int]:
        return {kind.exit_code}.union(*(codes(sub) for sub in kind.__subclasses__()))

    text = make_cli_docs.PAGE.read_text("utf-8")
    documented = {int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert documented == codes(MutoscopeError) | {0}


def test_text_for_people_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("a [red]ball[/red] :smile: " + "x" * 300)
    assert capsys.readouterr().out == "a [red]ball[/red] :smile: " + "x" * 300 + "\n"
