"""Files inside of requests: strict data URIs, judged by content."""

from __future__ import annotations

import base64

import pytest

from mutoscope.jobs import inline
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.inline import INVALID_DATA_URI, TOO_LARGE, UNSUPPORTED_TYPE, InputRefused
from tests.service.inputs.conftest import animation, picture, png_bomb


def uri(data: bytes, mime: str = "image/png", params: str = "") -> str:
    return f"data:{mime}{params};base64,{base64.b64encode(data).decode()}"


def refused(text: str, **options: object) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        inline.decode(text, field="promptImage", **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, InvalidRequest)
    assert caught.value.field == "promptImage"
    assert caught.value.message.startswith("promptImage ")
    return caught.value


@pytest.mark.parametrize(
    ("text", "mime"),
    [
        (uri(picture()), "image/png"),
        (uri(picture("JPEG"), "image/jpeg"), "image/jpeg"),
        (uri(picture("WEBP"), "image/webp"), "image/webp"),
        (
            uri(picture("JPEG"), "image/png"),
            "image/jpeg",
        ),  # declared wrongly, but a picture: what it is, counts
        (uri(picture(), "", ""), "image/png"),
        (uri(picture(), "image/png", ";charset=utf-8"), "image/png"),
        (uri(picture()).replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64"), "image/png"),
    ],
)
def test_pictures(text: str, mime: str) -> None:
    assert inline.is_data_uri(text)
    found = inline.decode(text)
    assert (found.mime, found.kind) == (mime, "image")
    assert found.data.startswith(
        {"image/png": b"\x89PNG", "image/jpeg": b"\xff\xd8", "image/webp": b"RIFF"}[mime]
    )


def test_clip(clip: bytes) -> None:
    found = inline.decode(uri(clip, "video/mp4"))
    assert (found.mime, found.kind, found.probed.frames) == ("video/mp4", "video", 9)


def test_animation_is_picture_and_clip() -> None:
    for kinds in (("image",), ("video",), ("image", "video")):
        assert inline.decode(uri(animation(), "image/gif"), kinds=kinds).probed.kind == "animation"


_GOOD = base64.b64encode(picture()).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data:",
        "data:,",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/png;base64,",
        f"data:image/png;{_GOOD}",
        f"image/png;base64,{_GOOD}",
        f"data:image/png;base64;{_GOOD}",
        f"data:image/png;base64,{_GOOD[:-1]}",  # padding cut off
        f"data:image/png;base64,{_GOOD[:20]}\n{_GOOD[20:]}",
        f"data:image/png;base64, {_GOOD}",
        f"data:image/png;base64,{_GOOD[:20]}!!!!{_GOOD[20:]}",
        f"data:image/png;base64,{_GOOD[:20]}%2B{_GOOD[20:]}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(bytes([251, 255] * 300)).decode()}",
        f"data:image/png;base64,é{_GOOD}",
        f"data:{'a' * 300}/png;base64,{_GOOD}",
        f"data:image/png\n;base64,{_GOOD}",
        f"data:image;base64,{_GOOD}",
    ],
)
def test_what_is_no_data_uri(text: str) -> None:
    assert refused(text).reason == INVALID_DATA_URI


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (uri(picture(), "video/mp4"), {}),
        (uri(picture(), "text/plain"), {}),
        (uri(picture(), "application/octet-stream"), {}),
        (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), {}),
        (uri(b"<html>", "image/png"), {}),
        (uri(b"GIF89a" + bytes(30), "image/gif"), {}),
        (uri(picture()[:-30]), {}),
        (uri(png_bomb(9000, 9000)), {}),
        (uri(picture()), {"kinds": ("video",)}),
        (uri(picture("BMP"), "image/bmp"), {"kinds": ("video",)}),
        (uri(animation(), "image/gif"), {"types": ("image/jpeg", "image/png", "image/webp")}),
    ],
)
def test_what_is_no_usable_file(text: str, options: dict[str, object]) -> None:
    assert refused(text, **options).reason == UNSUPPORTED_TYPE


def test_clip_where_a_picture_is_expected(clip: bytes) -> None:
    error = refused(uri(clip, "video/mp4"), kinds=("image",))
    assert error.reason == UNSUPPORTED_TYPE
    assert "video/mp4" in error.message


def test_size_is_of_the_decoded_file_and_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture()
    assert inline.decode(uri(data), max_bytes=len(data)).data == data
    assert refused(uri(data), max_bytes=len(data) - 1).reason == TOO_LARGE
    monkeypatch.setattr("base64.b64decode", lambda *args, **kwargs: pytest.fail("decoded all the same"))
    assert refused(uri(bytes(10_000)), max_bytes=100).reason == TOO_LARGE


def test_bytes_of_a_form_field() -> None:
    assert inline.check(picture(), field="input_reference").mime == "image/png"
    with pytest.raises(InputRefused, match="input_reference is empty"):
        inline.check(b"", field="input_reference")


def test_messages_name_no_place_on_this_machine() -> None:
    assert "/" not in refused(uri(picture()[:-30])).message.replace("image/png", "")
