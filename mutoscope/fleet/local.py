"""The supervisor of one machine: a web process and a worker per device, kept alive.

It knows the database and processes, but neither HTTP nor torch, so there is little in it that can fail. It holds the
listening socket (a web process that is restarted loses no connection), notices at once when a worker dies and gives
its job back, kills workers that hang, and on SIGTERM lets everything finish.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import filelock
import psutil
import sqlalchemy as sa

from mutoscope.errors import RequestError
from mutoscope.jobs import queue, workers
from mutoscope.jobs.database import Database
from mutoscope.jobs.model import Failure, State
from mutoscope.jobs.schema import jobs
from mutoscope.settings import Settings

log = logging.getLogger("mutoscope.fleet")

WATCH_S = 0.5
"""How often jobs that run too long, and workers that do not beat, are looked for."""
KILL_AFTER_S = 5.0
"""What a process that was asked to end gets beyond `settings.drain_s`."""
FIRST_DELAY_S, MAX_DELAY_S = 0.25, 30.0
BUSY_DELAY_S = 5.0
"""The longest delay of a worker that came up and died over a job: others wait, and a job has only so many crashes."""
STEADY_S = 20.0
"""A process that lived that long is restarted at once, and its earlier failures are forgotten."""
BACKLOG = 2048


@dataclass
class Child:
    """A process that should run. `id` is the worker's id, new at every start; empty for the web process."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    is_worker: bool = False
    id: str = ""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0  # monotonic
    failures: int = 0
    start_at: float = 0.0  # monotonic: when it is started again
    killed_for: str = ""


class ServeLock:
    """One supervisor per data folder."""

    def __init__(self, settings: Settings) -> None:
        folder = settings.data_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(folder / "serve.lock")
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RequestError(
                f"{folder}: another `mutoscope serve` works in this data folder.",
                hint="Stop it first, or give this one a folder of its own with --data-dir.",
            ) from None
        except OSError as e:
            raise RequestError(
                f"{folder}: the data folder cannot be written ({e.strerror}).",
                hint="Choose another one with --data-dir.",
            ) from e

    def release(self) -> None:
        self.lock.release()


