"""Compare the engine with the official code of Wan 2.1 and VACE; by hand, once per release (docs/parity.md).

    git clone https://github.com/Wan-Video/Wan2.1 /tmp/wan; git clone https://github.com/ali-vilab/VACE /tmp/vace
    pip install einops
    python scripts/check_official.py --wan /tmp/wan --vace /tmp/vace

Tiny seeded random models in float32 on the CPU. The official modules are imported from the checkouts and nothing of
them is copied; their weights are saved as the official files are (a .pth, or safetensors without metadata) and read
by our loader. Prints relative L2 errors. Exit status 1 if one is above 1e-4, or if a comparison that is spoilt on
purpose is not clearly above it.

The official code is written for CUDA. To run it here, in this process only:

- flash attention is replaced by the official fallback, `attention` of wan/modules/attention.py, in float32 and not
  its bfloat16; it masks no padding, so all samples have full sequences, as in the official pipelines;
- CUDA autocast (bfloat16 for the transformer in the official pipelines) does nothing on the CPU;
- the packages' __init__ files, which pull in everything else, are not run; `torch.cuda.current_device`, a default
  argument in t5.py, answers "cpu";
- torchvision, if missing, is replaced by the one function used: a picture to a tensor in 0..1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mutoscope.engine import sampler, weights
from mutoscope.engine.conditioning import Prepared, prepare, vace_context
from mutoscope.engine.tokenizer import clean_text
from mutoscope.engine.vae import WanVAE
from mutoscope.engine.wan import WanModel, rope_table
from mutoscope.request import Conditioning

TOLERANCE = 1e-4
BROKEN = 1e-2
N_FRAMES = 17
HEIGHT, WIDTH = 32, 48
TEXT_DIM = 64
WAN = dict(dim=256, num_heads=2, ffn_dim=384, num_layers=4, freq_dim=256, text_dim=TEXT_DIM)  # heads of 128
TEXTS = (
    "",
    "  two   spaces\tand\n lines  ",
    "café &amp;amp; &lt;b&gt; it&#39;s “quoted”",
    "caf\u00c3\u00a9 mojibake",
    "ｆｕｌｌ　ｗｉｄｔｈ，ｄｏｎｅ。 no\u00a0break\u2003em \x1b[31mred\x1b[0m",
    "色调艳丽，过曝，静态，细节模糊不清，字幕",
    "CASE Stays_and_so_does: punctuation!",
)


class Row(NamedTuple):
    name: str
    error: float
    must_differ: bool = False  # spoilt on purpose: the comparison has to notice

    @property
    def passed(self) -> bool:
        return self.error > BROKEN if self.must_differ else self.error <= TOLERANCE


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2; infinite for another shape."""
    if got.shape != expected.shape:
        print(f"shape {list(got.shape)}, official {list(expected.shape)}")
        return float("inf")
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that keep activations near 1 and leave no term silent (official layers start with zeros)."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=rng)
            if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * values)
            elif parameter.ndim >= 2 and name.endswith("weight"):
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * values)
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------- the official modules


def package(name: str, folder: Path) -> None:
    """A package whose modules can be imported without running its __init__."""
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder; is this a checkout of the official repository?")
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def stand_in_for_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is not None:
        return

    def to_tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for parent, name in zip(("", *names), names, strict=False):
        sys.modules[name] = ModuleType(name)
        if parent:
            setattr(sys.modules[parent], name.rpartition(".")[2], sys.modules[name])
    sys.modules[names[-1]].to_tensor = to_tensor  # type: ignore[attr-defined]


