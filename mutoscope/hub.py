"""Fetching model sets from the Hugging Face hub or a mirror, and removing them.

    plan      one HEAD request per file: size, SHA-256, commit; what is here already; does the disk suffice
    download  into <models dir>/files/<12 digits of the SHA-256>-<name>.part, resumed where a try stopped
    verify    SHA-256 of the whole file, then its .part is dropped from the name
    install   the set's model.toml is written last: a half-pulled model is never installed

Files are kept by content, so the text encoder and the VAE are fetched once for all sets. huggingface_hub does
the talking (addresses, tokens, proxies, error codes); the bytes are streamed here, because its own download
starts again from zero in every new process, which hurts with 12 GB.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from huggingface_hub import get_hf_file_metadata, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from mutoscope import __version__
from mutoscope.catalog import POCKET, ModelSet, folder_name, installed_models, known_model
from mutoscope.errors import DownloadError, FileError, RequestError, ResourceError
from mutoscope.manifest import (
    MANIFEST,
    SHARED_FILES,
    ModelFile,
    ModelFiles,
    ModelManifest,
    Role,
    write_manifest,
)

HUB = "https://huggingface.co"
DISK_MARGIN_BYTES = 512 * 1024**2
"""Left free on the disk after a pull."""
MAX_STALLS = 5
"""So many tries in a row that bring no byte end a download; any progress starts the count anew."""
RETRY_WAIT_S = 1.0
TIMEOUT_S = 30.0
TELL_EVERY_S = 0.1
_TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a pull is. Bytes count over all files of the set; a resumed part counts as done."""

    stage: str  # "download" or "verify"
    file: str
    done_bytes: int
    total_bytes: int
    speed_bytes_s: float


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file of a pull: `have_bytes` of `size_bytes` are here already."""

    role: Role
    repo: str
    name: str
    url: str
    sha256: str
    size_bytes: int
    commit: str
    target: Path
    have_bytes: int

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")


@dataclass(frozen=True, kw_only=True)
class PullPlan:
    """What a pull will do; shown before it does."""

    model: ModelSet
    endpoint: str
    files: tuple[PlannedFile, ...]
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    @property
    def missing_bytes(self) -> int:
        return sum(f.size_bytes - f.have_bytes for f in self.files)


def plan(
    spec: str | ModelSet,
    models_dir: str | Path,
    *,
    endpoint: str | None = None,
    free_space: Callable[[Path], int] | None = None,
) -> PullPlan:
    """Ask the hub about every file of a set. Creates and downloads nothing."""
    model = known_model(spec) if isinstance(spec, str) else spec
    models_dir = Path(models_dir)
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if urlsplit(endpoint).scheme not in ("http", "https"):
        raise RequestError(f"endpoint {endpoint!r}: an address like {HUB} expected.")
    files = tuple(_plan_file(model, role, models_dir, endpoint) for role in model.files)
    return PullPlan(
        model=model, endpoint=endpoint, files=files, free_bytes=(free_space or _free_space)(models_dir)
    )


def pull(
    spec: str | ModelSet,
    models_dir: str | Path,
    *,
    endpoint: str | None = None,
    announce: Callable[[PullPlan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    dry_run: bool = False,
    free_space: Callable[[Path], int] | None = None,
) -> tuple[PullPlan, ModelManifest | None]:
    """Fetch and install a set: its plan and, unless this is a dry run, its manifest.

    endpoint  a mirror; default: $HF_ENDPOINT, else huggingface.co
    announce  is given the plan before the first byte; may raise to stop
    progress  is called some times a second
    """
    models_dir = Path(models_dir)
    planned = plan(spec, models_dir, endpoint=endpoint, free_space=free_space)
    if announce:
        announce(planned)
    if planned.missing_bytes + DISK_MARGIN_BYTES > planned.free_bytes and planned.missing_bytes:
        raise ResourceError(
            f"{planned.model.name}: {_gb(planned.missing_bytes)} are to be downloaded to {models_dir}, where "
            f"{_gb(planned.free_bytes)} are free ({_gb(DISK_MARGIN_BYTES)} are kept in reserve).",
            hint="Free some space, choose a smaller quant, or set MUTOSCOPE_HOME to another disk.",
        )
    if dry_run:
        return planned, None

    shared = models_dir / SHARED_FILES
    with _local_errors(shared):
        shared.mkdir(parents=True, exist_ok=True)
        with _only_pull(shared):
            meter = _Meter(planned, progress)
            for file in planned.files:
                _fetch(file, planned.endpoint, meter)
            return planned, _install(planned, models_dir)


def remove(name: str, models_dir: str | Path) -> int:
    """Remove an installed set and the files that no other set uses; how many bytes became free."""
    if name == POCKET:
        raise RequestError("the starter model is part of the package and stays.")
    models_dir = Path(models_dir)
    installed = installed_models(models_dir)
    wanted = {name.lower(), folder_name(name.lower())}
    found = [m for m in installed if {m.name.lower(), m.folder.name.lower()} & wanted]
    if not found:
        names = ", ".join(m.name for m in installed) or "none"
        raise RequestError(f"model {name!r} is not installed.", hint=f"Installed: {names}.")
    with _local_errors(models_dir):
        folder = found[0].folder
        freed = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        (folder / MANIFEST).unlink()  # first: from here on the set is not installed
        shutil.rmtree(folder)
        for path in unused_files(models_dir):
            if path.suffix != ".part":
                freed += path.stat().st_size
                path.unlink()
        return freed


def unused_files(models_dir: str | Path) -> list[Path]:
    """Shared files that no installed set names, and parts of interrupted pulls.

    None while a model.toml cannot be read: it might name any of them.
    """
    models_dir = Path(models_dir)
    installed = installed_models(models_dir)
    if any(m.manifest is None for m in installed):
        return []
    used = {file.path for m in installed if m.manifest for file in m.manifest.files.all()}
    shared = (models_dir / SHARED_FILES).absolute()
    return [p for p in sorted(shared.glob("*")) if p.is_file() and p.suffix != ".lock" and p not in used]


# -- plan ----------------------------------------------------------------------------------------------------


def _plan_file(model: ModelSet, role: Role, models_dir: Path, endpoint: str) -> PlannedFile:
    remote = model.files[role]
    url = hf_hub_url(remote.repo, remote.path, revision=remote.revision, endpoint=endpoint)
    with _hub_errors(remote.repo, remote.path, endpoint):
        meta: Any = _patiently(
            lambda: get_hf_file_metadata(
                url, token=_token(endpoint) or False, timeout=TIMEOUT_S, endpoint=endpoint
            )
        )
    sha256 = meta.etag or ""
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef") or meta.size is None:
        raise DownloadError(
            f"{endpoint} gives no SHA-256 and size for {remote.repo}/{remote.path} (etag {meta.etag!r}).",
            hint="Use huggingface.co or a mirror that passes its headers on.",
        )
    if remote.sha256 and sha256 != remote.sha256:
        raise DownloadError(
            f"{remote.repo}/{remote.path} at {endpoint} has SHA-256 {sha256[:12]}…, "
            f"{remote.sha256[:12]}… expected by this version of Mutoscope.",
            hint="It was replaced upstream, or the mirror is not to be trusted: update or change endpoint.",
        )
    commit = meta.commit_hash or remote.revision
    target = models_dir / SHARED_FILES / f"{sha256[:12]}-{remote.name}"
    # the same content may be here under another repository's name for it
    same = [p for p in target.parent.glob(f"{sha256[:12]}-*") if p.suffix != ".part"]
    target = same[0] if same else target
    part = target.with_name(target.name + ".part")
    if target.is_file() and target.stat().st_size == meta.size:
        have = meta.size
    else:
        have = min(part.stat().st_size, meta.size) if part.is_file() else 0
    return PlannedFile(
        role=role,
        repo=remote.repo,
        name=remote.path,
        url=hf_hub_url(remote.repo, remote.path, revision=commit, endpoint=endpoint),
        sha256=sha256,
        size_bytes=meta.size,
        commit=commit,
        target=target,
        have_bytes=have,
    )


def _token(endpoint: str) -> str | None:
    """A token in the environment is for the endpoint in use; one stored by `hf auth login` for the hub."""
    return os.environ.get("HF_TOKEN") or (get_token() if endpoint == HUB else None)


def _free_space(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# -- download ------------------------------------------------------------------------------------------------


class _Meter:
    """Adds up bytes over files and tells the caller now and then."""

    def __init__(self, planned: PullPlan, tell: Callable[[Progress], None] | None) -> None:
        self.tell = tell
        self.total = planned.total_bytes
        self.finished = 0  # bytes of complete files
        self.began, self.fetched, self.told = time.monotonic(), 0, 0.0

    def __call__(
        self, stage: str, file: PlannedFile, done: int, *, new: int = 0, force: bool = False
    ) -> None:
        self.fetched += new
        now = time.monotonic()
        if self.tell and (force or now - self.told >= TELL_EVERY_S):
            self.told = now
            speed = self.fetched / max(now - self.began, 1e-6)
            name = Path(file.name).name
            self.tell(
                Progress(
                    stage=stage,
                    file=name,
                    done_bytes=self.finished + done,
                    total_bytes=self.total,
                    speed_bytes_s=speed,
                )
            )


def _fetch(file: PlannedFile, endpoint: str, meter: _Meter) -> None:
    if not (file.target.is_file() and file.target.stat().st_size == file.size_bytes):
        with _hub_errors(file.repo, file.name, endpoint):
            _download(file, endpoint, meter)
        digest = _sha256(file, meter)
        if digest != file.sha256:
            file.part.unlink()
            raise DownloadError(
                f"{file.repo}/{file.name}: the download has SHA-256 {digest[:12]}…, "
                f"{file.sha256[:12]}… expected. It was thrown away.",
                hint="Try again; if it happens twice, use another endpoint.",
            )
        os.replace(file.part, file.target)
    meter.finished += file.size_bytes
    meter("download", file, 0, force=True)


def _download(file: PlannedFile, endpoint: str, meter: _Meter) -> None:
    """Append to the .part until it has its full size; a dropped connection is taken up again."""
    stalls = 0
    while (before := _size(file.part)) != file.size_bytes:
        if before > file.size_bytes:
            file.part.unlink()
            continue
        try:
            _stream(file, before, endpoint, meter)
            reason: Exception | None = None
        except _transport_error() as e:
            if isinstance(e, HfHubHTTPError) and e.response.status_code not in _TRANSIENT:
                raise
            reason = e
        stalls = 0 if _size(file.part) > before else stalls + 1
        if stalls >= MAX_STALLS:
            raise DownloadError(
                f"{file.repo}/{file.name}: {endpoint} sends no more ({reason or 'the answer ends early'}); "
                f"{_gb(_size(file.part))} of {_gb(file.size_bytes)} are here.",
                hint="Run the same command later: it goes on from there.",
            ) from reason
        if stalls or reason:
            time.sleep(RETRY_WAIT_S * 2 ** max(0, stalls - 1))


def _stream(file: PlannedFile, start: int, endpoint: str, meter: _Meter) -> None:
    headers = build_hf_headers(
        token=_token(endpoint) or False, library_name="mutoscope", library_version=__version__
    )
    headers["Accept-Encoding"] = "identity"
    if start:
        headers["Range"] = f"bytes={start}-"
    session: Any = get_session()
    # on a redirect to another host the session leaves the token out
    with session.stream(
        "GET", file.url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
    ) as response:
        if response.status_code == 416:  # the server thinks that there is less: start again
            file.part.unlink()
            return
        hf_raise_for_status(response)
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise DownloadError(
                f"{file.repo}/{file.name}: asked for bytes from {start}, got "
                f"{response.headers.get('Content-Range')!r}."
            )
        done = start if resumed else 0
        with file.part.open("ab" if resumed else "wb") as out:
            for chunk in response.iter_bytes():  # as it arrives: nothing is lost when the connection drops
                out.write(chunk)
                done += len(chunk)
                meter("download", file, min(done, file.size_bytes), new=len(chunk))
                if done > file.size_bytes:
                    raise DownloadError(
                        f"{file.repo}/{file.name}: more than the announced {file.size_bytes} bytes arrive."
                    )


def _sha256(file: PlannedFile, meter: _Meter) -> str:
    digest, done = hashlib.sha256(), 0
    with file.part.open("rb") as source:
        while chunk := source.read(1 << 23):
            digest.update(chunk)
            done += len(chunk)
            meter("verify", file, done)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _install(planned: PullPlan, models_dir: Path) -> ModelManifest:
    model = planned.model

    def installed(role: Role) -> ModelFile:
        file = next(f for f in planned.files if f.role == role)
        return ModelFile(
            path=file.target.absolute(),
            sha256=file.sha256,
            size_bytes=file.size_bytes,
            source=f"{file.repo}@{file.commit[:12]}/{file.name}",
        )

    manifest = ModelManifest(
        name=model.name,
        title=model.title,
        licence=model.licence,
        notes=model.notes,
        files=ModelFiles(dit=installed("dit"), text_encoder=installed("text_encoder"), vae=installed("vae")),
        defaults=model.defaults,
        sizes=model.sizes,
        limits=model.limits,
    )
    folder = models_dir / folder_name(model.name)
    folder.mkdir(exist_ok=True)
    write_manifest(manifest, folder / MANIFEST)
    return manifest


@contextmanager
def _only_pull(shared: Path) -> Iterator[None]:
    """Two pulls must not append to the same part. The lock goes with its process, however that ends."""
    try:
        with FileLock(shared / "pull.lock", timeout=0):
            yield
    except Timeout as e:
        raise DownloadError(
            f"another pull into {shared.parent} is running.", hint="Wait until it has finished."
        ) from e


# -- errors --------------------------------------------------------------------------------------------------


def _transport_error() -> tuple[type[Exception], ...]:
    """What the session raises when the network fails: huggingface_hub uses httpx or, later, httpx2."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return (library.HTTPError, library.StreamError)


