"""The worker with a fake runner: what it writes, how it stops, and how every kind of failure ends."""

from __future__ import annotations

import base64
import io
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from mutoscope.errors import FileError, ResourceError
from mutoscope.events import Event, Frames, Result, Stage, Step
from mutoscope.jobs import assets, eta, inline, queue, workers
from mutoscope.jobs.model import Failure, State
from mutoscope.jobs.schema import timings
from mutoscope.manifest import ModelManifest
from mutoscope.media import deliver
from mutoscope.media.read import probe
from mutoscope.media.write import read_metadata
from mutoscope.request import GenerationRequest
from mutoscope.settings import Settings
from mutoscope.worker import Worker
from tests.service.fakes import FakeRunner
from tests.service.processes.conftest import House


def test_a_job_becomes_a_video(house: House) -> None:
    job_id = house.submit("steps=12", width=64, height=48, seed=5)
    house.worker()
    job = house.wait(job_id)
    assert job.state is State.SUCCEEDED
    assert [o.role for o in job.outputs] == ["video", "thumbnail", "spritesheet"]
    video = house.settings.data_dir / job.outputs[0].path
    assert video.parts[-3:] == (job_id, "1", "video.mp4")
    info = probe(video)
    assert (info.width, info.height, info.frames, info.fps) == (64, 48, 5, 8.0)
    assert job.outputs[0].size_bytes == video.stat().st_size
    assert {k: job.result[k] for k in ("seed", "width", "height", "generated_width", "frames", "fps", "device")} == {
        "seed": 5, "width": 64, "height": 48, "generated_width": 32, "frames": 5, "fps": 8.0, "device": "cpu",
    }  # fmt: skip
    described = read_metadata(video)
    assert described is not None
    assert (described["seed"], described["request"]["prompt"]) == (5, "steps=12")
    assert (job.progress, job.step) == (1.0, job.steps)
    assert job.steps == job.result["steps"]
    house.assert_sound()


def test_progress_comes_in_order_with_a_preview(house: House) -> None:
    job_id = house.submit("steps=12 step=0.1")
    house.worker()
    house.wait(job_id)
    events = house.events(job_id)
    progress = [e.data for e in events if e.type == "progress"]
    fractions = [d["progress"] for d in progress]
    assert 2 <= len(progress) <= 5  # at most twice a second
    assert fractions == sorted(fractions)
    assert {d["stage"] for d in progress} <= {"inputs", "text", "denoise", "decode", "save"}
    assert any(0 < d["step"] < 12 and d["eta_at"] > 0 for d in progress)


def test_times_are_learned(house: House) -> None:
    job_id = house.submit("steps=5 step=0.05", steps=5)
    house.worker()
    job = house.wait(job_id)
    with house.db.read() as tx:
        (row,) = tx.all(sa.select(timings))
        estimate = eta.estimate(tx, "pocket", "cpu", job.resolved)
    assert row.step_s == pytest.approx(0.05, abs=0.03)
    assert estimate.samples == 1
    assert estimate.seconds == pytest.approx(job.result["took_s"], abs=0.2)


def test_the_worker_says_what_it_does(house: House) -> None:
    job_id = house.submit("steps=10 step=0.1")
    worker = house.worker()
    house.wait(job_id, lambda job: job.state is State.RUNNING and job.step > 0)
    with house.db.read() as tx:
        (row,) = workers.listing(tx)
    assert (row.id, row.state, row.model, row.job_id) == (worker.id, "busy", "pocket", job_id)
    house.wait(job_id)
    house.end()
    with house.db.read() as tx:
        assert workers.listing(tx) == []
        (row,) = workers.listing(tx, alive=False)
    assert row.state == "gone"


def test_a_running_job_is_cancelled_between_two_steps(house: House) -> None:
    runner = house.runner()
    job_id = house.submit("steps=100 step=0.2")
    worker = house.worker(runner)
    house.wait(job_id, lambda job: job.step > 0)
    began = time.monotonic()
    assert house.cancel(job_id).state is State.RUNNING
    job = house.wait(job_id)
    assert job.state is State.CANCELLED
    assert time.monotonic() - began < 0.2 + 1.0
    second = house.submit("steps=2")
    assert house.wait(second).state is State.SUCCEEDED
    assert worker.model == "pocket"
    assert runner.loads == ["pocket"]  # the model stayed
    house.assert_sound()


