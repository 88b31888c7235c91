"""A disk cache of decoded clips, shared by processes and runs.

    <folder>/files/<key of path and file status>    SHA-256 of a video's content
    <folder>/clips/<2 digits>/<key>.clip            header, times and frames of a clip

A clip's key is made of the video's content, the whole request (part, frame rule, times), the
resizing and the decoder: another setting is another key, so that nothing stale can be read, and a
data set may move. A file appears whole or not at all; its checksum is verified. The clips used last
stay within the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vcr1_fast
from vcr1_fast.data.workers import result_array

if TYPE_CHECKING:
    from vcr1_fast.data.video import Clip, ClipRequest

FORMAT = 1
"""Of the files, and of the meaning of a key: raise it when the same request reads other frames."""
_LOG = logging.getLogger(__name__)
_SETTLED = 2.0
"""Seconds after which a file that changes again has another time stamp."""
_LEFTOVER = 3600.0
"""Age in seconds from which an unfinished file is that of a killed process."""
_SCAN_EVERY = 0.02
"""Share of the limit that a process adds between two looks at the whole folder."""


@dataclass(frozen=True)
class ClipCache:
    """Clips in a folder of at most `limit` bytes; each process that writes may exceed it by 2 %.

    Pictures and folders of frames are not kept: they are read as fast as a copy of them.
    """

    folder: Path
    limit: int

    def key(self, request: ClipRequest, backend: str, fit: Any) -> str | None:
        """A name for the frames that a request reads; None where they are not kept."""
        if request.is_image or not os.path.isfile(request.path):
            return None
        described = {
            "format": FORMAT,
            "package": vcr1_fast.__version__,
            "decoder": [backend, *(_version(name) for name in ("av", "decord"))],
            "content": self.content_hash(request.path),
            "frames": asdict(request.config),
            "part": [request.start, request.end, request.folder_fps],
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        # A task's times may be a function of the length: its arguments are the annotations.
        digest.update(pickle.dumps((request.times, fit), protocol=4))
        return digest.hexdigest()

    def get(self, key: str, path: str) -> Clip | None:
        """The clip of a key, as if it had been read from `path`; None where it is not there. A
        damaged file is removed."""
        file = self._file(key)
        try:
            data = file.read_bytes()
        except OSError:  # never written, or removed by another process
            return None
        clip = _decoded(data, path)
        if clip is None:
            _LOG.warning("%s: damaged, removed", file)
            file.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # removed meanwhile, or not ours: the clip is whole
            os.utime(file)  # used last
        return clip

    def put(self, key: str, clip: Clip) -> None:
        """Keep a clip. One that takes more than a quarter of the limit is not kept. A disk that is
        full or may not be written costs nothing but the cache, which the log says."""
        data = _encoded(clip)
        if len(data) > self.limit // 4:
            return
        file = self._file(key)
        # No flush to the disk: after a crash the checksum finds what is missing.
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, file)
            added = _ADDED.get(self.folder, self.limit) + len(data)
            if added >= _SCAN_EVERY * self.limit:
                self.evict()
                added = 0
            _ADDED[self.folder] = added
        except OSError as error:
            partial.unlink(missing_ok=True)
            if self.folder not in _WARNED:
                _WARNED.add(self.folder)
                _LOG.warning("the cache of clips is not written: %s", error)

    def evict(self) -> None:
        """Remove the clips used longest ago until the others fit, and files never finished."""
        found, now = [], time.time()
        for entry, status in _files(self.folder / "clips"):
            if not entry.name.startswith("."):
                found.append((status.st_mtime_ns, status.st_size, entry.path))
            elif now - status.st_mtime > _LEFTOVER:
                Path(entry.path).unlink(missing_ok=True)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def content_hash(self, path: str) -> str:
        """SHA-256 of a file, hashed once as long as its status (inode, size, both times) stays."""
        status = os.stat(path)
        # ctime: unlike mtime it cannot be set by hand.
        state = [
            os.path.realpath(path),
            *(status.st_dev, status.st_ino, status.st_size),
            *(status.st_mtime_ns, status.st_ctime_ns),
        ]
        known = self.folder / "files" / hashlib.sha256(json.dumps(state).encode()).hexdigest()
        try:
            written = known.read_text(encoding="ascii")
            if len(written) == 64:
                return written
        except OSError:
            pass
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
        found = digest.hexdigest()
        # A file written a moment ago may be written again under the same time stamp.
        if time.time() - status.st_ctime > _SETTLED:
            partial = known.with_name(f".{known.name}.{os.getpid()}")
            try:
                known.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(found, encoding="ascii")
                os.replace(partial, known)
            except OSError:
                partial.unlink(missing_ok=True)  # it is hashed again next time
        return found

    def _file(self, key: str) -> Path:
        return self.folder / "clips" / key[:2] / f"{key}.clip"


_ADDED: dict[Path, float] = {}
"""Bytes that this process has added to a folder since it last looked at all of it; its first
addition looks."""
_WARNED: set[Path] = set()


def open_cache(folder: str | None, gib: float) -> ClipCache | None:
    """The cache in a folder, which is made; None for no folder. OSError where it cannot be."""
    if folder is None:
        return None
    path = Path(folder).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return ClipCache(path, round(gib * 2**30))


def _encoded(clip: Clip) -> bytes:
    frames = np.ascontiguousarray(clip.frames)
    times = np.ascontiguousarray(clip.times, np.float64)
    body = times.tobytes() + frames.tobytes()
    header = {
        "shape": frames.shape,
        "crc": zlib.crc32(body),
        "fps": clip.fps,
        "duration": clip.duration,
        "start": clip.start,
        "fitted": clip.fitted,
    }
    return json.dumps(header).encode() + b"\n" + body


def _decoded(data: bytes, path: str) -> Clip | None:
    """None for data that `_encoded` did not write."""
    from vcr1_fast.data.video import Clip

    line, _, _ = data.partition(b"\n")
    try:
        header = json.loads(line)
        shape, crc = header.pop("shape"), header.pop("crc")
        body = memoryview(data)[len(line) + 1 :]
        if len(body) != 8 * shape[0] + int(np.prod(shape)) or zlib.crc32(body) != crc:
            return None
        times = np.frombuffer(body, np.float64, shape[0]).copy()
        stored = np.frombuffer(body, np.uint8, offset=8 * shape[0]).reshape(shape)
        frames = result_array(shape)  # a worker's are shared with the consumer, within its budget
        frames[:] = stored
        return Clip(frames, times, path=path, **header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _files(folder: Path) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    for part in sorted(folder.iterdir()) if folder.is_dir() else ():
        with os.scandir(part) as entries:
            for entry in entries:
                try:
                    yield entry, entry.stat()
                except OSError:
                    continue  # removed meanwhile


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
