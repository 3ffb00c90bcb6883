"""`mutoscope models`, `mutoscope models remove` and `mutoscope pull`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mutoscope.catalog import (
    POCKET,
    default_models_dir,
    find_model,
    installed_models,
    known_models,
    parse_name,
)
from mutoscope.cli.common import Debug, Json, console, say, say_json, size_text, time_text
from mutoscope.errors import Cancelled, FileError, RequestError

if TYPE_CHECKING:
    from mutoscope.hub import Progress, PullPlan
    from mutoscope.machine import Memory

MIN_TABLE_WIDTH = 56
"""On a narrower terminal lines wrap: better than names cut short."""
ROOM_FOR_FILE_NAMES = 110
"""Below this width the bar of a pull shows only its numbers."""

app = typer.Typer(help="List models, or remove one.", pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def models(
    ctx: typer.Context,
    all_: Annotated[bool, typer.Option("--all", help="Every quant, not only each family's default.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List the models that are installed and those that can be pulled, and say what fits this machine."""
    if ctx.invoked_subcommand is not None:
        return
    from mutoscope.machine import memory

    have = memory()
    if json_:
        say_json({"models_dir": default_models_dir(), "installed": _installed(), "known": _known(have)})
        return
    _print_installed()
    _print_known(have, all_=all_)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="As `mutoscope models` lists it.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Remove an installed model and the files that no other model uses."""
    from mutoscope import hub

    freed = hub.remove(name, default_models_dir())
    say(f"{name} is removed, {size_text(freed)} are free again.")


def _installed() -> list[dict[str, Any]]:
    rows = [_starter()]
    for model in installed_models():
        title = model.manifest.title if model.manifest else ""
        rows.append({"name": model.name, "title": title, "folder": model.folder, "problem": model.problem})
    return rows


def _starter() -> dict[str, Any]:
    row = {"name": POCKET, "title": "", "folder": None, "problem": ""}
    try:
        return {**row, "title": find_model(POCKET).title}
    except FileError as e:  # a checkout without its weights
        return {**row, "problem": str(e)}


def _known(have: Memory) -> list[dict[str, Any]]:
    return [
        {
            "name": model.name,
            "title": model.title,
            "licence": model.licence,
            "download_bytes": model.download_bytes,
            "memory_bytes": model.memory_bytes(),
            "fits": have.fit(model.memory_bytes()),
            "default": ":".join(parse_name(model.name.partition(":")[0])) == model.name,
        }
        for model in known_models()
    ]


def _print_installed() -> None:
    say("Installed", style="bold")
    table = _table()
    for row in _installed():
        table.add_row(row["name"], row["problem"] or row["title"])
    console().print(table, markup=False)
    say("")


def _print_known(have: Memory, *, all_: bool) -> None:
    rows = _known(have)
    colours = {"yes": "green", "tight": "yellow", "no": "red"}
    say("To pull", style="bold")
    out = console()
    roomy = out.width >= 72 and not all_
    table = _table("name", "download", "memory", "fits", *(("other quants",) if roomy else ()))
    for row in rows:
        if not (all_ or row["default"]):
            continue
        family, _, quant = row["name"].partition(":")
        quants = (r["name"].partition(":")[2] for r in rows if r["name"].startswith(family + ":"))
        others = [" ".join(q for q in quants if q != quant)] if roomy else []
        fits = f"[{colours[row['fits']]}]{row['fits']}[/]"
        sizes = size_text(row["download_bytes"]), size_text(row["memory_bytes"])
        table.add_row(row["name"], *sizes, fits, *others)
    out.width = max(out.width, MIN_TABLE_WIDTH)
    out.print(table)
    say(
        f"\nmemory: estimated need for 81 frames at 832x480; {size_text(have.available_bytes)} of "
        f"{size_text(have.total_bytes)} are free{'' if have.where == 'memory' else ' on ' + have.where}. "
        "tight: only if other programs make room; no: it runs from disk, slowly."
    )
    say("Pull one with: mutoscope pull NAME")


def _table(*headers: str) -> Table:
    """Columns without lines. In a pipe nothing is cut: names stay whole whatever the width."""
    table = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers or ("", ""):
        narrow = header in ("name", "download", "memory", "fits")
        right = header in ("download", "memory")
        table.add_column(header, no_wrap=narrow, justify="right" if right else "left", overflow="fold")
    return table


# -- pull ----------------------------------------------------------------------------------------------------


