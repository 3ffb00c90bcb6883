"""Fetching what users name by URL: what is refused, what is limited, and that nothing inside is ever reached."""

from __future__ import annotations

import gzip
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpcore
import pytest

from mutoscope.errors import Cancelled
from mutoscope.jobs import addresses, fetch
from mutoscope.jobs.fetch import InputError
from mutoscope.jobs.model import Failure
from mutoscope.settings import Settings
from tests.service.inputs.conftest import Host, picture, png_bomb

OPEN = addresses.input_policy(Settings(allow_http_inputs=True, allow_private_hosts=("127.0.0.1",)))
STRICT = addresses.input_policy(Settings())
STRICT_HTTP = addresses.input_policy(Settings(allow_http_inputs=True))


def download(url: str, tmp_path: Path, **options: Any) -> fetch.Fetched:
    given = {"policy": OPEN, "max_bytes": 1 << 20, "timeout_s": 10.0, "field": "keyframes[0]", **options}
    return fetch.download(url, tmp_path / "input-0", **given)


def refused(url: str, tmp_path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        download(url, tmp_path, **options)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert caught.value.message.startswith("keyframes[0]: ")
    return caught.value


# -- nothing inside is reached -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "0.0.0.0", "0", "localhost",
     "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
     "user@127.0.0.1", "example.com@127.0.0.1", "127。0。0。1", "①②⑦.0.0.1"],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_canary_sees_nothing(canary: Host, tmp_path: Path, spelling: str, scheme: str) -> None:
    """With the system's own resolver: what the check lets pass, is connected to."""
    error = refused(f"{scheme}://{spelling}:{canary.port}/", tmp_path, policy=STRICT_HTTP, timeout_s=3.0)
    assert error.failure is Failure.INPUT_INVALID
    assert canary.connections == 0


def test_canary_can_be_seen(canary: Host, tmp_path: Path) -> None:
    """Or the test above could not fail."""
    assert download(canary.url("/"), tmp_path).probed.mime == "image/png"
    assert canary.connections == 1


