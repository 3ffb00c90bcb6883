"""What the routes of our API answer when all went well, as OpenAPI. A test compares real answers with it.

Every field is listed and always there, unless it is named in `sometimes`; nothing else is there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import TypeAdapter

from mutoscope.jobs.batches import CANCELLED, FINISHED, PRICED, RUNNING
from mutoscope.jobs.model import Account, Failure, Output, Priority, Resolved, State
from mutoscope.jobs.plans import Plan
from mutoscope.jobs.pricing import Prices
from mutoscope.jobs.spec import JobSpec
from mutoscope.jobs.usage import UsageRow
from mutoscope.jobs.workers import WorkerRow
from mutoscope.manifest import Defaults
from mutoscope.server.api.shape import inlined

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
YES_NO: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object"}
TIME: Schema = {"type": "string", "format": "date-time"}
NAMES: Schema = {"type": "array", "items": TEXT}


def maybe(schema: Schema) -> Schema:
    """Or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def by_name(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def array(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def record(sometimes: tuple[str, ...] = (), /, **fields: Schema) -> Schema:
    """An object of these fields and no others."""
    required = [name for name in fields if name not in sometimes]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def of(
    kind: type, *, without: tuple[str, ...] = (), sometimes: tuple[str, ...] = (), **other: Schema
) -> Schema:
    """A dataclass as it is shown: all of its fields but some, and others in addition or in their place."""
    shown = inlined(TypeAdapter(kind).json_schema(mode="serialization"))["properties"]
    names = [f.name for f in dataclasses.fields(kind) if f.name not in without]
    plain = {name: {k: v for k, v in shown[name].items() if k not in ("title", "default")} for name in names}
    return record(sometimes, **plain | other)


def with_fields(schema: Schema, *, sometimes: tuple[str, ...] = (), **more: Schema) -> Schema:
    """An object with further fields."""
    fields = {**schema["properties"], **more}
    left_out = {*fields} - {*schema["required"]} - {*more}
    return record((*left_out, *sometimes), **fields)


def listing(item: Schema, **more: Schema) -> Schema:
    return record(object=one_of("list"), data=array(item), **more)


_SPEC = inlined(JobSpec.model_json_schema(mode="serialization"))
SPEC: Schema = {**_SPEC, "required": [], "description": "What was asked for, without what is default."}
RESOLVED = of(Resolved)
OUTPUT = of(
    Output, without=("path",), sometimes=("size_bytes", "width", "height", "frames", "fps", "url"), url=TEXT
)
JOB = record(
    id=TEXT, object=one_of("job"), operation=TEXT, state=one_of(*(s.value for s in State)), stage=TEXT, step=WHOLE,
    steps=WHOLE, progress=NUMBER, queue_position=maybe(WHOLE), eta_s=maybe(NUMBER), estimate_s=NUMBER,
    cancel_asked=YES_NO, attempt=WHOLE, model=TEXT, model_asked=TEXT, spec=SPEC, resolved=RESOLVED, seed=WHOLE,
    priority=one_of(*(p.value for p in Priority)), cost=WHOLE, cost_captured=WHOLE, created_at=TIME,
    started_at=maybe(TIME), finished_at=maybe(TIME),
    failure=maybe(record(code=one_of(*(f.value for f in Failure)), message=TEXT)), outputs=array(OUTPUT),
    result=ANYTHING, batch_id=maybe(TEXT), batch_index=maybe(WHOLE), parent_id=maybe(TEXT), dialect=TEXT,
    metadata=ANYTHING,
)  # fmt: skip
JOBS = listing(JOB, has_more=YES_NO, after=maybe(TEXT), total=WHOLE)
ESTIMATE = record(
    object=one_of("estimate"), credits=WHOLE, usd=NUMBER, seconds=NUMBER, low=NUMBER, high=NUMBER, samples=WHOLE,
    wait_s=NUMBER, model=TEXT, candidates=NAMES, resolved=RESOLVED, decision=ANYTHING,
)  # fmt: skip
BATCH = record(
    id=TEXT, object=one_of("batch"), name=TEXT, state=one_of(PRICED, RUNNING, FINISHED, CANCELLED),
    priority=one_of(*(p.value for p in Priority)), total=WHOLE, counts=record(**{s.value: WHOLE for s in State}),
    progress=NUMBER, estimate=record(credits=WHOLE, usd=NUMBER, device_seconds=NUMBER, models=by_name(WHOLE)),
    credits=WHOLE, metadata=ANYTHING, created_at=TIME, confirmed_at=maybe(TIME), finished_at=maybe(TIME),
)  # fmt: skip
MODEL = record(
    id=TEXT, object=one_of("model"), title=TEXT, notes=TEXT, licence=TEXT, tasks=NAMES, quality=NUMBER,
    sizes=array({"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 2}), defaults=of(Defaults),
    max_frames=WHOLE, has_vocabulary=YES_NO,
)  # fmt: skip
MODELS = listing(MODEL, aliases=by_name(TEXT))
LORA = record(
    id=TEXT, object=one_of("lora"), title=TEXT, trigger=TEXT, models=NAMES, strength=NUMBER, settings=ANYTHING,
    rank=WHOLE, size_bytes=WHOLE, changed_at=TIME, problem=maybe(TEXT),
)  # fmt: skip
PROMPT_REPORT = record(
    object=one_of("prompt_report"),
    model=TEXT,
    known_vocabulary=YES_NO,
    unknown=array(record(word=TEXT, near=NAMES)),
)
PING = record(message=one_of("pong"), version=TEXT, account=TEXT)
FILE = record(
    id=TEXT, object=one_of("file"), state=one_of("pending", "ready"), filename=TEXT, mime=TEXT, size_bytes=WHOLE,
    sha256=TEXT, info=ANYTHING, created_at=TIME, expires_at=TIME,
)  # fmt: skip
USAGE = listing(of(UsageRow), days=by_name(WHOLE))
PLAN = of(Plan)
CREDITS = record(
    object=one_of("credits"), balance=WHOLE, reserved=WHOLE, usd_per_credit=NUMBER, plan=PLAN, jobs_today=WHOLE,
    active=WHOLE, spent_30_days=WHOLE,
)  # fmt: skip
PLANS = listing(with_fields(PLAN, usd_per_year=NUMBER), prices=of(Prices))
_RULES = record(optimize_for=TEXT, mode=TEXT, ids=NAMES, max_credits=by_name(WHOLE), on_capacity=YES_NO)
ROUTER = record(
    id=TEXT, object=one_of("router"), slug=TEXT, name=TEXT, rules=_RULES, created_at=TIME, updated_at=TIME
)
DECISION = record(
    seq=WHOLE, id=TEXT, router_id=maybe(TEXT), job_id=maybe(TEXT), at=TIME, chosen=TEXT, data=ANYTHING
)
ENDPOINT = record(
    id=TEXT, object=one_of("webhook_endpoint"), url=TEXT, events=NAMES, created_at=TIME, failing_since=maybe(TIME),
    disabled_at=maybe(TIME), disabled_why=maybe(TEXT),
)  # fmt: skip
DELIVERY = record(
    id=TEXT, endpoint_id=maybe(TEXT), url=TEXT, event=TEXT, job_id=maybe(TEXT),
    state=one_of("pending", "delivered", "failed"), attempts=WHOLE, last_status=maybe(WHOLE), last_error=TEXT,
    created_at=TIME, delivered_at=maybe(TIME), next_at=maybe(TIME),
)  # fmt: skip
ACCOUNT = of(Account, object=one_of("account"), created_at=TIME, disabled_at=maybe(TIME))
KEY = record(
    id=TEXT, object=one_of("key"), account_id=TEXT, name=TEXT, hint=TEXT, scopes=NAMES, created_at=TIME,
    last_used_at=maybe(TIME), revoked_at=maybe(TIME),
)  # fmt: skip
WORKER = of(WorkerRow, started_at=TIME, beat_at=TIME)
SECRET = record(secret=TEXT)


def with_secret(schema: Schema) -> Schema:
    return with_fields(schema, secret=TEXT)
