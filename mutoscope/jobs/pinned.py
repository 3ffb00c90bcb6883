"""One HTTP exchange with addresses that were checked, and nobody else.

The name is looked up once (`addresses.resolve`) and connected to by address; Host and TLS keep the name, so that
certificates are checked against it. No proxy, no redirect, no content decoding, no connection kept. One deadline
covers everything, so that a server that sends a byte now and then cannot hold a thread.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpcore
import httpx

from mutoscope.jobs import addresses
from mutoscope.jobs.addresses import Policy, Resolver, Target

SLICE_S = 0.25
"""How often a wait looks whether it should stop."""


class Unreachable(Exception):
    """The exchange failed on the way. `reason` is half a sentence, to put after the URL."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.timed_out = timed_out


class Stopped(Exception):
    """`should_stop` said so."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """Status, headers (names in lower case, the last one wins) and the body as it comes."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


@contextmanager
def request(
    method: str,
    url: str,
    *,
    policy: Policy,
    timeout_s: float,
    headers: Mapping[str, str],
    content: bytes | None = None,
    resolver: Resolver | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Response]:
    """Send one request; the connection is closed at the end of the block.

    Raises:
        Refused: the policy forbids the URL or one of its addresses.
        Unreachable: no connection, no valid answer, or not within `timeout_s` in all.
        Stopped: `should_stop()` became true.
    """
    deadline = _Deadline(timeout_s, should_stop)
    target = addresses.parse(url, policy)
    checked = addresses.resolve(target, policy, resolver)
    sent = {"Host": target.host_header, "Accept-Encoding": "identity", "Connection": "close", **headers}
    pool = httpcore.ConnectionPool(
        ssl_context=_tls() if target.scheme == "https" else None,
        network_backend=_Pinned(checked, deadline),
        max_connections=1,
    )
    with pool, _explained(target, timeout_s):
        place = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        with pool.stream(method, place, headers=list(sent.items()), content=content) as answer:
            yield Response(
                status=answer.status,
                headers={k.decode("latin-1").lower(): v.decode("latin-1") for k, v in answer.headers},
                chunks=iter(answer.iter_stream()),
            )


@contextmanager
def _explained(target: Target, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except httpcore.TimeoutException as e:
        raise Unreachable(f"did not answer within {timeout_s:g} s", timed_out=True) from e
    except httpcore.ConnectError as e:
        text = (
            "its TLS certificate is not valid" if "CERTIFICATE_VERIFY" in str(e) else "cannot be connected to"
        )
        raise Unreachable(f"{text} ({target.host_header})") from e
    except httpcore.RemoteProtocolError as e:
        raise Unreachable("closed the connection or does not speak HTTP") from e
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as e:
        raise Unreachable("broke off the connection") from e


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class _Deadline:
    def __init__(self, seconds: float, should_stop: Callable[[], bool]) -> None:
        self.end = time.monotonic() + seconds
        self.should_stop = should_stop

    def left(self) -> float:
        """Seconds; never 0, which would mean not to wait at all."""
        if self.should_stop():
            raise Stopped
        left = self.end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("deadline")
        return left


class _Pinned(httpcore.NetworkBackend):
    """Connects to the given addresses, whatever the name is."""

    def __init__(self, checked: Sequence[str], deadline: _Deadline) -> None:
        self.checked = checked
        self.deadline = deadline
        self.real = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        failed: Exception = httpcore.ConnectError("no address")
        for i, address in enumerate(self.checked):
            share = self.deadline.left() / (len(self.checked) - i)  # a dead address leaves time for the next
            try:
                return _Timed(self.real.connect_tcp(address, port, timeout=share), self.deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as e:
                failed = e
        raise failed

    def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        raise httpcore.UnsupportedProtocol("a socket file")


class _Timed(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self.inner = inner
        self.deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            try:
                return self.inner.read(max_bytes, min(self.deadline.left(), SLICE_S))
            except httpcore.ReadTimeout:
                self.deadline.left()

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, self.deadline.left())

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inner = self.inner.start_tls(ssl_context, server_hostname, self.deadline.left())
        return _Timed(inner, self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)
