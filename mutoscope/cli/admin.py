"""`mutoscope keys`, `accounts`, `credits`, `jobs`: the service's data from the command line, running or not."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.table import Table

from mutoscope.cli.common import Debug, Json, console, say, say_json, time_text
from mutoscope.cli.serve import Config, DataDir, open_data
from mutoscope.errors import RequestError

if TYPE_CHECKING:
    from mutoscope.jobs.database import Tx
    from mutoscope.settings import Settings

T = TypeVar("T")
Account = Annotated[str, typer.Option("--account", metavar="NAME", help="An account's name or id.")]
OfAccount = Annotated[
    str | None,
    typer.Option("--account", metavar="NAME", help="Only this account's (name or id).", show_default=False),
]
DEFAULT = "default"

keys = typer.Typer(help="API keys: make, list and revoke them.", pretty_exceptions_enable=False)
accounts = typer.Typer(help="Accounts: who pays.", pretty_exceptions_enable=False)
credits_ = typer.Typer(help="Credits of accounts.", pretty_exceptions_enable=False)
jobs = typer.Typer(help="Jobs: list, look, cancel, try again.", pretty_exceptions_enable=False)


def _in(config: Path | None, data_dir: Path | None, act: Callable[[Tx, Settings], T]) -> T:
    """Do something in one transaction on the service's data."""
    settings, db = open_data(config, data_dir)
    try:
        with db.write() as tx:
            return act(tx, settings)
    finally:
        db.close()


# -- keys ----------------------------------------------------------------------------------------------------


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What it is for.", show_default=False)],
    account: Account = DEFAULT,
    value: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Take this key, which clients have already, over.", show_default=False
        ),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may also manage accounts and keys.")] = False,
    data_dir: DataDir = None,
    config: Config = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Make an API key and print it: it cannot be shown again."""
    from mutoscope.jobs import accounts as book

    scopes = ("jobs", "admin") if admin else ("jobs",)

    def act(tx: Tx, _: Settings) -> tuple[book.Key, str]:
        return book.create_key(tx, book.named(tx, account).id, name, scopes=scopes, value=value)

    key, secret = _in(config, data_dir, act)
    if json_:
        say_json({**vars(key), "key": secret})
    else:
        say(secret)
        say(f"This is the key {name} ({key.id}). It is shown only this once.", err=True)


@keys.command("list")
def keys_list(
    account: OfAccount = None,
    data_dir: DataDir = None,
    config: Config = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List the keys."""
    from mutoscope.jobs import accounts as book

    def act(tx: Tx, _: Settings) -> list[book.Key]:
        return book.keys(tx, book.named(tx, account).id if account else None)

    rows = [vars(key) for key in _in(config, data_dir, act)]
    if json_:
        say_json({"keys": rows})
        return
    _print(
        ("id", "name", "begins with", "scopes", "made", "last used", ""),
        [
            (r["id"], r["name"], r["hint"], " ".join(r["scopes"]), _when(r["created_at"]), _when(r["last_used_at"]),
             "revoked" if r["revoked_at"] else "")
            for r in rows
        ],
    )  # fmt: skip


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="As `mutoscope keys list` shows it.", show_default=False)],
    data_dir: DataDir = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Revoke a key: from now on it is refused."""
    from mutoscope.jobs import accounts as book

    _in(config, data_dir, lambda tx, _: book.revoke(tx, key_id))
    say(f"{key_id} is revoked.")


# -- accounts and credits ------------------------------------------------------------------------------------


@accounts.command("create")
def accounts_create(
    name: Annotated[str, typer.Argument(help="For people.", show_default=False)],
    plan: Annotated[
        str | None, typer.Option(help="Default: the plan in the settings.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Make an account. Give it a key with: mutoscope keys create NAME --account ID."""
    from mutoscope.jobs import accounts as book

    made = _in(config, data_dir, lambda tx, s: book.create(tx, name, plan=plan or s.plan))
    if json_:
        say_json(vars(made))
    else:
        say(made.id)


@accounts.command("list")
def accounts_list(
    data_dir: DataDir = None, config: Config = None, json_: Json = False, debug: Debug = False
) -> None:
    """List accounts with their plans and credits."""
    from mutoscope.jobs import accounts as book

    found = _in(config, data_dir, lambda tx, _: book.listing(tx))
    if json_:
        say_json({"accounts": [vars(a) for a in found]})
        return
    _print(
        ("id", "name", "plan", "credits", "reserved", "made", ""),
        [
            (a.id, a.name, a.plan, str(a.balance), str(a.reserved), _when(a.created_at),
             "disabled" if a.disabled_at else "")
            for a in found
        ],
    )  # fmt: skip


