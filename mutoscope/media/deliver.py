"""Frames into the files that a job hands over: the video or picture at the size asked for, a thumbnail, and a sheet.

    delivery = Delivery(folder, format="mp4", width=1280, height=720, fps=24, frames=121, info={...})
    for chunk in frames:
        delivery.write(chunk)       # [f, H, W, 3], any size: scaled and cropped to width x height
    files = delivery.close()        # what now lies in `folder`

Pictures are scaled with Lanczos; the engine's size is a multiple of 16, the size asked for need not be.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mutoscope.errors import MediaError, RequestError
from mutoscope.media import master
from mutoscope.media.frames import contact_sheet, sample_indices, thumbnail
from mutoscope.media.scale import cover_lanczos
from mutoscope.media.write import VideoWriter, write_image
from mutoscope.request import FramesHWC

THUMBNAIL_PX = 480
SHEET_CELL_PX = 192
SHEET_CELLS = 12
SHEET_COLUMNS = 4

MIME = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "gif": "image/gif",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "png_sequence": "application/zip",
    **master.MIME,
}
"""Formats that can be delivered, with their media types."""
PICTURES = ("png", "jpeg", "webp")
_EXTENSION = {"png_sequence": "zip", **master.EXTENSIONS}
_TO_HDR = {"mp4": "hdr10"}
"""What HDR makes of a format that cannot hold it."""
HDR_FORMATS = (*_TO_HDR, *master.FORMATS)
"""Formats that can be asked for together with HDR."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """One finished file; `role` as in a job's outputs."""

    role: str
    name: str
    mime: str
    width: int
    height: int
    frames: int
    fps: float


class Delivery:
    """Writes into `folder`, which must exist. Sizes in pixels, fps in frames per second.

    hdr     expand to high dynamic range: formats "mp4" (then it is HDR10), "hdr10", "hlg", "prores", "exr_sequence"
    frames  how many will come, to choose those of the sheet
    info    embedded in the file, see `VideoWriter`
    """

    def __init__(
        self,
        folder: Path,
        *,
        format: str,
        width: int,
        height: int,
        fps: float,
        frames: int,
        info: Mapping[str, Any],
        hdr: bool = False,
    ) -> None:
        if format not in MIME:
            raise MediaError(f"format {format!r} cannot be written.", hint=f"Expected: {', '.join(MIME)}.")
        if hdr:
            format = _TO_HDR.get(format, format)
            if format not in master.FORMATS:
                raise RequestError(f"HDR cannot be written as {format}.",
                                   hint=f"Expected: {', '.join(master.FORMATS)}.")  # fmt: skip
        self.folder, self.format = folder, format
        self.width, self.height, self.fps = width, height, fps
        self.is_picture = format in PICTURES
        self.name = f"{'image' if self.is_picture else 'video'}.{_EXTENSION.get(format, format)}"
        self._of_sheet = set(sample_indices(frames, min(frames, SHEET_CELLS)))
        self._thumbnail: FramesHWC | None = None
        self._cells: list[FramesHWC] = []
        self._n = 0
        self._writer: VideoWriter | master.MasterWriter
        if format in master.FORMATS:
            self._writer = master.MasterWriter(
                folder / self.name, format, width=width, height=height, fps=fps, hdr=hdr, info=info
            )
        else:
            target = folder / ("frames" if format == "png_sequence" else self.name)
            kind = "png-sequence" if format == "png_sequence" else format
            self._writer = VideoWriter(
                target, width=width, height=height, fps=fps, metadata=info, format=kind
            )

    def write(self, frames: FramesHWC) -> None:
        """The next frames, [f, H, W, 3]."""
        for frame in frames:
            shown = cover_lanczos(frame, self.width, self.height)
            self._writer.write(shown)
            if self._thumbnail is None:
                self._thumbnail = thumbnail(shown, THUMBNAIL_PX)
            if self._n in self._of_sheet:
                self._cells.append(thumbnail(shown, SHEET_CELL_PX))
            self._n += 1

    def close(self) -> list[Delivered]:
        """Finish all files; the main one first."""
        self._writer.close()
        if self.format == "png_sequence":
            _pack(self.folder / "frames", self.folder / self.name)
        role = "image" if self.is_picture else "video"
        made = [self._made(role, self.name, MIME[self.format], self.width, self.height, self._n)]
        small = self._thumbnail
        if small is not None:
            write_image(self.folder / "thumbnail.webp", small)
            made.append(self._made("thumbnail", "thumbnail.webp", "image/webp", *small.shape[1::-1]))
        if not self.is_picture and self._cells:
            sheet = contact_sheet(np.stack(self._cells), min(SHEET_COLUMNS, len(self._cells)))
            write_image(self.folder / "spritesheet.jpg", sheet)
            made.append(self._made("spritesheet", "spritesheet.jpg", "image/jpeg", *sheet.shape[1::-1]))
        return made

    def abort(self) -> None:
        """Leave nothing half-written; does nothing once closed."""
        self._writer.abort()
        with suppress(OSError):
            shutil.rmtree(self.folder / "frames", ignore_errors=True)

    def _made(self, role: str, name: str, mime: str, width: int, height: int, frames: int = 1) -> Delivered:
        fps = self.fps if role == "video" else 0.0
        return Delivered(role=role, name=name, mime=mime, width=width, height=height, frames=frames, fps=fps)


def _pack(folder: Path, target: Path) -> None:
    """The pictures of a folder as a zip archive, in order, without times: same pictures, same bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for picture in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo(picture.name), picture.read_bytes())
    shutil.rmtree(folder)