def _patiently(ask: Callable[[], Any]) -> Any:
    """Repeat a request that failed for a passing reason."""
    for stalls in range(1, MAX_STALLS + 1):
        try:
            return ask()
        except HfHubHTTPError as e:
            if e.response.status_code not in _TRANSIENT or stalls == MAX_STALLS:
                raise
        except _transport_error():
            if stalls >= 2:  # no network: say so soon
                raise
        time.sleep(RETRY_WAIT_S * 2 ** (stalls - 1))
    raise AssertionError("unreachable")


@contextmanager
def _hub_errors(repo: str, name: str, endpoint: str) -> Iterator[None]:
    where = f"{repo}/{name}"
    try:
        yield
    except GatedRepoError as e:
        raise DownloadError(
            f"{where}: its licence must be accepted first.",
            hint=f"Log in at {endpoint}/{repo}, accept it, then set HF_TOKEN.",
        ) from e
    except RepositoryNotFoundError as e:
        raise DownloadError(
            f"{where}: {endpoint} has no repository {repo}, or it is private.",
            hint="Set HF_TOKEN if you have access; otherwise the name has changed: see docs/models.md.",
        ) from e
    except (EntryNotFoundError, RevisionNotFoundError) as e:
        raise DownloadError(
            f"{where}: {endpoint} has no such file in {repo}.",
            hint="Choose another quant, or write a model.toml for files of your own (docs/models.md).",
        ) from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        hint = "Check HF_TOKEN." if status in (401, 403) else "Try again later, or another endpoint."
        raise DownloadError(f"{where}: {endpoint} answers {status}.", hint=hint) from e
    except OfflineModeIsEnabled as e:
        raise DownloadError(f"{where}: HF_HUB_OFFLINE is set.", hint="Unset it to download.") from e
    except _transport_error() as e:
        raise DownloadError(
            f"{where}: {endpoint} cannot be reached ({e}).",
            hint="Check the network and proxy, or name a mirror with --endpoint or HF_ENDPOINT.",
        ) from e


@contextmanager
def _local_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk of {folder} is full; what was downloaded is kept.",
                hint="Free some space and run the same command: it goes on from there.",
            ) from e
        raise FileError(f"{folder}: cannot be written ({e.strerror or e}).") from e


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 10_000_000 else f"{n:,} bytes"
