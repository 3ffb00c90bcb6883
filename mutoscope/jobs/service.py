"""What the edge may do with jobs. `submit` is the page to read.

Everything happens in the caller's transaction: a job, its credits, its event and its webhooks are written together.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from mutoscope.jobs import accounts, assets, endpoints, eta, fetch, ledger, plans, queue
from mutoscope.jobs import router as routing
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Forbidden, InvalidRequest, NotFound
from mutoscope.jobs.model import Caller, Job, Priority, Resolved, State
from mutoscope.jobs.pricing import Prices
from mutoscope.jobs.queue import NewJob, Page
from mutoscope.jobs.registry import AUTO, Registry
from mutoscope.jobs.resolve import MAX_SEED
from mutoscope.jobs.router import Decision, Rules
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.spec import JobSpec
from mutoscope.settings import Settings

MAX_METADATA_BYTES = 16_384


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What a job would cost and take. Seconds; `low` to `high` holds nine runs of ten."""

    credits: int
    usd: float
    seconds: float
    low: float
    high: float
    samples: int
    wait_s: float
    model: str
    candidates: tuple[str, ...]
    resolved: Resolved
    decision: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job that could be inserted: checked, routed, priced."""

    new: NewJob
    decision: Decision
    router_id: str | None = None


class Service:
    """Made once for a process; keeps no state but the registry's cache."""

    def __init__(self, settings: Settings, registry: Registry, prices: Prices) -> None:
        self.settings, self.registry, self.prices = settings, registry, prices

    @classmethod
    def make(cls, settings: Settings) -> Service:
        """With the registry and the price list that the settings name."""
        registry = Registry(settings.models_dir, settings.aliases, settings.loras_dir)
        return cls(settings, registry, Prices.load(settings.prices_file))

    # -- making jobs -----------------------------------------------------------------------------------------

    def submit(
        self,
        tx: Tx,
        caller: Caller,
        spec: JobSpec,
        *,
        dialect: str,
        vendor: Mapping[str, Any] | None = None,
        parent_id: str | None = None,
        router: str | None = None,
    ) -> Job:
        """A new job: checked, routed, priced, paid for and queued (or throttled). `router`: id or slug.

        Raises:
            InvalidRequest, Unsupported, Forbidden, OutOfCredits, LimitExceeded, NotFound (the router).
        """
        need_scope(caller, "jobs")
        account = accounts.get(tx, caller.account.id, hold=True)
        prepared = self.prepare(
            tx, caller, spec, dialect=dialect, vendor=vendor, parent_id=parent_id, router=router
        )
        new, plan = prepared.new, plans.plan_of(account)
        if (first := self._same_before(tx, new)) is not None:
            return first
        plans.check_quota(tx, account, cost=new.cost)
        if not plan.overdraft:
            ledger.cover(account.balance, new.cost)
        job = queue.insert(tx, replace(new, admit=plans.room(tx, account.id) > 0))
        ledger.reserve(tx, job, overdraft=plan.overdraft)
        named = [media.asset for media in spec.media() if media.asset is not None]
        assets.used(tx, named, hours=self.settings.upload_hours)
        routing.keep(tx, account.id, prepared.decision, job_id=job.id, router_id=prepared.router_id)
        return job

    def prepare(
        self,
        tx: Tx,
        caller: Caller,
        spec: JobSpec,
        *,
        dialect: str,
        vendor: Mapping[str, Any] | None = None,
        parent_id: str | None = None,
        router: str | None = None,
    ) -> Prepared:
        """What `submit` knows before it looks at the account: checked, routed, priced. Changes nothing."""
        account = caller.account
        self._check(tx, caller, spec)
        rules, router_id = self._router(tx, caller, router)
        decision = self._decide(tx, spec, rules)
        plan = plans.plan_of(account)
        plans.check_features(plan, spec, tier=decision.resolved.tier, dialect=dialect)
        estimate = eta.estimate(tx, decision.model.name, None, decision.resolved)
        dumped = spec.dump()
        dedupe = None
        if self.settings.dedupe_seeded_s and spec.seed is not None:
            dedupe = hashlib.sha256(self._content(tx, dialect, spec, dumped).encode()).hexdigest()
        new = NewJob(
            account_id=account.id, key_id=caller.key_id, dialect=dialect, operation=spec.operation,
            model=decision.model.name, model_asked=spec.model, candidates=decision.candidates, spec=dumped,
            resolved=decision.resolved, vendor=vendor or {}, metadata=spec.metadata,
            priority=Priority(spec.priority), cost=decision.cost,
            estimate_s=estimate.seconds, dedupe=dedupe, webhook_url=spec.webhook_url,
            time_limit_s=min(spec.time_limit_s or self.settings.time_limit_s, self.settings.time_limit_s),
            parent_id=parent_id or _parent(spec),
        )  # fmt: skip
        return Prepared(new=new, decision=decision, router_id=router_id)

    def estimate(self, tx: Tx, caller: Caller, spec: JobSpec, *, router: str | None = None) -> Quote:
        """What it would cost and take, without doing it. Refuses what cannot be made; asks neither plan nor balance."""
        self._check(tx, caller, spec)
        decision = self._decide(tx, spec, self._router(tx, caller, router)[0])
        run = eta.estimate(tx, decision.model.name, None, decision.resolved)
        return Quote(
            credits=decision.cost, usd=self.prices.usd(decision.cost), seconds=run.seconds, low=run.low,
            high=run.high, samples=run.samples, wait_s=eta.backlog(tx), model=decision.model.name,
            candidates=decision.candidates, resolved=decision.resolved, decision=decision.data,
        )  # fmt: skip

    def _decide(self, tx: Tx, spec: JobSpec, rules: Rules | None) -> Decision:
        default = self.settings.default_model
        prefer = "" if default in ("", AUTO) else self.registry.target(default)
        return routing.route(tx, self.registry, self.prices, spec, rules, prefer=prefer)

    @staticmethod
    def seed(asked: int | None) -> int:
        """The seed that was asked for, or one that is drawn."""
        return secrets.randbelow(MAX_SEED) if asked is None else asked

    # -- jobs that are there ---------------------------------------------------------------------------------

    def get(self, tx: Tx, caller: Caller, job_id: str) -> Job:
        """A job of this account.

        Raises:
            NotFound: there is none, or it was deleted.
        """
        return queue.get(tx, job_id, account_id=caller.account.id)

    def listing(self, tx: Tx, caller: Caller, **filters: Any) -> Page:
        """Jobs of this account; see `queue.listing`."""
        return queue.listing(tx, caller.account.id, **filters)

    def cancel(self, tx: Tx, caller: Caller, job_id: str) -> Job:
        """What waits ends now, what runs is asked to stop, what has ended stays."""
        need_scope(caller, "jobs")
        return queue.cancel(tx, self.get(tx, caller, job_id).id)

    def delete(self, tx: Tx, caller: Caller, job_id: str) -> Job:
        """Not shown any more; cancelled first if it has not ended."""
        need_scope(caller, "jobs")
        return queue.delete(tx, self.get(tx, caller, job_id).id)

    # -- checks ----------------------------------------------------------------------------------------------

    def _check(self, tx: Tx, caller: Caller, spec: JobSpec) -> None:
        check_metadata(spec)
        if spec.webhook_url is not None:
            endpoints.check_url(spec.webhook_url, self.settings, field="webhook_url")
        for use in fetch.uses(spec):
            if use.media.job is not None:
                finished(tx, caller.account.id, use.media.job, field=f"{use.field}.job", kinds=use.kinds)
            elif use.media.asset is not None:
                self._check_asset(tx, caller, use)

    @staticmethod
    def _check_asset(tx: Tx, caller: Caller, use: fetch.Use) -> None:
        field = f"{use.field}.asset"
        assert use.media.asset is not None
        try:
            asset = assets.get(tx, caller.account.id, use.media.asset)
        except NotFound as e:
            raise InvalidRequest(f"{field}: {e.message}", field=field, hint=e.hint) from e
        kind = asset.info.get("kind")  # an animation serves as both
        if kind in ("image", "video") and kind not in use.kinds:
            raise InvalidRequest(f"{field}: {asset.mime}, {' or '.join(use.kinds)} expected.", field=field)

    def _router(self, tx: Tx, caller: Caller, name: str | None) -> tuple[Rules | None, str | None]:
        if name is None:
            return None, None
        found = routing.get(tx, caller.account.id, name)
        return found.rules, found.id

    @staticmethod
    def _content(tx: Tx, dialect: str, spec: JobSpec, dumped: dict[str, Any]) -> str:
        """What is asked, with files by their content: data inside of a repeated request gets another id."""
        text = json.dumps([dialect, dumped], sort_keys=True)
        for asset_id, digest in assets.digests(tx, [m.asset for m in spec.media() if m.asset]).items():
            text = text.replace(asset_id, digest)
        return text

    def _same_before(self, tx: Tx, new: NewJob) -> Job | None:
        """A seeded request that came within the window before: most likely its answer was lost on the way."""
        if new.dedupe is None:
            return None
        since = tx.now - self.settings.dedupe_seeded_s
        same = sa.select(jobs.c.id).where(jobs.c.account_id == new.account_id, jobs.c.dedupe == new.dedupe)
        row = tx.first(same.where(jobs.c.created_at >= since, jobs.c.deleted_at.is_(None)).limit(1))
        return queue.get(tx, row.id) if row is not None else None


