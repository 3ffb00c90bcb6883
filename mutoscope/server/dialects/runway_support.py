"""What of Runway's fields is done here, done without effect, or refused, as data. Pure.

`runway_spec.to_spec` obeys these tables, and docs/api-coverage.md is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mutoscope.jobs.spec import OutputFormat
from mutoscope.server.dialects.runway_rules import Issue, Path

NO_AUDIO = "no model here makes or hears sound"
NO_CLIP_REFERENCES = "references are pictures here; a clip can only be the source"

IGNORED: dict[str, str] = {
    "contentModeration": "nothing is moderated on your own machine",
    "cfgScale": "Runway's scale for this partner has no counterpart; models here keep their own guidance",
    "promptExpansionMode": "prompts are taken as they are written",
    "grounding": "nothing is looked up",
    "thinkingLevel": "the generator does not think first",
    "edit": "a reference picture is always shown as a reference",
    "backgroundColor": "colours are asked for in the prompt",
    "colors": "colours are asked for in the prompt",
    "expressionIntensity": "facial expression is not transferred",
    "creativity": "enlarging is faithful: nothing is invented",
    "flavor": "there is one way to enlarge",
    "sharpen": "there is one way to enlarge",
    "smartGrain": "no grain is added",
    "ultraDetail": "enlarging is faithful: nothing is invented",
    "proresProfile": "there is one ProRes profile, 422 HQ",
    "quality": "only low and very_low matter: they are drafts",
    "subject": "references are not told apart by subject",
}
"""Accepted without effect, by field (the last part of its path)."""

IGNORED_AT: dict[tuple[str, str], str] = {
    ("gen4_aleph", "ratio"): "deprecated by Runway: the size follows the clip",
    ("aleph2", "ratio"): "the size follows the clip",
}
"""The same for one model's field."""


@dataclass(frozen=True)
class Refusal:
    """A value that is well-formed, and cannot be done. `values` empty: whatever is not false or empty."""

    field: str  # path without list positions, e.g. "referenceImages.subject"
    why: str
    values: tuple[Any, ...] = ()
    models: tuple[str, ...] = ()

    def applies(self, model: str, value: Any) -> bool:
        if self.models and model not in self.models:
            return False
        if not self.values:
            return bool(value)
        return any(value == v and type(value) is type(v) for v in self.values)


MORE_THAN_ONE = tuple(range(2, 11))
REFUSALS: tuple[Refusal, ...] = (
    Refusal("audio", NO_AUDIO + "; leave it out or say false", (True,)),
    Refusal("referenceAudio", NO_AUDIO),
    Refusal("providerSettings.keepOriginalSound", NO_AUDIO, (True,)),
    Refusal("providerSettings.multiPrompt", "one prompt makes one shot; send a job for each shot"),
    Refusal("providerSettings.shotType", "one prompt makes one shot", ("customize",)),
    Refusal("referenceVideos", NO_CLIP_REFERENCES),
    Refusal("character", "the character has to be a picture ({type: image}); a moving one is not supported", ()),
    Refusal("bodyControl", "false asks for the face alone, and faces are not animated; body motion is", (False,)),
    Refusal("maskUri", "masks for pictures are not supported in this dialect; /api/v1/jobs takes them for clips"),
    Refusal("preciseEdit", "pictures are not edited in place", (True,)),
    Refusal("background", "pictures have no transparency", ("transparent",)),
    Refusal("outputCount", "a task makes one picture; send several tasks with different seeds", MORE_THAN_ONE),
    Refusal("draftTaskId", "a draft cannot be taken up again; send the same seed without draft"),
    Refusal("mode", "a clip is edited or extended, it cannot be a loose reference", ("reference",)),
    Refusal("fpsBoost", "send the finished clip to enhance_frame_rate", (True,)),
    Refusal("resolution", "2k is not a size here; 720p, 1k and 4k are", ("2k",), ("magnific_video_upscaler_creative",)),
    Refusal("keyframes.range", "keyframes act on the whole clip; leave range out"),
    Refusal(
        "outputFormat",
        "there is no encoder for it; mp4, prores, png_sequence, hdr10, hlg, hdr_prores and hdr_exr_sequence exist",
        ("sdr_rec709_10bit", "hdr_pq_12bit_master", "hdr_png_sequence", "hdr_exr_acescg_sequence_1_3",
         "hdr_exr_acescg_sequence_2_0"),
    ),
    Refusal("model", "it draws vector graphics, models here make pixels", ("recraft_v4_1_vector",)),
)  # fmt: skip
"""Refused with 400 and this sentence. `character` is decided in `refused` below."""

