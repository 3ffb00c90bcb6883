"""Uploads and data URIs as files of an account, and the inputs of a job brought together."""

from __future__ import annotations

import base64
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mutoscope.errors import Cancelled
from mutoscope.jobs import assets, fetch, inline, schema
from mutoscope.jobs.database import Database, Tx
from mutoscope.jobs.errors import Conflict, NotFound
from mutoscope.jobs.fetch import InputError
from mutoscope.jobs.inline import InputRefused
from mutoscope.jobs.model import Failure, Job, Priority, Resolved, State
from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.settings import Settings
from tests.service.inputs.conftest import Host, animation, picture

HOUR = 3600.0


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


# -- the inputs of a job -------------------------------------------------------------------------------------


@pytest.fixture
def settings(data: Path) -> Settings:
    return Settings(data_dir=data, allow_http_inputs=True, allow_private_hosts=("127.0.0.1",))


def job_of(spec: JobSpec, account: str = "acct") -> Job:
    resolved = Resolved(
        width=64, height=64, frames=5, fps=16.0, steps=2, passes=1, out_width=64, out_height=64, seed=1, tier="draft",
        seconds=0.3,
    )  # fmt: skip
    return Job(
        seq=1, id="job", account_id=account, key_id=None, dialect="api", operation="video", state=State.RUNNING,
        stage="inputs", step=0, steps=2, progress=0.0, eta_at=None, model="pocket", model_asked="auto", candidates=(),
        spec=spec.dump(), resolved=resolved, vendor={}, metadata={}, priority=Priority.NORMAL, cost=0, cost_captured=0,
        estimate_s=1.0, time_limit_s=60.0, attempt=1, crashes=0, fence=1, worker_id=None, lease_until=None,
        cancel_asked_at=None, created_at=0.0, started_at=0.0, finished_at=None, deleted_at=None, failure=None,
        message="", outputs=(), result={}, batch_id=None, batch_index=None, parent_id=None,
    )  # fmt: skip


def finished(
    db: Database, data: Path, *, account: str = "acct", state: str = "succeeded", role: str = "video"
) -> str:
    """A job of the account with one output."""
    path = f"outputs/made-{state}-{account}-{role}/1/output.bin"
    (data / path).parent.mkdir(parents=True)
    (data / path).write_bytes(b"made")
    output = {"role": role, "path": path, "mime": "video/mp4", "size_bytes": 4}
    with db.write() as tx:
        values: dict[str, Any] = {
            "id": f"made-{state}-{account}-{role}", "account_id": account, "dialect": "api", "operation": "video",
            "state": state, "model": "pocket", "model_asked": "auto", "candidates": [], "spec": {}, "resolved": {},
            "vendor": {}, "metadata": {}, "priority": "normal", "cost": 0, "estimate_s": 1.0, "time_limit_s": 1.0,
            "created_at": tx.now, "outputs": [output],
        }  # fmt: skip
        tx.run(schema.jobs.insert().values(**values))
    return str(values["id"])


def collect(
    db: Database, settings: Settings, folder: Path, spec: JobSpec, **options: Any
) -> dict[Media, Path]:
    return fetch.collect(db, job_of(spec), folder, settings, **options)


def frame(media: Media, at: float = 0.0) -> dict[str, Any]:
    return {"media": media.model_dump(exclude_none=True), "at": at}


def spec_of(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"prompt": "a ball", **fields})


def test_collect_brings_all_three_kinds(
    db: Database, data: Path, settings: Settings, host: Host, tmp_path: Path
) -> None:
    asset, url = store(db, data, picture()), Media(url=host.url("/b.webp"))
    made = Media(job=finished(db, data))
    host.file("/b.webp", picture("WEBP"))
    spec = spec_of(
        keyframes=[frame(asset), frame(url, 1.0)],
        extend_start={"job": made.job},
        references=[{"media": {"asset": asset.asset}}],
    )
    found = collect(db, settings, tmp_path / "work", spec)
    assert set(found) == {asset, url, made} == set(spec.media())
    assert found[asset].read_bytes() == picture()
    assert found[url].read_bytes() == picture("WEBP")
    assert found[made].read_bytes() == b"made"
    assert len(host.requests) == 1


def test_collected_files_outlive_their_originals(
    db: Database, data: Path, settings: Settings, tmp_path: Path
) -> None:
    asset = store(db, data, picture())
    found = collect(db, settings, tmp_path / "work", spec_of(keyframes=[frame(asset)]))
    with db.write() as tx:
        assets.delete(tx, "acct", asset.asset or "", data_dir=data)
    assert found[asset].read_bytes() == picture()
    assert found[asset].parent == tmp_path / "work"


