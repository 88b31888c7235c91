"""Errors of video and image files, and the check that a video file is whole."""

import os

import numpy as np

from vcr1_fast.data.picture import read_picture
from vcr1_fast.data.truncation import cut_off


class VideoError(ValueError):
    """A video or image that cannot be read as asked; names the file and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class NeedsPyav(VideoError):
    """A video that decord cannot read, or not exactly, by its codec or container; PyAV can."""


def open_picture(path: str) -> np.ndarray:
    """(H, W, 3) uint8 of an image file; VideoError names a file that cannot be read."""
    try:
        return read_picture(path)
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except OSError as error:
        raise VideoError(path, f"not a picture: {error}") from error


def check_file(path: str) -> None:
    """VideoError for a file that is missing, empty, or cut off by its container's own sizes."""
    if not os.path.exists(path):
        raise VideoError(path, "no such file")
    if not os.path.isfile(path):
        raise VideoError(path, "not a file")
    if os.path.getsize(path) == 0:
        raise VideoError(path, "the file is empty (0 bytes)")
    try:
        fault = cut_off(path)
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror or error}") from error
    if fault:
        raise VideoError(path, f"the file is cut off or damaged: {fault}")