def check_metadata(spec: JobSpec) -> None:
    """Raises InvalidRequest if it is too large."""
    if spec.metadata and len(json.dumps(spec.metadata).encode()) > MAX_METADATA_BYTES:
        raise InvalidRequest(f"metadata has more than {MAX_METADATA_BYTES} bytes.", field="metadata")


def need_scope(caller: Caller, scope: str) -> None:
    """Raises Forbidden unless the key has the scope, or is an administrator's."""
    if scope not in caller.scopes and "admin" not in caller.scopes:
        raise Forbidden(f"This API key may not do that: it needs the scope {scope!r}.")


def finished(
    tx: Tx, account_id: str, job_id: str, *, field: str = "job", kinds: Sequence[str] = ("video", "image")
) -> Job:
    """A job of the account whose video or picture can be used as input.

    Raises:
        InvalidRequest: there is none, it has not succeeded, or it made something else.
    """
    try:
        job = queue.get(tx, job_id, account_id=account_id)
    except NotFound as e:
        raise InvalidRequest(f"{field} = {job_id!r}: no such job.", field=field) from e
    if job.state is not State.SUCCEEDED:
        raise InvalidRequest(f"{field} = {job_id!r}: it is {job.state}, succeeded expected.", field=field)
    if not any(output.role in kinds for output in job.outputs):
        hint = "" if job.outputs else "Its files were deleted."
        raise InvalidRequest(f"{field} = {job_id!r}: has no {' or '.join(kinds)}.", field=field, hint=hint)
    return job


def _parent(spec: JobSpec) -> str | None:
    """The job that this one works on, if it works on one."""
    worked_on = (spec.source, spec.extend_start, spec.extend_end, spec.control)
    return next((m.job for m in worked_on if m is not None and m.job is not None), None)
