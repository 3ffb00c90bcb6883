"""The web process: `python -m mutoscope.server`, started by the supervisor or by hand.

Settings come from MUTOSCOPE_SETTINGS_JSON (the supervisor's), else from the environment as everywhere. With
MUTOSCOPE_LISTEN_FD it serves on a socket that is open already, so that a restart refuses no connection.
"""

from __future__ import annotations

import os
import signal
import socket
from types import FrameType

import uvicorn

from mutoscope import logs
from mutoscope import settings as settings_module
from mutoscope.server.app import create_app
from mutoscope.settings import Settings

DRAIN_S = 20


class _Server(uvicorn.Server):
    """Ends event streams at once when it is told to stop; they would hold it up."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.config.loaded_app and _end_streams(self.config)  # type: ignore[func-returns-value]
        super().handle_exit(sig, frame)


def _end_streams(config: uvicorn.Config) -> None:
    config.app.state.ctx.tail.closing()  # type: ignore[union-attr]


def main() -> None:
    told = os.environ.get("MUTOSCOPE_SETTINGS_JSON")
    settings = Settings.model_validate_json(told) if told else settings_module.load()
    logs.configure(as_json=settings.log_json)
    app = create_app(settings, loops=True)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, lifespan="on",
        timeout_graceful_shutdown=DRAIN_S, server_header=False, proxy_headers=True,
    )  # fmt: skip
    server = _Server(config)
    fd = os.environ.get("MUTOSCOPE_LISTEN_FD")
    sockets = [socket.socket(fileno=int(fd))] if fd else None
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server.run(sockets=sockets)


if __name__ == "__main__":
    main()