def test_cancel_and_completion_end_in_one_state(house: House) -> None:
    """A cancel at every moment of a short job: either it counts and nothing is kept, or it came too late."""
    house.worker()
    for i in range(12):
        job_id = house.submit("steps=3 step=0.01")
        house.wait(job_id, lambda job: job.state is not State.QUEUED)
        time.sleep(0.006 * i)  # spreads the cancel over the job's life
        asked = house.cancel(job_id)
        job = house.wait(job_id)
        if asked.state is State.SUCCEEDED:
            assert job.state is State.SUCCEEDED
        else:
            assert job.state is State.CANCELLED
    house.end()
    house.assert_sound()


@pytest.mark.parametrize(
    ("prompt", "failure", "said"),
    [
        ("oom", Failure.OUT_OF_MEMORY, "Memory ran out."),
        ("torch-oom", Failure.OUT_OF_MEMORY, "Memory ran out."),
        ("nan", Failure.BAD_OUTPUT, "not numbers"),
        ("request", Failure.REQUEST_INVALID, "nothing would be generated"),
        ("media", Failure.INPUT_INVALID, "input-0.png"),
        ("bug", Failure.INTERNAL, "KeyError"),
    ],
)
def test_failures_have_codes_and_the_next_job_runs(
    house: House, prompt: str, failure: Failure, said: str
) -> None:
    runner = house.runner()
    house.worker(runner)
    job = house.wait(house.submit(prompt))
    assert (job.state, job.failure) == (State.FAILED, failure)
    assert said in job.message
    assert "/" not in job.message
    assert runner.released == (failure is Failure.OUT_OF_MEMORY)
    assert house.wait(house.submit("steps=2")).state is State.SUCCEEDED
    house.assert_sound()


def test_what_cannot_be_encoded_names_no_place_on_this_machine(house: House) -> None:
    house.worker()
    job = house.wait(house.submit("steps=2", format="png"))
    assert (job.state, job.failure) == (State.FAILED, Failure.BAD_OUTPUT)
    assert "image.png: a second frame" in job.message
    assert str(house.settings.data_dir) not in job.message


class BadPocket(FakeRunner):
    """Cannot load its model."""

    def load(self, manifest: ModelManifest) -> None:
        raise FileError(f"{manifest.name} is damaged.")


def test_a_model_that_cannot_be_loaded(house: House) -> None:
    house.worker(BadPocket("cpu", house.settings))
    job = house.wait(house.submit("hello"))
    assert (job.state, job.failure) == (State.FAILED, Failure.MODEL_UNAVAILABLE)
    assert "pocket is damaged" in job.message
    house.assert_sound()


def test_the_next_candidate_takes_over(house: House) -> None:
    job_id = house.submit("hello", candidates=("other",))
    house.worker(BadPocket("cpu", house.settings))
    job = house.wait(job_id, lambda job: job.model == "other")
    assert (job.state, job.candidates, job.crashes) == (State.QUEUED, (), 0)
    notes = [e.data.get("note", "") for e in house.events(job_id) if e.type == "state"]
    assert any("pocket is damaged" in note for note in notes)


def test_an_input_that_is_no_picture(house: House) -> None:
    job = house.submit("hello", keyframes=[{"media": {"job": "00000000-0000-0000-0000-000000000000"}}])
    house.worker()
    ended = house.wait(job)
    assert (ended.state, ended.failure) == (State.FAILED, Failure.INPUT_INVALID)


class Remembering(FakeRunner):
    """Keeps what it was asked for."""

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        self.asked = request
        return super().run(request)


