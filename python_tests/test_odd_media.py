"""Odd and broken videos: frames by the numbers in them, times by what was written and by ffprobe.

A sample of the generator's files; VCR1_ODD_MEDIA=full (`make odd-media`) takes all of them.
"""

import os

import numpy as np
import odd_media
import pytest

from vcr1_fast.data.decode import BACKENDS, open_source
from vcr1_fast.data.media_file import NeedsPyav, VideoError
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import probe, read_clip

av = pytest.importorskip("av")
pytest.importorskip("decord")
pytestmark = pytest.mark.skipif(bool(odd_media.MISSING), reason=odd_media.MISSING)

PAIRS, SPECIAL = odd_media.pairs(), odd_media.special()
FILES = (PAIRS if os.environ.get("VCR1_ODD_MEDIA") == "full" else PAIRS[::23]) + SPECIAL
NO_STAMPS = ("avi-", "packed-")  # ffprobe guesses there
ROUNDING = 1.5e-3  # of time stamps in ms


def test_the_generator_makes_what_it_claims():
    assert len(PAIRS) + len(SPECIAL) >= 300
    names = [odd.name for odd in PAIRS + SPECIAL]
    assert len(set(names)) == len(names)
    frame = odd_media.picture(0b10110101)
    assert odd_media.number(frame) == 0b10110101 and odd_media.corners(frame) == "RGYB"
    assert odd_media.corners(np.rot90(frame, -1)) == "BRGY"
    assert odd_media.number(np.full_like(frame, 128)) is None


def shown(path: str, backend: str) -> tuple[np.ndarray, np.ndarray]:
    with open_source(path, backend) as source:
        frames = source.read(np.arange(len(source.timestamps)), lambda frame: frame)
        assert (np.diff(source.timestamps) >= 0).all()
        assert source.end >= source.timestamps[-1]
        info = probe(path, backend=backend)
        assert (info.frames, info.fps, info.duration) == (len(frames), source.fps, source.end)
        return frames, source.timestamps


@pytest.mark.parametrize("odd", FILES, ids=lambda odd: odd.name)
def test_frames_are_right_or_refused(odd, tmp_path):
    path = odd.make(tmp_path / odd.name)
    given = []
    for backend in BACKENDS:
        try:
            frames, seconds = shown(str(path), backend)
        except VideoError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert odd.verdict in ("refused", "either") or isinstance(error, NeedsPyav), error
            continue
        assert odd.verdict != "refused", f"{len(frames)} frames of a file that must be refused"
        given.append(frames)
        numbers = [odd_media.number(frame) for frame in frames]
        if odd.verdict == "shown":
            assert numbers == list(odd.numbers)
            rounding = 6e-3 if odd.name.startswith("gif") else ROUNDING  # a GIF counts hundredths
            off = seconds - np.array(odd.times())
            np.testing.assert_allclose(off, off[0], atol=rounding)
            # Sound may begin a moment before the picture, by the padding of its codec.
            assert abs(off[0]) < (0.05 if "mkv" in odd.name else ROUNDING)
            assert odd_media.corners(frames[0]) == "RGYB" or odd.name == "gray"
        elif odd.verdict == "packed":  # its encoder leaves frames out and shows one twice
            late = np.array(numbers) - seconds * odd.rate
            assert numbers == sorted(numbers) and np.abs(late).max() <= 3
        elif odd.checked:
            expected = numbers[0] + (seconds - seconds[0]) * odd.rate
            np.testing.assert_allclose(numbers, expected, atol=0.1)
        if odd.verdict == "shown" and not odd.name.startswith(NO_STAMPS):
            theirs = np.array(odd_media.probed(path))
            assert len(theirs) == len(seconds)
            known = ~np.isnan(theirs)  # of a last frame of MPEG-PS it may not know
            assert known.sum() >= len(theirs) - 1
            off = (theirs - seconds)[known]
            np.testing.assert_allclose(off, off[0], atol=ROUNDING)
        if odd.is_exact():
            check_random_access(str(path), backend, frames)
    if odd.is_exact() and len(given) == 2:
        assert np.array_equal(*given)
    assert given or odd.verdict in ("refused", "either")


def check_random_access(path: str, backend: str, frames: np.ndarray) -> None:
    rng = np.random.default_rng(len(frames))
    for size in (1, 1, 2, min(5, len(frames))):
        chosen = np.sort(rng.permutation(len(frames))[:size])
        with open_source(path, backend) as source:
            part = source.read(chosen, lambda frame: frame)
        assert np.array_equal(part, frames[chosen])


@pytest.mark.parametrize("name", ["uneven-mp4", "uneven-mkv", "uneven-webm", "late-picture"])
@pytest.mark.parametrize("rule", ["linspace", "hf"])
def test_the_seconds_given_to_the_model_are_those_of_the_frames(name, rule, tmp_path):
    odd = next(odd for odd in SPECIAL if odd.name == name)
    path = str(odd.make(tmp_path / name))
    stamps = np.array(odd.times())
    for backend in BACKENDS:
        clip = read_clip(path, FrameConfig(fps=2, rule=rule), backend=backend)
        given = np.arange(len(clip.frames)) / clip.fps
        numbers = [odd_media.number(frame) for frame in clip.frames]
        on_screen = np.searchsorted(stamps, given + 2e-3, side="right") - 1
        assert numbers == np.maximum(on_screen, 0).tolist()
        before = given < stamps[0] - 2e-3  # nothing is on screen yet
        np.testing.assert_allclose(clip.times[~before], given[~before], atol=2e-3)
        part = read_clip(path, FrameConfig(num_frames=4, rule=rule), start=2.2, backend=backend)
        first = np.searchsorted(stamps, 2.2, side="right") - 1
        assert odd_media.number(part.frames[0]) - first in (0, 1)
