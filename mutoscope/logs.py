"""Log lines: text for people, or one JSON object a line; with the request's and the job's id where there is one."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="")
_EXTRAS = ("job", "account", "delivery")


class _Fields(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request = request_id.get()
        return True


class JsonFormatter(logging.Formatter):
    """{"at", "level", "logger", "message", "request"?, "job"?, "error"?}"""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"at": at, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        for name in ("request", *_EXTRAS):
            if value := getattr(record, name, None):
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """12:34:56 warning mutoscope.worker: what happened [job ...]"""

    def format(self, record: logging.LogRecord) -> str:
        record.asctime = time.strftime("%H:%M:%S", time.localtime(record.created))
        ids = [f"{n} {v}" for n in ("request", *_EXTRAS) if (v := getattr(record, n, None))]
        tail = f" [{', '.join(ids)}]" if ids and record.levelno >= logging.WARNING else ""
        text = f"{record.asctime} {record.levelname.lower()} {record.name}: {record.getMessage()}{tail}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(*, as_json: bool, level: int = logging.INFO) -> None:
    """Of this process, to stderr. The web server's own access lines are off: metrics count requests."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    handler.addFilter(_Fields())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
