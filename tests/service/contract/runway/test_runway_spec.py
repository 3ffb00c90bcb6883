"""Bodies in Runway's terms become the jobs that they ask for."""

from __future__ import annotations

from typing import Any

import pytest

from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.server.dialects import runway_support as support
from mutoscope.server.dialects.runway_rules import BodyRefused, Hosts
from mutoscope.server.dialects.runway_spec import (
    File,
    frame_rate,
    parse,
    parse_generate,
    to_generate_spec,
    to_spec,
)

IMAGE, LAST, STYLE = (f"https://example.com/{name}.png" for name in ("first", "last", "style"))
CLIP = "https://example.com/clip.mp4"


def spec_of(
    endpoint: str, *, clip_seconds: float | None = None, size: tuple[int, int] | None = None, **body: Any
) -> JobSpec:
    _, found = parse(endpoint, body, Hosts())
    return to_spec(endpoint, body, {f.uri: File(Media(url=f.uri), clip_seconds, size) for f in found})


def refusal(endpoint: str, **body: Any) -> str:
    with pytest.raises(BodyRefused) as caught:
        spec_of(endpoint, **body)
    return str(caught.value)


def test_text_to_video() -> None:
    spec = spec_of("text_to_video", model="gen4.5", promptText="a ball", duration=4, ratio="720:1280", seed=7)
    assert spec.dump() == {
        "model": "gen4.5",
        "prompt": "a ball",
        "seconds": 4,
        "width": 720,
        "height": 1280,
        "seed": 7,
    }


def test_image_to_video() -> None:
    spec = spec_of("image_to_video", model="gen4_turbo", promptImage=IMAGE, ratio="1584:672")
    assert [(k.media.url, k.at) for k in spec.keyframes] == [(IMAGE, 0.0)]
    assert (spec.width, spec.height, spec.seconds, spec.prompt) == (1584, 672, 10, "")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"ratio": "1280:720"}, {"width": 1280, "height": 720}),
        ({"ratio": "auto_1080p"}, {"resolution": "1080p"}),
        ({"ratio": "auto_480p"}, {"resolution": "540p"}),
    ],
)
def test_sizes(body: dict[str, Any], expected: dict[str, Any]) -> None:
    dumped = spec_of("text_to_video", model="wan3", promptText="a ball", **body).dump()
    assert {
        k: dumped.get(k) for k in ("width", "height", "aspect_ratio", "resolution") if k in dumped
    } == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"ratio": "16:9", "resolution": "720p"}, {"aspect_ratio": "16:9", "resolution": "720p"}),
        ({"ratio": "16:9", "resolution": "480p"}, {"width": 854, "height": 480}),
        ({"ratio": "2:3", "resolution": "480p"}, {"width": 480, "height": 720}),
        ({"resolution": "1080p"}, {"resolution": "1080p"}),
    ],
)
def test_tiers(body: dict[str, Any], expected: dict[str, Any]) -> None:
    dumped = spec_of("text_to_video", model="grok_imagine_1_5", promptText="a ball", **body).dump()
    assert {
        k: dumped.get(k) for k in ("width", "height", "aspect_ratio", "resolution") if k in dumped
    } == expected


def test_a_size_without_a_shape_that_cannot_be_met_is_refused() -> None:
    assert "2k" in refusal("text_to_video", model="hailuo3", promptText="a", resolution="2k")
    assert "freeform" not in refusal("text_to_image", model="seedream5_lite", promptText="a", ratio="big")
    assert "8192" in refusal(
        "text_to_image", model="gemini_image3.1_flash", promptText="a", ratio="1408:11264"
    )


@pytest.mark.parametrize(
    ("asked", "format", "hdr"),
    [("mp4", "mp4", False), ("prores", "prores", False), ("png_sequence", "png_sequence", False),
     ("hdr10", "hdr10", True), ("hlg", "hlg", True),
     ("hdr_prores", "prores", True), ("hdr_exr_sequence", "exr_sequence", True)],
)  # fmt: skip
def test_output_formats(asked: str, format: str, hdr: bool) -> None:
    spec = spec_of(
        "text_to_video", model="gen4.5", promptText="a", duration=2, ratio="1280:720", outputFormat=asked
    )
    assert (spec.format, spec.hdr) == (format, hdr)


def test_aleph_follows_the_clip() -> None:
    spec = spec_of("video_to_video", model="gen4_aleph", videoUri=CLIP, promptText="at night", ratio="640:480",
                   references=[{"type": "image", "uri": STYLE}])  # fmt: skip
    assert spec.control == Media(url=CLIP)
    assert spec.control_kind == "gray"
    assert [r.media.url for r in spec.references] == [STYLE]
    assert spec.source is None
    assert (spec.width, spec.resolution, spec.seconds) == (None, "720p", None), "nothing is known of a URL"


