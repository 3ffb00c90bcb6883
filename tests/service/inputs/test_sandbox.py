"""Opening untrusted files: what they hold, and that nothing they do reaches further than their own process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mutoscope.errors import MediaError, ResourceError
from mutoscope.media import sandbox, sniff
from mutoscope.media.sandbox import Limits, Sandbox
from tests.service.inputs.conftest import animation, picture, png_bomb, png_chunk


@pytest.fixture
def own() -> Iterator[Sandbox]:
    own = Sandbox()
    yield own
    own.close()


def written(tmp_path: Path, data: bytes, name: str = "file") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("format", "mime"),
    [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif"),
     ("BMP", "image/bmp"), ("TIFF", "image/tiff"), ("AVIF", "image/avif")],
)  # fmt: skip
def test_pictures(tmp_path: Path, format: str, mime: str) -> None:
    probed = sandbox.probe(written(tmp_path, picture(format)))
    assert (probed.kind, probed.mime, probed.width, probed.height) == ("image", mime, 48, 32)
    assert sniff.extension(mime) != ".bin"


def test_animation(tmp_path: Path) -> None:
    probed = sandbox.probe(written(tmp_path, animation(3)))
    assert (probed.kind, probed.frames, probed.fps) == ("animation", 3, 10.0)


def test_clip(tmp_path: Path, clip: bytes) -> None:
    probed = sandbox.probe(written(tmp_path, clip))
    assert (probed.kind, probed.mime, probed.width, probed.height) == ("video", "video/mp4", 64, 48)
    assert (probed.frames, probed.fps) == (9, 16.0)
    assert probed.info()["seconds"] == pytest.approx(9 / 16, abs=0.01)


def test_size_is_as_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    probed = sandbox.probe(written(tmp_path, picture("JPEG", exif=exif)))
    assert (probed.width, probed.height) == (32, 48)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "neither"),
        (b"text", "neither"),
        (png_bomb(9000, 9000), "million pixels"),
        (picture()[:-40], "cannot be decoded"),
        (picture("JPEG")[:300], "cannot be read"),
        (b"GIF89a" + bytes(20), "."),
        (b"RIFF\x00\x00\x00\x00WEBP" + bytes(100), "."),
        (b"\x1aE\xdf\xa3" + bytes(500), "."),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(500), "."),
    ],
    ids=["empty", "text", "bomb", "cut-png", "cut-jpeg", "gif", "webp", "mkv", "mp4"],
)
def test_what_cannot_be_used_is_an_error_with_a_sentence(tmp_path: Path, data: bytes, why: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(MediaError, match=why) as caught:
        sandbox.probe(path)
    assert str(tmp_path) not in str(caught.value), "places on this machine are not told"


def test_bomb_in_a_text_chunk(tmp_path: Path) -> None:
    """Compressed text is unpacked by readers too: 200 MB of it in 200 kB."""
    import zlib

    whole = picture()
    text = png_chunk(b"zTXt", b"comment\x00\x00" + zlib.compress(bytes(200 << 20), 9))
    data = whole[:33] + text + whole[33:]
    with pytest.raises(MediaError):
        sandbox.probe(written(tmp_path, data))


def test_a_playlist_names_no_other_file(tmp_path: Path, clip: bytes) -> None:
    secret = written(tmp_path, clip, "secret.mp4")
    for text in (f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n", f"ffconcat version 1.0\nfile {secret}\n"):
        with pytest.raises(MediaError):
            sandbox.probe(written(tmp_path, text.encode(), "list.mp4"))


def test_mutated_files_never_get_out(tmp_path: Path, clip: bytes) -> None:
    """Whatever 60 damaged files do, the answer is a description or a MediaError."""
    rng = random.Random(4)
    seeds = [picture("PNG"), picture("JPEG"), picture("WEBP"), animation(), clip]
    outcomes = set()
    for i in range(60):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(rng.randint(1, 30)):
            data[rng.randrange(8, len(data))] = rng.randrange(256)
        try:
            outcomes.add(sandbox.probe(written(tmp_path, bytes(data))).kind)
        except MediaError:
            outcomes.add("refused")
    assert "refused" in outcomes
    assert len(outcomes) > 1


def test_memory_is_limited(tmp_path: Path) -> None:
    """48 million pixels are allowed, but need 144 MB."""
    path = written(tmp_path, png_bomb(8000, 6000))
    small = Sandbox(Limits(memory_bytes=32 << 20))
    try:
        with pytest.raises(MediaError, match="memory"):
            small.probe(path)
        assert small.probe(written(tmp_path, picture(), "next")).kind == "image"
    finally:
        small.close()


def test_time_is_limited(tmp_path: Path) -> None:
    path = written(tmp_path, png_bomb(8000, 6000))
    hasty = Sandbox(Limits(wall_s=0.02))
    try:
        with pytest.raises(MediaError, match="crash, or needs too much memory or time"):
            hasty.probe(path)
        assert hasty.pid is not None, "the helper lives on"
    finally:
        hasty.close()


def test_process_that_ignores_its_limits_is_killed(own: Sandbox) -> None:
    """As one would that was taken over: it told its id, and then nothing comes."""
    own.limits = Limits(wall_s=-1.9)  # 0.1 s to answer
    stuck = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.sendall(b"%d\n" % stuck.pid)
        answer = own._exchange(mine, b"{}\n")
    assert answer is not None
    assert "takes longer" in answer["error"]
    assert stuck.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "answer",
    [b"nonsense", b"[]", b'{"kind": "image"}', b'{"kind": "door", "width": 1}', b"{" * 100_000,
     b'{"kind":"image","width":-1,"height":1,"frames":1,"fps":null,"duration_s":0,"codec":"x"}',
     b'{"kind":"image","width":1,"height":1,"frames":1,"fps":NaN,"duration_s":0,"codec":"x"}',
     b'{"kind":"image","width":1e999,"height":1,"frames":1,"fps":1,"duration_s":0,"codec":"x"}'],
)  # fmt: skip
def test_hostile_answers_are_not_believed(
    own: Sandbox, tmp_path: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hand_over(theirs: socket.socket) -> None:
        copy = theirs.dup()

        def speak() -> None:
            with copy, contextlib.suppress(BrokenPipeError):  # they may have heard enough
                copy.sendall(b"%d\n" % 2**22)
                copy.sendall(answer + b"\n")

        threading.Thread(target=speak).start()

    monkeypatch.setattr(own, "_hand_over", hand_over)
    with pytest.raises(MediaError, match="crash"):
        own.probe(written(tmp_path, picture()))


def test_dead_helper_is_replaced(own: Sandbox, tmp_path: Path) -> None:
    path = written(tmp_path, picture())
    own.probe(path)
    first = own.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert own.probe(path).kind == "image"
    assert own.pid not in (None, first)


def test_helper_that_does_not_start(own: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ResourceError, match="does not start"):
        own.probe(written(tmp_path, picture()))
    assert own.pid is None


def test_helper_is_not_shared_with_a_fork(own: Sandbox, tmp_path: Path) -> None:
    own.probe(written(tmp_path, picture()))
    own._owner = -1  # as it looks from a child of this process
    kept = (own._helper, own._control)
    assert own.probe(tmp_path / "file").kind == "image"
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[0].poll() is None, "the parent's helper is left alone"
    kept[1].close()
    assert kept[0].wait(10) == 0, "a helper ends when nobody can ask it any more"


def test_many_at_once(tmp_path: Path) -> None:
    paths = [written(tmp_path, picture(size=(16 + i, 16)), str(i)) for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert [p.width for p in pool.map(sandbox.probe, paths)] == [16 + i for i in range(24)]


def test_nothing_secret_is_in_its_environment(own: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    own.warm()
    assert b"secret" not in Path(f"/proc/{own.pid}/environ").read_bytes()


def test_helper_holds_no_files_of_ours(own: Sandbox, tmp_path: Path) -> None:
    with (tmp_path / "open").open("wb"):
        own.probe(written(tmp_path, picture()))
        held = [os.readlink(f"/proc/{own.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{own.pid}/fd")]
    assert not [name for name in held if str(tmp_path) in name]


@pytest.mark.parametrize(
    ("head", "mime"),
    [
        (b"\x00\x00\x00\x20ftypisom", "video/mp4"),
        (b"\x00\x00\x00\x14ftypqt  ", "video/quicktime"),
        (b"\x00\x00\x00\x08wide\x00\x00", "video/quicktime"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm", "video/webm"),
        (b"\x1aE\xdf\xa3\xa3B\x86\x81\x01B\x82\x88matroska", "video/x-matroska"),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "video/x-msvideo"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", ""),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", ""),
        (b"ID3\x04", ""),
        (b"PK\x03\x04", ""),
        (b"G" + bytes(187) + b"G" + bytes(10), "video/mp2t"),
    ],
)
def test_sniffing(head: bytes, mime: str) -> None:
    assert sniff.mime_of(head) == mime


def test_webm_is_told_from_matroska(tmp_path: Path) -> None:
    import av

    for format, mime in (("webm", "video/webm"), ("matroska", "video/x-matroska")):
        file = io.BytesIO()
        with av.open(file, "w", format=format) as container:
            stream = container.add_stream("libvpx", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32)))
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert sandbox.probe(written(tmp_path, file.getvalue())).mime == mime
