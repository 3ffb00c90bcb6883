"""The worker: claims a job, collects its inputs, drives the engine, writes the files, ends the job. One per device.

    python -m mutoscope.worker cpu        # what the supervisor starts

This is the one file in which jobs and the engine meet. The main thread claims and makes; a second one, the pulse,
beats, looks whether the job was cancelled and passes progress on, so that the engine never waits for the database.

Whatever happens to this process, the job is safe: what it wrote lies in a folder named after its lease's fence, and
every write names the fence. A worker that was frozen and comes back too late changes nothing.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mutoscope import __version__, logs
from mutoscope.errors import Cancelled, FileError, MediaError
from mutoscope.events import Event, Frames, Preview, Result, Stage, Step
from mutoscope.failures import Untaken, Unusable, Unwritten, failure_of, is_out_of_memory, writing
from mutoscope.jobs import eta, fetch, queue, switches, translate, workers
from mutoscope.jobs.checkpoints import VARIABLE, checkpoint
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.model import Failure, Job, Output, State
from mutoscope.jobs.registry import WITHOUT_MODEL, Registry
from mutoscope.jobs.resolve import SHORT_SIDE
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.spec import JobSpec
from mutoscope.lease import Lease, preview_uri
from mutoscope.media.deliver import Delivered, Delivery
from mutoscope.media.operations import Planned, frames_of, plan_operation
from mutoscope.planning import describe, plan
from mutoscope.runner import Runner, find_runner
from mutoscope.settings import Settings

log = logging.getLogger("mutoscope.worker")

LOOK_S = 0.25
"""How often the pulse looks whether the job was cancelled."""
PROGRESS_S = 0.5
"""Progress is written at most that often."""
PREVIEW_S = 2.0
"""Previews are encoded and written at most that often; a newer one takes the place of one that waits."""
IDLE_S = 0.1
"""How often an idle worker looks for a job: one indexed read, and a claim only if something waits."""
ENCODE_SHARE = 0.02
BEFORE_SHARE, DENOISE_SHARE = 0.03, 0.87
"""Of the progress: what comes before denoising, and denoising; the rest is decoding and writing."""


class _Stop(Exception):
    """The job ends here although nothing failed: "cancel", "lost" (another worker has it), or "drain"."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Worker:
    """The loop. `settings` and the runner are given; everything else is made here.

    worker_id: who it is in `workers`; the supervisor chooses it, so that it knows whose job it was.
    """

    def __init__(
        self, db: Database, settings: Settings, runner: Runner, *, device: str, worker_id: str = ""
    ) -> None:
        self.db, self.settings, self.runner, self.device = db, settings, runner, device
        self.id = worker_id or f"worker-{uuid.uuid4()}"
        self.registry = Registry(settings.models_dir, settings.aliases, settings.loras_dir)
        self.model, self.switches = "", 0
        self._lease: Lease | None = None
        self._draining = threading.Event()
        self._drain_until = math.inf  # monotonic
        self._ended = threading.Event()
        self._ticking = threading.Lock()
        self._told: tuple[object, ...] = ()
        self._beat_at = -math.inf

    # -- life ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `drain()`. Registers, beats, preloads, then takes job after job."""
        with self.db.write() as tx:
            workers.register(
                tx, worker_id=self.id, device=self.device, host=socket.gethostname(), pid=os.getpid()
            )
        pulse = threading.Thread(target=self._pulse, name="pulse", daemon=True)
        pulse.start()
        try:
            self._preload()
            while not self._draining.is_set():
                if not self.turn():
                    self._draining.wait(IDLE_S)
        finally:
            self._ended.set()
            pulse.join()
            with self.db.write() as tx:
                workers.gone(tx, self.id)

    def drain(self, limit_s: float = math.inf) -> None:
        """Take no further job; finish the one in hand, or hand it back after `limit_s`. For signal handlers too."""
        self._drain_until = time.monotonic() + limit_s
        self._draining.set()

    def turn(self) -> bool:
        """Claim one job and see it to its end; False if there was none."""
        try:
            if not self._anything():
                return False
            with self.db.write() as tx:
                job = queue.claim(tx, self.id, self._models(), self.device, lease_s=self.settings.lease_s)
        except sa.exc.OperationalError as e:  # a database that is away comes back
            log.warning("no claim: %s", e.orig)
            return False
        if job is None:
            return False
        self._at("claimed")
        self._perform(job)
        return True

    def _anything(self) -> bool:
        with self.db.read() as tx:
            return tx.scalar(sa.select(sa.exists().where(jobs.c.state == State.QUEUED)))

    def _models(self) -> tuple[str, ...]:
        """What this worker can run: asked at every claim, since models are pulled while it lives."""
        return tuple(model.name for model in self.registry.models())

    def _preload(self) -> None:
        if self.settings.preload:
            try:
                self._load(self.settings.preload)
            except Unusable as e:
                log.warning("model %s is not preloaded: %s", self.settings.preload, e.__cause__)

    # -- one job ---------------------------------------------------------------------------------------------

    def _perform(self, job: Job) -> None:
        started = time.monotonic()
        lease = self._lease = Lease(job, steps=job.resolved.steps, eta_at=job.eta_at)
        place = self.settings.data_dir / "outputs" / job.id
        part, final = place / f"{job.fence}.part", place / str(job.fence)
        log.info("job %s: %s on %s", job.id, job.operation, job.model, extra={"job": job.id})
        try:
            try:
                _remove_older(place, job.fence)
                part.mkdir(parents=True)
                outputs, result = self._make(lease, part)
                self._look(lease)
                self._at("before-rename")
                _settle(part, final)
            except OSError as e:
                raise Unwritten from e
            took = time.monotonic() - started
            facts = {"took_s": round(took, 3), "device": self.device, "stages": lease.times()}
            self._succeed(lease, final, outputs, {**result, **facts}, took)
        except _Stop as e:
            _remove(part)
            self._stopped(lease, e.why)
        except Exception as e:
            _remove(part)
            self._failed(lease, e)
        finally:
            self._lease = None
            shutil.rmtree(self._scratch(job), ignore_errors=True)
            self._tell()

    def _make(self, lease: Lease, folder: Path) -> tuple[list[Output], dict[str, Any]]:
        """Everything between the claim and the finished files in `folder`."""
        job = lease.job
        spec = JobSpec.model_validate(job.spec)
        try:
            files = fetch.collect(
                self.db, job, self._scratch(job), self.settings, should_stop=lambda: bool(self._why(lease))
            )
        except Cancelled:
            self._look(lease)
            raise
        if spec.operation in WITHOUT_MODEL:
            made, facts = self._operate(lease, spec, files, folder), {"seed": job.resolved.seed}
        else:
            made, info = self._generate(lease, spec, files, folder)
            request = info["request"]
            facts = {
                "model": job.model, "seed": info["seed"], "steps": request["steps"],
                "generated_width": request["width"], "generated_height": request["height"],
            }  # fmt: skip
            if "loras" in request:
                facts["loras"] = [{"name": name, "strength": strength, "sha256": info["lora_sha256"][name]}
                                  for name, strength in request["loras"]]  # fmt: skip
        where = f"outputs/{job.id}/{job.fence}"
        outputs = [
            Output(role=f.role, path=f"{where}/{f.name}", mime=f.mime, size_bytes=(folder / f.name).stat().st_size,
                   width=f.width, height=f.height, frames=f.frames, fps=f.fps)
            for f in made
        ]  # fmt: skip
        main = made[0]
        seconds = main.frames / main.fps if main.fps else 0.0
        return outputs, {
            **facts, "width": main.width, "height": main.height, "frames": main.frames, "fps": main.fps,
            "seconds": round(seconds, 3),
        }  # fmt: skip

    def _generate(
        self, lease: Lease, spec: JobSpec, files: translate.Files, folder: Path
    ) -> tuple[list[Delivered], dict[str, Any]]:
        """The files, and what is embedded in them: see `planning.describe`."""
        job, r = lease.job, lease.job.resolved
        model = self.registry.get(job.model)
        try:
            loras = switches.taken(spec, model)
        except InvalidRequest as e:  # since it was asked for, a file has changed or gone
            raise Untaken(job.model) from e
        request = plan(translate.generation_request(spec, r, files, loras), model.manifest)
        info = _without_paths(describe(request, model.manifest), self._scratch(job))
        info = switches.named(info, switches.names(spec, loras))
        if self.model != job.model:
            lease.at("load", 0.01)
            began = time.monotonic()
            self._load(job.model)
            lease.load_s = time.monotonic() - began
        self._at("loaded")
        self._look(lease)
        delivery = Delivery(
            folder, format=spec.format or ("png" if spec.operation == "image" else "mp4"), hdr=spec.hdr,
            width=r.out_width, height=r.out_height, fps=request.fps or r.fps, frames=request.frames or 1,
            info=info,
        )  # fmt: skip
        with closing(self.runner.run(request)) as events:  # type: ignore[type-var]
            return self._deliver(lease, events, delivery), info

    def _operate(self, lease: Lease, spec: JobSpec, files: translate.Files, folder: Path) -> list[Delivered]:
        """Enlarge, change the frame rate, or expand to HDR: no model is needed."""
        assert spec.source is not None
        planned = plan_operation(
            spec.operation,
            files[spec.source],
            scale=spec.scale,
            size=(spec.width, spec.height) if spec.width and spec.height else None,
            short_side=SHORT_SIDE[spec.resolution] if spec.resolution else None,
            fps=spec.fps,
        )
        delivery = Delivery(
            folder, format=spec.format or ("png" if planned.is_still else "mp4"),
            hdr=spec.hdr or spec.operation == "hdr", width=planned.width, height=planned.height, fps=planned.fps,
            frames=planned.frames, info={"version": __version__, "operation": spec.operation},
        )  # fmt: skip
        with closing(_as_events(planned)) as events:
            return self._deliver(lease, events, delivery)

    def _deliver(self, lease: Lease, events: Iterator[Event], delivery: Delivery) -> list[Delivered]:
        try:
            self._follow(lease, events, delivery)
            self._at("decoded")
            lease.at("save", 0.99)
            with writing():
                return delivery.close()
        finally:
            delivery.abort()

    def _follow(self, lease: Lease, events: Iterator[Event], delivery: Delivery) -> None:
        """Take events until the result. Between two of them the job can be stopped."""
        for event in events:
            if isinstance(event, Stage):
                lease.at(event.name, BEFORE_SHARE if event.name == "denoise" else 0.02)
                if event.name == "decode":
                    lease.at("decode", BEFORE_SHARE + DENOISE_SHARE)
            elif isinstance(event, Step):
                lease.step, lease.steps = event.i, event.n
                lease.step_seconds.append(event.seconds)
                rest = event.eta_seconds * (1 + ENCODE_SHARE)
                lease.at("denoise", BEFORE_SHARE + DENOISE_SHARE * event.i / event.n, self.db.clock() + rest)
                self._at("step")
            elif isinstance(event, Preview):
                lease.preview = event
            elif isinstance(event, Frames):
                with writing():
                    delivery.write(event.frames)
                lease.at("decode", 0.9 + 0.09 * event.done / event.of)
            elif isinstance(event, Result):
                return
            self._look(lease)
        raise AssertionError("the engine ended without a result")

    def _load(self, model: str) -> None:
        """Make `model` the loaded one. Raises Unusable, or what says that memory ran out."""
        if self.model == model:
            return
        self.switches += bool(self.model)
        self.model = ""
        try:
            self.runner.load(self.registry.get(model).manifest)
        except Exception as e:
            self.runner.release()
            if is_out_of_memory(e):
                raise
            raise Unusable(model) from e
        self.model = model

    # -- how it ends -----------------------------------------------------------------------------------------

    def _succeed(
        self, lease: Lease, final: Path, outputs: list[Output], result: dict[str, Any], took: float
    ) -> None:
        job = lease.job
        self._at("before-commit")

        def change(tx: Tx) -> Job | None:
            ended = queue.succeed(tx, job.id, job.fence, tuple(outputs), result)
            if ended is not None and lease.step_seconds:
                step_s = statistics.median(lease.step_seconds)
                rest_s = max(0.0, took - lease.load_s - sum(lease.step_seconds))
                eta.record(tx, model=job.model, device=self.device, resolved=job.resolved,
                           step_s=step_s, rest_s=rest_s, load_s=lease.load_s)  # fmt: skip
            return ended

        if self._end(lease, change) is None:
            if self._cancel_asked(lease):  # asked in the last moment: it counts
                self._stopped(lease, "cancel")
            _remove(final)
            return
        self._at("committed")
        log.info("job %s: done in %.1f s", job.id, took, extra={"job": job.id})

    def _stopped(self, lease: Lease, why: str) -> None:
        job = lease.job
        log.info("job %s: stopped (%s)", job.id, why, extra={"job": job.id})
        if why == "cancel":
            self._end(lease, lambda tx: queue.cancelled(tx, job.id, job.fence))
        elif why == "drain":
            self._end(
                lease, lambda tx: queue.lose(tx, job.id, job.fence, "the worker was stopped", crashed=False)
            )

    def _failed(self, lease: Lease, error: Exception) -> None:
        job = lease.job
        wrong_model = isinstance(error, Unusable | FileError) and not isinstance(error, MediaError)
        if wrong_model and job.candidates:
            why = failure_of(error, job.model)[1]
            log.warning("job %s: %s", job.id, why, extra={"job": job.id})
            self._end(lease, lambda tx: queue.reroute(tx, job.id, job.fence, why))
            return
        failure, message = failure_of(error, job.model)
        log.warning(
            "job %s: failed (%s): %s", job.id, failure, message,
            exc_info=error if failure == Failure.INTERNAL else None, extra={"job": job.id},
        )  # fmt: skip
        if failure == Failure.OUT_OF_MEMORY:
            self.model = ""
            self.runner.release()
        self._end(lease, lambda tx: queue.fail(tx, job.id, job.fence, failure, message))

    def _end(self, lease: Lease, change: Callable[[Tx], Job | None]) -> Job | None:
        """The last write of a job, tried for as long as its lease holds."""
        until = time.monotonic() + self.settings.lease_s
        while True:
            try:
                with self.db.write() as tx:
                    return change(tx)
            except sa.exc.OperationalError as e:
                if time.monotonic() > until or lease.stop == "lost":
                    log.error("job %s: its end could not be written: %s", lease.job.id, e.orig)
                    return None
                self._ended.wait(1.0)

    def _at(self, name: str) -> None:
        """A checkpoint, while the pulse does nothing: whoever stands still here holds no lock of the database.
        Outside of tests nothing waits for the pulse."""
        if VARIABLE in os.environ:
            with self._ticking:
                checkpoint(name)

    # -- the pulse -------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                with self._ticking:
                    self._tick()
            except sa.exc.OperationalError as e:
                log.warning("no beat: %s", e.orig)
            except Exception:
                log.exception("the pulse goes on")

    def _tick(self) -> None:
        lease, now = self._lease, time.monotonic()
        if now - self._beat_at >= self.settings.heartbeat_s:
            if lease is not None:
                with self.db.write() as tx:
                    beat = queue.beat(
                        tx, self.id, lease.job.id, lease.job.fence, lease_s=self.settings.lease_s
                    )
                self._mark(lease, valid=beat.valid, cancel=beat.cancel_asked)
            self._tell(force=True)
            self._beat_at = now
        elif lease is not None:
            row = self._row(lease)
            ours = row is not None and row.state == State.RUNNING and row.fence == lease.job.fence
            self._mark(lease, valid=ours, cancel=row is not None and row.cancel_asked_at is not None)
            self._tell()
        else:
            self._tell()
        if lease is not None and lease.news and now - lease.written_at >= PROGRESS_S and not lease.stop:
            self._progress(lease)

    def _progress(self, lease: Lease) -> None:
        job, now, picture = lease.job, time.monotonic(), None
        lease.news, lease.written_at = False, now
        if lease.preview is not None and now - lease.previewed_at >= PREVIEW_S:
            picture, lease.preview, lease.previewed_at = preview_uri(lease.preview), None, now
        with self.db.write() as tx:
            queue.progress(
                tx, job.id, job.fence, stage=lease.stage, step=lease.step, steps=lease.steps,
                fraction=lease.fraction, eta_at=lease.eta_at, preview=picture,
            )  # fmt: skip

    def _tell(self, *, force: bool = False) -> None:
        """What this worker does now, for `workers`, when it changed or when it is time for a sign of life."""
        lease = self._lease
        state = "busy" if lease else "draining" if self._draining.is_set() else "idle"
        told = (state, self.model, lease.job.id if lease else None, self.switches)
        if told != self._told or force:
            with self.db.write() as tx:
                workers.update(tx, self.id, state=told[0], model=told[1], job_id=told[2], switches=told[3])
            self._told = told

    def _row(self, lease: Lease) -> Any:
        with self.db.read() as tx:
            columns = (jobs.c.state, jobs.c.fence, jobs.c.cancel_asked_at)
            return tx.first(sa.select(*columns).where(jobs.c.id == lease.job.id))

    def _cancel_asked(self, lease: Lease) -> bool:
        row = self._row(lease)
        return row is not None and row.cancel_asked_at is not None

    def _mark(self, lease: Lease, *, valid: bool, cancel: bool) -> None:
        if not valid:
            lease.stop = "lost"
        elif cancel:
            lease.stop = "cancel"

    def _why(self, lease: Lease) -> str:
        """Why the job should stop now, or nothing."""
        if not lease.stop and self._draining.is_set():
            now = time.monotonic()
            rest = (lease.eta_at or 0.0) - self.db.clock()
            if now > self._drain_until or now + rest > self._drain_until:
                return "drain"
        return lease.stop

    def _look(self, lease: Lease) -> None:
        why = self._why(lease)
        if why:
            raise _Stop(why)

    def _scratch(self, job: Job) -> Path:
        return self.settings.data_dir / "work" / f"{job.id}-{job.fence}"


