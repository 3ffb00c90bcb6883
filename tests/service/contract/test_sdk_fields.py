"""Every field that the SDKs of Luma and OpenAI can send stands in the tables of docs/api-coverage.md.

For Runway, tests/service/contract/runway/test_runway_coverage.py does the same with the rules made of its SDK.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import luma_agents.types as agents
import lumaai.types as dream
import openai.types as oa
import pytest
from lumaai.types import generations as dream_generations

from mutoscope.server.dialects import luma, luma_agents, openai_videos

SENT: tuple[tuple[Any, str, Any], ...] = (
    (luma, "POST /generations/video", dream_generations.video_create_params.VideoCreateParams),
    (luma, "POST /generations", dream_generations.video_create_params.VideoCreateParams),
    (luma, "POST /generations/image", dream_generations.image_create_params.ImageCreateParams),
    (luma, "POST /generations/image/reframe", dream_generations.image_reframe_params.ImageReframeParams),
    (luma, "POST /generations/video/reframe", dream_generations.video_reframe_params.VideoReframeParams),
    (luma, "POST /generations/video/modify", dream_generations.video_modify_params.VideoModifyParams),
    (
        luma,
        "POST /generations/{generation_id}/upscale",
        dream.generation_upscale_params.GenerationUpscaleParams,
    ),
    (luma, "GET /generations", dream.generation_list_params.GenerationListParams),
    (luma_agents, "POST /generations", agents.generation_create_params.GenerationCreateParams),
    (luma_agents, "POST /files", agents.file_create_params.FileCreateParams),
    (luma_agents, "GET /files", agents.file_list_params.FileListParams),
    (openai_videos, "POST /videos", oa.video_create_params.VideoCreateParams),
    (openai_videos, "GET /videos", oa.video_list_params.VideoListParams),
    (
        openai_videos,
        "GET /videos/{video_id}/content",
        oa.video_download_content_params.VideoDownloadContentParams,
    ),
    (openai_videos, "POST /videos/{video_id}/remix", oa.video_remix_params.VideoRemixParams),
    (openai_videos, "POST /videos/edits", oa.video_edit_params.VideoEditParams),
    (openai_videos, "POST /videos/extensions", oa.video_extend_params.VideoExtendParams),
)


def fields(kind: Any, at: str = "") -> Iterator[str]:
    """Names of a TypedDict's fields, with those of the objects inside it (lists are left whole)."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = [h for h in _alternatives(hint) if typing.is_typeddict(h)]
        yield at + name
        if len(inner) == 1 and hasattr(inner[0], "__annotations__"):
            yield from fields(inner[0], f"{at}{name}.")


def _alternatives(hint: Any) -> Iterator[Any]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _alternatives(one)
    elif origin in (typing.Required, typing.NotRequired, typing.Annotated):
        yield from _alternatives(typing.get_args(hint)[0])
    else:
        yield hint


@pytest.mark.parametrize(("module", "route", "kind"), SENT, ids=lambda v: v if isinstance(v, str) else "")
def test_every_field_of_the_sdk_stands_in_the_table(module: Any, route: str, kind: Any) -> None:
    table = next(r for r in module.COVERAGE if f"{r.method} {r.path}" == route)
    told = {name for part in table.fields for name in part.name.split(", ")}
    missing = {
        name for name in fields(kind)
        if name not in told and not any(name.startswith(f"{known}.") for known in told)
        and not any(known.startswith(f"{name}.") for known in told)
    }  # fmt: skip
    assert not missing
