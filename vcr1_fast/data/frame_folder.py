"""A folder of images as a video: GOT-10k and other tracking sets have nothing else."""

import os
import re
from collections import Counter
from itertools import pairwise

import numpy as np

from vcr1_fast.data.media_file import VideoError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FOLDER_FPS = 10.0
"""Frames a second of a folder of images, which does not state a rate: GOT-10k's rate."""
_DIGITS = re.compile(r"\d+")


def frame_names(path: str) -> list[str]:
    """The images of a folder in the order of the numbers in their names: 2 comes before 10.

    Hidden files and files that are no images are left out. VideoError for names that are no
    series: an image that does not fit it (a cover, a thumbnail), a number that occurs twice, and
    numbers whose distance changes, since frames are missing there and later ones would come early.
    """
    names = [n for n in os.listdir(path) if n.lower().endswith(IMAGES) and not n.startswith(".")]
    if len(names) < 2:
        return names
    shapes = Counter(map(_shape, names))
    usual = shapes.most_common(1)[0][0]
    if strays := sorted(n for n in names if _shape(n) != usual):
        reason = f"{strays[0]!r} does not belong to the series of {shapes[usual]} frames {usual!r}"
        raise VideoError(path, f"{reason} ({len(strays)} such images)")
    order = sorted((tuple(map(int, _DIGITS.findall(n))), n) for n in names)
    numbers = np.array([key for key, _ in order], np.int64)  # (frames, numbers in a name)
    for (key, name), (following, other) in pairwise(order):
        if key == following:
            raise VideoError(path, f"{name!r} and {other!r} have the same number")
    varying = np.flatnonzero((numbers != numbers[0]).any(0))
    if len(varying) == 1:
        series = numbers[:, varying[0]]
        steps = np.diff(series)
        if (uneven := np.flatnonzero(steps != steps.min())).size:
            at = int(uneven[0])
            reason = f"its frames jump from number {series[at]} to {series[at + 1]}"
            raise VideoError(path, f"{reason}, others are {steps.min()} apart: frames are missing")
    return [name for _, name in order]


def _shape(name: str) -> str:
    return _DIGITS.sub("#", name.lower())
