"""Lines of the log: for people, and as JSON with the ids that belong to them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from mutoscope import logs


@pytest.fixture(autouse=True)
def root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def written(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_json_lines_have_ids_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=True)
    token = logs.request_id.set("req-1")
    try:
        raise ValueError("nobody foresaw this")
    except ValueError:
        logging.getLogger("mutoscope.worker").exception("job %s failed", "j1", extra={"job": "j1"})
    finally:
        logs.request_id.reset(token)
    logging.getLogger("mutoscope.worker").debug("too quiet")
    (line,) = written(capsys).splitlines()
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("error", "mutoscope.worker", "job j1 failed")
    assert (told["job"], told["request"]) == ("j1", "req-1")
    assert "ValueError: nobody foresaw this" in told["error"]
    assert told["at"].endswith("Z")


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=False)
    logging.getLogger("mutoscope.worker").warning("slow", extra={"job": "j1"})
    logging.getLogger("mutoscope.worker").info("done", extra={"job": "j1"})
    warning, info = written(capsys).splitlines()
    assert warning.endswith("warning mutoscope.worker: slow [job j1]")
    assert info.endswith("info mutoscope.worker: done")


def test_a_name_of_an_unknown_field_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(as_json=True)
    logging.getLogger("mutoscope").warning("x", extra={"secret": "mk_123"})
    assert "mk_123" not in written(capsys)
