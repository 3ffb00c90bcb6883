"""Which model makes a job: capability, price ceiling, rules, load, preference, fallbacks; and that it can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mutoscope.jobs import eta, ledger, queue, router, workers
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, NotFound, Unsupported
from mutoscope.jobs.model import Failure, Job, State
from mutoscope.jobs.pricing import Prices
from mutoscope.jobs.registry import Model, Registry, tasks_of
from mutoscope.jobs.router import Decision, Rules
from mutoscope.jobs.schema import workers as worker_table
from mutoscope.jobs.spec import JobSpec
from tests.service.making import (
    FixedRegistry,
    account_row,
    caller_for,
    make_account,
    make_model,
    make_service,
    output,
    resolved,
)

SMALL = make_model("small", quality=0.2)
GOOD = make_model("good", quality=0.6, price_factor=2.0)
BEST = make_model("best", quality=0.9, price_factor=4.0, tasks=("text", "keyframes"), defaults={"frames": 33})
ALL = (SMALL, GOOD, BEST)
CLIP = {"job": "00000000-0000-0000-0000-000000000000"}


def decide(tx: Tx, *models: Model, rules: Rules | None = None, prefer: str = "", **spec: Any) -> Decision:
    asked = JobSpec(**{"prompt": "a ball", "quality": "draft", **spec})
    return router.route(tx, FixedRegistry(*(models or ALL)), Prices.load(), asked, rules, prefer=prefer)


def order(decision: Decision) -> list[str]:
    return [entry["model"] for entry in decision.data["rank"]]


def ran(tx: Tx, model: str, seconds: float, load_s: float = 0.0) -> None:
    """The model has made a clip like the one that is asked for, in so many seconds."""
    frames = 33 if model == "best" else 17
    shape = resolved(frames=frames, steps=8, passes=2, tier="draft")  # a draft
    eta.record(tx, model=model, device="cpu", resolved=shape, step_s=seconds / 8, rest_s=0.0, load_s=load_s)


def worker(tx: Tx, model: str) -> None:
    workers.register(tx, worker_id=f"w-{model}", device="cpu", host="h", pid=1)
    workers.update(tx, f"w-{model}", state="idle", model=model, job_id=None, switches=0)


# -- filter --------------------------------------------------------------------------------------------------


def test_what_a_spec_needs() -> None:
    def needs(**spec: Any) -> set[str]:
        return set(tasks_of(JobSpec(**{"prompt": "x", **spec})))

    keyframe = [{"media": CLIP}]
    assert needs() == {"text"}
    assert needs(keyframes=keyframe) == {"text", "keyframes"}
    assert needs(source=CLIP) == {"text", "control"}
    assert needs(source=CLIP, mask=CLIP) == {"text", "repaint"}
    assert needs(source=CLIP, reframe="fit") == {"text", "outpaint"}
    assert needs(extend_end=CLIP) == {"text", "extend"}
    assert needs(operation="upscale", source=CLIP) == set()


def test_only_models_that_can_do_it(db: Database) -> None:
    with db.write() as tx:
        found = decide(tx, extend_start=CLIP)
        assert order(found) == ["good", "small"]
        (left,) = [f for f in found.data["filter"] if not f["kept"]]
        assert (left["model"], left["code"]) == ("best", "capability")
        assert left["why"] == "best does not follow extend."
        with pytest.raises(Unsupported, match="best does not follow extend") as caught:
            decide(tx, extend_start=CLIP, model="best")
        assert caught.value.field == "model"
        with pytest.raises(InvalidRequest, match=r"No model can do this. small: .*good: .*best: "):
            decide(tx, seconds=299)


def test_the_ceiling_of_the_request_and_of_the_router(db: Database) -> None:
    with db.write() as tx:
        assert [decide(tx, max_credits=n).model.name for n in (16, 15, 8, 7, 4)] == [
            "best", "good", "good", "small", "small",
        ]  # fmt: skip
        with pytest.raises(InvalidRequest, match="costs 4 credits, at most 3") as caught:
            decide(tx, max_credits=3)
        assert caught.value.field == "max_credits"
        assert decide(tx, rules=Rules(max_credits={"video": 7})).model.name == "small"
        assert decide(tx, rules=Rules(max_credits={"image": 0})).model.name == "best"


def test_models_that_a_router_leaves_out_or_allows(db: Database) -> None:
    with db.write() as tx:
        assert order(decide(tx, rules=Rules(ids=("best",)))) == ["good", "small"]
        assert order(decide(tx, rules=Rules(mode="allowlist_only", ids=("small", "good")))) == [
            "good",
            "small",
        ]
        with pytest.raises(InvalidRequest, match="the router leaves it out"):
            decide(tx, rules=Rules(mode="allowlist_only"))


def test_a_model_that_is_named_is_the_only_one(db: Database) -> None:
    with db.write() as tx:
        found = decide(tx, model="small")
        assert (found.model.name, found.candidates, order(found)) == ("small", (), ["small"])
        assert found.data["reasonCode"] == "only_eligible_model"


# -- rank ----------------------------------------------------------------------------------------------------


def test_quality_and_cost(db: Database) -> None:
    with db.write() as tx:
        best = decide(tx)
        assert (order(best), best.data["reasonCode"]) == (["best", "good", "small"], "best_quality")
        cheap = decide(tx, optimize_for="cost")
        assert (order(cheap), cheap.data["reasonCode"]) == (["small", "good", "best"], "lowest_cost")
        assert (best.cost, cheap.cost) == (16, 4)
        assert decide(tx, prefer="small").model.name == "small"
        assert (
            decide(tx, prefer="best", extend_start=CLIP).model.name == "good"
        )  # what is preferred cannot do it


def test_latency_asks_for_measured_times(db: Database) -> None:
    with db.write() as tx:
        ran(tx, "small", 30), ran(tx, "good", 10)
        unknown = decide(tx, optimize_for="latency")
        assert unknown.data["reasonCode"] == "filter_order_fallback"
        ran(tx, "best", 20)
        for name in ("small", "good", "best"):
            worker(tx, name)
        found = decide(tx, optimize_for="latency")
        assert (order(found), found.data["reasonCode"]) == (["good", "best", "small"], "best_latency")
        assert [round(e["seconds"]) for e in found.data["rank"]] == [10, 20, 30]


def test_latency_counts_the_queue_and_the_loading(db: Database) -> None:
    service = make_service(*ALL)
    with db.write() as tx:
        make_account(tx)
        ran(tx, "small", 30, 5.0), ran(tx, "good", 10, 35.0), ran(tx, "best", 20, 5.0)
        worker(tx, "small"), worker(tx, "best")
        assert order(decide(tx, optimize_for="latency")) == ["best", "small", "good"]  # 20, 30, 10 + 35
        for _ in range(3):
            service.submit(
                tx, caller_for(tx), JobSpec(prompt="x", model="best", quality="draft"), dialect="api"
            )
        assert order(decide(tx, optimize_for="latency")) == [
            "small",
            "good",
            "best",
        ]  # 30, 45, 20 + 3 x 20 / 2
        tx.run(
            sa.update(worker_table).values(beat_at=tx.now - 1000)
        )  # all are gone: everything has to be loaded
        assert order(decide(tx, optimize_for="latency"))[0] == "small"


# -- capacity ------------------------------------------------------------------------------------------------


def test_a_model_that_is_full_is_passed_over(db: Database) -> None:
    full = make_model("best", quality=0.9, max_queue=2)
    service = make_service(SMALL, full)
    with db.write() as tx:
        make_account(tx)
        for _ in range(2):
            service.submit(tx, caller_for(tx), JobSpec(prompt="x"), dialect="api")
        found = decide(tx, SMALL, full)
        assert (found.model.name, found.data["capacity"]["full"]) == ("small", ["best"])
        assert found.data["capacityFallback"] == {"allExhausted": False, "skipped": ["best"]}
        assert decide(tx, SMALL, full, fallback=False).model.name == "best"
        assert decide(tx, SMALL, full, rules=Rules(on_capacity=False)).model.name == "best"
        assert decide(tx, SMALL, full, model="best").model.name == "best"  # whoever names it waits for it
        alone = decide(tx, full)
        assert (alone.model.name, alone.data["capacityFallback"]["allExhausted"]) == ("best", True)


# -- fallback ------------------------------------------------------------------------------------------------


def submit(tx: Tx, service: Any, **spec: Any) -> Job:
    made: Job = service.submit(
        tx, caller_for(tx), JobSpec(**{"prompt": "x", "quality": "draft", **spec}), dialect="api"
    )
    return made


def claimed(tx: Tx, *models: str) -> Job:
    job = queue.claim(tx, "w", models or ("small", "good", "best"), "cpu")
    assert job is not None
    return job


def test_candidates_never_cost_more(db: Database) -> None:
    with db.write() as tx:
        assert decide(tx).candidates == ("good", "small")
        assert decide(tx, optimize_for="cost").candidates == ()
        assert decide(tx, fallback=False).candidates == ()


def test_the_next_model_gets_its_own_sizes_and_price(db: Database) -> None:
    """What the fallback is charged, and the sizes that it makes, are its own; the seed stays."""
    service = make_service(*ALL)
    with db.write() as tx:
        make_account(tx)
        ran(tx, "good", 12.0)
        made = submit(tx, service, seed=5)
        assert (made.model, made.cost, made.resolved.frames) == ("best", 16, 33)
        job = claimed(tx)
        after = queue.reroute(tx, job.id, job.fence, "cannot be loaded")
        assert after is not None
        assert (after.state, after.model, after.candidates, after.cost) == (
            State.QUEUED,
            "good",
            ("small",),
            8,
        )
        assert (after.resolved.frames, after.resolved.seed, after.estimate_s) == (17, 5, pytest.approx(12.0))
        assert queue.claim(tx, "w", ("best",), "cpu") is None
        job = claimed(tx, "good")
        done = queue.succeed(tx, job.id, job.fence, [output(job)], {})
        assert done is not None
        assert (done.cost_captured, account_row(tx).balance, account_row(tx).reserved) == (8, 992, 0)
        assert ledger.check(tx) == []


def test_crashes_go_through_all_models_and_then_end(db: Database) -> None:
    service = make_service(*ALL)
    with db.write() as tx:
        make_account(tx)
        made = submit(tx, service)
        tried = []
        while not (job := queue.get(tx, made.id)).is_terminal:
            job = claimed(tx)
            tried.append(job.model)
            queue.lose(tx, job.id, job.fence, "it died", max_crashes=2)
        assert tried == ["best", "best", "good", "good", "small", "small"]
        assert (job.state, job.failure) == (State.FAILED, Failure.WORKER_LOST)
        assert account_row(tx).balance == 1000


# -- what is kept --------------------------------------------------------------------------------------------


def test_decisions_are_kept_and_read(db: Database) -> None:
    service = make_service(*ALL)
    with db.write() as tx:
        make_account(tx), make_account(tx, "else")
        made = [submit(tx, service) for _ in range(3)]
        (found,) = router.decisions(tx, "acct", job_id=made[1].id)
        assert (found.chosen, found.data["estimatedCost"]) == ("best", 16)
        assert [f["model"] for f in found.data["filter"]] == ["small", "good", "best"]
        newest = router.decisions(tx, "acct", limit=2)
        assert [d.job_id for d in newest] == [made[2].id, made[1].id]
        assert [d.job_id for d in router.decisions(tx, "acct", before=newest[-1].seq)] == [made[0].id]
        assert router.decisions(tx, "else") == []
        other = router.alternative(tx, made[0].id, "small")
        assert other is not None
        assert other.cost == 4
        assert router.alternative(tx, made[0].id, "nobody") is None
        assert router.prune(tx, tx.now + 1) == 3


def test_a_router_of_ones_own(db: Database) -> None:
    service = make_service(*ALL)
    with db.write() as tx:
        make_account(tx), make_account(tx, "else")
        made = router.create(tx, "acct", slug="cheap", name="", rules=Rules(optimize_for="cost"))
        spec = JobSpec(prompt="x", quality="draft")
        job = service.submit(tx, caller_for(tx), spec, dialect="api", router="cheap")
        assert job.model == "small"
        (kept,) = router.decisions(tx, "acct", router_id=made.id)
        assert kept.job_id == job.id
        changed = router.change(tx, "acct", "cheap", slug="dear", rules=Rules(ids=("best",)))
        assert service.submit(tx, caller_for(tx), spec, dialect="api", router="dear").model == "good"
        assert changed.rules.ids == ("best",)
        with pytest.raises(NotFound):
            router.get(tx, "else", made.id)
        with pytest.raises(Conflict):
            router.create(tx, "acct", slug="dear", name="", rules=Rules())
        assert router.create(tx, "else", slug="dear", name="", rules=Rules()).slug == "dear"
        for slug, rules in (("No", Rules()), ("a", Rules(optimize_for="luck")), ("a", Rules(mode="x")),
                            ("a", Rules(max_credits={"video": -1}))):  # fmt: skip
            with pytest.raises(InvalidRequest):
                router.create(tx, "acct", slug=slug, name="", rules=rules)
        router.delete(tx, "acct", "dear")
        with pytest.raises(NotFound):
            service.submit(tx, caller_for(tx), spec, dialect="api", router="dear")
        assert len(router.decisions(tx, "acct", router_id=made.id)) == 2


# -- the registry --------------------------------------------------------------------------------------------


def test_names_aliases_and_families() -> None:
    told = replace(GOOD.manifest, name="wan:q8_0", service=replace(GOOD.manifest.service, aliases=("house",)))
    registry = FixedRegistry(SMALL, Model(told), aliases={"sora-2": "small", "gone": "not-here:q4"})
    assert registry.target("small") == "small"
    assert registry.target("wan") == "wan:q8_0"  # the first of the family
    assert registry.target("house") == "wan:q8_0"
    assert registry.target("sora-2") == "small"  # one's own line comes before the shipped one
    assert registry.target("gen4_turbo") == "auto"
    with pytest.raises(InvalidRequest, match="not installed") as missing:
        registry.target("gone")
    assert missing.value.hint == "Run: mutoscope pull not-here:q4"
    with pytest.raises(InvalidRequest, match="No model 'smal'") as unknown:
        registry.target("smal")
    assert "small" in str(unknown.value.hint)


def test_without_any_model(db: Database) -> None:
    with db.write() as tx, pytest.raises(Unsupported, match="No model is installed"):
        router.route(tx, FixedRegistry(), Prices.load(), JobSpec(prompt="x"))


def test_a_folder_of_models_is_read_and_what_is_broken_is_left_out(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.toml").write_text('name = "broken"\nsurprise = 1\n')
    registry = Registry(tmp_path)
    assert [model.name for model in registry.models()] == ["pocket"]
    assert registry.models() is registry.models()  # read at most every FRESH_S
