"""Answers that get lost after the task was made, and what the SDK's retries then do."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest
import runwayml
from runway_house import House, InProcess
from runwayml import RunwayML

from mutoscope.jobs import queue
from mutoscope.server import edge

MADE: dict[str, Any] = {"model": "gen4.5", "prompt_text": "a ball", "ratio": "1280:720", "duration": 2}


class Losing(httpx.BaseTransport):
    """Delivers every request and loses the first answers."""

    def __init__(self, inner: httpx.BaseTransport, answers: int) -> None:
        self.inner, self.left = inner, answers
        self.retries: list[str] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.inner.handle_request(request)
        self.retries.append(request.headers["x-stainless-retry-count"])
        if self.left:
            self.left -= 1
            answer.read()
            raise httpx.ReadError("the connection was lost")
        return answer


def client_of(house: House, transport: httpx.BaseTransport, monkeypatch: pytest.MonkeyPatch) -> RunwayML:
    monkeypatch.setattr("runwayml._base_client.time.sleep", lambda seconds: None)  # between retries
    return house.client(http_client=httpx.Client(transport=transport))


def made(house: House) -> list[str]:
    with house.db.read() as tx:
        return [job.id for job in queue.listing(tx, house.account.id).jobs]


def test_with_a_key_a_lost_answer_does_not_double(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = Losing(InProcess(house.http), answers=2)
    client = client_of(house, transport, monkeypatch)
    task = client.text_to_video.create(**MADE, extra_headers={"Idempotency-Key": "abc"})
    assert transport.retries == ["0", "1", "2"]
    assert made(house) == [task.id]
    again = client.text_to_video.create(**MADE, extra_headers={"Idempotency-Key": "abc"})
    assert again.to_dict() == task.to_dict()
    with pytest.raises(runwayml.UnprocessableEntityError, match="Idempotency-Key"):
        client.text_to_video.create(**{**MADE, "duration": 3}, extra_headers={"Idempotency-Key": "abc"})
    assert made(house) == [task.id]


def test_without_a_key_it_does_as_documented(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = Losing(InProcess(house.http), answers=1)
    task = client_of(house, transport, monkeypatch).text_to_video.create(**MADE)
    assert transport.retries == ["0", "1"]
    assert len(made(house)) == 2
    assert task.id in made(house)


def test_with_the_window_a_seeded_repeat_finds_the_first_task(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path / "window", dedupe_seeded_s=60)
    data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    body: dict[str, Any] = {"model": "gen4_turbo", "prompt_image": data, "ratio": "1280:720"}
    with house.http:
        client = client_of(house, Losing(InProcess(house.http), answers=1), monkeypatch)
        task = client.image_to_video.create(**body, seed=7)
        assert made(house) == [task.id], "also with a picture inside, which is kept under a new id"
        assert client.image_to_video.create(**body, seed=8).id != task.id
        assert client.image_to_video.create(**body, seed=7, prompt_text="it rolls").id != task.id
        unseeded = {client.image_to_video.create(**body).id for _ in range(2)}
        assert len(unseeded) == 2
    house.db.close()


def test_what_may_have_been_done_is_not_repeated(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction was committed, then the server broke."""
    broken = iter([True, False])

    def breaks(name: str) -> None:
        if next(broken, False):
            raise RuntimeError(f"the server breaks at {name}")

    monkeypatch.setattr(edge, "checkpoint", breaks)
    transport = Losing(InProcess(house.http), answers=0)
    with pytest.raises(runwayml.InternalServerError, match="may have had its effect") as told:
        client_of(house, transport, monkeypatch).text_to_video.create(**MADE)
    assert told.value.response.headers["x-should-retry"] == "false"
    assert (transport.retries, len(made(house))) == (["0"], 1)
    broken = iter([True, False])
    key = {"Idempotency-Key": "abc"}
    task = client_of(house, transport, monkeypatch).text_to_video.create(**MADE, extra_headers=key)
    assert transport.retries == ["0", "0", "1"], "with a key a repeat is safe, and the SDK does it"
    assert len(made(house)) == 2
    assert task.id in made(house)


def test_a_lost_answer_of_a_delete_is_a_404_on_retry(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    task = house.client().text_to_video.create(**MADE)
    client = client_of(house, Losing(InProcess(house.http), answers=1), monkeypatch)
    with pytest.raises(runwayml.NotFoundError):
        client.tasks.delete(task.id)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusals_are_not_repeated(house: House, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = Losing(InProcess(house.http), answers=0)
    client = client_of(house, transport, monkeypatch)
    calls: dict[int, Any] = {
        400: lambda: client.text_to_video.create(**{**MADE, "duration": 99}),
        401: lambda: client.with_options(api_key="wrong").text_to_video.create(**MADE),
        404: lambda: client.tasks.retrieve("17f20503-6c24-4c16-946b-35dbbce2af2f"),
    }
    with pytest.raises(runwayml.APIStatusError) as caught:
        calls[status]()
    assert caught.value.status_code == status
    assert transport.retries == ["0"]
