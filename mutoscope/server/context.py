"""What handlers share: made once for a process by `app.create_app`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

from mutoscope.jobs.blobs import Blobs, Links
from mutoscope.jobs.database import Database
from mutoscope.jobs.registry import Registry
from mutoscope.jobs.service import Service
from mutoscope.settings import Settings

if TYPE_CHECKING:
    from mutoscope.server.events import Tail


@dataclass
class Context:
    """Database, settings, the domain's face, files."""

    db: Database
    settings: Settings
    service: Service
    blobs: Blobs
    url_secret: bytes
    tail: Tail

    @property
    def registry(self) -> Registry:
        return self.service.registry

    def base_url(self, request: Request | None = None) -> str:
        """What clients reach this server as, without a slash at the end."""
        if self.settings.public_url:
            return self.settings.public_url.rstrip("/")
        if request is not None:
            return str(request.base_url).rstrip("/")
        host = {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(self.settings.host, self.settings.host)
        return f"http://{host}:{self.settings.port}"

    def links(self, request: Request | None = None) -> Links:
        """Signed links for an answer to this request (None: for a webhook)."""
        return Links(self.url_secret, self.base_url(request), self.settings.url_ttl_s, self.db.clock())
