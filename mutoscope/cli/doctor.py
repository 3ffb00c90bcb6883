"""`mutoscope doctor`: what is here, what fits, how fast, and what to do about problems."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from mutoscope.cli.common import Debug, Json, say, say_json, size_text

SEVERE = 3
"""Exit code if something that `generate` needs is missing."""


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also try to reach the model hub.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Look at this machine: what is missing, which models fit, how fast it is."""
    from mutoscope.catalog import default_models_dir
    from mutoscope.machine import examine, problems

    report = examine(default_models_dir(), online=online)
    found = problems(report)
    if json_:
        say_json({**report, "problems": [vars(p) for p in found]})
    else:
        _print(report)
        say("")
        for problem in found:
            say(
                Text("! ", style="bold red" if problem.severe else "yellow").append(
                    problem.text, style="not bold default"
                )
            )
            say(f"  {problem.todo}")
        if not found:
            say("All is well.")
    if any(p.severe for p in found):
        raise typer.Exit(SEVERE)


def _print(r: dict[str, Any]) -> None:
    cpu, rates, endpoint = r["cpu"], r["gflops"], r["endpoint"]
    libraries = ", ".join(f"{name} {v or 'missing'}" for name, v in r["libraries"].items())
    gpus = [_gpu(d) for d in r["devices"] if d["device"] != "cpu"]
    installed = ", ".join(m["name"] for m in r["installed"])
    reachable = {None: "not tried (--online tries)", True: "reachable", False: "not reachable"}
    encoders = ", ".join(f"{name} {'ok' if here else 'missing'}" for name, here in r["encoders"].items())
    free, total = (size_text(r["memory"][key]) for key in ("available_bytes", "total_bytes"))
    rows = {
        "mutoscope": f"{r['mutoscope']}, Python {r['python']}, {r['platform']}",
        "libraries": libraries,
        "cpu": f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads in use",
        "features": ", ".join(cpu["features"]) or "unknown",
        "gpu": ", ".join(gpus) or "none",
        "memory": f"{free} of {total} free",
        "models in": f"{r['disk']['models_dir']} ({size_text(r['disk']['free_bytes'])} free)",
        "installed": f"pocket{', ' + installed if installed else ''}",
        "encoders": encoders,
        "hub": f"{endpoint['url']}, {reachable[endpoint['reachable']]}",
        "fits": ", ".join(r["fits"]) or "pocket only",
        "cpu speed": f"float32 {rates['float32']:.0f}, bfloat16 {rates['bfloat16']:.0f} GFLOP/s",
    }
    for name, value in rows.items():
        say(Text(f"{name:<10} ", style="bold").append(value, style="not bold"))


def _gpu(device: dict[str, Any]) -> str:
    if "name" not in device:
        return str(device["device"])
    free, total = size_text(device["available_bytes"]), size_text(device["total_bytes"])
    return f"{device['device']} {device['name']} ({free} of {total} free)"
