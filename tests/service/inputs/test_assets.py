"""Uploads and data URIs as files of an account."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from mutoscope.jobs import assets, inline, queue
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import Conflict, NotFound
from mutoscope.jobs.inline import InputRefused
from mutoscope.jobs.spec import Media
from tests.service.inputs.conftest import animation, picture
from tests.service.making import add_job, make_account

HOUR = 3600.0


@pytest.fixture(autouse=True)
def two_accounts(db: Database) -> None:
    with db.write() as tx:
        make_account(tx, "acct")
        make_account(tx, "other")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def later(tx: Tx, seconds: float) -> Tx:
    return dataclasses.replace(tx, now=tx.now + seconds)


def store(db: Database, data: Path, content: bytes, account: str = "acct", hours: float = 24.0) -> Media:
    checked = inline.check(content)
    with db.write() as tx:
        return assets.store(tx, account, checked, data_dir=data, hours=hours)


def upload(db: Database, data: Path, tmp_path: Path, content: bytes, filename: str = "a.png") -> assets.Asset:
    with db.write() as tx:
        asset = assets.open_upload(tx, "acct", filename=filename)
    temporary = tmp_path / "arriving"
    temporary.write_bytes(content)
    arrived = assets.check_upload(temporary, max_bytes=1 << 20)
    with db.write() as tx:
        return assets.finish_upload(tx, asset.id, arrived, data_dir=data)


def test_store_and_get(db: Database, data: Path) -> None:
    media = store(db, data, picture())
    with db.read() as tx:
        asset = assets.get(tx, "acct", media.asset or "")
    assert (data / asset.path).read_bytes() == picture()
    assert asset.path == f"assets/{asset.id}/picture.png"
    assert (asset.mime, asset.size_bytes, asset.info["width"]) == ("image/png", len(picture()), 48)
    assert asset.media == media


def test_two_step_upload(db: Database, data: Path, tmp_path: Path) -> None:
    with db.write() as tx:
        asset = assets.open_upload(tx, "acct", filename="holiday.jpg")
        with pytest.raises(NotFound):
            assets.get(tx, "acct", asset.id)  # no bytes yet
        assert assets.get(tx, "acct", asset.id, states=("pending",)).state == "pending"
    done = upload(db, data, tmp_path, picture("JPEG"), "holiday.jpg")
    assert (done.state, done.filename, done.mime) == ("ready", "holiday.jpg", "image/jpeg")
    assert not (tmp_path / "arriving").exists()


def test_upload_that_is_sent_twice(db: Database, data: Path, tmp_path: Path) -> None:
    """A client that lost the answer sends the same again: fine. Another file: refused."""
    done = upload(db, data, tmp_path, picture())
    for content, ok in ((picture(), True), (picture(size=(20, 20)), False)):
        again = tmp_path / "again"
        again.write_bytes(content)
        arrived = assets.check_upload(again, max_bytes=1 << 20)
        with db.write() as tx:
            if ok:
                assert assets.finish_upload(tx, done.id, arrived, data_dir=data) == done
            else:
                with pytest.raises(Conflict):
                    assets.finish_upload(tx, done.id, arrived, data_dir=data)
    assert (data / done.path).read_bytes() == picture()


def test_upload_that_comes_too_late(db: Database, data: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "late"
    temporary.write_bytes(picture())
    arrived = assets.check_upload(temporary, max_bytes=1 << 20)
    with db.write() as tx:
        asset = assets.open_upload(tx, "acct", hours=1.0)
        with pytest.raises(NotFound):
            assets.finish_upload(later(tx, HOUR), asset.id, arrived, data_dir=data)
        with pytest.raises(NotFound):
            assets.finish_upload(tx, "no-such-upload", arrived, data_dir=data)


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "0 bytes"), (bytes(2000), "bytes, from"), (b"#!/bin/sh", "no picture")]
)
def test_uploads_are_checked(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "arriving"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match=why):
        assets.check_upload(path, max_bytes=1000)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../../etc/passwd", "passwd"),
        ("..\\..\\windows\\system32\\a.png", "a.png"),
        ("/etc/shadow", "shadow"),
        ("C:\\Users\\me\\photo.png", "photo.png"),
        ("..", ""),
        (".", ""),
        (".htaccess", "htaccess"),
        ("a\x00b.png", "ab.png"),
        ("a\r\nSet-Cookie: x=y.png", "aSet-Cookie: x=y.png"),
        ('"><script>alert(1)</script>.png', "script.png"),
        ("\u202egnp.exe", "gnp.exe"),
        ("x" * 5000 + ".png", "x" * 200),
        ("Ferien in Zürich.png", "Ferien in Zürich.png"),
    ],
)
def test_file_names_are_shown_and_never_used(
    db: Database, data: Path, tmp_path: Path, given: str, shown: str
) -> None:
    done = upload(db, data, tmp_path, picture(), given)
    assert done.filename == shown
    files = [p.relative_to(data).as_posix() for p in data.rglob("*") if p.is_file()]
    assert files == [f"assets/{done.id}/picture.png"]


def test_accounts_do_not_see_each_other(db: Database, data: Path) -> None:
    media = store(db, data, picture())
    with db.write() as tx:
        with pytest.raises(NotFound):
            assets.get(tx, "other", media.asset or "")
        with pytest.raises(NotFound):
            assets.delete(tx, "other", media.asset or "", data_dir=data)
        assert assets.listing(tx, "other") == []
        assert [a.media for a in assets.listing(tx, "acct")] == [media]


def test_files_expire_unless_a_job_needs_them(db: Database, data: Path) -> None:
    kept, gone = store(db, data, picture()), store(db, data, animation())
    with db.write() as tx:
        assets.used(tx, [kept.asset or ""], hours=48.0)
        after = later(tx, 24 * HOUR)
        with pytest.raises(NotFound):
            assets.get(after, "acct", gone.asset or "")
        assert assets.expire(after, data_dir=data) == 1
        assert assets.get(after, "acct", kept.asset or "").used_at == tx.now
    assert os.listdir(data / "assets") == [kept.asset]
    with db.write() as tx:
        assets.used(tx, [kept.asset or ""], hours=1.0)
        assert assets.get(later(tx, 47 * HOUR), "acct", kept.asset or ""), "never shortened"


def test_files_that_a_waiting_job_needs_do_not_expire(db: Database, data: Path) -> None:
    needed, loose = store(db, data, picture()), store(db, data, picture())
    with db.write() as tx:
        job = add_job(tx, spec={"prompt": "a ball", "source": {"asset": needed.asset}})
        assets.used(tx, [needed.asset or "", loose.asset or ""], hours=24.0)
        for days in (2, 3):
            after = later(tx, days * 24 * HOUR)
            assert assets.expire(after, data_dir=data) == (1 if days == 2 else 0)
            assert assets.get(after, "acct", needed.asset or "")
        queue.cancel(tx, job.id)
        assert assets.expire(later(tx, 4 * 24 * HOUR), data_dir=data) == 1
    assert os.listdir(data / "assets") == []


def test_delete(db: Database, data: Path) -> None:
    media = store(db, data, picture())
    with db.write() as tx:
        assets.delete(tx, "acct", media.asset or "", data_dir=data)
        with pytest.raises(NotFound):
            assets.get(tx, "acct", media.asset or "")
    assert os.listdir(data / "assets") == []


def test_files_of_requests_that_were_rolled_back_are_swept(db: Database, data: Path) -> None:
    kept = store(db, data, picture())
    checked = inline.check(picture())

    def rolled_back() -> None:
        with db.write() as tx:
            assets.store(tx, "acct", checked, data_dir=data, hours=1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rolled_back()
    assert len(os.listdir(data / "assets")) == 2
    for name in os.listdir(data / "assets"):
        os.utime(data / "assets" / name, (0, 0))
    with db.write() as tx:
        assert assets.sweep_orphans(tx, data_dir=data) == 1
        assert assets.sweep_orphans(tx, data_dir=data / "nothing") == 0
    assert os.listdir(data / "assets") == [kept.asset]
