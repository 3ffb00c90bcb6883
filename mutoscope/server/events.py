"""Server-sent events: one reader of the feed for all listeners of this process.

A listener is registered first, then gets what the database has after its Last-Event-ID, then what comes. So nothing is
missed and nothing comes twice. Event ids are the feed's numbers, valid across restarts and processes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import sqlalchemy as sa

from mutoscope.jobs import feed
from mutoscope.jobs.database import Database
from mutoscope.jobs.feed import FeedEvent
from mutoscope.server import edge

log = logging.getLogger("mutoscope.server")

LOOK_S = 0.2
"""How often the feed is read while somebody listens."""
HEARTBEAT_S = 15.0
RETRY_MS = 1000
QUEUE = 1000
"""Events that a slow listener may be behind; then its stream ends, and it comes back with its Last-Event-ID."""
WINDOW = 200
"""Rows that are read again: on PostgreSQL a lower number may be committed after a higher one."""
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(eq=False)
class Listener:
    """One stream."""

    account_id: str
    job_id: str | None
    queue: asyncio.Queue[tuple[int, str, bool] | None] = field(default_factory=lambda: asyncio.Queue(QUEUE))

    def wants(self, event: FeedEvent) -> bool:
        return event.account_id == self.account_id and self.job_id in (None, event.job_id)


def encode(event: FeedEvent) -> str:
    """As it goes over the wire."""
    data = {"job_id": event.job_id, "at": round(event.at, 3), **event.data}
    return f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


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
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._last = 0
        self._recent: deque[int] = deque(maxlen=4 * WINDOW)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="feed")

    async def close(self) -> None:
        """End every stream; whoever listens comes back."""
        self._closing = True
        for listener in list(self.listeners):
            self._end(listener)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def closing(self) -> None:
        """The process is about to stop: end streams now, from the event loop."""
        self._closing = True
        for listener in list(self.listeners):
            self._end(listener)

    async def listen(
        self, account_id: str, *, job_id: str | None = None, after: int | None = None
    ) -> AsyncIterator[str]:
        """The stream of a listener, from behind event `after` (None: a job's from its beginning, else from now)."""
        if job_id is not None and after is None:
            after = 0
        listener = Listener(account_id, job_id)
        self._add(listener)
        try:
            yield f"retry: {RETRY_MS}\n\n"
            seen = after or 0
            replayed: set[int] = set()
            while after is not None:
                rows = await edge.on_thread(lambda since=seen: self._replay(listener, since))  # type: ignore[misc]
                for event in rows:
                    seen = event.id
                    replayed.add(event.id)
                    yield encode(event)
                    if job_id is not None and ends(event):
                        return
                if not rows:
                    break
            while not self._closing:
                try:
                    item = await asyncio.wait_for(listener.queue.get(), HEARTBEAT_S)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if item is None:
                    break
                number, text, is_last = item
                if number not in replayed:
                    yield text
                if is_last and job_id is not None:
                    return
            yield ": the server stops or you are too slow, come back with Last-Event-ID\n\n"
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
        while True:
            if not self.listeners:
                self._wake.clear()
                self._last = 0
                await self._wake.wait()
            try:
                events = await edge.on_thread(self._look)
            except sa.exc.OperationalError as e:
                log.warning("the feed: %s", e.orig)
                events = []
            for event in events:
                self._hand_out(event)
            await asyncio.sleep(LOOK_S)

    def _look(self) -> list[FeedEvent]:
        with self.db.read() as tx:
            if not self._last:
                self._last = feed.last_id(tx)
                self._recent.extend(range(max(0, self._last - WINDOW), self._last + 1))
                return []
            rows = feed.after(tx, max(0, self._last - WINDOW), limit=WINDOW + 2000)
        known = set(self._recent)
        fresh = [event for event in rows if event.id not in known]
        self._recent.extend(event.id for event in fresh)
        self._last = max([self._last, *(event.id for event in fresh)])
        return fresh

    def _hand_out(self, event: FeedEvent) -> None:
        item: tuple[int, str, bool] | None = None
        everyone = [listener for listener in self.listeners if listener.job_id is None]
        for listener in (*self._by_job.get(event.job_id, ()), *everyone):
            if not listener.wants(event):
                continue
            item = item or (event.id, encode(event), ends(event))
            try:
                listener.queue.put_nowait(item)
            except asyncio.QueueFull:
                self._end(listener)