@pytest.mark.parametrize(
    ("size", "out"), [((1280, 720), (1280, 720)), ((720, 1280), (720, 1280)), ((3840, 2160), (1920, 1080))]
)
def test_aleph_keeps_size_and_length_of_a_clip_that_is_known(
    size: tuple[int, int], out: tuple[int, int]
) -> None:
    body = {"model": "aleph2", "videoUri": CLIP, "promptText": "at night"}
    spec = spec_of("video_to_video", clip_seconds=7.5, size=size, **body)
    assert (spec.width, spec.height, spec.seconds) == (*out, 7.5)
    wider = spec_of("video_to_video", clip_seconds=7.5, size=size, **body, targetAspectRatio="21:9")
    assert (wider.width, wider.aspect_ratio, wider.resolution, wider.seconds) == (None, "21:9", "720p", 7.5)


def test_where_the_shape_is_open_it_is_that_of_the_picture() -> None:
    body = {"model": "happyhorse_1_0", "promptImage": IMAGE}
    tall = spec_of("image_to_video", size=(600, 800), **body, resolution="1080p")
    assert (tall.width, tall.height) == (1080, 1440)
    default = spec_of("image_to_video", size=(600, 800), **body)
    assert (default.width, default.height) == (720, 960)
    assert spec_of("image_to_video", **body).resolution == "720p"
    assert spec_of("text_to_video", model="veo3.1", promptText="a", ratio="1280:720").width == 1280
    assert spec_of("text_to_video", model="wan3", promptText="a").resolution == "720p"


def test_aleph2_keyframes() -> None:
    body = {"model": "aleph2", "videoUri": CLIP, "promptText": "at night"}
    frames = [{"at": 0.5, "uri": IMAGE}, {"seconds": 1, "uri": LAST}]
    spec = spec_of("video_to_video", clip_seconds=4.0, **body, keyframes=frames)
    assert [(k.media.url, k.at) for k in spec.keyframes] == [(IMAGE, 0.5), (LAST, 0.25)]
    assert "keyframes[1].seconds" in refusal("video_to_video", **body, keyframes=frames)
    with pytest.raises(BodyRefused, match=r"lasts 0\.5 s"):
        spec_of("video_to_video", clip_seconds=0.5, **body, keyframes=frames)
    window = {"start_seconds": 0, "end_seconds": 2}
    assert "whole clip" in refusal(
        "video_to_video", **body, keyframes=[{"at": 0, "uri": IMAGE, "range": window}]
    )
    mixed = [{"at": 0, "uri": IMAGE, "range": window}, {"at": 1, "uri": LAST}]
    assert "all keyframes have a range" in refusal("video_to_video", **body, keyframes=mixed)
    older = [{"uri": IMAGE, "position": "first"},
             {"uri": LAST, "position": {"type": "position", "positionPercentage": 0.75}}]  # fmt: skip
    assert [k.at for k in spec_of("video_to_video", **body, promptImage=older).keyframes] == [0.0, 0.75]


def test_aleph2_expands_the_picture() -> None:
    spec = spec_of("video_to_video", model="aleph2", videoUri=CLIP, targetAspectRatio="21:9")
    assert (spec.source, spec.reframe, spec.aspect_ratio, spec.control) == (
        Media(url=CLIP),
        "fit",
        "21:9",
        None,
    )


@pytest.mark.parametrize(("mode", "field"), [("edit", "control"), ("extend", "extend_start")])
def test_seedance_modes(mode: str, field: str) -> None:
    spec = spec_of(
        "video_to_video", model="seedance2_5", promptVideo=CLIP, promptText="on", mode=mode, draft=True
    )
    assert getattr(spec, field) == Media(url=CLIP)
    assert spec.quality == "draft"


def test_act_two_moves_the_body() -> None:
    spec = spec_of("character_performance", model="act_two", character={"type": "image", "uri": IMAGE},
                   reference={"type": "video", "uri": CLIP}, bodyControl=True, expressionIntensity=3)  # fmt: skip
    assert (spec.control, spec.control_kind) == (Media(url=CLIP), "gray")
    assert [r.media.url for r in spec.references] == [IMAGE]
    assert spec.prompt
    moving = refusal("character_performance", model="act_two", character={"type": "video", "uri": CLIP},
                     reference={"type": "video", "uri": CLIP})  # fmt: skip
    assert "has to be a picture" in moving
    assert "lip-sync" in support.NOTES["act_two"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"model": "upscale_v1"}, {"operation": "upscale", "scale": 4}),
        ({"model": "magnific_video_upscaler_creative"}, {"operation": "upscale", "scale": 2}),
        (
            {"model": "magnific_video_upscaler_creative", "resolution": "4k"},
            {"operation": "upscale", "resolution": "4k"},
        ),
        ({"model": "enhance_frame_rate", "targetFramerate": "60"}, {"operation": "reframe_rate", "fps": 60}),
    ],
)
def test_upscale(body: dict[str, Any], expected: dict[str, Any]) -> None:
    dumped = spec_of("video_upscale", videoUri=CLIP, **body).dump()
    assert dumped == {"model": body["model"], "source": {"url": CLIP}, **expected}


