"""The one way in: who asks, what they sent, one transaction, and errors in the caller's own dialect.

    @api.post("/things")
    async def create(request: Request) -> Response:
        def parse(body: Any) -> Thing: ...                       # no database; files are looked into here
        def act(tx: Tx, caller: Caller, thing: Thing) -> Reply: ...
        return await edge.write(ctx, request, parse, act, DIALECT)

`write` runs `act` in one write transaction together with the Idempotency-Key's row. So a POST has happened with its
stored answer, or not at all; a duplicate under way waits for the first. Everything blocking runs on threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import sqlalchemy as sa
from fastapi import Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from mutoscope.errors import MutoscopeError
from mutoscope.jobs import accounts, errors, idempotency, plainjson
from mutoscope.jobs.checkpoints import checkpoint
from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import Caller
from mutoscope.server.context import Context

log = logging.getLogger("mutoscope.server")
Parsed = TypeVar("Parsed")
LINES = ("application/jsonl", "application/x-ndjson", "application/jsonlines")
AT_ONCE = 24
"""Requests that are worked on at the same time; more wait their turn."""
SEEN_EVERY_S = 60.0
NO_ROOM = ("disk is full", "No space left on device")
"""In the words of SQLite and PostgreSQL, which undo the whole transaction then."""
UNSURE = "Something went wrong when the request was carried out, or after: it may have had its effect."


class BodyTooLarge(errors.JobsError):
    """The body is larger than this server takes."""

    code = "too_large"


class MethodNotAllowed(errors.JobsError):
    """The route exists, but not with this method."""

    code = "method_not_allowed"


class Busy(errors.JobsError):
    """The database did not answer in time; nothing was changed."""

    code = "busy"
    retry_after_s = 1.0


class Full(Busy):
    """The database found no room on its disk; nothing was changed."""

    code = "storage_full"
    retry_after_s = 60.0


class Unsure(MutoscopeError):
    """It went wrong while, or after, the request was carried out: the caller has to look."""

    code = "unsure"


@dataclass(frozen=True)
class Reply:
    """An answer: `body` is JSON-able, bytes, or None for an empty one."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"


@dataclass(frozen=True)
class Dialect:
    """A vendor's way of saying what went wrong."""

    name: str
    error: Callable[[Exception], Reply]


STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (errors.Unauthorized, 401),
    (errors.OutOfCredits, 402),
    (errors.Forbidden, 403),
    (errors.NotFound, 404),
    (MethodNotAllowed, 405),
    (errors.Conflict, 409),
    (BodyTooLarge, 413),
    (errors.IdempotencyMismatch, 422),
    (errors.LimitExceeded, 429),
    (Busy, 503),
    (Unsure, 500),
    (errors.JobsError, 400),
    (MutoscopeError, 400),
)