def test_name_that_changes_its_address(canary: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that answers once with a public address and then with 127.0.0.1: it is asked once, and what it
    said is connected to."""
    asked: list[str] = []
    connected: list[str] = []

    def rebinding(name: str, port: int) -> list[str]:
        asked.append(name)
        return ["192.0.1.1"] if len(asked) == 1 else ["127.0.0.1"]

    def connect(self: Any, address: str, port: int, **options: Any) -> Any:
        connected.append(address)
        raise httpcore.ConnectError("no network in tests")

    monkeypatch.setattr("httpcore.SyncBackend.connect_tcp", connect)
    url = f"http://rebind.example:{canary.port}/"
    error = refused(url, tmp_path, policy=STRICT_HTTP, resolver=rebinding)
    assert error.failure is Failure.INPUT_UNREACHABLE
    assert (asked, connected) == (["rebind.example"], ["192.0.1.1"])
    assert refused(url, tmp_path, policy=STRICT_HTTP, resolver=rebinding).failure is Failure.INPUT_INVALID
    assert connected == ["192.0.1.1"]
    assert canary.connections == 0


def test_connects_to_what_was_checked_and_not_to_the_name(host: Host, tmp_path: Path) -> None:
    """The system does not know this name at all."""
    policy = addresses.input_policy(Settings(allow_http_inputs=True, allow_private_hosts=("media.example",)))
    host.file("/a.png", picture())
    download(
        host.url("/a.png?x=1", "media.example"), tmp_path, policy=policy, resolver=lambda *_: ["127.0.0.1"]
    )
    ((path, headers),) = host.requests
    assert path == "/a.png?x=1"
    assert headers["host"] == f"media.example:{host.port}"
    assert headers["accept-encoding"] == "identity"
    assert headers["user-agent"].startswith("Mutoscope/")


def test_dead_address_leaves_time_for_the_next(host: Host, tmp_path: Path) -> None:
    policy = addresses.input_policy(Settings(allow_http_inputs=True, allow_private_hosts=("media.example",)))
    host.file("/a.png", picture())
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.2", host.port))
        found = download(
            host.url("/a.png", "media.example"), tmp_path, policy=policy,
            resolver=lambda *_: ["127.0.0.2", "127.0.0.1"],
        )  # fmt: skip
    assert found.probed.mime == "image/png"


def test_redirect_inwards_is_not_followed(host: Host, canary: Host, tmp_path: Path) -> None:
    for status in (301, 302, 303, 307, 308):
        target = canary.url("/") if status != 308 else "http://169.254.169.254/latest/meta-data/"

        def serve(request: BaseHTTPRequestHandler, status: int = status, target: str = target) -> None:
            request.send_response(status)
            request.send_header("Location", target)
            request.send_header("Content-Length", "0")
            request.end_headers()

        host.paths["/a.png"] = serve
        error = refused(host.url("/a.png"), tmp_path)
        assert f"answered {status}" in error.message
        assert "Redirects are not followed" in error.hint
        assert str(canary.port) not in str(error), "where it led is not told"
    assert canary.connections == 0


def test_proxy_settings_are_not_used(
    host: Host, canary: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, canary.url(""))
    host.file("/a.png", picture())
    download(host.url("/a.png"), tmp_path)
    assert canary.connections == 0


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://127.0.0.1/x", "ftp://example.com/a.png"])
def test_other_schemes(tmp_path: Path, url: str) -> None:
    assert refused(url, tmp_path).failure is Failure.INPUT_INVALID


# -- TLS -----------------------------------------------------------------------------------------------------


def named(*names: str) -> addresses.Policy:
    return addresses.input_policy(Settings(allow_private_hosts=names))


def test_tls_goes_by_the_name(secure_host: Host, tmp_path: Path) -> None:
    secure_host.file("/a.png", picture())
    found = download(
        secure_host.url("/a.png", "media.example"), tmp_path, policy=named("media.example"),
        resolver=lambda *_: ["127.0.0.1"],
    )  # fmt: skip
    assert found.path == tmp_path / "input-0.png"


@pytest.mark.parametrize("name", ["other.example", "127.0.0.1"])
def test_certificate_of_another_name(secure_host: Host, tmp_path: Path, name: str) -> None:
    secure_host.file("/a.png", picture())
    error = refused(
        secure_host.url("/a.png", name), tmp_path, policy=named(name), resolver=lambda *_: ["127.0.0.1"]
    )
    assert "certificate" in error.message
    assert error.failure is Failure.INPUT_UNREACHABLE
    assert secure_host.requests == []


# -- limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [True, False])
def test_size_is_limited_with_and_without_content_length(host: Host, tmp_path: Path, length: bool) -> None:
    host.file("/a.png", picture(size=(400, 400)), length=length)
    error = refused(host.url("/a.png"), tmp_path, max_bytes=100_000)
    assert error.failure is Failure.INPUT_INVALID
    assert "more than 100000 bytes" in error.message


def test_endless_body_ends_at_the_limit(host: Host, tmp_path: Path) -> None:
    sent = 0

    def serve(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        block = picture() + bytes(1 << 16)
        while not host.release.is_set():
            request.wfile.write(block)
            sent += len(block)

    host.paths["/endless.png"] = serve
    assert "more than" in refused(host.url("/endless.png"), tmp_path, max_bytes=1 << 20).message
    assert sent < 1 << 24, "reading went on for long after the limit"


def test_lying_content_length(host: Host, tmp_path: Path) -> None:
    def serve(request: BaseHTTPRequestHandler) -> None:
        data = picture()
        request.send_response(200)
        request.send_header("Content-Length", str(len(data) + 100))
        request.end_headers()
        request.wfile.write(data)
        request.close_connection = True

    host.paths["/short.png"] = serve
    assert refused(host.url("/short.png"), tmp_path).failure is Failure.INPUT_UNREACHABLE


def test_compressed_body_is_not_unpacked(host: Host, tmp_path: Path) -> None:
    host.file("/bomb.png", gzip.compress(bytes(50 << 20)), Content_Encoding="gzip")
    assert "compressed (gzip)" in refused(host.url("/bomb.png"), tmp_path).message


def test_slow_loris_meets_the_deadline(host: Host, tmp_path: Path) -> None:
    """A byte now and then keeps every single wait short; the sum counts."""

    def serve(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        for byte in picture():
            request.wfile.write(bytes([byte]))
            if host.release.wait(0.05):
                return

    host.paths["/slow.png"] = serve
    begin = time.monotonic()
    error = refused(host.url("/slow.png"), tmp_path, timeout_s=0.5)
    assert error.message.endswith("did not answer within 0.5 s.")
    assert error.failure is Failure.INPUT_UNREACHABLE
    assert time.monotonic() - begin < 3


def test_slow_headers_meet_the_deadline(host: Host, tmp_path: Path) -> None:
    def serve(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not host.release.wait(0.05):
            request.wfile.write(b"X: y\r\n")

    host.paths["/slow.png"] = serve
    assert "within 0.3 s" in refused(host.url("/slow.png"), tmp_path, timeout_s=0.3).message


def test_endless_headers(host: Host, tmp_path: Path) -> None:
    def serve(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not host.release.is_set():
            request.wfile.write(b"X: " + b"y" * 1000 + b"\r\n")

    host.paths["/headers.png"] = serve
    assert refused(host.url("/headers.png"), tmp_path).failure is Failure.INPUT_UNREACHABLE


def test_silent_host_is_left_when_the_job_is_cancelled(host: Host, tmp_path: Path) -> None:
    arrived, cancelled = threading.Event(), threading.Event()

    def serve(request: BaseHTTPRequestHandler) -> None:
        arrived.set()
        cancelled.set()
        host.release.wait()

    host.paths["/silent.png"] = serve
    begin = time.monotonic()
    with pytest.raises(Cancelled):
        download(host.url("/silent.png"), tmp_path, timeout_s=60.0, should_stop=cancelled.is_set)
    assert arrived.is_set()
    assert time.monotonic() - begin < 5
    assert list(tmp_path.iterdir()) == []


def test_reset_and_nobody_there(host: Host, tmp_path: Path) -> None:
    def serve(request: BaseHTTPRequestHandler) -> None:
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()

    host.paths["/reset.png"] = serve
    assert refused(host.url("/reset.png"), tmp_path).failure is Failure.INPUT_UNREACHABLE
    url = host.url("/reset.png")
    host.close()
    assert "cannot be connected to" in refused(url, tmp_path).message


def test_unknown_name(tmp_path: Path) -> None:
    error = refused("https://no-such-host.invalid/a.png", tmp_path, policy=STRICT)
    assert error.failure is Failure.INPUT_UNREACHABLE
    assert "looked up" in error.message


@pytest.mark.parametrize("status", [204, 401, 403, 404, 500, 503])
def test_other_answers(host: Host, tmp_path: Path, status: int) -> None:
    def serve(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()

    host.paths["/a.png"] = serve
    error = refused(host.url("/a.png?signature=secret"), tmp_path)
    assert f"answered {status}, 200 expected" in error.message
    assert "secret" not in error.message


# -- content -------------------------------------------------------------------------------------------------


def test_content_decides_and_not_name_or_type(host: Host, tmp_path: Path) -> None:
    host.file("/photo.exe", picture("JPEG"), mime="text/html")
    found = download(host.url("/photo.exe"), tmp_path)
    assert (found.probed.mime, found.path.name) == ("image/jpeg", "input-0.jpg")


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", b"%PDF-1.4", b"MZ" + bytes(5000), b"#EXTM3U\nhttp://127.0.0.1/a.ts\n",
     b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", picture()[:200],
     b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x00\x00\x00\x18ftypmp42" + bytes(100)],
    ids=["empty", "html", "pdf", "exe", "playlist", "svg", "cut", "png-like", "mp4-like"],
)  # fmt: skip
def test_what_is_no_picture_or_clip(host: Host, tmp_path: Path, data: bytes) -> None:
    host.file("/a.png", data, mime="image/png")
    assert refused(host.url("/a.png"), tmp_path).failure is Failure.INPUT_INVALID


def test_wrong_type_is_noticed_after_the_first_bytes(host: Host, tmp_path: Path) -> None:
    def serve(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"<html>" + bytes(8192))
        host.release.wait()

    host.paths["/page"] = serve
    assert "no picture or clip" in refused(host.url("/page"), tmp_path).message


def test_clip_where_a_picture_is_expected(host: Host, tmp_path: Path, clip: bytes) -> None:
    host.file("/a.png", clip, mime="image/png")
    assert "video/mp4" in refused(host.url("/a.png"), tmp_path, kinds=("image",)).message
    assert download(host.url("/a.png"), tmp_path, kinds=("video",)).probed.frames == 9


def test_decompression_bomb(host: Host, tmp_path: Path) -> None:
    bomb = png_bomb(12_000, 12_000)
    assert len(bomb) < 1 << 20
    host.file("/bomb.png", bomb)
    assert "million pixels" in refused(host.url("/bomb.png"), tmp_path).message


def test_full_disk(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    host.file("/a.png", picture())
    monkeypatch.setattr("mutoscope.jobs.fetch._receive", full)
    error = refused(host.url("/a.png"), tmp_path)
    assert error.failure is Failure.STORAGE
    assert "No space left" in error.message