def test_the_rest() -> None:
    assert frame_rate("23_98") == pytest.approx(23.976, abs=1e-3)
    assert frame_rate("29_97") == pytest.approx(30000 / 1001)
    assert (
        spec_of("image_upscale", model="magnific_precision_upscaler_v2", imageUri=IMAGE, scaleFactor=8).scale
        == 8
    )
    hdr = spec_of("video_to_hdr", model="ruby", videoUri=CLIP)
    assert (hdr.operation, hdr.format, hdr.hdr) == ("hdr", "hdr10", True)
    picture = spec_of("text_to_image", model="gen4_image", promptText="@ball rolls", ratio="1920:1080",
                      referenceImages=[{"uri": IMAGE, "tag": "ball"}])  # fmt: skip
    assert (picture.operation, picture.references[0].tag, picture.width) == ("image", "ball", 1920)


@pytest.mark.parametrize(
    ("endpoint", "body", "word"),
    [
        ("text_to_video", {"model": "veo3.1", "promptText": "a", "ratio": "1280:720", "audio": True}, "sound"),
        ("text_to_video", {"model": "seedance2", "promptText": "a",
                           "referenceAudio": [{"type": "audio", "uri": "https://a.example/a.mp3"}]}, "sound"),
        ("text_to_video", {"model": "kling3.0_pro", "promptText": "a", "ratio": "1440:1440",
                           "providerSettings": {"multiPrompt": [{"duration": 3, "prompt": "x"}]}}, "one shot"),
        ("text_to_video", {"model": "seedance2_5", "draftTaskId": "1"}, "draft"),
        ("text_to_image", {"model": "gpt_image_2", "promptText": "a", "ratio": "auto", "outputCount": 2},
         "one picture"),
        ("text_to_image", {"model": "gpt_image_2", "promptText": "a", "ratio": "auto", "background": "transparent"},
         "transparency"),
        ("text_to_image", {"model": "gen4_image_turbo", "promptText": "a", "ratio": "1024:1024", "referenceImages": []},
         "empty"),
        ("video_upscale", {"model": "magnific_video_upscaler_creative", "videoUri": CLIP, "fpsBoost": True},
         "enhance_frame_rate"),
        ("video_to_hdr", {"model": "ruby", "videoUri": CLIP, "outputFormat": "hdr_exr_acescg_sequence_1_3"},
         "no encoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_reason(endpoint: str, body: dict[str, Any], word: str) -> None:
    assert word in refusal(endpoint, **body)


def test_what_has_no_effect_is_said() -> None:
    body = {"model": "gen4_aleph", "ratio": "640:480", "contentModeration": {"publicFigureThreshold": "low"}}
    said = support.ignored("gen4_aleph", body)
    assert len(said) == 2
    assert all("has no effect" in sentence for sentence in said)
    assert support.ignored("gen4.5", {"model": "gen4.5", "ratio": "1280:720"}) == []


def generate(kind: str, **asked: Any) -> JobSpec:
    body = {"configId": "mine", "input": asked}
    _, found = parse_generate(kind, body, Hosts())
    return to_generate_spec(kind, body, {f.uri: File(Media(url=f.uri), 8.0) for f in found})


def test_generate_video() -> None:
    spec = generate(
        "video", promptText="a ball", negativePrompt="red", aspectRatio="16:9", resolution="1080p", duration=5, seed=3,
        referenceImages=[{"uri": IMAGE, "role": "first"}, {"uri": LAST, "role": "last"},
                         {"uri": STYLE, "role": "reference"}],
    )  # fmt: skip
    assert [(k.media.url, k.at) for k in spec.keyframes] == [(IMAGE, 0.0), (LAST, 1.0)]
    assert [r.media.url for r in spec.references] == [STYLE]
    assert (spec.model, spec.aspect_ratio, spec.resolution, spec.seconds, spec.seed) == (
        "auto",
        "16:9",
        "1080p",
        5,
        3,
    )
    edited = generate("video", promptText="a", referenceVideos=[{"uri": CLIP, "role": "source"}],
                      keyframes=[{"seconds": 2, "uri": IMAGE}])  # fmt: skip
    assert edited.control == Media(url=CLIP)
    assert edited.keyframes[0].at == 0.25
    assert generate("image", promptText="a", aspectRatio="4:5", resolution="1k").width == 1024


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"promptText": "a", "audio": True}, "input.audio"),
        (
            {"promptText": "a", "referenceVideos": [{"uri": CLIP, "role": "reference"}]},
            "input.referenceVideos",
        ),
        ({"promptText": "a", "keyframes": [{"at": 0, "uri": IMAGE}]}, "input.keyframes"),
        (
            {"promptText": "a", "referenceImages": [{"uri": u, "role": "first"} for u in (IMAGE, LAST)]},
            "input",
        ),
        ({"promptText": "a", "aspectRatio": "5:7"}, "input.aspectRatio"),
        ({"model": "gen4.5"}, "input.model"),
    ],
)
def test_generate_refuses(asked: dict[str, Any], where: str) -> None:
    with pytest.raises(BodyRefused) as caught:
        generate("video", **asked)
    assert caught.value.issues[0].name == where
