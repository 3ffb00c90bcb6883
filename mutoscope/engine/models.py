"""The three networks of a model set: opened when first needed, kept, and held to what memory was promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mutoscope.engine import cache, compiling, devices, lora, memory, pages, weights
from mutoscope.engine.linear import forget_buffers, kept_bytes, settle
from mutoscope.engine.precision import checked, compute_dtype
from mutoscope.engine.streaming import BlockStream, stream_blocks
from mutoscope.engine.text_cache import TextCache, name_of
from mutoscope.engine.tokenizer import Tokenizer, clean_text
from mutoscope.engine.umt5 import UMT5Encoder
from mutoscope.engine.vae import VAEConfig, WanVAE
from mutoscope.engine.wan import WanModel
from mutoscope.errors import RequestError
from mutoscope.manifest import ModelManifest
from mutoscope.request import GenerationRequest

MAX_TEXT_TOKENS = 512
REMEMBERED_PROMPTS = 8


class Models:
    """The three networks of a model set, opened when first needed and kept. Weights stay in their mapped files.

    precision: see `precision.py`. memory_bytes: what this process may use in all while it makes a clip; None: what is
    free. text_cache: where rows of the model's own negative prompt are kept; None: nowhere.
    On a device with memory of its own, `vram_bytes` is the promise for that. compiled: see `compiling.py`.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        memory_bytes: int | None = None,
        text_cache: TextCache | None = None,
        *,
        vram_bytes: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.manifest = manifest
        self.text_cache = text_cache
        self.device = torch.device(device)
        self.memory_bytes = _promise(self.device, memory_bytes, vram_bytes)
        self.compiled = compiled
        if compiled and self.device.type == "cpu":
            raise RequestError(
                "--compile is for GPUs; on the processor the engine has kernels of its own.",
                hint="Leave it out.",
            )
        self.precision = checked(precision)
        self._rows: dict[str, Tensor] = {}
        self._loras = lora.Attached()
        devices.limit(self.device, self.memory_bytes, memory.RUNTIME_BYTES)

    @cached_property
    def text(self) -> tuple[UMT5Encoder, Tokenizer]:
        path = self.manifest.files.text_encoder.path
        promised = self.memory_bytes is not None
        encoder, metadata = weights.load_umt5(
            path, device=self.device, compute_dtype=self.dtype, drop=promised
        )
        return encoder, Tokenizer.from_metadata(metadata)

    @cached_property
    def dit(self) -> WanModel:
        if self.device.type == "cpu":
            pages.reuse_freed()
        files = self.manifest.files
        paths = [files.dit.path, *(extra.path for extra in files.dit_extra)]
        model = weights.load_wan(paths, device=self.device, precision=self.precision)
        if self.compiled:
            compiling.compile_blocks(model)
        return model

    @cached_property
    def stream(self) -> BlockStream | None:
        """How the transformer's weights get to a device with memory of its own."""
        return stream_blocks(self.dit, self.device) if devices.has_own_memory(self.device) else None

    def open_loras(self, request: GenerationRequest) -> lora.Loras:
        """The LoRAs of a planned request, checked against the transformer."""
        own = self.manifest.loras
        found = []
        for name, strength in request.loras:
            path = own[str(name)].file.path if str(name) in own else Path(name)
            assert strength is not None
            found.append((path, strength))
        self.without_loras()
        return self._loras.open(self.dit, found)

    def dit_with(self, loras: lora.Loras) -> WanModel:
        """The transformer with these LoRAs and no others, until it is asked for with others."""
        self._loras.attach(self.dit, loras)
        return self.dit

    def numbers(self, request: GenerationRequest) -> cache.Numbers:
        """What the step cache of a planned request has to know of the transformer."""
        own = self.manifest.files.magnitudes
        return cache.find_numbers(request.cache, self.dit.config, own.path if own else None)

    def without_loras(self) -> None:
        """Take off whatever the transformer has."""
        self._loras.detach()

    @cached_property
    def vae(self) -> WanVAE:
        return weights.load_vae(self.manifest.files.vae.path, device=self.device, compute_dtype=self.dtype)

    @property
    def vae_config(self) -> VAEConfig:
        """Told without reading the VAE, which is not needed before its first picture."""
        return self._vae_facts[0]

    @cached_property
    def _vae_facts(self) -> tuple[VAEConfig, int]:
        return weights.check_vae(self.manifest.files.vae.path, compute_dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, self.device)

    @torch.inference_mode()
    def text_rows(self, prompts: Sequence[str], between: Callable[[], None] = lambda: None) -> list[Tensor]:
        """The encoder's rows of each prompt, [1, L, E]; only its real tokens. The last few prompts are remembered.

        between: called now and then while they are made; what it raises ends that.
        """
        prompts = [clean_text(prompt) for prompt in prompts]
        rows = {p: self._rows[p] for p in prompts if p in self._rows}
        stored = {p: self._stored_as(p) for p in prompts if p not in rows}
        for prompt, name in stored.items():
            if self.text_cache and name and (found := self.text_cache.read(name)) is not None:
                rows[prompt] = found.to(self.device)
        missing = [p for p in stored if p not in rows]
        if missing:
            encoder, tokenizer = self.text
            ids = [torch.tensor([tokenizer.encode(p, MAX_TEXT_TOKENS)], device=self.device) for p in missing]
            rows.update(zip(missing, encoder.together(ids, between), strict=True))
        for prompt in missing:
            if self.text_cache and (name := stored[prompt]):
                self.text_cache.write(name, rows[prompt])
        self._rows = dict(list({**self._rows, **rows}.items())[-REMEMBERED_PROMPTS:])
        return [rows[prompt] for prompt in prompts]

    def _stored_as(self, prompt: str) -> str | None:
        """The name of a prompt's rows in the text cache, if they may be there."""
        own = clean_text(self.manifest.defaults.negative_prompt)
        if self.text_cache is None or not own or prompt != own:
            return None
        how = {"dtype": str(self.dtype), "device": str(self.device), "threads": torch.get_num_threads()}
        return name_of(self.manifest.files.text_encoder.path, prompt, **how)

    @cached_property
    def resident_bytes(self) -> int:
        """Weights that stay in memory whatever is asked for."""
        small = sum(p.nbytes for p in self.dit.parameters()) + self._vae_facts[1]
        if self.stream is None:
            return small + (settle(self.dit, 0) if self.device.type == "cpu" else 0)
        there = sum(b.nbytes for b in self.dit.buffers() if b.device.type == self.device.type)
        return small + there + self.stream.least_bytes

    @property
    def allowed_bytes(self) -> int:
        """What this process may use where it computes."""
        return memory.allowed(self.device, self.memory_bytes) or memory.available(self.device)

    def settle(self, need: memory.Need, now: int) -> None:
        """Keep of the weights what leaves room for a stage that needs `now` bytes, and give the rest back."""
        if self.stream is not None:
            room = memory.room(need, self.device, self.memory_bytes, now=now)
            self.stream.settle(room + self.stream.least_bytes)  # which `now` has in it already
            for model in (self.dit, *self.__dict__.get("text", ())[:1]):
                forget_buffers(model)
            devices.empty_cache(self.device)
            return
        if self.memory_bytes is not None:
            self.__dict__.pop("text", None)  # what it unpacks into and its vocabulary take 0.15 GB
        if self.device.type == "cpu":
            room = memory.room(need, self.device, self.memory_bytes, now=now)
            settle(self.dit, room if self.memory_bytes is not None else room + kept_bytes(self.dit))
            pages.give_back()


def _promise(device: torch.device, memory_bytes: int | None, vram_bytes: int | None) -> int | None:
    """The one of the two that is about where it computes. Raises RequestError for the other one."""
    own = devices.has_own_memory(device)
    if memory_bytes is not None and own:
        raise RequestError(
            f"--memory is kept on the processor only, not on {device}.",
            hint="Like --vram 8GiB for its memory.",
        )
    if vram_bytes is not None and not own:
        raise RequestError(
            f"--vram is for devices with memory of their own, not for {device}.", hint="Like --memory 8GiB."
        )
    return vram_bytes if own else memory_bytes
