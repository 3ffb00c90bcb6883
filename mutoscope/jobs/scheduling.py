"""The order of dispatch: start-time fair queueing between accounts, in rounds, with like shapes next to each other.

The order is decided when a job is submitted and stored with it, as (round, affinity, vtime, seq). So a claim reads the
head of one index, and a job's position is a count in that index.

- **Fairness** (start-time fair queueing; Goyal, Vin, Cheng 1996): every account has a virtual clock. A job starts
  where its account's last one ended, but not before the virtual time V of what runs, and pushes the clock by its work
  divided by the account's weight. Serving by start tags gives each account its share, whoever submitted how much.
- **Rounds**: the virtual time is cut into pieces that hold PER_ROUND usual jobs of an account of weight 1. Within a
  round jobs are ordered by model and shape, so that a worker changes models at most once for each of them and round;
  every second round backwards, so that the last shape of one round is the first of the next. An account is at most a
  round behind its share. What is usual is taken from the head of the queue, as a power of two; a round is named by
  where it begins, so that places given out before it changed stay comparable.
- **Together**: jobs that one account submits at once (a batch) get their places ordered by model and shape, which takes
  nothing from anybody else.
- **Priorities** are three clocks of one account: a high job waits for high ones only, a normal one for high and normal
  ones, a low one for all. So high overtakes what its own account has submitted, which moves back by as much: the
  account's share stays what it is. What has waited for AGED_S does not move back any more, so that nothing starves.

Work is in seconds of estimated device time. What is cancelled before it ran is given back to its account's clocks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import NotFound
from mutoscope.jobs.model import Job, Priority, Resolved, State
from mutoscope.jobs.schema import accounts, jobs

PER_ROUND = 4
"""Usual jobs of an account of weight 1 in a round: docs/scheduling.md has what other numbers cost."""
HEAD = 64
"""Jobs at the head of the queue that say what is usual."""
AGED_S = 3600.0
LEAST_WORK = 0.01
CLOCKS = {Priority.HIGH: "finish_high", Priority.NORMAL: "finish_normal", Priority.LOW: "finish_low"}
ORDER = (jobs.c.round, jobs.c.affinity, jobs.c.vtime, jobs.c.seq)
MODEL_BITS, SHAPE_BITS = 28, 24
MOST = (1 << MODEL_BITS + SHAPE_BITS) - 1
"""The highest `affinity`. In a job's tags it is doubled; an odd number is one that counts from MOST downwards."""


def in_state(state: State) -> sa.ColumnElement[bool]:
    """`state = 'queued'`, with the value in the text: SQLite uses a partial index only if it can read its condition."""
    return jobs.c.state == sa.bindparam(None, state.value, literal_execute=True)


QUEUED, RUNNING = in_state(State.QUEUED), in_state(State.RUNNING)


@dataclass(frozen=True)
class Tags:
    """Where a job stands in the order."""

    round: int
    affinity: int
    vtime: float


class Tagger:
    """Gives out places for jobs of one account, and remembers its clocks with `save`, before the jobs are inserted.

    Holds the account's row: two that submit for one account at once take turns.
    """

    def __init__(self, tx: Tx, account_id: str) -> None:
        columns = (accounts.c.weight, *(accounts.c[name] for name in CLOCKS.values()))
        mine = sa.select(*columns).where(accounts.c.id == account_id)
        row = tx.first(mine.with_for_update(key_share=True))
        if row is None:
            raise NotFound(f"No account {account_id}.")
        self.tx, self.account_id, self.weight = tx, account_id, float(row.weight)
        self.clocks = {p: float(row._mapping[name]) for p, name in CLOCKS.items()}
        self.now = virtual_time(tx)
        self.length: int | None = None
        self.pushed: dict[
            Priority, tuple[float, float]
        ] = {}  # what was queued from there on moves back by so much

    def place(self, priority: Priority, work_s: float, kind: int) -> Tags:
        """The next place. `kind` is an `affinity`."""
        if self.length is None:
            self.length = round_length(self.tx, work_s)
        start = max(self.now, self.clocks[priority])
        length = max(work_s, LEAST_WORK) / self.weight
        self.clocks[priority] = start + length
        for other in _behind(priority)[1:]:
            self.clocks[other] = max(self.now, self.clocks[other]) + length
            since, by = self.pushed.get(other, (start, 0.0))
            self.pushed[other] = min(since, start), by + length
        return tags_at(start, kind, self.length)

    def save(self) -> None:
        values = {name: self.clocks[p] for p, name in CLOCKS.items()}
        self.tx.run(sa.update(accounts).where(accounts.c.id == self.account_id).values(values))
        for priority, (since, by) in self.pushed.items():
            self._push(priority, since, by)
        self.pushed.clear()

    def _push(self, priority: Priority, since: float, by: float) -> None:
        """Waiting jobs of the account and priority move back; `tags_at` in SQL."""
        assert self.length is not None
        vtime = jobs.c.vtime + by
        number = sa.cast(
            vtime / self.length if self.tx.is_sqlite else sa.func.floor(vtime / self.length), sa.BigInteger
        )
        half = jobs.c.affinity // 2
        kind = sa.case((jobs.c.affinity % 2 == 0, half), else_=MOST - half)
        turned = sa.case((number % 2 == 0, kind * 2), else_=(MOST - kind) * 2 + 1)
        waits = jobs.c.state.in_([State.QUEUED, State.THROTTLED])
        mine = (jobs.c.account_id == self.account_id, waits, jobs.c.priority == priority.value)
        later = (jobs.c.vtime >= since, jobs.c.created_at > self.tx.now - AGED_S)
        values = {"vtime": vtime, "round": number * self.length, "affinity": turned}
        self.tx.run(sa.update(jobs).where(*mine, *later).values(values))