def listen(host: str, port: int) -> socket.socket:
    """The listening socket; raises RequestError if the address is taken or not ours."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as e:
        reason = "is in use" if e.errno == 98 else f"cannot be listened on ({e.strerror})"
        raise RequestError(
            f"{host}:{port} {reason}.", hint="Choose another port with --port (0: any free one)."
        ) from e
    return listener


def all_devices() -> tuple[str, ...]:
    """Every NVIDIA GPU, or the CPU, without loading torch."""
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ("cpu",)
    gpus = [line for line in told.stdout.splitlines() if line.startswith("GPU ")]
    return tuple(f"cuda:{i}" for i in range(len(gpus))) or ("cpu",)


@dataclass
class Supervisor:
    """Runs until a signal. `ready` is called once, when the web process answers for the first time."""

    settings: Settings
    db: Database
    listener: socket.socket
    devices: tuple[str, ...]
    ready: Callable[[], None] = lambda: None
    children: list[Child] = field(default_factory=list)
    signals: int = 0
    stopped_at: float | None = None

    @property
    def url(self) -> str:
        """Where this machine reaches the service."""
        host, port = self.listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Start everything, keep it running, and after a signal let it end."""
        bury(self.db)
        self.children = [Child("web", "mutoscope.server")]
        self.children += [
            Child(f"worker on {d}", "mutoscope.worker", (d,), is_worker=True) for d in self.devices
        ]
        with self._wakeups() as awake:
            for child in self.children:
                self._start(child)
            threading.Thread(target=self._await_web, name="ready", daemon=True).start()
            watch_at = 0.0
            while not self._done():
                awake(WATCH_S if self.stopped_at is None else 0.1)
                self._reap()
                if self.stopped_at is None and self.signals:
                    self._drain()
                if self.stopped_at is None:
                    self._restart()
                else:
                    self._hurry()
                if time.monotonic() >= watch_at:
                    watch_at = time.monotonic() + WATCH_S
                    self._watch()

    # -- processes -------------------------------------------------------------------------------------------

    def _start(self, child: Child) -> None:
        child.id = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}" if child.is_worker else ""
        child.killed_for = ""
        fd = self.listener.fileno()
        variables = {
            **os.environ,
            "MUTOSCOPE_SETTINGS_JSON": self.settings.model_dump_json(),
            "MUTOSCOPE_LISTEN_FD": str(fd),
        }
        command = [
            sys.executable,
            "-m",
            "mutoscope.fleet.child",
            str(os.getpid()),
            child.module,
            *child.arguments,
        ]
        child.process = subprocess.Popen(
            [*command, *filter(None, [child.id])],
            stdin=subprocess.PIPE,
            env=variables,
            pass_fds=() if child.is_worker else (fd,),
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor, which passes on what it means
        )
        child.started = time.monotonic()

    def _restart(self) -> None:
        for child in self.children:
            if child.process is None and time.monotonic() >= child.start_at:
                self._start(child)

    def _reap(self) -> None:
        """Notice the dead, give their jobs back, and plan their return."""
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            code, lived = child.process.returncode, time.monotonic() - child.started
            if child.process.stdin:
                child.process.stdin.close()
            child.process = None
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            if self.stopped_at is None or code not in (
                0,
                -signal.SIGTERM,
            ):  # uvicorn ends by the signal it got
                log.warning(
                    "the %s ended (%s)%s",
                    child.name,
                    how,
                    f": {child.killed_for}" if child.killed_for else "",
                )
            came_up, made_one = self._bury(child, how) if child.is_worker else (False, False)
            child.failures = 0 if made_one or lived >= STEADY_S else child.failures + 1
            most = BUSY_DELAY_S if came_up else MAX_DELAY_S
            delay = min(most, FIRST_DELAY_S * 2 ** (child.failures - 1)) if child.failures else 0.0
            child.start_at = time.monotonic() + delay

    def _bury(self, child: Child, how: str) -> tuple[bool, bool]:
        """Give back the job of a worker that is gone. Whether it had come up, and whether it has made a job."""
        found = False, False
        try:
            with self.db.read() as tx:
                found = workers.record(tx, child.id)
            lose_jobs_of(
                self.db,
                child.id,
                f"the worker process ended with {how}",
                crashed=not self.signals,  # what is killed for a shutdown did not crash
                max_crashes=self.settings.max_crashes,
            )
        except sa.exc.OperationalError as e:  # the lease will run out
            log.warning("the job of %s could not be given back: %s", child.name, e.orig)
        return found

    # -- what hangs ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            with self.db.read() as tx:
                late = queue.overdue(tx, self.settings)
                beats = {w.id: w.beat_at for w in workers.listing(tx)}
                now = tx.now
        except sa.exc.OperationalError as e:
            log.warning("cannot look after jobs: %s", e.orig)
            return
        for child in self.children:
            if child.process is None or not child.is_worker:
                continue
            for one in late:
                if one.job.worker_id == child.id:
                    self._kill(child, one.why)
                    self._finish_overdue(one)
            silent_s = now - beats.get(child.id, now)
            if silent_s > self.settings.lease_s + self.settings.heartbeat_s:
                self._kill(child, f"no sign of life for {silent_s:.0f} s")

    def _finish_overdue(self, late: queue.Overdue) -> None:
        job = late.job
        with self.db.write() as tx:
            if late.kind == "cancel":
                queue.cancelled(tx, job.id, job.fence)
            else:
                queue.fail(
                    tx,
                    job.id,
                    job.fence,
                    Failure.TIME_LIMIT,
                    f"The run took longer than {job.time_limit_s:g} s.",
                )

    def _kill(self, child: Child, why: str) -> None:
        if child.process is not None and child.process.poll() is None:
            child.killed_for = why
            child.process.kill()
            child.process.wait()

    # -- the end ---------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        self.stopped_at = time.monotonic()
        self.listener.close()  # who comes now is refused at once, instead of waiting for nobody
        for child in self.children:
            if child.process is not None:
                child.process.send_signal(signal.SIGTERM)

    def _hurry(self) -> None:
        """Kill what does not end in time; all of it after a second signal."""
        assert self.stopped_at is not None
        limit = self.settings.drain_s + KILL_AFTER_S
        if self.signals > 1 or time.monotonic() - self.stopped_at > limit:
            for child in self.children:
                self._kill(child, "stopped at once" if self.signals > 1 else "did not end in time")

    def _done(self) -> bool:
        return self.stopped_at is not None and all(c.process is None for c in self.children)

    # -- events ----------------------------------------------------------------------------------------------

    @contextmanager
    def _wakeups(self) -> Iterator[Callable[[float], None]]:
        """Signals and dead children end a wait at once."""

        def count(_number: int, _frame: FrameType | None) -> None:
            self.signals += 1

        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        before = {s: signal.signal(s, count) for s in (signal.SIGTERM, signal.SIGINT)}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        old_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

        def wait(seconds: float) -> None:
            if select.select([read], [], [], seconds)[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(read, 4096)

        try:
            yield wait
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            for child in self.children:  # only after an exception: nothing outlives the supervisor
                self._kill(child, "the supervisor failed")
            os.close(read)
            os.close(write)

    def _await_web(self) -> None:
        """The socket listens already, so one request waits until the web process answers it."""
        while self.stopped_at is None:
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=60):
                    self.ready()
                    return
            except OSError:
                time.sleep(0.2)


def lose_jobs_of(
    db: Database, worker_id: str, why: str, *, crashed: bool = True, max_crashes: int = queue.MAX_CRASHES
) -> None:
    """A worker is gone for good: its job goes back to the queue, or fails when it crashed too often."""
    with db.write() as tx:
        running = sa.select(jobs.c.id, jobs.c.fence).where(
            jobs.c.state == State.RUNNING, jobs.c.worker_id == worker_id
        )
        for row in tx.all(running):
            queue.lose(tx, row.id, row.fence, why, crashed=crashed, max_crashes=max_crashes)
        workers.gone(tx, worker_id)


def bury(db: Database) -> None:
    """Workers of this machine whose process is gone: what a supervisor that was killed could not clean up."""
    with db.read() as tx:
        known = [w for w in workers.listing(tx) if w.host == socket.gethostname()]
    for worker in known:
        if not is_alive(worker.pid):
            lose_jobs_of(db, worker.id, "the server was stopped", crashed=False)


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
