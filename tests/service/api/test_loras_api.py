"""LoRAs and doing less through the service: what is listed, what is refused when it is asked for, and what is made.

The last tests run the starter itself: a worker takes the jobs one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_house import House, opened

from mutoscope.catalog import find_model
from mutoscope.jobs import queue
from mutoscope.jobs.model import Job, State
from mutoscope.manifest import ModelManifest
from mutoscope.media.read import iter_frames
from mutoscope.media.write import read_metadata
from mutoscope.runner import WanRunner
from mutoscope.worker import Worker
from tests.making_loras import make_lora
from tests.service.fakes import FakeRunner

POCKET = find_model("pocket").files.dit.path
SMALL = {"prompt": "a red ball falls", "model": "pocket", "seed": 7, "frames": 5, "steps": 2}


@pytest.fixture
def shelf(tmp_path: Path, tiny_model: Path) -> Path:
    """Two for the starter, one for another model, one that is broken."""
    folder = tmp_path / "loras"
    make_lora(folder / "ink.safetensors", POCKET, seed=1)
    make_lora(folder / "oil.safetensors", POCKET, seed=2)
    make_lora(folder / "foreign.safetensors", tiny_model / "dit.gguf")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    return folder


@pytest.fixture
def house(tmp_path: Path, shelf: Path) -> Iterator[House]:
    with opened(House(tmp_path / "data", preload="", loras_dir=shelf)) as made:
        yield made


def test_what_is_listed(house: House, shelf: Path) -> None:
    found = {lora["id"]: lora for lora in house.get("/loras")["data"]}
    assert {name: lora["models"] for name, lora in found.items()} == {
        "ink": ["pocket"], "oil": ["pocket"], "foreign": [], "broken": [],
    }  # fmt: skip
    assert found["ink"]["rank"] == 2
    assert found["ink"]["problem"] is None
    assert "neither GGUF nor safetensors" in found["broken"]["problem"]
    one = house.get("/loras/ink")
    assert one.pop("sha256") == hashlib.sha256((shelf / "ink.safetensors").read_bytes()).hexdigest()
    assert one == found["ink"]
    assert house.refused("GET", "/loras/..%2Fink", status=404)
    assert str(shelf) not in house.call("GET", "/loras").text


REFUSED: tuple[tuple[dict[str, Any], str, str, str], ...] = (
    ({"loras": [{"name": "inc"}]}, "loras[0].name", "invalid_request", "LoRA 'inc' is unknown; known: broken"),
    ({"loras": [{"name": "ink"}, {"name": "ink"}]}, "loras[1].name", "invalid_request", "'ink' is there already"),
    ({"loras": [{"name": "foreign"}]}, "loras[0].name", "unsupported", "do not fit 'blocks.0"),
    ({"loras": [{"name": "broken"}]}, "loras[0].name", "invalid_request", "cannot be used: broken.safetensors"),
    ({"loras": [{"name": "../loras/ink"}]}, "loras[0].name", "invalid_request", "is unknown"),
    ({"loras": [{"name": "ink", "strength": 101}]}, "loras.0.strength", "invalid_request", "100"),
    ({"loras": [{"file": "ink"}]}, "loras.0.name", "invalid_request", "required"),
    ({"cache": "easi"}, "cache", "invalid_request", "expected one of none, easy, tea, mag"),
    ({"cache": "easy=x"}, "cache", "invalid_request", "'x' is not a number"),
    ({"cache": "mag"}, "cache", "unsupported", "none for one of width"),
    ({"guidance_interval": [0.8, 0.2]}, "guidance_interval", "invalid_request", "two fractions"),
    ({"guidance_interval": [0.2, 1.2]}, "guidance_interval.1", "invalid_request", "less than or equal to 1"),
    ({"guidance_kept": 101}, "guidance_kept", "invalid_request", "100"),
    ({"guidance_kind": "zero-star=9", "steps": 4}, "guidance_kind", "invalid_request", "expected 0 to 3"),
    ({"sampler": "distill4", "steps": 20}, "steps", "invalid_request", "exactly 4"),
    ({"operation": "upscale", "scale": 2, "source": {"url": "https://example.com/x.mp4"}, "cache": "easy"}, "cache",
     "invalid_request", "is for video and image"),
)  # fmt: skip


def test_what_is_refused_when_it_is_asked_for(house: House) -> None:
    for asked, field, code, said in REFUSED:
        error = house.refused(
            "POST", "/jobs", {"prompt": "a red ball", "model": "pocket", **asked}, status=400
        )
        assert (error["field"], error["code"]) == (field, code)
        assert said in error["message"]
    assert house.get("/jobs")["total"] == 0


def test_price_stays_and_passes_are_counted(house: House) -> None:
    def quote(**asked: Any) -> tuple[int, float, str]:
        found = house.post("/estimates", {"prompt": "a red ball", "steps": 20, **asked}, expect=200)
        return found["credits"], found["resolved"]["passes"], found["resolved"]["switches"]

    price, passes, _ = quote()
    assert passes == 2
    assert quote(guidance_interval=[0, 0.5]) == (price, 1.5, "")
    assert quote(guidance_kind="zero-star=5") == (price, 1.5, "")
    assert quote(guidance=1) == (price, 1, "")
    assert quote(cache="easy=0.1", loras=[{"name": "ink"}]) == (price, 2, "easy=0.1+lora")
    assert quote(loras=[{"name": "ink", "strength": 0}]) == (price, 2, "")
    assert quote(sampler="distill4", steps=None) == (price, 1, "")


class Counting(WanRunner):
    """Notes which models were loaded."""

    loads: list[str]

    def load(self, manifest: ModelManifest) -> None:
        self.loads = [*getattr(self, "loads", ()), manifest.name]
        super().load(manifest)


def make(house: House, worker: Worker, **asked: Any) -> dict[str, Any]:
    job = house.post("/jobs", {**SMALL, **asked})
    assert worker.turn()
    done: dict[str, Any] = house.get(f"/jobs/{job['id']}")
    assert done["state"] == "succeeded", done["failure"]
    return done


def test_loras_are_swapped_between_jobs_and_named_in_what_is_made(house: House, shelf: Path) -> None:
    runner = Counting("cpu", house.settings)
    worker = Worker(house.db, house.settings, runner, device="cpu")

    def frames(job: dict[str, Any]) -> np.ndarray:
        return np.stack(list(iter_frames(file(job))))

    def file(job: dict[str, Any]) -> Path:
        (path,) = (house.settings.data_dir / "outputs" / job["id"]).glob("*/video.mp4")
        return path

    def strength(value: float) -> dict[str, Any]:
        return {"loras": [{"name": "ink", "strength": value}]}

    plain = frames(make(house, worker))
    inked = make(house, worker, **strength(1))
    half = frames(make(house, worker, **strength(0.5)))
    both = make(house, worker, loras=[{"name": "ink", "strength": 1}, {"name": "oil", "strength": 0.5}])
    different = [plain, frames(inked), half, frames(both)]
    for i, one in enumerate(different):
        assert not any(np.array_equal(one, other) for other in different[i + 1 :])
    assert np.array_equal(frames(make(house, worker, **strength(0))), plain)
    assert np.array_equal(frames(make(house, worker)), plain)
    again = make(house, worker, **strength(1))
    assert file(again).read_bytes() == file(inked).read_bytes()
    assert runner.loads == ["pocket"]

    digests = [
        hashlib.sha256((shelf / f"{name}.safetensors").read_bytes()).hexdigest() for name in ("ink", "oil")
    ]
    assert both["result"]["loras"] == [
        {"name": "ink", "strength": 1.0, "sha256": digests[0]}, {"name": "oil", "strength": 0.5, "sha256": digests[1]},
    ]  # fmt: skip
    assert both["spec"]["loras"] == [{"name": "ink", "strength": 1.0}, {"name": "oil", "strength": 0.5}]
    info = read_metadata(file(both))
    assert info is not None
    assert info["lora_sha256"] == {"ink": digests[0], "oil": digests[1]}
    assert info["request"]["loras"] == [["ink", 1.0], ["oil", 0.5]]
    used = {row["loras"]: row["jobs"] for row in house.get("/usage")["data"]}
    assert used == {"": 2, "ink": 4, "ink+oil": 1}


def test_doing_less_reaches_the_engine_and_its_times_are_kept_apart(house: House) -> None:
    worker = Worker(house.db, house.settings, WanRunner("cpu", house.settings), device="cpu")
    less = {"cache": "easy=0.2", "guidance_interval": [0, 0.5], "steps": 10}
    done = make(house, worker, **less)
    (path,) = (house.settings.data_dir / "outputs" / done["id"]).glob("*/video.mp4")
    info = read_metadata(path)
    assert info is not None
    assert (info["request"]["cache"], info["request"]["guidance_interval"]) == ("easy=0.2", [0.0, 0.5])
    alike = house.post("/estimates", {**SMALL, **less}, expect=200)
    full = house.post("/estimates", {**SMALL, "steps": 10}, expect=200)
    assert (alike["samples"], full["samples"]) == (1, 0)
    assert make(house, worker, sampler="distill4", steps=None)["result"]["steps"] == 4


# -- what changed since it was asked for ----------------------------------------------------------------------


def _ended(house: House, job_id: str) -> Job:
    with house.db.read() as tx:
        return queue.get(tx, job_id)


def test_a_lora_that_is_gone_when_the_job_runs(house: House, shelf: Path) -> None:
    worker = Worker(house.db, house.settings, FakeRunner("cpu", house.settings), device="cpu")
    job = house.post("/jobs", {**SMALL, "loras": [{"name": "ink"}]})
    (shelf / "ink.safetensors").unlink()
    assert worker.turn()
    ended = _ended(house, job["id"])
    assert (ended.state, ended.failure) == (State.FAILED, "model_unavailable")
    assert "cannot take this any more: loras[0].name: LoRA 'ink' is unknown" in ended.message
    assert ended.cost_captured == 0


def test_another_model_takes_over_if_the_first_cannot_take_it(
    tmp_path: Path, shelf: Path, tiny_model: Path
) -> None:
    """The router leaves out models that do not fit; one that does not fit any more hands the job on."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "tiny").symlink_to(tiny_model)
    with opened(House(tmp_path / "data", preload="", loras_dir=shelf, models_dir=models)) as house:
        name = next(m["id"] for m in house.get("/models")["data"] if m["id"] != "pocket")
        asked = {"prompt": "a red ball", "frames": 5, "steps": 2}
        assert house.post("/estimates", asked, expect=200)["candidates"] == ["pocket"]
        only = house.post("/estimates", {**asked, "loras": [{"name": "ink"}]}, expect=200)
        assert (only["model"], only["candidates"]) == ("pocket", [])
        (filtered,) = [f for f in only["decision"]["filter"] if not f["kept"]]
        assert (filtered["model"], filtered["code"]) == (name, "capability")
        error = house.refused("POST", "/jobs", {**asked, "loras": [{"name": "broken"}]}, status=400)
        assert "No model can do this. pocket: loras[0].name: LoRA 'broken' cannot be used" in error["message"]

        make_lora(shelf / "ink.safetensors", tiny_model / "dit.gguf")
        job = house.post("/jobs", {**asked, "loras": [{"name": "foreign"}]})
        assert job["model"] == name
        with house.db.write() as tx:  # as if both had taken it when it was asked for
            tx.conn.exec_driver_sql(
                "UPDATE jobs SET candidates = '[\"pocket\"]', spec = replace(spec, 'foreign', 'oil')"
            )
        worker = Worker(house.db, house.settings, FakeRunner("cpu", house.settings), device="cpu")
        assert worker.turn()
        assert _ended(house, job["id"]).model == "pocket"
        assert worker.turn()
        ended = _ended(house, job["id"])
        assert (ended.state, ended.result["loras"][0]["name"]) == (State.SUCCEEDED, "oil")