def test_a_video_goes_on_from_another_job(house: House) -> None:
    runner = Remembering("cpu", house.settings)
    house.worker(runner)
    first = house.wait(house.submit("steps=2"))
    second = house.wait(house.submit("steps=2", extend_start={"job": first.id}))
    assert second.state is State.SUCCEEDED
    clip = runner.asked.conditioning.extend_start
    assert isinstance(clip, Path)
    assert clip.name == "input-0.mp4"
    assert not clip.exists()  # the scratch folder is gone
    described = read_metadata(house.settings.data_dir / second.outputs[0].path)
    assert described is not None
    assert described["request"]["conditioning"] == {"extend_start": "input-0.mp4"}  # no path of this machine
    assert not list((house.settings.data_dir / "work").iterdir())


@pytest.mark.parametrize(
    ("spec", "size", "frames", "fps"),
    [
        ({"operation": "upscale", "scale": 2}, (64, 64), 5, 8.0),
        ({"operation": "reframe_rate", "fps": 24}, (32, 32), 15, 24.0),
        ({"operation": "hdr"}, (32, 32), 5, 8.0),
    ],
)
def test_operations_on_finished_clips(
    house: House, spec: dict[str, object], size: tuple[int, int], frames: int, fps: float
) -> None:
    house.worker()
    first = house.wait(house.submit("steps=2"))
    second = house.wait(house.submit("", source={"job": first.id}, **spec))
    assert (second.state, second.message) == (State.SUCCEEDED, "")
    info = probe(house.settings.data_dir / second.outputs[0].path)
    assert ((info.width, info.height), info.frames, info.fps) == (size, frames, fps)
    assert info.codec == ("hevc" if spec["operation"] == "hdr" else "h264")
    assert (second.outputs[0].width, second.outputs[0].height) == size
    house.assert_sound()


def test_a_full_disk_is_said_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ResourceError("video.mp4: the disk is full after 1 frames.")

    monkeypatch.setattr(deliver.VideoWriter, "write", full)
    house.worker()
    job = house.wait(house.submit("steps=2"))
    assert (job.state, job.failure) == (State.FAILED, Failure.STORAGE)
    monkeypatch.undo()
    assert house.wait(house.submit("steps=2")).state is State.SUCCEEDED
    house.assert_sound()


class Noisy(FakeRunner):
    """Makes a video that no codec makes small, and says when its last frame is there."""

    def __init__(self, device: str, settings: Settings, before_last: Callable[[], None]) -> None:
        super().__init__(device, settings)
        self.before_last = before_last

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        rng, n = np.random.default_rng(1), request.frames or 1
        yield Step(i=1, n=1, seconds=0.0, eta_seconds=0.0)
        for done in range(1, n + 1):
            if done == n:
                self.before_last()
            noise = rng.integers(0, 256, (1, request.height or 16, request.width or 16, 3)).astype(np.uint8)
            yield Frames(frames=noise, done=done, of=n)
        yield Result(seconds=0.0)


@contextmanager
def no_file_above(n_bytes: int) -> Iterator[Callable[[], None]]:
    """Writes beyond that size fail, as they do on a full disk; the function gives room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield lift
    finally:
        lift()


def test_a_disk_that_is_full_while_the_video_is_written(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is real: the operating system refuses to write. The database still has room, since the pulse, which
    writes for as long as a slow machine encodes, is silent."""
    monkeypatch.setattr("mutoscope.worker.LOOK_S", 3600.0)
    clip = {"width": 512, "height": 512, "frames": 33}
    house.worker(Noisy("cpu", house.settings, lambda: None))
    usual = house.wait(house.submit("noise", **clip))
    largest = max(file.stat().st_size for file in house.settings.data_dir.glob("mutoscope.db*"))
    limit = largest + 200_000  # what the database writes meanwhile
    assert usual.outputs[0].size_bytes > limit
    with no_file_above(limit):
        job = house.wait(house.submit("noise", **clip))
    assert (job.state, job.failure) == (State.FAILED, Failure.STORAGE)
    assert "disk is full" in job.message
    assert house.wait(house.submit("noise", **clip)).state is State.SUCCEEDED
    house.assert_sound()


