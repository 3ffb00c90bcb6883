"""`mutoscope serve` and `mutoscope worker`: the service on this machine, and a worker of its own."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mutoscope import __version__, logs
from mutoscope.cli.common import Debug, say
from mutoscope.errors import RequestError

if TYPE_CHECKING:
    from mutoscope.jobs.database import Database
    from mutoscope.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Settings in a TOML file; see docs/settings.md.", show_default=False
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Database, uploads and outputs (default: a folder of your user).", show_default=False),
]


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one (default: 8000).", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="cpu, cuda:0, ... Repeatable: one worker each (default: all GPUs, or cpu).",
            show_default=False,
        ),
    ] = None,
    preload: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Loaded by workers at the start (default: pocket).", show_default=False
        ),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan of new accounts (default: unlimited).", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Start the service: the web process and a worker per device.

    Prints the address and, the first time, an API key. Ctrl-C lets running jobs finish for a while; a second one
    stops at once.
    """
    from mutoscope.fleet.local import ServeLock, Supervisor, all_devices, listen
    from mutoscope.settings import load

    settings = load(
        config,
        {"host": host, "port": port, "data_dir": data_dir, "devices": tuple(device) if device else None,
         "preload": preload, "plan": plan},
    )  # fmt: skip
    settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
    lock = ServeLock(settings)
    listener = listen(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})
    logs.configure(as_json=settings.log_json, level=logging.WARNING)
    db, secret = open_service(settings)
    devices = settings.devices or all_devices()
    supervisor = Supervisor(settings, db, listener, devices)

    def ready() -> None:
        say(f"Mutoscope {__version__} is ready.", style="bold")
        say(f"  URL      {supervisor.url}")
        if secret:
            say(f"  API key  {secret}")
            say("           It is shown only this once. More: mutoscope keys create NAME")
        say(f"  data     {settings.data_dir}")
        say(f"  devices  {', '.join(devices)}")
        say("Ctrl-C stops, and lets running jobs finish; a second one stops at once.")
        sys.stdout.flush()

    supervisor.ready = ready
    try:
        supervisor.run()
    finally:
        listener.close()
        db.close()
        lock.release()


def worker(
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda:0, ... (default: a GPU if there is one).", show_default=False),
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Run one worker alone, on a machine that shares the database and the data folder with the service.

    `mutoscope serve` starts workers itself; this is for further machines.
    """
    from mutoscope.fleet.local import all_devices, bury
    from mutoscope.jobs.database import Database
    from mutoscope.runner import find_runner
    from mutoscope.settings import load
    from mutoscope.worker import Worker

    settings = load(config, {"data_dir": data_dir})
    settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
    logs.configure(as_json=settings.log_json)
    chosen = device or (settings.devices or all_devices())[0]
    db = Database(settings.database)
    bury(db)
    running = Worker(db, settings, find_runner(settings.engine)(chosen, settings), device=chosen)
    asked: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            os._exit(130)
        running.drain(settings.drain_s)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        running.run()
    finally:
        db.close()


def open_service(settings: Settings) -> tuple[Database, str | None]:
    """The database at its newest schema, and the first key if it was just made."""
    from mutoscope.jobs import accounts, migrations
    from mutoscope.jobs.database import Database

    settings.data_dir.mkdir(parents=True, exist_ok=True)
    db = Database(settings.database)
    migrations.upgrade(db)
    with db.write() as tx:
        return db, accounts.first_run(tx, plan=settings.plan)


def open_data(config: Path | None, data_dir: Path | None) -> tuple[Settings, Database]:
    """For commands that look into a service's data, running or not."""
    from mutoscope.jobs import migrations
    from mutoscope.jobs.database import Database
    from mutoscope.settings import load

    settings = load(config, {"data_dir": data_dir})
    settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
    if not settings.database_url and not (settings.data_dir / "mutoscope.db").is_file():
        raise RequestError(
            f"{settings.data_dir}: there is no service's data here.",
            hint="Start one with mutoscope serve, or name its folder with --data-dir.",
        )
    db = Database(settings.database)
    migrations.upgrade(db)
    return settings, db
