"""Server-sent events: one reader of the feed for all listeners of this process.

A listener is registered first, then gets what the database has after its Last-Event-ID, then what comes. So nothing is
missed and nothing comes twice. Event ids are the feed's numbers, valid across restarts and processes.

What one look at the feed brings for a job is put into bytes once and sent to each of its listeners as one piece: a
thousand listeners cost a thousand writes, not a thousand times the work (docs/service-performance.md).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property

import sqlalchemy as sa

from mutoscope.jobs import feed
from mutoscope.jobs.database import Database
from mutoscope.jobs.feed import FeedEvent
from mutoscope.server import edge

log = logging.getLogger("mutoscope.server")

LOOK_S = 0.1
"""How often the feed is read while somebody listens."""
HEARTBEAT_S = 15.0
RETRY_MS = 1000
QUEUE = 500
"""Looks that a slow listener may be behind; then its stream ends, and it comes back with its Last-Event-ID."""
WINDOW = 200
"""Rows that are read again: on PostgreSQL a lower number may be committed after a higher one."""
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Piece:
    """Events for a stream, all of one look."""

    events: tuple[FeedEvent, ...]

    @cached_property
    def data(self) -> bytes:
        """As it goes over the wire; the same for all who get it."""
        return b"".join(map(encode, self.events))

    def beyond(self, number: int) -> Piece:
        """What is new to somebody who has seen everything up to this number."""
        if self.events[0].id > number:
            return self
        return Piece(tuple(event for event in self.events if event.id > number))


ALIVE = b": still here\n\n"


@dataclass(eq=False)
class Listener:
    """One stream. Its queue holds pieces, ALIVE, and None at the end."""

    account_id: str
    job_id: str | None
    queue: asyncio.Queue[Piece | bytes | None] = field(default_factory=lambda: asyncio.Queue(QUEUE))


def encode(event: FeedEvent) -> bytes:
    """As it goes over the wire."""
    data = {"job_id": event.job_id, "at": round(event.at, 3), **event.data}
    text = f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
    return text.encode()


def ends(event: FeedEvent) -> bool:
    """Whether nothing comes after it for its job."""
    return event.type == "state" and event.data.get("state") in TERMINAL


class Tail:
    """Reads the feed on a thread and hands events out. Started by the app; `close` ends all streams."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.listeners: set[Listener] = set()
        self._by_job: dict[str, set[Listener]] = {}
        self._wake = asyncio.Event()
        self._begun = asyncio.Event()  # from which number on events are handed out is settled
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._last: int | None = None
        self._recent: deque[int] = deque(maxlen=4 * WINDOW)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="feed")

    async def close(self) -> None:
        """End every stream; whoever listens comes back."""
        self.closing()
        if self._task is not None:  # it may be reading, so it is not cancelled but let go to its end
            await asyncio.gather(self._task, return_exceptions=True)

    def closing(self) -> None:
        """The process is about to stop: end streams now, from the event loop."""
        self._closing = True
        self._begun.set()
        self._wake.set()
        for listener in list(self.listeners):
            self._end(listener)

    async def listen(
        self, account_id: str, *, job_id: str | None = None, after: int | None = None
    ) -> AsyncIterator[bytes]:
        """The stream of a listener, from behind event `after` (None: a job's from its beginning, else from now)."""
        if job_id is not None and after is None:
            after = 0
        listener = Listener(account_id, job_id)
        self._add(listener)
        try:
            yield f"retry: {RETRY_MS}\n\n".encode()
            seen = after or 0
            await self._begun.wait()  # what is committed after a replay that came earlier would be lost
            while after is not None:
                rows = await edge.on_thread(lambda since=seen: self._replay(listener, since))  # type: ignore[misc]
                for event in rows:
                    seen = event.id
                    yield encode(event)
                    if job_id is not None and ends(event):
                        return
                if not rows:
                    break
            while not self._closing:
                item = await listener.queue.get()
                if item is None:
                    break
                if isinstance(item, bytes):
                    yield item
                    continue
                piece = item.beyond(seen)  # the tail may be behind a replay
                if piece.events:
                    seen = piece.events[-1].id
                    yield piece.data
                if job_id is not None and any(map(ends, item.events)):
                    return
            yield b": the server stops or you are too slow, come back with Last-Event-ID\n\n"
        finally:
            self._remove(listener)

    def _replay(self, listener: Listener, since: int) -> list[FeedEvent]:
        with self.db.read() as tx:
            return feed.after(tx, since, job_id=listener.job_id, account_id=listener.account_id)

    def _add(self, listener: Listener) -> None:
        self.listeners.add(listener)
        if listener.job_id is not None:
            self._by_job.setdefault(listener.job_id, set()).add(listener)
        self._wake.set()

    def _remove(self, listener: Listener) -> None:
        self.listeners.discard(listener)
        if listener.job_id is not None and listener.job_id in self._by_job:
            self._by_job[listener.job_id].discard(listener)
            if not self._by_job[listener.job_id]:
                del self._by_job[listener.job_id]

    def _end(self, listener: Listener) -> None:
        while listener.queue.full():
            listener.queue.get_nowait()
        listener.queue.put_nowait(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        alive_at = 0.0
        while not self._closing:
            if not self.listeners:
                self._wake.clear()
                self._last = None
                self._begun.clear()
                await self._wake.wait()
                alive_at = loop.time() + HEARTBEAT_S
            try:
                events = await edge.on_thread(self._look)
                self._begun.set()
            except sa.exc.OperationalError as e:
                log.warning("the feed: %s", e.orig)
                events = []
            self._hand_out(events)
            if loop.time() >= alive_at:
                alive_at = loop.time() + HEARTBEAT_S
                for listener in list(self.listeners):
                    self._give(listener, ALIVE)
            await asyncio.sleep(LOOK_S)

    def _look(self) -> list[FeedEvent]:
        with self.db.read() as tx:
            if self._last is None:
                self._last = feed.last_id(tx)
                self._recent.extend(range(max(0, self._last - WINDOW), self._last + 1))
                return []
            rows = feed.after(tx, max(0, self._last - WINDOW), limit=WINDOW + 2000)
        known = set(self._recent)
        fresh = [event for event in rows if event.id not in known]
        self._recent.extend(event.id for event in fresh)
        self._last = max([self._last, *(event.id for event in fresh)])
        return fresh

    def _hand_out(self, events: list[FeedEvent]) -> None:
        of_job: dict[tuple[str, str], list[FeedEvent]] = {}
        of_account: dict[str, list[FeedEvent]] = {}
        for event in events:
            of_job.setdefault((event.account_id, event.job_id), []).append(event)
            of_account.setdefault(event.account_id, []).append(event)
        for (account_id, job_id), mine in of_job.items():
            piece = Piece(tuple(mine))
            for listener in self._by_job.get(job_id, ()):
                if listener.account_id == account_id:
                    self._give(listener, piece)
        for account_id, mine in of_account.items():
            piece = Piece(tuple(mine))
            for listener in self.listeners:
                if listener.job_id is None and listener.account_id == account_id:
                    self._give(listener, piece)

    def _give(self, listener: Listener, item: Piece | bytes) -> None:
        try:
            listener.queue.put_nowait(item)
        except asyncio.QueueFull:
            self._end(listener)
