"""What a job is: its states, the events that move it between them, and the record.

`TRANSITIONS` is the whole state machine. docs/state-machine.md draws it, and a test walks every state x event pair.
"""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a job is. Deletion is not a state: `deleted_at` hides a job that has ended."""

    QUEUED = "queued"  # waits for a worker
    THROTTLED = "throttled"  # waits for a slot of its account
    RUNNING = "running"  # leased by a worker
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobEvent(StrEnum):
    """What can happen to a job."""

    ADMIT = "admit"  # a slot of the account became free
    CLAIM = "claim"  # a worker takes it
    SUCCEED = "succeed"
    FAIL = "fail"  # for good: bad input, out of memory, time limit, too many crashes
    LOSE = "lose"  # the worker died or its lease ran out; there are attempts left
    REROUTE = "reroute"  # the model failed to load or crashes; the next candidate gets it
    CANCEL = "cancel"  # asked while waiting, or obeyed by the worker


WAITING = (State.QUEUED, State.THROTTLED)
TERMINAL = (State.SUCCEEDED, State.FAILED, State.CANCELLED)

TRANSITIONS: dict[tuple[State, JobEvent], State] = {
    (State.THROTTLED, JobEvent.ADMIT): State.QUEUED,
    (State.THROTTLED, JobEvent.FAIL): State.FAILED,
    (State.THROTTLED, JobEvent.CANCEL): State.CANCELLED,
    (State.QUEUED, JobEvent.CLAIM): State.RUNNING,
    (State.QUEUED, JobEvent.FAIL): State.FAILED,
    (State.QUEUED, JobEvent.CANCEL): State.CANCELLED,
    (State.RUNNING, JobEvent.SUCCEED): State.SUCCEEDED,
    (State.RUNNING, JobEvent.FAIL): State.FAILED,
    (State.RUNNING, JobEvent.LOSE): State.QUEUED,
    (State.RUNNING, JobEvent.REROUTE): State.QUEUED,
    (State.RUNNING, JobEvent.CANCEL): State.CANCELLED,
}
"""Everything that is not here does not happen: the write that tries it changes nothing."""


class Priority(StrEnum):
    """Order among the jobs of one account; see `scheduling.py`."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Failure(StrEnum):
    """Why a job failed, for programs. Dialects map these to their vendor's codes."""

    INPUT_INVALID = "input_invalid"  # a picture or clip cannot be used
    INPUT_UNREACHABLE = "input_unreachable"  # a URL could not be fetched
    REQUEST_INVALID = "request_invalid"  # found out only with the inputs at hand
    MODEL_UNAVAILABLE = "model_unavailable"  # no candidate model could be loaded
    OUT_OF_MEMORY = "out_of_memory"
    TIME_LIMIT = "time_limit"
    WORKER_LOST = "worker_lost"  # crashed or vanished on every attempt
    BAD_OUTPUT = "bad_output"  # not a number, or nothing that can be encoded
    STORAGE = "storage"  # the disk is full, or not writable
    INTERNAL = "internal"


@dataclass(frozen=True, kw_only=True)
class Output:
    """One finished file, `path` relative to the data folder."""

    role: str  # "video", "image", "thumbnail", "spritesheet"
    path: str
    mime: str
    size_bytes: int
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The numbers that a spec comes to on its model. Sizes in pixels; `out_*` is the size of the delivered file."""

    width: int
    height: int
    frames: int
    fps: float
    steps: int
    passes: float  # through the model for each step: 2 with classifier-free guidance, else 1; between with an interval
    out_width: int
    out_height: int
    seed: int
    tier: str  # price tier: "draft", "540p", "720p", "1080p", "4k"
    seconds: float  # length of the video; 0 for a picture
    switches: str = ""  # what else changes the time of a step: a step cache, LoRAs

    @property
    def shape(self) -> str:
        """What has to be equal for two jobs to take the same time and memory on one device."""
        size = f"{self.width}x{self.height}x{self.frames}"
        return f"{size}/{self.steps}x{self.passes:g}" + (f"/{self.switches}" if self.switches else "")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of `jobs`, read-only. Times are unix seconds."""

    seq: int
    id: str
    account_id: str
    key_id: str | None
    dialect: str
    operation: str
    state: State
    stage: str  # "", then "load", "inputs", "text", "conditioning", "denoise", "decode", "save"
    step: int
    steps: int
    progress: float  # 0..1, never falls within an attempt
    eta_at: float | None  # when a running job is expected to end
    model: str
    model_asked: str
    candidates: tuple[str, ...]  # models that can take over, in order
    spec: dict[str, Any]  # JobSpec.model_dump(mode="json", exclude_defaults=True)
    resolved: Resolved
    vendor: dict[str, Any]  # whatever the dialect wants back: the request's echo
    metadata: dict[str, Any]
    priority: Priority
    cost: int  # credits: reserved, and captured at success
    cost_captured: int
    estimate_s: float
    time_limit_s: float
    attempt: int  # claims so far
    crashes: int
    fence: int  # token of the current lease; every write of a worker names it
    worker_id: str | None
    lease_until: float | None
    cancel_asked_at: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    deleted_at: float | None
    failure: Failure | None
    message: str  # of a failure, for people
    outputs: tuple[Output, ...]
    result: dict[str, Any]  # what was made: seed, sizes, seconds
    batch_id: str | None
    batch_index: int | None
    parent_id: str | None  # job that this one extends, upscales or remixes

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who pays."""

    id: str
    name: str
    plan: str
    weight: float
    balance: int  # credits that can be spent
    reserved: int  # credits held for jobs under way
    created_at: float
    disabled_at: float | None = None
    limits: dict[str, Any] = field(default_factory=dict)  # overrides of the plan's limits


@dataclass(frozen=True, kw_only=True)
class Caller:
    """An account together with the key that speaks for it."""

    account: Account
    key_id: str
    scopes: tuple[str, ...]  # "jobs", "admin"; see accounts.py


def new_id() -> str:
    """A random UUID, which every vendor's SDK accepts as an id."""
    return str(uuid.uuid4())


def new_secret(prefix: str, n_bytes: int = 32) -> str:
    """A secret to show once."""
    return prefix + secrets.token_hex(n_bytes)
