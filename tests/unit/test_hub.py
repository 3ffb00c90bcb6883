"""Pulling model sets from a hub-like server: resume, checksums, sharing, and every failure's sentence.

The server below speaks the part of the hub's protocol that matters: /{owner}/{repo}/resolve/{revision}/{path}
with HEAD and GET, Range, X-Linked-Etag, X-Linked-Size, X-Repo-Commit, X-Error-Code, and a redirect to another
host.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from mutoscope import hub
from mutoscope.catalog import ModelSet, RemoteFile, find_model, installed_models, known_model
from mutoscope.errors import DownloadError, FileError, RequestError, ResourceError
from mutoscope.hub import Progress, plan, pull, remove, unused_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLENTY = 10**15


def content(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@dataclass
class FakeHub:
    """Files by "owner/repo/path", and what to do wrong."""

    files: dict[str, bytes]
    etags: dict[str, str] = field(default_factory=dict)  # instead of the true SHA-256
    drop_after: list[int] = field(default_factory=list)  # bytes after which the next GETs break off
    ignore_range: bool = False
    need_token: str = ""
    error: tuple[int, str] | None = None  # status, X-Error-Code
    busy: int = 0  # so many requests are answered 503
    cdn: str = ""  # redirect GETs to this address
    no_linked_etag: bool = False
    seen: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def gets(self) -> list[tuple[str, str | None]]:
        """(path, Range) of the GET requests."""
        return [(path, range_) for method, path, range_, _ in self.seen if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeHub

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        fake, token = self.fake, self.headers.get("Authorization")
        fake.seen.append((self.command, self.path, self.headers.get("Range"), token))
        parts = self.path.strip("/").split("/")
        assert parts[2] == "resolve"
        key = "/".join(parts[:2] + parts[4:])
        if fake.busy:
            fake.busy -= 1
            return self.refuse(503, "")
        if fake.error:
            return self.refuse(*fake.error)
        if fake.need_token and token != f"Bearer {fake.need_token}":
            return self.refuse(401, "GatedRepo")
        if key not in fake.files:
            known_repo = any(k.startswith("/".join(parts[:2]) + "/") for k in fake.files)
            return self.refuse(404, "EntryNotFound" if known_repo else "RepoNotFound")
        data = fake.files[key]
        etag = fake.etags.get(key) or hashlib.sha256(data).hexdigest()
        facts = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag}"'}
        if fake.no_linked_etag:
            facts = {"ETag": '"1234-abcd"'}
        if fake.cdn and self.command == "GET":
            return self.send(302, b"", {"Location": fake.cdn + self.path, **facts})
        start = 0
        requested = self.headers.get("Range")
        if requested and not fake.ignore_range:
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self.refuse(416, "")
            facts["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        drop = fake.drop_after.pop(0) if self.command == "GET" and fake.drop_after else None
        self.send(206 if "Content-Range" in facts else 200, data[start:], facts, drop_after=drop)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def send(self, status: int, body: bytes, headers: dict[str, str], drop_after: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        if drop_after is not None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if drop_after is None else body[:drop_after])


def serve(fake: FakeHub) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"fake": fake}))
    fake.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FILES = {
    "big/dit/dit-Q4.gguf": content(1, 3_000_000),
    "big/dit/dit-Q8.gguf": content(2, 3_500_000),
    "some/encoder/sub/enc.gguf": content(3, 2_000_000),
    "a/vae/vae.safetensors": content(4, 500_000),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "HF_ENDPOINT",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "MUTOSCOPE_HOME",
        "http_proxy",
        "HTTP_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "RETRY_WAIT_S", 0.001)
    monkeypatch.setattr(hub, "get_token", lambda: "stored-token")


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    yield from serve(FakeHub(dict(FILES)))


@pytest.fixture
def other() -> Iterator[FakeHub]:
    yield from serve(FakeHub(dict(FILES)))


def remote(key: str, **changes: Any) -> RemoteFile:
    owner, repo, path = key.split("/", 2)
    return RemoteFile(repo=f"{owner}/{repo}", path=path, size_bytes=len(FILES.get(key, b"")), **changes)


def model(quant: str = "q4", **files: RemoteFile) -> ModelSet:
    """A small set that looks like a known one."""
    return dataclasses.replace(
        known_model("wan2.1-vace-1.3b"),
        name=f"tiny:{quant}",
        files={
            "dit": remote(f"big/dit/dit-{quant.upper()}.gguf"),
            "text_encoder": remote("some/encoder/sub/enc.gguf"),
            "vae": remote("a/vae/vae.safetensors"),
            **files,  # type: ignore[dict-item]
        },
    )


def test_pull_installs_a_usable_model(fake: FakeHub, tmp_path: Path) -> None:
    announced: list[hub.PullPlan] = []
    told: list[Progress] = []
    planned, manifest = pull(
        model(), tmp_path, endpoint=fake.endpoint, announce=announced.append, progress=told.append
    )
    assert manifest is not None
    assert announced == [planned]
    assert planned.model.licence == "Apache-2.0"
    assert planned.total_bytes == planned.missing_bytes == 5_500_000
    for file, key in (
        (manifest.files.dit, "big/dit/dit-Q4.gguf"),
        (manifest.files.vae, "a/vae/vae.safetensors"),
    ):
        assert file.path.read_bytes() == FILES[key]
        assert file.sha256 == hashlib.sha256(FILES[key]).hexdigest()
    assert manifest.files.text_encoder.source == "some/encoder@0123456789ab/sub/enc.gguf"
    assert find_model("tiny:q4", tmp_path) == manifest
    assert find_model("tiny-q4", tmp_path) == manifest
    assert [m.name for m in installed_models(tmp_path)] == ["tiny:q4"]
    assert sorted(p.name for p in (tmp_path / "files").iterdir() if p.suffix == ".part") == []
    assert (told[-1].done_bytes, told[-1].total_bytes) == (5_500_000, 5_500_000)
    assert [t.done_bytes for t in told if t.stage == "download"] == sorted(
        t.done_bytes for t in told if t.stage == "download"
    )
    assert told[-1].speed_bytes_s > 0
    # the GETs name the commit that the HEADs saw, so a push in between cannot mix versions
    assert {path.split("/")[4] for path, _ in fake.gets()} == {COMMIT}


def test_dry_run_touches_nothing(fake: FakeHub, tmp_path: Path) -> None:
    planned, manifest = pull(model(), tmp_path / "models", endpoint=fake.endpoint, dry_run=True)
    assert manifest is None
    assert planned.missing_bytes == 5_500_000
    assert fake.gets() == []
    assert not (tmp_path / "models").exists()


def test_equal_files_are_fetched_once(fake: FakeHub, tmp_path: Path) -> None:
    pull(model("q4"), tmp_path, endpoint=fake.endpoint)
    n = len(fake.gets())
    planned, _ = pull(model("q8"), tmp_path, endpoint=fake.endpoint)
    assert [path.split("/")[-1] for path, _ in fake.gets()[n:]] == ["dit-Q8.gguf"]
    assert planned.missing_bytes == 3_500_000
    # the same content under another name is recognised too
    fake.files["mirror/vae/renamed.safetensors"] = FILES["a/vae/vae.safetensors"]
    n = len(fake.gets())
    pull(model("q4", vae=remote("mirror/vae/renamed.safetensors")), tmp_path, endpoint=fake.endpoint)
    assert fake.gets()[n:] == []


def test_a_dropped_connection_is_resumed(fake: FakeHub, tmp_path: Path) -> None:
    fake.drop_after = [1_000_000, 700_000]
    _, manifest = pull(model(), tmp_path, endpoint=fake.endpoint)
    assert manifest is not None
    assert manifest.files.dit.path.read_bytes() == FILES["big/dit/dit-Q4.gguf"]
    ranges = [range_ for path, range_ in fake.gets() if path.endswith("dit-Q4.gguf")]
    assert ranges == [None, "bytes=1000000-", "bytes=1700000-"]


def test_an_interrupted_pull_goes_on_in_the_next_one(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TELL_EVERY_S", 0.0)

    def interrupt(progress: Progress) -> None:
        if progress.done_bytes > 1_500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(model(), tmp_path, endpoint=fake.endpoint, progress=interrupt)
    assert installed_models(tmp_path) == []
    with pytest.raises(RequestError):
        find_model("tiny:q4", tmp_path)
    parts = list((tmp_path / "files").glob("*.part"))
    assert len(parts) == 1
    size = parts[0].stat().st_size
    assert size > 0
    assert plan(model(), tmp_path, endpoint=fake.endpoint).missing_bytes == 5_500_000 - size
    n = len(fake.gets())
    _, manifest = pull(model(), tmp_path, endpoint=fake.endpoint)
    assert fake.gets()[n][1] == f"bytes={size}-"
    assert manifest is not None
    assert manifest.files.dit.path.read_bytes() == FILES["big/dit/dit-Q4.gguf"]


def test_a_server_without_ranges_is_read_from_the_start(fake: FakeHub, tmp_path: Path) -> None:
    fake.drop_after, fake.ignore_range = [1_000_000], True
    _, manifest = pull(model(), tmp_path, endpoint=fake.endpoint)
    assert manifest is not None
    assert manifest.files.dit.path.read_bytes() == FILES["big/dit/dit-Q4.gguf"]


def test_a_server_that_never_finishes_ends_the_pull(fake: FakeHub, tmp_path: Path) -> None:
    fake.drop_after = [1_000_000] + [0] * 50
    with pytest.raises(DownloadError, match=r"sends no more .* 1,000,000 bytes of 3,000,000 bytes are here"):
        pull(model(), tmp_path, endpoint=fake.endpoint)
    assert len(fake.gets()) == 1 + hub.MAX_STALLS
    assert installed_models(tmp_path) == []


def test_wrong_bytes_are_thrown_away(fake: FakeHub, tmp_path: Path) -> None:
    key = "a/vae/vae.safetensors"
    good, bad = FILES[key], bytearray(FILES[key])
    bad[1000] ^= 1
    fake.etags[key], fake.files[key] = hashlib.sha256(good).hexdigest(), bytes(bad)
    with pytest.raises(DownloadError, match=r"a/vae/vae\.safetensors: the download has SHA-256 .* expected"):
        pull(model(), tmp_path, endpoint=fake.endpoint)
    assert installed_models(tmp_path) == []
    assert not [p for p in (tmp_path / "files").iterdir() if "vae" in p.name]
    fake.files[key] = good
    pull(model(), tmp_path, endpoint=fake.endpoint)
    assert [m.name for m in installed_models(tmp_path)] == ["tiny:q4"]


def test_a_damaged_part_is_found_by_the_checksum(fake: FakeHub, tmp_path: Path) -> None:
    target = plan(model(), tmp_path, endpoint=fake.endpoint).files[0]
    target.part.parent.mkdir()
    target.part.write_bytes(b"\0" * 1000)
    with pytest.raises(DownloadError, match="SHA-256"):
        pull(model(), tmp_path, endpoint=fake.endpoint)
    assert not target.part.exists()
    target.part.write_bytes(b"\0" * 4_000_000)  # longer than the file: start again
    pull(model(), tmp_path, endpoint=fake.endpoint)
    assert target.target.read_bytes() == FILES["big/dit/dit-Q4.gguf"]


def test_a_checksum_of_the_catalog_binds_the_mirror(fake: FakeHub, tmp_path: Path) -> None:
    pinned = remote("a/vae/vae.safetensors", sha256="a" * 64)
    with pytest.raises(DownloadError, match=r"has SHA-256 .* aaaaaaaaaaaa… expected by this version"):
        pull(model(vae=pinned), tmp_path, endpoint=fake.endpoint)
    assert fake.gets() == []


def test_a_mirror_without_checksums_is_refused(fake: FakeHub, tmp_path: Path) -> None:
    fake.no_linked_etag = True
    with pytest.raises(DownloadError, match=r"gives no SHA-256 .*1234-abcd.*mirror that passes its headers"):
        pull(model(), tmp_path, endpoint=fake.endpoint)


def test_too_little_disk_is_said_before_the_download(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"5,500,000 bytes are to be downloaded .* 0\.20 GB are free"):
        pull(model(), tmp_path, endpoint=fake.endpoint, free_space=lambda _: 200_000_000)
    assert fake.gets() == []
    pull(model(), tmp_path, endpoint=fake.endpoint, free_space=lambda _: PLENTY)
    # nothing to fetch: a full disk does not matter
    pull(model(), tmp_path, endpoint=fake.endpoint, free_space=lambda _: 0)


def test_a_disk_that_fills_up_keeps_the_part(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "_stream", full)
    with pytest.raises(ResourceError, match=r"is full; what was downloaded is kept\..*goes on from there"):
        pull(model(), tmp_path, endpoint=fake.endpoint)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"error": (404, "RepoNotFound")}, r"has no repository big/dit, or it is private.*HF_TOKEN"),
        (
            {"error": (404, "EntryNotFound")},
            r"big/dit/dit-Q4\.gguf: .* has no such file in big/dit.*another quant",
        ),
        ({"error": (404, "RevisionNotFound")}, "has no such file"),
        ({"error": (401, "GatedRepo")}, r"licence must be accepted.*big/dit, accept it, then set HF_TOKEN"),
        ({"error": (403, "GatedRepo")}, "licence must be accepted"),
        ({"error": (403, "")}, r"answers 403.*Check HF_TOKEN"),
        ({"error": (500, "")}, r"answers 500.*Try again later"),
    ],
)
def test_refusals_of_the_hub(fake: FakeHub, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    for key, value in change.items():
        setattr(fake, key, value)
    with pytest.raises(DownloadError, match=expected) as caught:
        pull(model(), tmp_path / "models", endpoint=fake.endpoint)
    assert fake.endpoint in str(caught.value) or "licence" in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_a_busy_hub_is_asked_again(fake: FakeHub, tmp_path: Path) -> None:
    fake.busy = 3
    _, manifest = pull(model(), tmp_path, endpoint=fake.endpoint)
    assert manifest is not None


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9 cannot be reached.*HF_ENDPOINT"):
        pull(model(), tmp_path, endpoint="http://127.0.0.1:9")
    with pytest.raises(RequestError, match=r"endpoint 'mirror\.example': an address like"):
        pull(model(), tmp_path, endpoint="mirror.example")


def test_mirrors(fake: FakeHub, other: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint + "/")
    assert plan(model(), tmp_path).endpoint == fake.endpoint
    assert len(fake.seen) == 3
    pull(model(), tmp_path, endpoint=other.endpoint)  # the argument wins
    assert len(fake.seen) == 3
    assert len(other.gets()) == 3


def test_tokens(fake: FakeHub, other: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(model(), tmp_path / "1", endpoint=fake.endpoint)
    assert {token for *_, token in fake.seen} == {None}  # the stored token is for huggingface.co only
    assert hub._token(hub.HUB) == "stored-token"

    monkeypatch.setenv("HF_TOKEN", "secret")
    fake.need_token, fake.cdn = "secret", other.endpoint
    pull(model(), tmp_path / "2", endpoint=fake.endpoint)
    assert [token for method, *_, token in fake.seen if method == "GET"][-3:] == ["Bearer secret"] * 3
    assert len(other.gets()) == 3
    assert {token for *_, token in other.seen} == {None}  # and never follows a redirect to another host


def test_two_pulls_at_once(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with FileLock(tmp_path / "files" / "pull.lock"), pytest.raises(DownloadError, match="another pull"):
        pull(model(), tmp_path, endpoint=fake.endpoint)


def test_a_models_folder_that_cannot_be_made(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        pull(model(), tmp_path / "file", endpoint=fake.endpoint, free_space=lambda _: PLENTY)


def test_remove_keeps_what_others_use(fake: FakeHub, tmp_path: Path) -> None:
    pull(model("q4"), tmp_path, endpoint=fake.endpoint)
    pull(model("q8"), tmp_path, endpoint=fake.endpoint)
    assert unused_files(tmp_path) == []
    freed = remove("tiny:q4", tmp_path)
    assert 3_000_000 < freed < 3_010_000
    find_model("tiny:q8", tmp_path)
    assert freed + remove("tiny-q8", tmp_path) > 9_000_000
    assert [p.name for p in (tmp_path / "files").iterdir() if p.suffix != ".lock"] == []
    with pytest.raises(RequestError, match=r"'tiny:q4' is not installed\. Installed: none"):
        remove("tiny:q4", tmp_path)
    with pytest.raises(RequestError, match="part of the package"):
        remove("pocket", tmp_path)


def test_remove_is_careful_while_a_manifest_is_broken(fake: FakeHub, tmp_path: Path) -> None:
    pull(model("q4"), tmp_path, endpoint=fake.endpoint)
    pull(model("q8"), tmp_path, endpoint=fake.endpoint)
    (tmp_path / "tiny-q8" / "model.toml").write_text("name =")
    assert remove("tiny:q4", tmp_path) < 10_000
    assert len(list((tmp_path / "files").glob("*-dit-*"))) == 2
    remove("tiny-q8", tmp_path)  # broken sets can be removed by their folder's name
    assert list((tmp_path / "files").glob("*-dit-*")) == []
