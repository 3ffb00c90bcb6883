"""The inputs of a job brought together: uploads, URLs, outputs of other jobs."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mutoscope.errors import Cancelled
from mutoscope.jobs import assets, fetch, inline, schema
from mutoscope.jobs.database import Database
from mutoscope.jobs.fetch import InputError
from mutoscope.jobs.model import Failure, Job, Priority, Resolved, State
from mutoscope.jobs.spec import JobSpec, Media
from mutoscope.settings import Settings
from tests.service.inputs.conftest import Host, animation, picture
from tests.service.making import make_account


@pytest.fixture
def db(sqlite_db: Database) -> Database:
    with sqlite_db.write() as tx:
        make_account(tx, "acct")
        make_account(tx, "other")
    return sqlite_db


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def store(db: Database, data: Path, content: bytes, account: str = "acct", hours: float = 24.0) -> Media:
    checked = inline.check(content)
    with db.write() as tx:
        return assets.store(tx, account, checked, data_dir=data, hours=hours)


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
