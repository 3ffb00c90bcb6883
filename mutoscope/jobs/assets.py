"""Files that users gave: uploads and data URIs, kept for a while and named by an id.

On disk an asset is `assets/<id>/<our name>`; the user's file name is only remembered, to show it. The file is there
before its row says "ready", so a row never names half a file; a file whose row was rolled back is swept later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import unicodedata
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from mutoscope.jobs import inline as inlines
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Conflict, InvalidRequest, NotFound
from mutoscope.jobs.inline import ANY, Inline, InputKind
from mutoscope.jobs.model import TERMINAL
from mutoscope.jobs.schema import assets, jobs
from mutoscope.jobs.spec import Media
from mutoscope.media import sandbox, sniff

FOLDER = "assets"
MIN_UPLOAD_BYTES = 1
NEEDED_S = 3600.0
"""How long a file lives on whose time is over, but which a waiting job needs; then it is looked at again."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One row of `assets`. `path` is relative to the data folder, `info` says what the file holds."""

    id: str
    account_id: str
    purpose: str
    state: str  # "pending" (no bytes yet), "ready"
    filename: str
    mime: str
    size_bytes: int
    sha256: str
    path: str
    info: dict[str, Any]
    created_at: float
    expires_at: float
    used_at: float | None

    @property
    def media(self) -> Media:
        return Media(asset=self.id)


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """An uploaded file that was checked; made outside of a transaction by `check_upload`."""

    path: Path
    sha256: str
    probed: sandbox.Probed