FORMATS: dict[str, tuple[OutputFormat, bool]] = {
    "mp4": ("mp4", False),
    "mov": ("prores", False),
    "prores": ("prores", False),
    "png_sequence": ("png_sequence", False),
    "hdr10": ("hdr10", True),
    "hlg": ("hlg", True),
    "hdr_prores": ("prores", True),
    "hdr_exr_sequence": ("exr_sequence", True),
    "png": ("png", False),
    "jpeg": ("jpeg", False),
    "webp": ("webp", False),
}
"""outputFormat to ours, and whether it is HDR."""

NOTES: dict[str, str] = {
    "act_two": "Body motion follows the reference clip; facial expression and lip-sync are not transferred.",
}
"""Said in the answer to a create call, under `warnings`."""

DEFAULT_SECONDS: dict[str, int] = {
    "gen4_turbo": 10, "gen3a_turbo": 10, "veo3": 8, "veo3.1": 8, "veo3.1_fast": 8, "gemini_omni_flash": 10,
}  # fmt: skip
"""duration where it was left out; 5 for the others."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("/v1/text_to_speech", NO_AUDIO),
    ("/v1/sound_effect", NO_AUDIO),
    ("/v1/voice_isolation", NO_AUDIO),
    ("/v1/voice_dubbing", NO_AUDIO),
    ("/v1/speech_to_speech", NO_AUDIO),
    ("/v1/video_to_audio", NO_AUDIO),
    ("/v1/generate/audio", NO_AUDIO),
    ("/v1/voices", NO_AUDIO),
    ("/v1/avatar", "no model here makes talking characters or does lip-sync"),
    ("/v1/realtime_sessions", "no model here is fast enough to talk with; avatars are not supported"),
    ("/v1/documents", "documents feed avatars, which are not supported"),
    ("/v1/workflows", "workflows are made in Runway's web app, which is not here"),
    ("/v1/workflow_invocations", "workflows are made in Runway's web app, which is not here"),
    ("/v1/recipes", "recipes are Runway's own products; the endpoints they are built from are here"),
    ("/v1/organization/webapp", "there is no web app whose use could be reported"),
)
"""Routes of the SDK that are not here, by prefix of their path, and why."""


def refused(model: str, body: Mapping[str, Any]) -> list[Issue]:
    """What of a body that keeps to the rules cannot be done here."""
    issues = []
    for path, value in _walk(body):
        name = ".".join(p for p in path if isinstance(p, str))
        for refusal in REFUSALS:
            if refusal.field != name or (name == "character" and value.get("type") != "video"):
                continue
            if refusal.applies(model, value):
                shown = f"{value} is not supported" if isinstance(value, str | int) else "is not supported"
                issues.append(Issue(path, f"{shown}: {refusal.why}."))
    return issues


def ignored(model: str, body: Mapping[str, Any]) -> list[str]:
    """A sentence for each field of a body that is accepted without effect."""
    sentences: dict[str, None] = {}
    for path, _ in _walk(body):
        name = next(p for p in reversed(path) if isinstance(p, str))
        why = IGNORED_AT.get((model, name)) or IGNORED.get(name)
        if why:
            sentences[f"{name} has no effect: {why}."] = None
    return list(sentences)


def reason(path: str) -> str:
    """Why a route of the vendor is not here; empty: it is no route of the vendor's."""
    return next((why for prefix, why in UNSUPPORTED if path.startswith(prefix)), "")


def _walk(value: Any, at: Path = ()) -> list[tuple[Path, Any]]:
    """Every field at any depth, outer ones first."""
    found: list[tuple[Path, Any]] = []
    if isinstance(value, Mapping):
        for name, inner in value.items():
            found.append(((*at, name), inner))
            found += _walk(inner, (*at, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            found += _walk(inner, (*at, i))
    return found