def status_of(error: Exception) -> int:
    """The usual HTTP status of an error; a dialect may have its own."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def sentence(error: Exception) -> str:
    """What to tell the caller: nothing of what nobody foresaw."""
    if isinstance(error, MutoscopeError):
        return str(error)
    return "Something went wrong inside of the server; nothing was changed. The log has the details."


# -- in ------------------------------------------------------------------------------------------------------


async def write(
    ctx: Context,
    request: Request,
    parse: Callable[[Any], Parsed],
    act: Callable[[Tx, Caller, Parsed], Reply],
    dialect: Dialect,
    *,
    max_bytes: int | None = None,
    before: Callable[[Tx, Caller, Parsed], Parsed] | None = None,
    after: Callable[[Reply], Awaitable[None]] | None = None,
) -> Response:
    """A request that changes something. `parse` gets the JSON, the FormData of a multipart body, the text of a body of
    JSON Lines, or None.

    `before` may look around first, where nobody has to wait for it. `after` may wait for something once all is written;
    it holds no thread.

    What goes wrong once a POST without an Idempotency-Key may have been carried out tells SDKs not to repeat it.
    """
    would_double = fresh = False

    def work(body: _Body) -> Reply:
        nonlocal would_double, fresh
        caller = _caller(ctx, request)
        parsed = parse(body.value(dialect))
        if before is not None:
            with ctx.db.read() as tx:
                parsed = before(tx, caller, parsed)
        key = request.headers.get("idempotency-key") if request.method == "POST" else None
        asked = f"?{request.url.query}" if request.url.query else ""  # options may be there
        route = f"{request.method} {request.url.path}{asked}"
        with ctx.db.write() as tx:
            if key is not None:
                stored = idempotency.begin(tx, caller.account.id, key, route, body.digest)
                if stored is not None:
                    again = {**stored.headers, "idempotency-replayed": "true"}
                    return Reply(stored.status, stored.body.encode() or None, again)
            reply = act(tx, caller, parsed)
            if key is not None:
                text = _encode(reply).decode() if not isinstance(reply.body, bytes) else ""
                idempotency.keep(tx, caller.account.id, key, reply.status, reply.headers, text)
            would_double = key is None and request.method == "POST"
        checkpoint("accepted")
        fresh = True
        return reply

    async def answer() -> Reply:
        body = await _read(request, max_bytes or ctx.settings.max_body_bytes)
        try:
            reply = await _on_thread(lambda: work(body))
        finally:
            await body.close()
        if after is not None and fresh:
            await after(reply)
        return reply

    return await _guarded(request, answer, dialect, lambda: would_double)


async def read(
    ctx: Context, request: Request, act: Callable[[Tx, Caller], Reply], dialect: Dialect
) -> Response:
    """A request that changes nothing."""

    def work() -> Reply:
        caller = _caller(ctx, request)
        with ctx.db.read() as tx:
            return act(tx, caller)

    return await _guarded(request, lambda: _on_thread(work), dialect)


async def caller_of(ctx: Context, request: Request) -> Caller:
    """Who asks, for handlers that stream."""
    return await _on_thread(lambda: _caller(ctx, request))


async def guarded(request: Request, answer: Callable[[], Any], dialect: Dialect) -> Response:
    """Run an async function that returns a Reply or a Response; errors in the dialect."""
    return await _guarded(request, answer, dialect)


async def on_thread(work: Callable[[], Parsed]) -> Parsed:
    """Run something that blocks."""
    return await _on_thread(work)


def respond(reply: Reply) -> Response:
    """The reply as a response."""
    if isinstance(reply.body, Response):
        return reply.body
    media_type = None if reply.body is None else reply.media_type
    return Response(_encode(reply), reply.status, dict(reply.headers), media_type)


def refuse(error: Exception, dialect: Dialect) -> Response:
    """The error in the dialect, with the headers that tell SDKs whether to try again."""
    reply = dialect.error(error)
    headers = dict(reply.headers)
    retry = getattr(error, "retry_after_s", None)
    if retry is not None:
        headers.setdefault("retry-after", str(max(1, round(retry))))
        headers.setdefault("x-should-retry", "true" if retry <= 60 else "false")
    elif reply.status in (409, 422) or isinstance(error, Unsure):  # the SDKs would try again
        headers.setdefault("x-should-retry", "false")
    return respond(Reply(reply.status, reply.body, headers, reply.media_type))


_limiter: anyio.CapacityLimiter | None = None


async def _on_thread(work: Callable[[], Parsed]) -> Parsed:
    global _limiter
    if _limiter is None:
        _limiter = anyio.CapacityLimiter(AT_ONCE)
    return await anyio.to_thread.run_sync(work, limiter=_limiter)


def _check_text(*texts: str) -> None:
    """Parts of a request that end up in the database."""
    try:
        plainjson.check(list(texts))
    except ValueError as e:
        raise errors.InvalidRequest(f"The request cannot be taken: {e}.") from e


async def _guarded(
    request: Request,
    answer: Callable[[], Any],
    dialect: Dialect,
    would_double: Callable[[], bool] = lambda: False,
) -> Response:
    """`would_double`: whether a repeat could do the same twice, by what has happened up to now."""
    try:
        _check_text(request.url.path, *request.query_params.values())
        made = await answer()
        return made if isinstance(made, Response) else respond(made)
    except MutoscopeError as e:
        return refuse(e, dialect)
    except sa.exc.OperationalError as e:
        log.warning("the database: %s", e.orig)
        if any(words in str(e.orig) for words in NO_ROOM):
            hint = "Whoever runs the server has to free some; jobs that were accepted go on then."
            return refuse(Full("The server's disk is full; nothing was changed.", hint=hint), dialect)
        if would_double():
            return refuse(Unsure(UNSURE, hint="Look whether it is there before you send it again."), dialect)
        return refuse(Busy("The database is busy; nothing was changed.", hint="Try again."), dialect)
    except ClientDisconnect:
        return Response(status_code=400)
    except Exception as e:
        log.exception("%s %s failed", request.method, request.url.path)
        if would_double():
            return refuse(Unsure(UNSURE, hint="Look whether it is there before you send it again."), dialect)
        return refuse(e, dialect)


# -- who -----------------------------------------------------------------------------------------------------

_seen: dict[str, float] = {}
_buckets: dict[str, tuple[float, float]] = {}
_lock = threading.Lock()


def _caller(ctx: Context, request: Request) -> Caller:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise errors.Unauthorized("No API key was sent.", hint="Send the header Authorization: Bearer KEY.")
    with ctx.db.read() as tx:
        caller = accounts.authenticate(tx, secret.strip())
    if request.method not in ("GET", "HEAD") and not {"jobs", "admin"} & set(caller.scopes):
        raise errors.Forbidden("This API key may only read.")
    _rate_limit(ctx, caller.key_id)
    now = time.monotonic()
    if now - _seen.get(caller.key_id, -SEEN_EVERY_S) >= SEEN_EVERY_S:
        _seen[caller.key_id] = now
        with ctx.db.write() as tx:
            accounts.used(tx, caller.key_id)
    return caller


def _rate_limit(ctx: Context, key_id: str) -> None:
    """A token bucket for each key that holds the requests of two seconds."""
    rate = ctx.settings.rate_limit_per_s
    if not rate:
        return
    now = time.monotonic()
    with _lock:
        tokens, at = _buckets.get(key_id, (max(1.0, 2 * rate), now))
        tokens = min(max(1.0, 2 * rate), tokens + (now - at) * rate)
        _buckets[key_id] = (tokens - 1 if tokens >= 1 else tokens, now)
    if tokens < 1:
        raise errors.LimitExceeded(
            f"More than {rate:g} requests a second.", retry_after_s=(1 - tokens) / rate, hint="Slow down."
        )


# -- what ----------------------------------------------------------------------------------------------------


@dataclass
class _Body:
    """What was sent: raw bytes, and the form if it is one."""

    raw: bytes
    form: FormData | None = None
    parts: tuple[tuple[str, str], ...] = ()
    is_lines: bool = False  # JSON Lines: given on as text

    @property
    def digest(self) -> str:
        """Equal for equal requests; boundaries of multipart bodies do not count."""
        what = json.dumps(self.parts).encode() if self.form is not None else self.raw
        return hashlib.sha256(what).hexdigest()

    def value(self, dialect: Dialect) -> Any:
        if self.form is not None:
            return self.form
        if self.is_lines:
            return self.raw.decode("utf-8", "replace")
        if not self.raw.strip():
            return None
        try:
            return plainjson.loads(self.raw)
        except ValueError as e:
            raise errors.InvalidRequest(
                f"The body is not JSON: {e}.", hint="Send an object with Content-Type: application/json."
            ) from e

    async def close(self) -> None:
        if self.form is not None:
            await self.form.close()


async def limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes.

    Raises:
        BodyTooLarge: as soon as it is known.
    """
    too_large = BodyTooLarge(f"The body has more than {max_bytes} bytes.", hint="Upload large files first.")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:18]) > max_bytes:
        raise too_large
    got = 0
    async for chunk in request.stream():
        got += len(chunk)
        if got > max_bytes:
            raise too_large
        yield chunk