@accounts.command("set")
def accounts_set(
    account: Annotated[str, typer.Argument(help="Its name or id.", show_default=False)],
    plan: Annotated[str | None, typer.Option(help="Another plan.", show_default=False)] = None,
    weight: Annotated[
        float | None, typer.Option(help="Its share of the workers against others' (1).", show_default=False)
    ] = None,
    disabled: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Refuse its keys, or not.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Change an account's plan or weight, or disable it."""
    from mutoscope.jobs import accounts as book

    def act(tx: Tx, _: Settings) -> Any:
        return book.change(tx, book.named(tx, account).id, plan=plan, weight=weight, disabled=disabled)

    a = _in(config, data_dir, act)
    say(f"{a.name}: plan {a.plan}, weight {a.weight:g}{', disabled' if a.disabled_at else ''}.")


@credits_.command("grant")
def credits_grant(
    account: Annotated[
        str, typer.Argument(help="As `mutoscope accounts list` shows it.", show_default=False)
    ],
    amount: Annotated[int, typer.Argument(min=1, help="Credits.", show_default=False)],
    note: Annotated[str, typer.Option(help="Why, for the ledger.")] = "",
    data_dir: DataDir = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Give credits to an account."""
    from mutoscope.jobs import accounts as book
    from mutoscope.jobs import ledger

    def act(tx: Tx, _: Settings) -> int:
        ledger.grant(tx, book.named(tx, account).id, amount, note)
        return book.named(tx, account).balance

    say(f"{account} has {_in(config, data_dir, act)} credits now.")


# -- jobs ----------------------------------------------------------------------------------------------------


@jobs.command("list")
def jobs_list(
    state: Annotated[
        list[str] | None,
        typer.Option(help="Only these: queued, running, ... Repeatable.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    account: OfAccount = None,
    data_dir: DataDir = None,
    config: Config = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List jobs, the newest first; of all accounts unless one is named."""
    from mutoscope.jobs import accounts as book
    from mutoscope.jobs import queue, view
    from mutoscope.jobs.model import State

    unknown = [s for s in state or () if s not in set(State)]
    if unknown:
        raise RequestError(f"--state {unknown[0]!r}: unknown.", hint=f"Known: {', '.join(State)}.")
    states = tuple(State(s) for s in state or ())

    def act(tx: Tx, _: Settings) -> Any:
        owner = book.named(tx, account).id if account else None
        page = queue.listing(tx, owner, limit=limit, states=states)
        return [view.public(tx, job) for job in page.jobs] if json_ else page.jobs

    found = _in(config, data_dir, act)
    if json_:
        say_json({"jobs": found})
        return
    _print(
        ("id", "state", "operation", "model", "progress", "made", "prompt"),
        [
            (j.id, j.state, j.operation, j.model, f"{j.progress:.0%}", _when(j.created_at),
             str(j.spec.get("prompt", ""))[:60])
            for j in found
        ],
    )  # fmt: skip


@jobs.command("show")
def jobs_show(
    job_id: Annotated[str, typer.Argument(show_default=False)],
    data_dir: DataDir = None,
    config: Config = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show all that is known of a job."""
    from mutoscope.jobs import queue, view

    def act(tx: Tx, settings: Settings) -> tuple[Any, dict[str, Any], Path]:
        job = queue.get(tx, job_id)
        return job, view.public(tx, job), settings.data_dir

    job, shown, folder = _in(config, data_dir, act)
    if json_:
        say_json(shown)
        return
    facts = {
        "id": job.id,
        "state": job.state + (f" ({job.failure})" if job.failure else ""),
        "message": job.message,
        "stage": f"{job.stage} {job.step}/{job.steps}" if job.stage else "",
        "operation": f"{job.operation} by {job.model}",
        "prompt": str(job.spec.get("prompt", "")),
        "made": _when(job.created_at),
        "took": time_text(job.finished_at - job.started_at) if job.finished_at and job.started_at else "",
        "attempts": f"{job.attempt}, crashes {job.crashes}",
        "credits": f"{job.cost} reserved, {job.cost_captured} taken",
        "worker": job.worker_id or "",
        "files": "\n".join(str(folder / o.path) for o in job.outputs),
    }
    for name, value in facts.items():
        for line in filter(None, value.splitlines()):
            say(f"{name:<10} {line}")


@jobs.command("cancel")
def jobs_cancel(
    job_id: Annotated[str, typer.Argument(show_default=False)],
    data_dir: DataDir = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Cancel a job: what waits ends now, what runs stops after its step."""
    from mutoscope.jobs import queue

    job = _in(config, data_dir, lambda tx, _: queue.cancel(tx, job_id))
    say(f"{job.id} is {job.state}" + (" and will stop." if job.state == "running" else "."))


@jobs.command("retry")
def jobs_retry(
    job_id: Annotated[str, typer.Argument(show_default=False)],
    data_dir: DataDir = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Submit the request of an ended job again, as a new job of the same account."""
    from mutoscope.jobs import accounts as book
    from mutoscope.jobs import queue
    from mutoscope.jobs.model import Caller
    from mutoscope.jobs.service import Service
    from mutoscope.jobs.spec import JobSpec

    def act(tx: Tx, settings: Settings) -> str:
        old = queue.get(tx, job_id)
        if not old.is_terminal:
            raise RequestError(f"{job_id} is {old.state}; only what has ended can be tried again.")
        caller = Caller(account=book.get(tx, old.account_id), key_id=old.key_id or "", scopes=("jobs",))
        spec = JobSpec.model_validate(old.spec)
        return Service.make(settings).submit(tx, caller, spec, dialect=old.dialect, vendor=old.vendor).id

    say(_in(config, data_dir, act))


# -- how it looks --------------------------------------------------------------------------------------------


def _print(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out = console()
    if not out.is_terminal:
        out.width = 400  # nothing is cut in a pipe
    out.print(table, markup=False)


def _when(at: float | None) -> str:
    """Local time to the minute, or nothing."""
    if not at:
        return ""
    return datetime.datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M")