@pytest.mark.parametrize(
    ("state", "account", "why"),
    [
        ("running", "acct", "is running, succeeded expected"),
        ("failed", "acct", "is failed"),
        ("succeeded", "other", "no job"),
    ],
)
def test_outputs_that_cannot_be_used(
    db: Database, data: Path, settings: Settings, tmp_path: Path, state: str, account: str, why: str
) -> None:
    job_id = finished(db, data, account=account, state=state)
    with pytest.raises(InputError, match=why) as caught:
        collect(db, settings, tmp_path / "work", spec_of(extend_start={"job": job_id}))
    assert caught.value.failure is Failure.INPUT_INVALID
    assert caught.value.message.startswith("extend_start: ")


def test_output_that_was_deleted(db: Database, data: Path, settings: Settings, tmp_path: Path) -> None:
    job_id = finished(db, data)
    spec = spec_of(extend_start={"job": job_id})
    with db.read() as tx:
        (data / tx.scalar(sa.select(schema.jobs.c.outputs))[0]["path"]).unlink()
    with pytest.raises(InputError, match="its file is gone"):
        collect(db, settings, tmp_path / "work", spec)
    with db.write() as tx:
        tx.run(schema.jobs.update().values(deleted_at=tx.now))
    with pytest.raises(InputError, match="was deleted"):
        collect(db, settings, tmp_path / "work", spec)


def test_files_of_other_accounts_and_expired_ones(
    db: Database, data: Path, settings: Settings, tmp_path: Path
) -> None:
    foreign = store(db, data, picture(), account="other")
    expired = store(db, data, picture(), hours=0.0)
    for media in (foreign, expired):
        with pytest.raises(InputError, match=r"keyframes\[0\]: No file") as caught:
            collect(db, settings, tmp_path / "work", spec_of(keyframes=[frame(media)]))
        assert caught.value.failure is Failure.INPUT_INVALID


def test_kinds_are_checked(
    db: Database, data: Path, settings: Settings, host: Host, tmp_path: Path, clip: bytes
) -> None:
    host.file("/clip", clip)
    still, moving, both = store(db, data, picture()), store(db, data, clip), store(db, data, animation())
    made = {"job": finished(db, data, role="image")}
    for fields, why in (
        ({"keyframes": [frame(moving)]}, r"keyframes\[0\]: is a clip, a picture expected"),
        (
            {"references": [{"media": {"url": host.url("/clip")}}]},
            r"references\[0\]: http://.* holds video/mp4",
        ),
        ({"control": {"asset": still.asset}}, "control: is a picture, a clip expected"),
        ({"extend_end": made}, "extend_end: job .* made no clip"),
        ({"operation": "reframe_rate", "source": {"asset": still.asset}}, "source: is a picture"),
    ):
        with pytest.raises(InputError, match=why) as caught:
            collect(db, settings, tmp_path / "work", spec_of(**fields))
        assert caught.value.failure is Failure.INPUT_INVALID
    for fields in (
        {"keyframes": [frame(both)]},
        {"control": {"asset": both.asset}},
        {"source": {"asset": still.asset}},
        {"source": {"asset": moving.asset}, "mask": {"asset": still.asset}},
    ):
        assert collect(db, settings, tmp_path / "work", spec_of(**fields))


def test_every_file_of_a_request_is_collected() -> None:
    """A field that is added to JobSpec and forgotten in `uses` would be missing when the job runs."""
    media = [Media(asset=str(i)) for i in range(7)]
    spec = JobSpec(
        prompt="a ball", source=media[0], control=media[1], mask=media[2], extend_start=media[3], extend_end=media[4],
        keyframes=({"media": media[5]},), references=({"media": media[6]},),  # type: ignore[arg-type]
    )  # fmt: skip
    assert {use.media for use in fetch.uses(spec)} == set(spec.media()) == set(media)
    holders = {name for name, f in JobSpec.model_fields.items() if "Media" in str(f.annotation)}
    assert holders == {"source", "control", "mask", "extend_start", "extend_end"}


def test_collect_stops_when_asked(db: Database, data: Path, settings: Settings, tmp_path: Path) -> None:
    asset = store(db, data, picture())
    with pytest.raises(Cancelled):
        collect(db, settings, tmp_path / "work", spec_of(keyframes=[frame(asset)]), should_stop=lambda: True)


def test_data_uri_to_input(db: Database, data: Path, settings: Settings, tmp_path: Path) -> None:
    """The whole way: what came in a request is what the engine gets."""
    text = "data:image/png;base64," + base64.b64encode(picture()).decode()
    checked = inline.decode(text, kinds=("image",))
    with db.write() as tx:
        media = assets.store(tx, "acct", checked, data_dir=data, hours=1.0)
    found = collect(db, settings, tmp_path / "work", spec_of(keyframes=[frame(media)]))
    assert found[media].read_bytes() == picture()