async def read_form(request: Request, max_bytes: int) -> FormData:
    """A multipart body; files are kept on disk when large."""
    try:
        return await MultiPartParser(
            request.headers, limited(request, max_bytes), max_part_size=max_bytes
        ).parse()
    except (MultiPartException, KeyError) as e:
        raise errors.InvalidRequest(f"The body is not multipart/form-data: {e}.") from e


async def _read(request: Request, max_bytes: int) -> _Body:
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        form = await read_form(request, max_bytes)
        parts = []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                digest = hashlib.sha256(await value.read()).hexdigest()
                await value.seek(0)
                parts.append((name, f"{value.filename} {digest}"))
            else:
                parts.append((name, value))
            _check_text(*parts[-1])
        return _Body(b"", form, tuple(parts))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    raw = b"".join([chunk async for chunk in limited(request, max_bytes)])
    return _Body(raw, is_lines=kind in LINES)


def _encode(reply: Reply) -> bytes:
    if reply.body is None:
        return b""
    if isinstance(reply.body, bytes):
        return reply.body
    return json.dumps(reply.body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


__all__ = [
    "BodyTooLarge",
    "Busy",
    "Dialect",
    "Full",
    "MethodNotAllowed",
    "Reply",
    "Unsure",
    "caller_of",
    "guarded",
    "limited",
    "on_thread",
    "read",
    "read_form",
    "refuse",
    "respond",
    "sentence",
    "status_of",
    "write",
]  # fmt: skip