# -- helpers -------------------------------------------------------------------------------------------------


def _as_events(planned: Planned) -> Generator[Event, None, None]:
    """An operation's frames in the way of the engine."""
    yield Stage(name="decode", seconds=0.0)
    for done, frame in enumerate(frames_of(planned), 1):
        yield Frames(frames=frame[None], done=done, of=max(done, planned.frames))
    yield Result(seconds=0.0)


def _without_paths(value: Any, folder: Path) -> Any:
    """The description of a request with its inputs named, not placed."""
    if isinstance(value, dict):
        return {k: _without_paths(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(v, folder) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith(f"{folder}/") else value


def _remove(folder: Path) -> None:
    """A folder of outputs, and the job's if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def _remove_older(place: Path, fence: int) -> None:
    """What earlier attempts left: their fence is void. Later ones there may be too, if this process was frozen."""
    for folder in place.iterdir() if place.is_dir() else ():
        number = folder.name.removesuffix(".part")
        if number.isdigit() and int(number) < fence:
            shutil.rmtree(folder, ignore_errors=True)


def _settle(part: Path, final: Path) -> None:
    """All files at once: they are written through, then their folder gets its name."""
    for file in (*part.iterdir(), part):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.rename(part, final)


def main() -> None:
    """`python -m mutoscope.worker DEVICE [ID]`, with the settings as JSON in MUTOSCOPE_SETTINGS_JSON."""
    device, worker_id = (*sys.argv[1:], "", "")[:2]
    settings = Settings.model_validate_json(os.environ["MUTOSCOPE_SETTINGS_JSON"])
    logs.configure(as_json=settings.log_json)
    db = Database(settings.database)
    drain: list[Worker] = []
    signal.signal(signal.SIGTERM, lambda *_: [w.drain(settings.drain_s) for w in drain] or sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor passes on what has to be passed on
    runner = find_runner(settings.engine)(device or "cpu", settings)
    worker = Worker(db, settings, runner, device=device or "cpu", worker_id=worker_id)
    drain.append(worker)
    try:
        worker.run()
    finally:
        db.close()


if __name__ == "__main__":
    main()
