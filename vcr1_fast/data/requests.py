"""The clip to read for a record: its part of the file, at the times that its task asks for."""

from collections.abc import Hashable
from functools import partial

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import ClipRequest
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.record import Record


def clip_request(record: Record, frames: FrameConfig) -> ClipRequest:
    """The frames that a record's task asks for, or its image."""
    times = TASKS[record.task].times
    return ClipRequest(
        path=record.media,
        config=frames,
        start=record.start,
        end=record.end,
        times=None if times is None else partial(times, record),
        is_image=record.image is not None,
        folder_fps=record.metadata.get("fps"),
    )


def clip_key(record: Record) -> Hashable:
    """A key that two records share when they show the same frames."""
    timed = record.id if TASKS[record.task].times else None
    return record.media, record.start, record.end, record.metadata.get("fps"), timed
