"""The service's data from the command line, while nothing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mutoscope.cli import run
from mutoscope.cli.serve import open_service
from mutoscope.jobs import accounts, queue
from mutoscope.jobs.database import Database
from mutoscope.jobs.errors import Forbidden, Unauthorized
from mutoscope.jobs.model import State
from mutoscope.settings import Settings
from tests.service.making import add_job, output


class Shell:
    """Runs commands on one data folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.db: Database = open_service(Settings(data_dir=folder))[0]

    def __call__(self, *arguments: str, code: int = 0) -> str:
        got = run([*arguments, "--data-dir", str(self.folder)])
        out, err = self.capsys.readouterr()
        assert got == code, err
        return out if code == 0 else err

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    made = Shell(tmp_path / "data", capsys)
    yield made
    made.db.close()


def works(shell: Shell, secret: str) -> bool:
    with shell.db.read() as tx:
        try:
            accounts.authenticate(tx, secret)
        except (Unauthorized, Forbidden):
            return False
    return True


def test_keys_are_made_listed_and_revoked(shell: Shell) -> None:
    secret = shell("keys", "create", "laptop").strip()
    assert works(shell, secret)
    (key,) = [k for k in shell.json("keys", "list")["keys"] if k["name"] == "laptop"]
    assert secret not in shell("keys", "list")
    assert secret.startswith(key["hint"].rstrip("."))
    assert key["last_used_at"] is None
    shell("keys", "revoke", key["id"])
    assert not works(shell, secret)
    assert "revoked" in shell("keys", "list")


def test_a_key_that_clients_have_is_taken_over(shell: Shell) -> None:
    theirs = "key_" + "0123456789abcdef" * 4
    assert shell("keys", "create", "old", "--value", theirs).strip() == theirs
    assert works(shell, theirs)
    assert shell("keys", "create", "again", "--value", theirs, code=2)


def test_accounts_and_credits(shell: Shell) -> None:
    made = shell("accounts", "create", "studio", "--plan", "plus").strip()
    assert shell.json("accounts", "list")["accounts"][-1]["id"] == made
    before = next(a for a in shell.json("accounts", "list")["accounts"] if a["id"] == made)["balance"]
    assert f"has {before + 500} credits now" in shell("credits", "grant", "studio", "500", "--note", "gift")
    assert "plan pro, weight 2" in shell("accounts", "set", "studio", "--plan", "pro", "--weight", "2")
    secret = shell("keys", "create", "theirs", "--account", "studio").strip()
    assert "disabled" in shell("accounts", "set", "studio", "--disable")
    assert not works(shell, secret)


def test_jobs_are_listed_shown_cancelled_and_tried_again(shell: Shell) -> None:
    with shell.db.write() as tx:
        waiting, other = add_job(tx, "default"), add_job(tx, "default", spec={"prompt": "a red star"})
        job = queue.claim(tx, "w", ["pocket"], "cpu")
        assert job is not None
        assert queue.succeed(tx, job.id, job.fence, [output(job)], {}) is not None
    left = {waiting.id, other.id} - {job.id}
    assert {j["id"] for j in shell.json("jobs", "list")["jobs"]} == {waiting.id, other.id}
    assert {j["id"] for j in shell.json("jobs", "list", "--state", "queued")["jobs"]} == left
    shown = shell("jobs", "show", job.id)
    assert "succeeded" in shown
    assert str(shell.folder / output(job).path) in shown
    queued = left.pop()
    assert f"{queued} is cancelled." in shell("jobs", "cancel", queued)
    new = shell("jobs", "retry", queued).strip()
    with shell.db.read() as tx:
        assert queue.get(tx, new).state is State.QUEUED
        assert queue.get(tx, new).spec == queue.get(tx, queued).spec


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("keys", "revoke", "nobody"), "nobody"),
        (("jobs", "show", "nothing"), "No job nothing"),
        (("jobs", "list", "--state", "sleeping"), "Known: queued"),
        (("accounts", "set", "ghost", "--plan", "pro"), "ghost"),
        (("keys", "create", "x", "--account", "ghost"), "ghost"),
    ],
)
def test_a_mistake_is_one_sentence(shell: Shell, command: tuple[str, ...], words: str) -> None:
    told = shell(*command, code=2)
    assert words in told
    assert "Traceback" not in told


def test_a_folder_without_a_service_is_not_made_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["jobs", "list", "--data-dir", str(tmp_path / "typo")]) == 2
    assert "no service's data" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
