"""A service of real processes with the fake runner, which can be stopped at named points and killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from mutoscope.fleet.local import is_alive
from mutoscope.jobs import accounts, ledger, migrations, workers
from mutoscope.jobs.checkpoints import VARIABLE
from mutoscope.jobs.database import Database
from mutoscope.settings import Settings
from tests.service.processes.conftest import House

ROOT = Path(__file__).parents[3]
LIMIT_S = 60.0
KEY = r"API key\s+(\S+)"


def wait_until(check: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """What `check` gives once it is true: asked again and again, since other processes make it so."""
    clock = threading.Event()
    for _ in range(int(limit_s / 0.01)):
        found = check()
        if found:
            return found
        clock.wait(0.01)
    raise AssertionError(f"{what}: not within {limit_s:g} s")


@dataclass
class Serving(House):
    """`mutoscope serve` in a process group of its own, and its database."""

    options: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    output: list[str] = field(default_factory=list)
    log: IO[str] | None = None
    reader: threading.Thread | None = None
    secret: str = ""

    @property
    def points(self) -> Path:
        return self.settings.data_dir.parent / "points"

    @property
    def environment(self) -> dict[str, str]:
        given = {f"MUTOSCOPE_{k.upper()}": v for k, v in self.options.items()}
        engine = {"MUTOSCOPE_ENGINE": "tests.service.fakes:FakeRunner", "MUTOSCOPE_PRELOAD": ""}
        return {**os.environ, **engine, **given, VARIABLE: str(self.points)}

    def command(self, *arguments: str) -> list[str]:
        data = ["--data-dir", str(self.settings.data_dir)]
        return [
            sys.executable,
            "-m",
            "mutoscope",
            "serve",
            "--port",
            "0",
            "--device",
            "cpu",
            *data,
            *arguments,
        ]

    def prepare(self) -> None:
        """The database as a first start makes it, with the account that pays."""
        self.settings.data_dir.mkdir(exist_ok=True)
        migrations.upgrade(self.db)
        with self.db.write() as tx:
            accounts.first_run(tx)
            ledger.grant(tx, "default", 1_000_000)

    def start(self) -> None:
        """Start it, and wait for its worker. The first time, its account gets credits."""
        first = not (self.settings.data_dir / "mutoscope.db").exists()
        self._finish_reading()
        if found := re.search(KEY, "".join(self.output)):  # it is printed only once, the URL each time
            self.secret = found[1]
        self.output.clear()
        self.log = (self.settings.data_dir.parent / "serve.log").open("a")
        self.process = subprocess.Popen(
            self.command(), cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.reader = threading.Thread(target=self._read, args=(self.process,))
        self.reader.start()
        self.worker_pid()
        if first:
            with self.db.write() as tx:
                ledger.grant(tx, "default", 1_000_000)

    def _finish_reading(self) -> None:
        """What an earlier process has left to read, and its log."""
        if self.reader is not None:
            self.reader.join()
        if self.log is not None:
            self.log.close()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self.output.append(line)

    def told(self, pattern: str) -> str:
        """The first group of what serve has printed, once it has."""
        found = wait_until(lambda: re.search(pattern, "".join(self.output)), pattern)
        return str(found[1])

    @property
    def url(self) -> str:
        return self.told(r"URL\s+(\S+)")

    @property
    def key(self) -> str:
        return self.secret or self.told(KEY)

    def worker_pid(self, other_than: int = 0) -> int:
        """Of the worker that is alive and idle or busy, once there is one."""

        def look() -> int:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"serve ended:\n{self.logged()}")
            if not (self.settings.data_dir / "mutoscope.db").exists() or not migrations.current(self.db):
                return 0
            with self.db.read() as tx:
                pids = [w.pid for w in workers.listing(tx) if w.state != "starting"]
            return next((p for p in pids if p != other_than and is_alive(p)), 0)

        return int(wait_until(look, "a worker"))

    def child(self, module: str) -> psutil.Process:
        """The running process of a module."""
        assert self.process is not None
        supervisor = psutil.Process(self.process.pid)

        def look() -> psutil.Process | None:
            for child in supervisor.children():
                try:
                    if module in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        return child
                except psutil.Error:
                    continue
            return None

        found: psutil.Process = wait_until(look, module)
        return found

    def arm(self, point: str) -> None:
        self.points.mkdir(exist_ok=True)
        (self.points / f"hit.{point}").unlink(missing_ok=True)
        (self.points / point).touch()

    def hit(self, point: str) -> int:
        """The process that stands still at the point, once one does."""
        path = self.points / f"hit.{point}"
        wait_until(path.exists, f"the point {point}")
        return int(path.read_text())

    def kill(self) -> None:
        """SIGKILL to the supervisor; waits until its children are gone too."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(children, timeout=10)
        assert not left
        self.process = None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """A signal to the supervisor; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(LIMIT_S)
        self.process = None
        return code

    def logged(self) -> str:
        return (self.settings.data_dir.parent / "serve.log").read_text()

    def end(self) -> None:
        super().end()
        if self.process is not None:
            self.kill()
        self._finish_reading()


@contextmanager
def serving(folder: Path, **options: str) -> Iterator[Serving]:
    """A service in `folder`, not started yet; options are settings."""
    data = folder / "data"
    quick = {"heartbeat_s": "0.3", "lease_s": "3", "cancel_grace_s": "1", "drain_s": "5", "max_crashes": "2"}
    settings = Settings(data_dir=data)
    made = Serving(settings, Database(settings.database), options={**quick, **options})
    try:
        yield made
    finally:
        made.end()
        made.db.close()
