"""What is wrong with a video or image file, in words that a user can act on."""

import os

import numpy as np

from vcr1_fast.data.picture import read_picture


class VideoError(ValueError):
    """A video or image that cannot be read as asked; names the file and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_picture(path: str) -> np.ndarray:
    """(H, W, 3) uint8 of an image file; VideoError, naming it, where it cannot be read."""
    try:
        return read_picture(path)
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except OSError as error:
        raise VideoError(path, f"not a picture: {error}") from error


def check_file(path: str) -> None:
    """VideoError for what is plain without a decoder, in words a user can act on."""
    if not os.path.exists(path):
        raise VideoError(path, "no such file")
    if not os.path.isfile(path):
        raise VideoError(path, "not a file")
    size = os.path.getsize(path)
    if size == 0:
        raise VideoError(path, "the file is empty (0 bytes)")
    position, kinds = 0, []
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if not kinds and kind != b"ftyp":
                return  # not an mp4: left to the decoder
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            length = length or size - position  # 0: up to the end of the file
            if length < 8:
                break
            kinds.append(kind)
            position += length
            if position > size:
                name = kind.decode("latin-1")
                reason = f"its {name!r} box needs {position} bytes, the file has {size}"
                raise VideoError(path, f"the file is cut off: {reason}")
    if kinds and b"moov" not in kinds:
        raise VideoError(path, "the file is cut off: it has no index ('moov' box)")
