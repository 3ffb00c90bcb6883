"""What the web process does besides answering: housekeeping and webhooks, each on a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import sqlalchemy as sa

from mutoscope.jobs import assets, batching, housekeeping, webhooks
from mutoscope.media import sandbox
from mutoscope.server.context import Context

log = logging.getLogger("mutoscope.server")

SWEEP_S = 5.0
DELIVER_S = 0.5
ORPHANS_S = 3600.0
STOP_S = 10.0


class Loops:
    """Started and stopped by the app. A failure is logged, and the loop goes on."""

    def __init__(self, ctx: Context, render: webhooks.Render) -> None:
        self._stop = threading.Event()
        settings = ctx.settings
        self._threads = [
            self._loop("housekeeping", SWEEP_S, lambda: housekeeping.sweep(ctx.db, settings)),
            self._loop("batches", SWEEP_S, lambda: batching.go_on_with_left(ctx.db, ctx.service)),
            self._loop("webhooks", DELIVER_S, lambda: webhooks.deliver_due(
                ctx.db, settings, render=render, should_stop=self._stop.is_set)),
            self._loop("orphans", ORPHANS_S, lambda: _sweep_orphans(ctx)),
        ]  # fmt: skip

    def start(self) -> None:
        sandbox.shared().warm()  # its helper takes a moment to start: the first upload need not wait
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(STOP_S)
        sandbox.close()

    def _loop(self, name: str, every_s: float, work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            while not self._stop.is_set():
                try:
                    work()
                except sa.exc.OperationalError as e:
                    log.warning("%s: the database: %s", name, e.orig)
                except Exception:
                    log.exception("%s failed; it is tried again", name)
                self._stop.wait(every_s)

        return threading.Thread(target=run, name=name, daemon=True)


def _sweep_orphans(ctx: Context) -> None:
    with ctx.db.read() as tx:
        assets.sweep_orphans(tx, data_dir=ctx.settings.data_dir)
    housekeeping.sweep_leftovers(ctx.db, ctx.settings)
