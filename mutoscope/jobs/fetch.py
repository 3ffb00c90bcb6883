"""The inputs of a job as files, brought together by its worker before it runs.

Nothing is fetched while a request is answered: a slow host holds up one job and nobody else. What was fetched is
judged by its content, in the sandbox, like an upload.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa

from mutoscope import __version__
from mutoscope.errors import Cancelled, MutoscopeError
from mutoscope.jobs import addresses, assets, inline, pinned
from mutoscope.jobs.addresses import Policy, Resolver
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import NotFound
from mutoscope.jobs.inline import ANY, InputKind
from mutoscope.jobs.model import Failure, Job, State
from mutoscope.jobs.schema import jobs
from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.media import sandbox, sniff
from mutoscope.settings import Settings

USER_AGENT = f"Mutoscope/{__version__} (input fetcher)"
MAX_SHOWN_URL = 200


class InputError(MutoscopeError):
    """An input cannot be used: the job fails with `failure`, and the message names the field."""

    def __init__(self, failure: Failure, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.failure = failure


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file that a URL gave."""

    path: Path
    probed: sandbox.Probed


@dataclass(frozen=True, kw_only=True)
class Use:
    """Where a request names a file, and what it has to be."""

    field: str
    media: Media
    kinds: tuple[InputKind, ...]


def uses(spec: JobSpec) -> Iterator[Use]:
    """All files of a request with what is expected of each, in a fixed order."""
    for i, keyframe in enumerate(spec.keyframes):
        yield Use(field=f"keyframes[{i}]", media=keyframe.media, kinds=("image",))
    for i, reference in enumerate(spec.references):
        yield Use(field=f"references[{i}]", media=reference.media, kinds=("image",))
    source: tuple[InputKind, ...] = ("video",) if spec.operation == "reframe_rate" else ANY
    expected: Mapping[str, tuple[InputKind, ...]] = {
        "source": source, "control": ("video",), "mask": ANY, "extend_start": ("video",), "extend_end": ("video",),
    }  # fmt: skip
    for field, kinds in expected.items():
        media = getattr(spec, field)
        if media is not None:
            yield Use(field=field, media=media, kinds=kinds)


def collect(
    db: Database,
    job: Job,
    folder: Path,
    settings: Settings,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    resolver: Resolver | None = None,
) -> dict[Media, Path]:
    """Every file that the job names, as a path that stays until `folder` is removed.

    Raises:
        InputError: INPUT_INVALID (cannot be used), INPUT_UNREACHABLE (could not be fetched), STORAGE.
        Cancelled: `should_stop()` became true.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy = addresses.input_policy(settings)
    found: dict[Media, tuple[Path, tuple[InputKind, ...]]] = {}
    for i, use in enumerate(uses(JobSpec.model_validate(job.spec))):
        if should_stop():
            raise Cancelled("Stopped while inputs were collected.")
        if use.media not in found:
            stem = folder / f"input-{i}"
            found[use.media] = _bring(db, job, use, stem, policy, settings, should_stop, resolver)
        _, are = found[use.media]
        if not set(are) & set(use.kinds):
            raise InputError(
                Failure.INPUT_INVALID, f"{use.field}: is a {_names(are)}, a {_names(use.kinds)} expected."
            )
    return {media: path for media, (path, _) in found.items()}


def download(
    url: str,
    stem: Path,
    *,
    policy: Policy,
    max_bytes: int,
    timeout_s: float,
    kinds: tuple[InputKind, ...] = ANY,
    field: str = "url",
    resolver: Resolver | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fetched:
    """Fetch a picture or clip to `stem` plus the extension of what it is. Nothing is left behind on failure.

    Raises:
        InputError: see `collect`.
        Cancelled: `should_stop()` became true.
    """
    shown = f"{field}: {display_url(url)}"
    part = stem.with_name(stem.name + ".part")
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*, video/*"}
    try:
        with pinned.request(
            "GET",
            url,
            policy=policy,
            timeout_s=timeout_s,
            headers=headers,
            resolver=resolver,
            should_stop=should_stop,
        ) as response:
            mime = _receive(response, part, max_bytes, kinds, shown)
        probed = inline.probe(part, field=shown)
        inline.refuse_kind(probed, kinds=kinds, field=shown)
        path = stem.with_name(stem.name + sniff.extension(mime))
        part.replace(path)
        return Fetched(path=path, probed=probed)
    except addresses.Unresolved as e:
        raise InputError(Failure.INPUT_UNREACHABLE, f"{shown}: {e.reason}.") from e
    except addresses.Refused as e:
        raise InputError(Failure.INPUT_INVALID, f"{shown} {e.reason}.") from e
    except inline.InputRefused as e:
        raise InputError(Failure.INPUT_INVALID, e.message, hint=e.hint) from e
    except pinned.Unreachable as e:
        raise InputError(Failure.INPUT_UNREACHABLE, f"{shown} {e.reason}.") from e
    except pinned.Stopped as e:
        raise Cancelled("Stopped while inputs were fetched.") from e
    except OSError as e:
        raise InputError(Failure.STORAGE, f"{shown} could not be written ({e.strerror or e}).") from e
    finally:
        part.unlink(missing_ok=True)


def display_url(url: str) -> str:
    """A URL for messages: without its query, which may hold a signature, and not endless."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return repr(url[:MAX_SHOWN_URL])
    return f"{parts.scheme}://{host}{parts.path}"[:MAX_SHOWN_URL]


