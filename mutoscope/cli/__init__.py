"""The command line. Thin: parse, build a request, call, print.

parse.py      texts to values, names for files        generate.py   generate
running.py    take events, stop on Ctrl-C             decode.py     decode
progress.py   bar, lines or JSON while it runs        models.py     models, pull
remake.py     metadata to the command that made it    files.py      inspect, quantize
common.py     consoles, options, failures             doctor.py     doctor
admin.py      keys, jobs, accounts, credits           serve.py      serve, worker
loras.py      loras

Importing it is cheap, so `mutoscope --help` answers at once: commands import the engine when they need it.
Exit codes: errors.py, docs/cli.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mutoscope import __version__
from mutoscope.cli import admin, decode, doctor, files, generate, loras, models, serve
from mutoscope.cli.common import ClosedPipe, Settings, say, tell_failure

USAGE = 2
INTERRUPTED = 130

app = typer.Typer(add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _version(value: bool) -> None:
    if value:
        print(f"mutoscope {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def mutoscope(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Video generation that you own: Wan2.1-VACE from GGUF files, on CPU or GPU.

    Start with: mutoscope generate "a red ball falls and bounces"
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


app.command()(generate.generate)
app.command()(decode.decode)
app.add_typer(models.app, name="models")
app.command()(models.pull)
app.command()(loras.loras)
app.command()(files.inspect)
app.command()(files.calibrate)
app.command()(files.quantize)
app.command()(doctor.doctor)
app.command()(serve.serve)
app.command()(serve.worker)
app.add_typer(admin.keys, name="keys")
app.add_typer(admin.jobs, name="jobs")
app.add_typer(admin.accounts, name="accounts")
app.add_typer(admin.credits_, name="credits")

# typer carries its own click or uses the installed one, by its version: this is the one it raises
_UsageError: Any = typer.BadParameter.__mro__[1]


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code. Every failure ends here."""
    settings = Settings()
    try:
        code = app(list(arguments), prog_name="mutoscope", standalone_mode=False, obj=settings)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _UsageError as e:
        ctx = getattr(e, "ctx", None)
        command = ctx.command_path if ctx else "mutoscope"
        say(f"Error: {e.format_message()}", err=True)
        say(f"See: {command} --help", err=True)
        return USAGE
    except (KeyboardInterrupt, typer.Abort) as e:
        say(" ".join(("Stopped.", *getattr(e, "__notes__", ()))), err=True)
        return INTERRUPTED
    except (ClosedPipe, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        return tell_failure(e, settings)


def main() -> None:
    """The entry point of the installed package."""
    sys.exit(run(sys.argv[1:]))
