"""Names of Wan's parameters: the official ones, which are ours, and those of diffusers. No torch."""

from __future__ import annotations

from collections.abc import Iterable

# diffusers' WanTransformer3DModel and WanVACETransformer3DModel: what a name starts with, then what it may contain.
_DIFFUSERS_ROOT = {
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "scale_shift_table": "head.modulation",
    "proj_out.": "head.head.",
}
_DIFFUSERS_INNER = {
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".norm2.": ".norm3.",  # the only norm with weights is the second there and the third here
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".proj_in.": ".before_proj.",
    ".proj_out.": ".after_proj.",
    ".scale_shift_table": ".modulation",
}


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a file (official or diffusers) to the parameter names of `WanModel`; unknown ones stay as they are."""

    def translate(name: str) -> str:
        for theirs, ours in _DIFFUSERS_ROOT.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        for theirs, ours in _DIFFUSERS_INNER.items():
            name = name.replace(theirs, ours)
        return name

    return {name: translate(name) for name in names}


def diffusers_name(name: str) -> str:
    """The name that diffusers gives a layer or parameter of ours; `our_names` leads back."""
    name = f"{name}."
    for theirs, ours in _DIFFUSERS_ROOT.items():
        if name.startswith(ours):
            return (theirs + name.removeprefix(ours)).removesuffix(".")
    for theirs, ours in _DIFFUSERS_INNER.items():
        name = name.replace(ours, theirs)
    return name.removesuffix(".")
