"""Pictures and clips, good and hostile, and hosts on this machine that serve them well or badly."""

from __future__ import annotations

import io
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import trustme
from PIL import Image

from mutoscope.media import sandbox
from mutoscope.media.write import VideoWriter


def picture(format: str = "PNG", size: tuple[int, int] = (48, 32), **options: Any) -> bytes:
    """A picture with content."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def animation(frames: int = 3) -> bytes:
    file = io.BytesIO()
    shots = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(frames)]
    shots[0].save(file, "GIF", save_all=True, append_images=shots[1:], duration=100)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_bomb(width: int, height: int) -> bytes:
    """A small file that says it is a huge picture, and is: zeros compress a thousandfold."""
    header = png_chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    packer, rows = zlib.compressobj(9), []
    row = bytes(1 + 3 * width)
    rows = [packer.compress(row) for _ in range(height)] + [packer.flush()]
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"".join(rows)) + png_chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An MP4 of 9 frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    rng = np.random.default_rng(1)
    with VideoWriter(path, width=64, height=48, fps=16.0) as writer:
        for _ in range(9):
            writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return path.read_bytes()


@pytest.fixture(scope="session", autouse=True)
def sandbox_ends() -> Iterator[None]:
    yield
    sandbox.close()


Serve = Callable[[BaseHTTPRequestHandler], None]


class Host:
    """A web server on 127.0.0.1 that does what its paths are given to do, and counts every connection."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.paths: dict[str, Serve] = {}
        self.connections = 0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                serve = outer.paths.get(self.path.partition("?")[0])
                if serve is None:
                    self.send_error(404)
                    return
                try:
                    serve(self)
                except OSError:  # the client has had enough
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                outer.connections += 1
                return connection, address

            def finish_request(self, request: Any, client_address: Any) -> None:
                if tls is not None:
                    try:
                        request = tls.wrap_socket(request, server_side=True)
                    except OSError:  # the client does not trust us
                        return
                try:
                    super().finish_request(request, client_address)
                except OSError:
                    pass
                finally:
                    request.close()

        self.server = Server(("127.0.0.1", 0), Handler)
        self.scheme = "https" if tls is not None else "http"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def file(self, path: str, data: bytes, *, mime: str = "", length: bool = True, **headers: str) -> None:
        """Serve bytes; without `length` the end is the end of the connection."""

        def serve(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            if mime:
                request.send_header("Content-Type", mime)
            if length:
                request.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                request.send_header(name.replace("_", "-"), value)
            request.end_headers()
            request.wfile.write(data)

        self.paths[path] = serve

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def canary() -> Iterator[Host]:
    """Something inside that must never be reached."""
    canary = Host()
    canary.file("/", picture(), mime="image/png")
    yield canary
    canary.close()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure_host(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """media.example over TLS, with a certificate that is trusted."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("media.example").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    monkeypatch.setattr("mutoscope.jobs.pinned._tls", lambda: client_side)
    host = Host(server_side)
    yield host
    host.close()