class Official:
    """The official modules, by the paths of their repositories: `wan("modules.t5")`."""

    def __init__(self, wan: Path, vace: Path | None) -> None:
        for name in ("wan", "wan.modules", "wan.utils", "wan.distributed"):
            package(name, wan / name.replace(".", "/"))
        with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
            self.wan("modules.t5")
        self.wan("modules.model").flash_attention = partial(
            self.wan("modules.attention").attention, dtype=torch.float32
        )
        for name in ("modules.vae", "utils.fm_solvers", "utils.fm_solvers_unipc"):
            self.wan(name)
        stand_in_for_torchvision()  # only now: transformers and diffusers look for the real one
        # by repository: the transformer and the pipeline
        self.vace = {"Wan2.1": (self.wan("modules.vace_model"), self.wan("vace"))}
        if vace is not None:
            for name in ("", ".models", ".models.utils", ".models.wan", ".models.wan.modules"):
                package(f"vace{name}", vace / f"vace{name}".replace(".", "/"))
            self.vace["VACE"] = (
                importlib.import_module("vace.models.wan.modules.model"),
                importlib.import_module("vace.models.wan.wan_vace"),
            )

    def wan(self, name: str) -> ModuleType:
        return importlib.import_module(f"wan.{name}")

    def vae(self, path: Path) -> Any:
        """The official wrapper with its statistics; a narrow network, whose checkpoint lies at `path`."""
        module = self.wan("modules.vae")
        network = module.WanVAE_(dim=8, z_dim=16, temperal_downsample=[False, True, True])
        torch.save(randomise(network, 3).state_dict(), path)
        with mock.patch.object(module, "_video_vae", partial(module._video_vae, dim=8)):
            return module.WanVAE(vae_pth=path, device="cpu")


# ---------------------------------------------------------------- comparisons


