"""Files of the service: where they lie, and links to them that anybody who holds one may follow until it expires.

A link is the path, an expiry and an HMAC-SHA256 over both with a secret of this installation. It opens one file,
for one purpose; a link for reading is none for uploading.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlencode

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import Forbidden, NotFound
from mutoscope.jobs.model import Job, Output
from mutoscope.jobs.schema import settings_kept

OUTPUTS = "outputs"
URL_SECRET = "url_secret"


def url_secret(tx: Tx) -> bytes:
    """The secret that signs links, made at the first call."""
    insert = sqlite.insert if tx.is_sqlite else postgresql.insert
    made = {"name": URL_SECRET, "value": secrets.token_hex(32), "locked": True}
    tx.run(insert(settings_kept).values(made).on_conflict_do_nothing())
    value = tx.scalar(sa.select(settings_kept.c.value).where(settings_kept.c.name == URL_SECRET))
    return bytes.fromhex(value)


@dataclass(frozen=True)
class Links:
    """Makes and checks links. `base_url` is what clients reach the service as, `now` when the links are made."""

    secret: bytes
    base_url: str
    ttl_s: float
    now: float

    def output(self, job: Job, output: Output) -> str:
        """A fresh link to a finished file."""
        return self._link("/files/", output.path, "read")

    def file(self, path: str) -> str:
        """A fresh link to any file of the data folder, by its relative path."""
        return self._link("/files/", path, "read")

    def upload(self, asset_id: str) -> str:
        """Where the bytes of an announced upload go."""
        return self._link("/uploads/", asset_id, "upload")

    def check(self, path: str, purpose: str, expires: str, signature: str) -> None:
        """Raises Forbidden unless the link was made here and has not expired."""
        good = self._sign(path, purpose, expires)
        if not hmac.compare_digest(good.encode(), signature.encode()):
            raise Forbidden(
                "This link is not valid.", hint="Ask for the job again: each answer has fresh links."
            )
        if float(expires) < self.now:
            raise Forbidden(
                "This link has expired.", hint="Ask for the job again: each answer has fresh links."
            )

    def _link(self, prefix: str, path: str, purpose: str) -> str:
        expires = str(int(self.now + self.ttl_s))
        query = urlencode({"expires": expires, "signature": self._sign(path, purpose, expires)})
        return f"{self.base_url}{prefix}{quote(path)}?{query}"

    def _sign(self, path: str, purpose: str, expires: str) -> str:
        return hmac.new(self.secret, f"{purpose}\n{path}\n{expires}".encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Blobs:
    """The data folder."""

    data_dir: Path

    def path(self, relative: str) -> Path:
        """Where a stored path lies.

        Raises:
            NotFound: it would leave the data folder, or is not a file.
        """
        parts = PurePosixPath(relative).parts
        path = self.data_dir.joinpath(*parts)
        if not parts or PurePosixPath(relative).is_absolute() or ".." in parts or not path.is_file():
            raise NotFound("There is no such file any more.")
        if not path.resolve().is_relative_to(self.data_dir.resolve()):
            raise NotFound("There is no such file any more.")
        return path

    def job_folder(self, job_id: str) -> Path:
        """Everything that was made for a job, by any of its attempts."""
        return self.data_dir / OUTPUTS / job_id

    def remove_job(self, job_id: str) -> None:
        """Delete all outputs of a job; nothing happens if there are none."""
        shutil.rmtree(self.job_folder(job_id), ignore_errors=True)