def pull(
    name: Annotated[
        str, typer.Argument(help="Like wan2.1-vace-14b or wan2.1-vace-14b:q4_k_m.", show_default=False)
    ],
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="A mirror (default: HF_ENDPOINT, else huggingface.co).", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be fetched.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a model: the transformer, the text encoder and the VAE.

    Shows sizes and licence first. An interrupted pull goes on where it stopped; every file is verified.
    """
    from mutoscope import hub

    def announce(planned: PullPlan) -> None:
        if json_:
            say_json({"event": "plan", **_plan_facts(planned)})
        else:
            _print_plan(planned)
        if dry_run or yes or not planned.missing_bytes:
            return
        if json_ or not sys.stdin.isatty():
            raise RequestError("nobody is here to say yes.", hint="Add --yes to pull without asking.")
        if not typer.confirm(f"Fetch {size_text(planned.missing_bytes)}?", default=True, err=True):
            raise Cancelled("Nothing was fetched.")

    meter = _JsonMeter() if json_ else _Meter()
    try:
        planned, manifest = hub.pull(name, default_models_dir(), endpoint=endpoint, announce=announce,
                                     progress=meter, dry_run=dry_run)  # fmt: skip
    except KeyboardInterrupt:
        raise Cancelled(
            "Stopped. What was fetched is kept.", hint=f"Go on with: mutoscope pull {name}"
        ) from None
    finally:
        meter.close()
    if json_:
        say_json({"event": "result", "name": planned.model.name, "installed": manifest is not None})
    elif manifest is not None:
        say(f"{manifest.name} is installed. Try it:")
        say(f'mutoscope generate --model {manifest.name} "a fox runs through the snow"')


def _plan_facts(planned: PullPlan) -> dict[str, Any]:
    return {
        "name": planned.model.name,
        "title": planned.model.title,
        "licence": planned.model.licence,
        "endpoint": planned.endpoint,
        "total_bytes": planned.total_bytes,
        "missing_bytes": planned.missing_bytes,
        "free_bytes": planned.free_bytes,
        "files": [{"role": f.role, "repo": f.repo, "name": f.name, "size_bytes": f.size_bytes,
                   "have_bytes": f.have_bytes, "sha256": f.sha256} for f in planned.files],
    }  # fmt: skip


def _print_plan(planned: PullPlan) -> None:
    model = planned.model
    say(model.title, style="bold")
    for file in planned.files:
        here = "here" if file.have_bytes == file.size_bytes else f"{size_text(file.have_bytes)} here"
        have = f", {here}" if file.have_bytes else ""
        role, size = file.role.replace("_", " "), size_text(file.size_bytes)
        say(f"  {role:<13} {size:>8}{have}  {file.repo}/{file.name}")
    say(f"Licence {model.licence}. From {planned.endpoint} to {default_models_dir()}.")
    say(f"{size_text(planned.missing_bytes)} to fetch, {size_text(planned.free_bytes)} free on the disk.")
    if model.notes:
        say(model.notes)


class _Meter:
    """Bytes, speed and time left on one line of a terminal; elsewhere a line for each tenth."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        out = console(err=True)
        self.tenth = -1
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}", markup=False),
            console=out,
            transient=True,
            expand=True,
        ) if out.is_terminal else None  # fmt: skip
        self.task = self.bars.add_task("", total=None, state="", visible=False) if self.bars else None

    def __call__(self, p: Progress) -> None:
        share = p.done_bytes / max(1, p.total_bytes)
        rest = (p.total_bytes - p.done_bytes) / p.speed_bytes_s if p.speed_bytes_s else 0.0
        speed = f", {size_text(p.speed_bytes_s)}/s, {time_text(rest)} left" if rest else ""
        state = f"{size_text(p.done_bytes)} of {size_text(p.total_bytes)}{speed}"
        verb = "verifying" if p.stage == "verify" else "fetching"
        if self.bars is not None and self.task is not None:
            self.bars.start()
            what = f"{verb} {p.file}" if self.bars.console.width >= ROOM_FOR_FILE_NAMES else verb
            self.bars.update(
                self.task,
                total=p.total_bytes,
                completed=p.done_bytes,
                visible=True,
                description=what,
                state=state,
            )
        elif int(share * 10) != self.tenth:
            self.tenth = int(share * 10)
            say(f"{verb} {p.file}: {state}", err=True)

    def close(self) -> None:
        if self.bars is not None:
            self.bars.stop()


class _JsonMeter(_Meter):
    def __init__(self) -> None:
        self.bars = None

    def __call__(self, p: Progress) -> None:
        say_json({"event": "progress", "stage": p.stage, "file": p.file, "done_bytes": p.done_bytes,
                  "total_bytes": p.total_bytes, "bytes_per_second": round(p.speed_bytes_s)})  # fmt: skip