def saved(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """As safetensors without metadata, like the official transformers."""
    path = folder / f"weights-{len(list(folder.iterdir()))}.safetensors"
    save_file({name: values.clone().contiguous() for name, values in tensors.items()}, path)
    return path


def check_transformer(official: Official, folder: Path) -> Iterator[Row]:
    lengths, grid = (5, 9), (3, 8, 12)
    x, context = noise(2, 16, *grid, seed=1), noise(2, 96, *grid, seed=2)
    rows, t = noise(2, max(lengths), TEXT_DIM, seed=3), torch.tensor([700, 36])

    def theirs(model: nn.Module, **control: Any) -> Tensor:
        texts = [rows[b, :n] for b, n in enumerate(lengths)]
        return torch.stack(model(list(x), t=t, context=texts, seq_len=x[0, 0].numel() // 4, **control))

    def load(model: nn.Module) -> WanModel:
        return weights.load_wan(saved(model.state_dict(), folder), compute_dtype=torch.float32)

    def ours(model: WanModel, strength: float | None = None) -> Tensor:
        tokens = None if strength is None else model.vace_tokens(context)
        rope = rope_table((grid[0], grid[1] // 2, grid[2] // 2), model.config.head_dim)
        time, text = model.time_modulation(t), model.text_context(rows, lengths)
        return model(x, time, text, rope, tokens, 1.0 if strength is None else strength)

    t2v = randomise(official.wan("modules.model").WanModel(**WAN), 1)
    model, expected = load(t2v), theirs(t2v)
    yield Row("WanModel, text to video", error(ours(model), expected))
    for repository, (module, _) in official.vace.items():
        vace = randomise(module.VaceWanModel(**WAN, vace_in_dim=96), 2)
        model = load(vace)
        for strength in (1.0, 0.6):
            expected = theirs(vace, vace_context=list(context), vace_context_scale=strength)
            name = f"VaceWanModel of {repository}, strength {strength}"
            yield Row(name, error(ours(model, strength), expected))
        yield Row("  without the side branch", error(ours(model), expected), must_differ=True)


def check_vae(theirs: Any, ours: WanVAE) -> Iterator[Row]:
    video = noise(2, 3, N_FRAMES, HEIGHT, WIDTH, seed=4).clamp(-1, 1)
    expected = torch.stack(theirs.encode(list(video)))
    yield Row(f"VAE encode, {N_FRAMES} frames", error(ours.encode(video), expected))
    yield Row("  in other chunks of time", error(ours.encode(video, chunk=8), expected))
    latents = noise(*expected.shape, seed=5)
    expected = torch.stack(theirs.decode(list(latents)))
    assert (expected.abs() < 1).float().mean() > 0.5, "clamping must not hide the comparison"
    yield Row(f"VAE decode, {N_FRAMES} frames", error(ours.decode(latents), expected))
    shifted = ours.decode(latents.roll(1, dims=2))
    yield Row("  latent frames moved by one", error(shifted, expected), must_differ=True)


def check_text_encoder(official: Official, folder: Path) -> Iterator[Row]:
    sizes = dict(vocab_size=100, dim=48, dim_attn=48, dim_ffn=80, num_heads=3, encoder_layers=3)
    theirs = randomise(official.wan("modules.t5").umt5_xxl(encoder_only=True, **sizes), 4)
    path = folder / "t5.pth"
    torch.save(theirs.state_dict(), path)
    ours, _ = weights.load_umt5(path, compute_dtype=torch.float32)

    lengths = (40, 150)  # beyond the farthest distance, 128
    ids = torch.randint(3, 100, (2, 512), generator=torch.Generator().manual_seed(6))
    mask = torch.arange(512)[None] < torch.tensor(lengths)[:, None]
    rows = theirs(ids * mask, mask.long())
    expected = torch.cat([rows[b, :n] for b, n in enumerate(lengths)])
    alone = torch.cat([ours(ids[b : b + 1, :n])[0] for b, n in enumerate(lengths)])
    yield Row("T5 encoder, real tokens alone", error(alone, expected))
    both = ours(ids[:, : max(lengths)], lengths)
    both = torch.cat([both[b, :n] for b, n in enumerate(lengths)])
    yield Row("T5 encoder, padded batch", error(both, expected))
    unmasked = torch.cat([row[:n] for row, n in zip(ours(ids * mask), lengths, strict=True)])
    yield Row("  padding attended to", error(unmasked, expected), must_differ=True)


def check_conditioning(official: Official, vae: Any, ours: WanVAE, folder: Path) -> Iterator[Row]:
    rng = np.random.default_rng(7)
    frames = rng.integers(0, 256, (N_FRAMES, HEIGHT, WIDTH, 3)).astype(np.float16)
    mask = rng.integers(0, 2, (N_FRAMES, HEIGHT, WIDTH), np.uint8)
    references = tuple(rng.integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8))
    gray, everywhere = np.full_like(frames, 127.5), np.ones_like(mask)
    cases = {
        "text only": Prepared(gray, everywhere, (), "text"),
        "repaint": Prepared(frames, mask, (), "repaint"),
        "repaint, 2 references": Prepared(frames, mask, references, "repaint"),
        "control, 1 reference": Prepared(frames, everywhere, references[:1], "control"),
    }
    for repository, (_, module) in official.vace.items():
        pipeline = object.__new__(module.WanVace)
        pipeline.vae, pipeline.vae_stride = vae, (4, 8, 8)
        for name, case in cases.items():
            video = torch.from_numpy(case.frames).float().permute(3, 0, 1, 2) / 127.5 - 1
            pictures = [torch.from_numpy(r).permute(2, 0, 1)[:, None] / 127.5 - 1 for r in case.references]
            masks, pictures = [torch.from_numpy(case.mask)[None].float()], [pictures or None]
            latents = pipeline.vace_encode_frames([video], pictures, masks=masks)
            (expected,) = pipeline.vace_latent(latents, pipeline.vace_encode_masks(masks, pictures))
            (got,) = vace_context(case, ours.encode_stream)
            yield Row(f"VACE context of {repository}, {name}", error(got, expected))
            if len(case.references) == 2:
                turned = replace(case, references=case.references[::-1])
                (got,) = vace_context(turned, ours.encode_stream)
                yield Row("  references in reverse order", error(got, expected), must_differ=True)
        yield from check_references(module, repository, folder)


def check_references(module: ModuleType, repository: str, folder: Path) -> Iterator[Row]:
    """References put on the white canvas. None is scaled: our scaling is another one, docs/conditioning.md."""
    width, height, n_frames = 832, 480, 5
    rng = np.random.default_rng(8)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((480, 401), (301, 832), (480, 832))]
    paths = [folder / f"{repository}-{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    pipeline = object.__new__(module.WanVace)
    pipeline.vid_proc = mock.Mock()  # reads clips, and there are none
    video, mask, references = pipeline.prepare_source(
        [None], [None], [[str(path) for path in paths]], n_frames, (width, height), torch.device("cpu")
    )
    made = prepare(Conditioning(references=tuple(paths)), width, height, n_frames)
    pixels = [torch.from_numpy(made.frames).float(), *(torch.from_numpy(r)[None] for r in made.references)]
    got = torch.cat([(p / 127.5 - 1).permute(3, 0, 1, 2) for p in pixels], dim=1)
    yield Row(
        f"References of {repository} on white", error(got, torch.cat([video[0], *references[0]], dim=1))
    )
    yield Row("  the mask of text only", error(torch.from_numpy(made.mask), mask[0][0]))


def check_text(official: Official) -> Iterator[Row]:
    tokenizer = object.__new__(official.wan("modules.tokenizers").HuggingfaceTokenizer)
    tokenizer.clean = "whitespace"  # as T5EncoderModel sets it
    wrong = [text for text in TEXTS if clean_text(text) != tokenizer._clean(text)]
    for text in wrong:
        print(f"cleaned otherwise: {text!r}")
    yield Row(f"Text cleaning, {len(TEXTS)} texts: share that differs", len(wrong) / len(TEXTS))
    untouched = [text for text in TEXTS if text == tokenizer._clean(text)]
    yield Row("  share that cleaning changes", 1 - len(untouched) / len(TEXTS), must_differ=True)


def check_samplers(official: Official) -> Iterator[Row]:
    """Whole trajectories of 20 steps, with a nonlinear stand-in for the transformer."""
    shape, steps, shift, cpu = (1, 8, 3, 6, 6), 20, 5.0, torch.device("cpu")
    mix = noise(8, 8, seed=9) / 8**0.5

    def velocity(x: Tensor, t: float) -> Tensor:
        return (
            0.6 * x
            - 1.5 * torch.tanh(torch.einsum("ij,bjfhw->bifhw", mix, x))
            - 0.3 * torch.sin(2 * x + t / 200)
        )

    unipc = official.wan("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(
        shift=1, use_dynamic_shifting=False
    )
    unipc.set_timesteps(steps, device=cpu, shift=shift)
    module = official.wan("utils.fm_solvers")
    dpm = module.FlowDPMSolverMultistepScheduler(shift=1, use_dynamic_shifting=False)
    module.retrieve_timesteps(dpm, device=cpu, sigmas=module.get_sampling_sigmas(steps, shift))
    for name, scheduler in (("unipc", unipc), ("dpm++", dpm)):
        sigmas = sampler.schedule(name, steps, shift)
        times = [sampler.timestep(name, sigma) for sigma in sigmas[:-1]]
        yield Row(f"Sampler {name}, time steps", error(torch.tensor(times), scheduler.timesteps))
        solver = sampler.make_solver(name, sigmas)
        state = solver.start()
        ours = theirs = noise(*shape, seed=10)
        for i, t in enumerate(scheduler.timesteps):
            theirs = scheduler.step(velocity(theirs, float(t)), t, theirs, return_dict=False)[0]
            ours, state = solver.step(ours, velocity(ours, times[i]), i, state)
        yield Row(f"Sampler {name}, {steps} steps", error(ours, theirs))


def check(official: Official, folder: Path) -> Iterator[Row]:
    path = folder / "vae.pth"
    their_vae = official.vae(path)
    our_vae = weights.load_vae(path, compute_dtype=torch.float32)
    yield from check_transformer(official, folder)
    yield from check_vae(their_vae, our_vae)
    yield from check_text_encoder(official, folder)
    yield from check_conditioning(official, their_vae, our_vae, folder)
    yield from check_text(official)
    yield from check_samplers(official)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wan", type=Path, required=True, metavar="DIR", help="checkout of Wan-Video/Wan2.1")
    parser.add_argument("--vace", type=Path, metavar="DIR", help="checkout of ali-vilab/VACE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about CUDA, and the fallback's padding mask
    failed = 0
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for row in check(Official(args.wan, args.vace), Path(folder)):
            verdict = "FAILED" if not row.passed else "differs, as it must" if row.must_differ else "ok"
            print(f"{row.name:<52} {row.error:8.1e}  {verdict}", flush=True)
            failed += not row.passed
    print(f"{failed} failed" if failed else f"all within {TOLERANCE:.0e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