def tags(tx: Tx, account_id: str, priority: Priority, work_s: float, kind: int) -> Tags:
    """The place of one new job."""
    tagger = Tagger(tx, account_id)
    place = tagger.place(priority, work_s, kind)
    tagger.save()
    return place


def give_back(tx: Tx, ended: Iterable[Job]) -> None:
    """Jobs end without having run: what they would have taken is still their accounts'."""
    work: dict[tuple[str, Priority], float] = {}
    for job in ended:
        kind = job.account_id, job.priority
        work[kind] = work.get(kind, 0.0) + max(job.estimate_s, LEAST_WORK)
    for (account_id, priority), seconds in work.items():
        length: sa.ColumnElement[Any] = seconds / accounts.c.weight
        values: dict[str, Any] = {CLOCKS[p]: accounts.c[CLOCKS[p]] - length for p in _behind(priority)}
        tx.run(sa.update(accounts).where(accounts.c.id == account_id).values(values))


def affinity(model: str, resolved: Resolved) -> int:
    """A number that is equal for jobs of one model and shape, and near for jobs of one model."""
    of_model = zlib.crc32(model.encode()) >> (32 - MODEL_BITS)
    of_shape = zlib.crc32(resolved.shape.encode()) >> (32 - SHAPE_BITS)
    return of_model << SHAPE_BITS | of_shape


def tags_at(vtime: float, kind: int, length: int) -> Tags:
    """The place of a job of this kind at a virtual time, in rounds of this length."""
    number = math.floor(vtime / length)
    return Tags(number * length, (MOST - kind) * 2 + 1 if number % 2 else kind * 2, vtime)


def round_length(tx: Tx, work_s: float) -> int:
    """Virtual seconds of a round now, a power of two; `work_s` counts while the queue is empty."""
    head = sa.select(jobs.c.estimate_s).where(QUEUED).order_by(*ORDER).limit(HEAD).subquery()
    usual = tx.scalar(sa.select(sa.func.avg(head.c.estimate_s)))
    return 1 << max(0, round(math.log2(PER_ROUND * max(usual or work_s, LEAST_WORK))))


def virtual_time(tx: Tx) -> float:
    """V: the start tag of what is being served; with nothing in service that of the head of the queue; with an empty
    queue the end of everything that was ever asked for."""
    served = tx.scalar(sa.select(sa.func.max(jobs.c.vtime)).where(RUNNING))
    if served is not None:
        return float(served)
    head = tx.scalar(sa.select(jobs.c.vtime).where(QUEUED).order_by(*ORDER).limit(1))
    if head is not None:
        return float(head)
    clocks = [sa.func.max(accounts.c[name]) for name in CLOCKS.values()]
    row = tx.first(sa.select(*clocks))
    return max((float(v) for v in row if v is not None), default=0.0) if row is not None else 0.0


def _behind(priority: Priority) -> list[Priority]:
    """The priority itself and those that it goes before."""
    order = list(CLOCKS)
    return order[order.index(priority) :]