def test_a_disk_that_is_full_for_the_database_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the video nor its failure can be written; the worker tries until there is room, and nothing is lost."""
    with ExitStack() as disk:
        lift: list[Callable[[], None]] = []
        runner = Noisy("cpu", house.settings, lambda: lift.append(disk.enter_context(no_file_above(1))))
        worker = Worker(house.db, house.settings, runner, device="cpu")
        tries: list[float] = []

        def wait(timeout: float | None = None) -> bool:
            tries.append(timeout or 0.0)
            if len(tries) == 2:
                lift[0]()
            return False

        monkeypatch.setattr(worker._ended, "wait", wait)
        job_id = house.submit("noise")
        assert worker.turn()
    assert len(tries) == 2
    job = house.get(job_id)
    assert (job.state, job.failure, job.cost_captured) == (State.FAILED, Failure.STORAGE, 0)
    house.assert_sound()


# -- leases --------------------------------------------------------------------------------------------------


def test_a_drained_worker_hands_its_job_back(house: House) -> None:
    job_id = house.submit("steps=200 step=0.05")
    worker = house.worker()
    house.wait(job_id, lambda job: job.step > 0)
    worker.drain(0.1)
    job = house.wait(job_id, lambda job: job.state is not State.RUNNING)
    assert (job.state, job.crashes, job.attempt) == (State.QUEUED, 0, 1)
    assert house.files() == []


def test_a_drained_worker_finishes_what_it_can(house: House) -> None:
    job_id = house.submit("steps=10 step=0.05")
    worker = house.worker()
    house.wait(job_id, lambda job: job.state is State.RUNNING)
    worker.drain(20)
    assert house.wait(job_id).state is State.SUCCEEDED
    house.end()
    queued = house.submit("steps=2")
    assert house.get(queued).state is State.QUEUED


def test_a_worker_that_lost_its_lease_changes_nothing(house: House) -> None:
    """The second attempt runs while the first one still does."""
    job_id = house.submit("steps=40 step=0.05")
    house.worker(worker_id="first")
    house.wait(job_id, lambda job: job.step > 0)
    with house.db.write() as tx:
        assert queue.lose(tx, job_id, 1, "a test says so")
    house.worker(worker_id="second")
    job = house.wait(job_id)
    house.end()
    assert (job.state, job.fence, job.attempt, job.worker_id) == (State.SUCCEEDED, 2, 2, "second")
    assert {Path(name).parts[1] for name in house.files()} == {"2"}
    house.assert_sound()


def test_older_attempts_are_cleared_away_and_later_ones_are_not(house: House) -> None:
    job_id = house.submit("steps=2")
    place = house.settings.data_dir / "outputs" / job_id
    for name in ("0", "0.part", "7"):
        (place / name).mkdir(parents=True)
        (place / name / "video.mp4").write_text("half")
    house.worker()
    house.wait(job_id)
    assert sorted(p.name for p in place.iterdir()) == ["1", "7"]


class Waiting(FakeRunner):
    """Yields a step whenever it is told to."""

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        yield Stage(name="denoise", seconds=0.0)
        for i in range(1, 1000):
            time.sleep(0.02)
            yield Step(i=i, n=1000, seconds=0.02, eta_seconds=1.0)


def test_beats_keep_the_lease(house: House) -> None:
    job_id = house.submit("hello")
    house.worker(Waiting("cpu", house.settings))
    first = house.wait(job_id, lambda job: job.step > 0).lease_until
    assert first is not None
    later = house.wait(job_id, lambda job: (job.lease_until or 0) > first + 0.9)
    assert later.state is State.RUNNING
    house.cancel(job_id)
    assert house.wait(job_id).state is State.CANCELLED


def test_an_upload_is_a_keyframe(house: House) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(picture, "PNG")
    decoded = inline.decode("data:image/png;base64," + base64.b64encode(picture.getvalue()).decode())
    with house.db.write() as tx:
        media = assets.store(tx, "default", decoded, data_dir=house.settings.data_dir, hours=1)
    runner = Remembering("cpu", house.settings)
    house.worker(runner)
    keyframes = [{"media": media.model_dump(), "at": 1.0}]
    assert house.wait(house.submit("steps=2", keyframes=keyframes)).state is State.SUCCEEDED
    (keyframe,) = runner.asked.conditioning.keyframes
    assert keyframe.index == 4
