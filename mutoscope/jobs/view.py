"""A job as our own API and webhooks show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from mutoscope.jobs import eta, queue
from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import WAITING, Job, Output, State

Link = Callable[[Job, Output], str]


def iso(at: float | None) -> str | None:
    """Unix seconds as ISO 8601 in UTC, with milliseconds."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def public(tx: Tx, job: Job, link: Link | None = None, *, live: bool = True) -> dict[str, Any]:
    """The JSON of a job. `link` makes the URL of an output; without it outputs have none.

    Not `live`: nothing that costs a look at the rest of the queue (position and ETA of a job that waits).
    """
    waits = job.state in WAITING
    finish = eta.finish_at(tx, job) if live or not waits else None
    outputs = []
    for output in job.outputs:
        shown = {k: v for k, v in asdict(output).items() if k != "path" and v not in (0, 0.0)}
        outputs.append(shown | ({"url": link(job, output)} if link is not None else {}))
    return {
        "id": job.id,
        "object": "job",
        "operation": job.operation,
        "state": job.state.value,
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "progress": round(job.progress, 4),
        "queue_position": queue.position(tx, job) if waits and live else None,
        "eta_s": None if finish is None else round(max(0.0, finish - tx.now), 1),
        "estimate_s": round(job.estimate_s, 1),
        "cancel_asked": job.cancel_asked_at is not None and job.state is State.RUNNING,
        "attempt": job.attempt,
        "model": job.model,
        "model_asked": job.model_asked,
        "spec": job.spec,
        "resolved": asdict(job.resolved),
        "seed": job.resolved.seed,
        "priority": job.priority.value,
        "cost": job.cost,
        "cost_captured": job.cost_captured,
        "created_at": iso(job.created_at),
        "started_at": iso(job.started_at),
        "finished_at": iso(job.finished_at),
        "failure": {"code": job.failure.value, "message": job.message} if job.failure else None,
        "outputs": outputs,
        "result": job.result,
        "batch_id": job.batch_id,
        "batch_index": job.batch_index,
        "parent_id": job.parent_id,
        "dialect": job.dialect,
        "metadata": job.metadata,
    }