def store(
    tx: Tx,
    account_id: str,
    inline: Inline,
    *,
    data_dir: Path,
    hours: float,
    purpose: str = "inline",
    filename: str = "",
    told: Mapping[str, Any] | None = None,
) -> Media:
    """Keep a checked file for some hours. `told`: what the sender says of it, kept in `info` as it is."""
    asset_id = str(uuid.uuid4())
    relative = _place(asset_id, inline.mime)
    path = data_dir / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(inline.data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    values = _ready(inline.probed, hashlib.sha256(inline.data).hexdigest(), relative)
    if told:
        values["info"] |= {"told": dict(told)}
    _insert(tx, asset_id, account_id, purpose, filename, hours, **values)
    return Media(asset=asset_id)


def open_upload(
    tx: Tx,
    account_id: str,
    *,
    filename: str = "",
    purpose: str = "upload",
    hours: float = 24.0,
    told: Mapping[str, Any] | None = None,
) -> Asset:
    """Announce a file; `finish_upload` brings it. The link to send it to is signed by `blobs.Links.upload`."""
    asset_id = str(uuid.uuid4())
    info = {"told": dict(told)} if told else {}
    _insert(tx, asset_id, account_id, purpose, filename, hours, state="pending", info=info)
    return get(tx, account_id, asset_id, states=("pending",))


def check_upload(
    path: Path,
    *,
    max_bytes: int,
    kinds: Collection[InputKind] = ANY,
    types: Collection[str] = (),
    field: str = "file",
) -> Arrived:
    """Look into a file that arrived, outside of a transaction.

    Raises:
        InputRefused: empty, too large, or not a usable picture or clip.
    """
    size = path.stat().st_size
    if not MIN_UPLOAD_BYTES <= size <= max_bytes:
        got = f"{field} has {size} bytes, from {MIN_UPLOAD_BYTES} to {max_bytes} expected."
        raise inlines.InputRefused(
            got, reason=inlines.TOO_LARGE if size else inlines.UNSUPPORTED_TYPE, field=field
        )
    inlines.refuse_type(sniff.mime_of_file(path), kinds=kinds, types=types, field=field)
    probed = inlines.probe(path, field=field)
    inlines.refuse_kind(probed, kinds=kinds, field=field)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Arrived(path=path, sha256=digest, probed=probed)


def finish_upload(tx: Tx, asset_id: str, arrived: Arrived, *, data_dir: Path, filename: str = "") -> Asset:
    """The announced file is here: it is moved into its place. Signed links speak for the account.

    Raises:
        NotFound: no such upload, or it has expired.
        Conflict: the file came before, and it was another one.
    """
    row = tx.first(sa.select(assets).where(assets.c.id == asset_id).with_for_update())
    if row is None or row.expires_at <= tx.now:
        raise NotFound(f"No upload {asset_id}, or it has expired.", hint="Start a new one.")
    if row.state == "ready":
        if row.sha256 != arrived.sha256:
            raise Conflict(f"Upload {asset_id} has its file already.", hint="Start a new one.")
        arrived.path.unlink(missing_ok=True)
        return _asset(row)
    relative = _place(asset_id, arrived.probed.mime)
    path = data_dir / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    _move(arrived.path, path)
    values = _ready(arrived.probed, arrived.sha256, relative)
    if "told" in row.info:
        values["info"] |= {"told": row.info["told"]}
    if filename and not row.filename:
        values["filename"] = display_name(filename)
    tx.run(assets.update().where(assets.c.id == asset_id).values(**values))
    return _asset(tx.first(sa.select(assets).where(assets.c.id == asset_id)))


def get(tx: Tx, account_id: str, asset_id: str, *, states: Sequence[str] = ("ready",)) -> Asset:
    """An asset of the account that has not expired.

    Raises:
        NotFound: there is none of this id in these states.
    """
    row = tx.first(
        sa.select(assets).where(
            assets.c.id == asset_id,
            assets.c.account_id == account_id,
            assets.c.state.in_(states),
            assets.c.expires_at > tx.now,
        )
    )
    if row is None:
        raise NotFound(
            f"No file {asset_id}, or it has expired or was not uploaded yet.", hint="Upload it again."
        )
    return _asset(row)


def listing(
    tx: Tx,
    account_id: str,
    *,
    limit: int = 50,
    before: tuple[float, str] | None = None,
    purposes: Sequence[str] = (),
    states: Sequence[str] = ("ready",),
) -> list[Asset]:
    """Files of an account that have not expired, newest first; `before`: created_at and id of the last one seen."""
    query = sa.select(assets).where(
        assets.c.account_id == account_id, assets.c.expires_at > tx.now, assets.c.state.in_(states)
    )
    if before is not None:
        at, last = before
        later = sa.and_(assets.c.created_at == at, assets.c.id > last)
        query = query.where(sa.or_(assets.c.created_at < at, later))
    if purposes:
        query = query.where(assets.c.purpose.in_(purposes))
    return [
        _asset(row) for row in tx.all(query.order_by(assets.c.created_at.desc(), assets.c.id).limit(limit))
    ]


def digests(tx: Tx, asset_ids: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the bytes of files, by id."""
    if not asset_ids:
        return {}
    rows = tx.all(sa.select(assets.c.id, assets.c.sha256).where(assets.c.id.in_(asset_ids)))
    return {row.id: row.sha256 for row in rows}


def used(tx: Tx, asset_ids: Sequence[str], *, hours: float) -> None:
    """Note that a job names these files: they live on for so many hours from now."""
    if asset_ids:
        until = tx.now + hours * 3600
        tx.run(
            assets.update()
            .where(assets.c.id.in_(asset_ids))
            .values(
                used_at=tx.now,
                expires_at=sa.case((assets.c.expires_at < until, until), else_=assets.c.expires_at),
            )
        )


def delete(tx: Tx, account_id: str, asset_id: str, *, data_dir: Path) -> None:
    """Forget a file.

    Raises:
        NotFound: the account has none of this id.
    """
    get(tx, account_id, asset_id, states=("pending", "ready"))
    tx.run(assets.delete().where(assets.c.id == asset_id))
    shutil.rmtree(data_dir / FOLDER / asset_id, ignore_errors=True)


def expire(tx: Tx, *, data_dir: Path, limit: int = 500) -> int:
    """Delete files whose time is over, unless a job that has not ended names them; how many."""
    rows = tx.all(
        sa.select(assets).where(assets.c.expires_at <= tx.now).order_by(assets.c.expires_at).limit(limit)
    )
    needed = [row.id for row in rows if row.used_at is not None and _is_needed(tx, row)]
    over = [row.id for row in rows if row.id not in needed]
    if needed:
        tx.run(assets.update().where(assets.c.id.in_(needed)).values(expires_at=tx.now + NEEDED_S))
    if over:
        tx.run(assets.delete().where(assets.c.id.in_(over)))
        for asset_id in over:
            shutil.rmtree(data_dir / FOLDER / asset_id, ignore_errors=True)
    return len(over)


def sweep_orphans(tx: Tx, *, data_dir: Path, older_than_s: float = 24 * 3600.0) -> int:
    """Delete folders without a row, which a crash or a rolled back request left; how many."""
    folder = data_dir / FOLDER
    old = []
    with contextlib.suppress(FileNotFoundError):
        old = [entry.name for entry in os.scandir(folder) if entry.stat().st_mtime < tx.now - older_than_s]
    gone = 0
    for start in range(0, len(old), 500):
        names = old[start : start + 500]
        known = {row.id for row in tx.all(sa.select(assets.c.id).where(assets.c.id.in_(names)))}
        for name in set(names) - known:
            shutil.rmtree(folder / name, ignore_errors=True)
            gone += 1
    return gone


def display_name(name: str) -> str:
    """A user's file name, fit to be shown: its last part, printable, at most 200 characters. Never a path of ours."""
    last = unicodedata.normalize("NFC", name).replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(c for c in last if c.isprintable() and c not in '"<>')
    return printable.strip(". ")[:200]


def _is_needed(tx: Tx, row: Row[Any]) -> bool:
    unfinished = (jobs.c.account_id == row.account_id, jobs.c.state.not_in(list(TERMINAL)))
    names = sa.cast(jobs.c.spec, sa.Text).contains(row.id, autoescape=True)
    return tx.first(sa.select(jobs.c.id).where(*unfinished, names).limit(1)) is not None


def _place(asset_id: str, mime: str) -> str:
    kind = "clip" if mime.startswith("video/") else "picture"
    return f"{FOLDER}/{asset_id}/{kind}{sniff.extension(mime)}"


def _ready(probed: sandbox.Probed, sha256: str, relative: str) -> dict[str, Any]:
    return {
        "state": "ready", "mime": probed.mime, "size_bytes": probed.size_bytes, "sha256": sha256, "path": relative,
        "info": probed.info(),
    }  # fmt: skip


def _insert(
    tx: Tx, asset_id: str, account_id: str, purpose: str, filename: str, hours: float, **values: Any
) -> None:
    if len(purpose) > 100:
        raise InvalidRequest(f"purpose has {len(purpose)} characters, at most 100 expected.", field="purpose")
    tx.run(
        assets.insert().values(
            id=asset_id,
            account_id=account_id,
            purpose=purpose,
            filename=display_name(filename),
            created_at=tx.now,
            expires_at=tx.now + hours * 3600,
            **values,
        )
    )


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError:  # another file system
        part = target.with_name(target.name + ".part")
        shutil.copyfile(source, part)
        part.replace(target)
        source.unlink(missing_ok=True)


def _asset(row: Row[Any] | None) -> Asset:
    assert row is not None
    return Asset(**row._mapping)
