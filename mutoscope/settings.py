"""Settings of the service: one frozen object, read once at the start from a file and the environment.

Precedence: command line, then environment (`MUTOSCOPE_PORT=...`), then the TOML file, then the defaults here. An
unknown key anywhere is an error. docs/settings.md is generated from the fields.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mutoscope.errors import RequestError
from mutoscope.manifest import suggest
from mutoscope.request import PrecisionName

PREFIX = "MUTOSCOPE_"
NOT_OURS = (
    "HOME",
    "CACHE",
    "DEBUG",
    "KEY",
    "SETTINGS_JSON",
    "TEST_STOP_AT",
)  # the command line's, clients', between processes


class Settings(BaseModel):
    """All of it. Durations in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # where
    host: str = Field("127.0.0.1", description="Address that the web process listens on.")
    port: int = Field(8000, ge=0, le=65535, description="0: any free one.")
    data_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("mutoscope")) / "service",
        description="Database, uploads and outputs.",
    )
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in data_dir.")
    public_url: str = Field(
        "", description="What clients reach this server as; empty: the request's own Host."
    )
    models_dir: Path | None = Field(
        None, description="Installed models; empty: where `mutoscope pull` puts them."
    )

    loras_dir: Path | None = Field(
        None, description="LoRA files that requests may name; empty: the folder `loras` in $MUTOSCOPE_HOME."
    )

    # who runs
    devices: tuple[str, ...] = Field(
        (), description='One worker each, e.g. "cpu", "cuda:0"; empty: all GPUs, or cpu.'
    )
    threads: int = Field(
        0,
        ge=0,
        description="Threads of a CPU worker; 0: torch's choice. Small models, like the starter, use one.",
    )
    precision: PrecisionName = Field(
        "auto", description="How layers compute, as `--precision` of `generate`."
    )
    memory: int = Field(0, ge=0, description="Of a CPU worker, as `--memory`; 0: what is free.")
    vram: int = Field(0, ge=0, description="Of its GPU for a worker, as `--vram`; 0: what is free.")
    compile: bool = Field(
        False, description="On GPUs, let torch.compile fuse what is between products, as `--compile`."
    )
    preload: str = Field("pocket", description="Model that workers load at start; empty: none.")
    engine: str = Field(
        "mutoscope.runner:WanRunner", description="What runs jobs; tests put a fake one here."
    )

    # jobs
    heartbeat_s: float = Field(10.0, gt=0, description="How often a worker says that it lives.")
    lease_s: float = Field(30.0, gt=0, description="After that long without a sign its job goes to another.")
    max_crashes: int = Field(3, ge=1, description="Crashes after which a job is given up.")
    time_limit_s: float = Field(6 * 3600, gt=0, description="Longest run of one job.")
    cancel_grace_s: float = Field(10.0, gt=0, description="Then a worker that does not obey is killed.")
    drain_s: float = Field(30.0, ge=0, description="On shutdown: what a running job gets to finish; else it waits "
                           "for the next start.")  # fmt: skip
    retention_days: float = Field(30.0, gt=0, description="After which outputs of ended jobs are deleted.")
    upload_hours: float = Field(24.0, gt=0, description="Life of an unused upload.")
    idempotency_hours: float = Field(24.0, gt=0, description="Life of an Idempotency-Key.")
    dedupe_seeded_s: float = Field(0.0, ge=0, le=60, description="Opt-in: an identical create with a seed within this "
                                   "time returns the first job.")  # fmt: skip
    default_model: str = Field(
        "auto", description='What "auto" prefers; empty or "auto": the best that fits.'
    )
    aliases: dict[str, str] = Field(
        default_factory=dict, description="Names of vendors' models to our models."
    )

    # money
    plan: str = Field("unlimited", description="Plan of accounts that are made without one.")
    prices_file: Path | None = Field(None, description="TOML in place of the shipped price list.")

    # edge
    url_ttl_s: float = Field(24 * 3600, gt=0, description="Life of signed output URLs.")
    max_body_bytes: int = Field(32 * 2**20, gt=0, description="Of one request, data URIs included.")
    max_upload_bytes: int = Field(200 * 2**20, gt=0, description="Of an upload, or an input by URL.")
    rate_limit_per_s: float = Field(0.0, ge=0, description="Requests per second and key; 0: no limit.")
    allow_http_inputs: bool = Field(False, description="Fetch http:// inputs too.")
    allow_private_hosts: tuple[str, ...] = Field((), description="Hosts or networks that inputs and webhooks may reach "
                                                 "although they are private.")  # fmt: skip
    fetch_timeout_s: float = Field(30.0, gt=0, description="For an input by URL, all of it.")
    webhook_timeout_s: float = Field(15.0, gt=0, description="For one delivery.")
    log_json: bool = Field(False, description="One JSON object a line; else text.")

    @property
    def database(self) -> str:
        """The SQLAlchemy URL in use."""
        return self.database_url or f"sqlite:///{self.data_dir / 'mutoscope.db'}"


def load(
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings from a TOML file, `MUTOSCOPE_*` variables and overrides (None means: not given).

    Raises:
        RequestError: an unknown or impossible setting, named with where it comes from.
    """
    table: dict[str, Any] = {}
    if file is not None:
        try:
            table = tomllib.loads(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
            raise RequestError(f"{file}: is not a readable TOML file ({e}).") from e
        _known(table, str(file))
    variables = {
        k[len(PREFIX) :].lower(): v
        for k, v in environ.items()
        if k.startswith(PREFIX) and k[len(PREFIX) :] not in NOT_OURS
    }
    _known(variables, "the environment")
    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    merged = {**table, **{k: _from_text(k, v) for k, v in variables.items()}, **given}
    try:
        return Settings(**merged)
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"Setting {name} = {first['input']!r}: {first['msg']}.") from e


def _known(names: Mapping[str, Any], where: str) -> None:
    for name in names:
        if name not in Settings.model_fields:
            raise RequestError(
                f"Unknown setting {name!r} in {where}.", hint=suggest(name, Settings.model_fields)
            )


def _from_text(name: str, text: str) -> Any:
    """Environment variables: lists are separated by commas, tables are `a=b,c=d`."""
    kind = str(Settings.model_fields[name].annotation)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if kind.startswith("tuple"):
        return tuple(parts)
    if kind.startswith("dict"):
        return {name: value for name, _, value in (part.partition("=") for part in parts)}
    return text