def _receive(
    response: pinned.Response, part: Path, max_bytes: int, kinds: tuple[InputKind, ...], shown: str
) -> str:
    """The body into a file; its media type. What is no picture or clip is found out after its first bytes."""
    if 300 <= response.status < 400:
        hint = "Redirects are not followed: name the address where the file is."
        raise InputError(
            Failure.INPUT_INVALID, f"{shown} answered {response.status}, 200 expected.", hint=hint
        )
    if response.status != 200:
        raise InputError(Failure.INPUT_UNREACHABLE, f"{shown} answered {response.status}, 200 expected.")
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise InputError(
            Failure.INPUT_INVALID,
            f"{shown} is sent compressed ({encoding[:20]}) although that was not asked for.",
        )
    promised = response.headers.get("content-length", "")
    if promised.isascii() and promised.isdigit() and int(promised[:20]) > max_bytes:
        raise _too_large(shown, max_bytes)
    mime, size, head = "", 0, b""
    with part.open("wb") as file:
        for chunk in response.chunks:
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(shown, max_bytes)
            file.write(chunk)
            if not mime:
                head += chunk
                if len(head) >= sniff.HEAD_BYTES:
                    mime = _type(head, kinds, shown)
    if size == 0:
        raise InputError(Failure.INPUT_INVALID, f"{shown} is empty.")
    return mime or _type(head, kinds, shown)


def _type(head: bytes, kinds: tuple[InputKind, ...], shown: str) -> str:
    mime = sniff.mime_of(head[: sniff.HEAD_BYTES])
    inline.refuse_type(mime, kinds=kinds, field=shown)
    return mime


def _bring(
    db: Database,
    job: Job,
    use: Use,
    stem: Path,
    policy: Policy,
    settings: Settings,
    should_stop: Callable[[], bool],
    resolver: Resolver | None,
) -> tuple[Path, tuple[InputKind, ...]]:
    media = use.media
    if media.url is not None:
        fetched = download(
            media.url, stem, policy=policy, max_bytes=settings.max_upload_bytes, timeout_s=settings.fetch_timeout_s,
            kinds=use.kinds, field=use.field, resolver=resolver, should_stop=should_stop,
        )  # fmt: skip
        return fetched.path, _kinds(fetched.probed.kind)
    with db.read() as tx:
        if media.asset is not None:
            relative, kinds = _asset(tx, job, use, media.asset)
        else:
            assert media.job is not None
            relative, kinds = _output(tx, job, use, media.job)
    path = settings.data_dir / relative
    if not path.is_file():
        raise InputError(
            Failure.INPUT_INVALID, f"{use.field}: its file is gone.", hint="Upload or make it again."
        )
    kept = stem.with_name(stem.name + path.suffix)
    try:
        os.link(path, kept)  # stays although the original may expire while the job runs
    except OSError:
        return path, kinds
    return kept, kinds


def _asset(tx: Tx, job: Job, use: Use, asset_id: str) -> tuple[str, tuple[InputKind, ...]]:
    try:
        asset = assets.get(tx, job.account_id, asset_id)
    except NotFound as e:
        raise InputError(Failure.INPUT_INVALID, f"{use.field}: {e.message}", hint=e.hint) from e
    return asset.path, _kinds(asset.info["kind"])


def _output(tx: Tx, job: Job, use: Use, other_id: str) -> tuple[str, tuple[InputKind, ...]]:
    row = tx.first(
        sa.select(jobs.c.state, jobs.c.outputs).where(
            jobs.c.id == other_id, jobs.c.account_id == job.account_id, jobs.c.deleted_at.is_(None)
        )
    )
    if row is None:
        raise InputError(Failure.INPUT_INVALID, f"{use.field}: no job {other_id}, or it was deleted.")
    if row.state != State.SUCCEEDED:
        raise InputError(
            Failure.INPUT_INVALID, f"{use.field}: job {other_id} is {row.state}, succeeded expected."
        )
    roles: tuple[InputKind, ...] = ("video", "image")
    for role in roles:
        for output in row.outputs:
            if output["role"] == role and role in use.kinds:
                return str(output["path"]), (role,)
    raise InputError(Failure.INPUT_INVALID, f"{use.field}: job {other_id} made no {_names(use.kinds)}.")


def _kinds(kind: str) -> tuple[InputKind, ...]:
    """What a file can be used as: an animation as both."""
    by_kind: Mapping[str, tuple[InputKind, ...]] = {"image": ("image",), "video": ("video",)}
    return by_kind.get(kind, ANY)


def _names(kinds: tuple[InputKind, ...]) -> str:
    return " or ".join("picture" if kind == "image" else "clip" for kind in kinds)


def _too_large(shown: str, max_bytes: int) -> InputError:
    return InputError(Failure.INPUT_INVALID, f"{shown} has more than {max_bytes} bytes.")
