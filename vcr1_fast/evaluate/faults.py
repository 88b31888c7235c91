"""Single faults of records and media, found one kind at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from vcr1_fast.data.quarantine import QuarantineItem
from vcr1_fast.data.records import Record
from vcr1_fast.data.requests import clip_key, clip_request
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import DECODER, ClipReader, VideoError, probe_all, read_image
from vcr1_fast.progress import Progress
from vcr1_fast.rewards import box_ious
from vcr1_fast.tasks import TASKS

DURATION_TOLERANCE = 1.0
"""Seconds by which a file's length may differ from the annotated one."""
_ROUNDING = 0.005
"""Seconds by which times that are given to hundredths may be off."""
_STANDSTILL = 1.5
"""How much more the first two boxes of tracks overlap than later neighbours where they are doubled:
objects do not begin to move, all of them, after the first of seven equal steps."""
_MALFORMED = (
    ("start not before end", re.compile(r"start \S+ is not before end")),
    ("duplicate id", re.compile(r"is already on line|occurs twice")),
)


@dataclass(frozen=True)
class Fault:
    """One finding: its kind, the record, and the details."""

    kind: str
    record: str
    detail: str


def malformed(item: QuarantineItem) -> Fault:
    """A refused row, by its error."""
    kinds = (kind for kind, pattern in _MALFORMED if pattern.search(item.reason))
    return Fault(
        next(kinds, "malformed row"), item.record_id, f"{Path(item.source).name}: {item.reason}"
    )


def repeated(records: Sequence[Record]) -> list[Fault]:
    """Records that ask the same of the same video or image."""
    first: dict[str, str] = {}
    faults = []
    for record in records:
        asked = [record.media, record.task, record.prompt, record.options]
        key = json.dumps([*asked, record.start, record.end], sort_keys=True)
        if key in first:
            faults.append(Fault("repeated question", record.id, f"as {first[key]}"))
        first.setdefault(key, record.id)
    return faults


def overlap(records: Sequence[Record], trained: Sequence[Record]) -> list[Fault]:
    """Records whose video or image is also trained on."""
    seen = {os.path.abspath(record.media) for record in trained}
    return [
        Fault(f"{_kind(record)} also trained on", record.id, record.media)
        for record in records
        if os.path.abspath(record.media) in seen
    ]


Timed = tuple[str, float | None]
"""A file, and the rate at which it is read where it is a folder of images."""


def timed(record: Record) -> Timed:
    """The key of a record's length in seconds."""
    return record.media, record.metadata.get("fps")


def dead_media(
    records: Sequence[Record], *, decode: bool, decoder: str = DECODER
) -> tuple[list[Fault], dict[Timed, float]]:
    """(media that cannot be opened, as faults of their first record; seconds of the others).

    Videos are opened in worker processes: a file that crashes its decoder is one fault. `decode`:
    what a record shows is read too, which finds damage behind the beginning.
    """
    owner: dict[Timed, Record] = {}
    for record in records:
        owner.setdefault(timed(record), record)
    faults: list[Fault] = []
    lengths: dict[Timed, float] = {}
    dead: set[str] = set()
    videos = (medium for medium, record in owner.items() if record.image is None)
    infos = probe_all(videos, backend=decoder)
    with Progress(len(owner), "open media") as progress, closing(infos):
        for (path, fps), record in owner.items():
            try:
                if record.image is not None:
                    read_image(path)
                else:
                    info = next(infos)
                    if isinstance(info, VideoError):
                        raise info
                    lengths[path, fps] = info.duration
            except VideoError as error:
                kind = "unreadable" if os.path.exists(path) else "missing"
                if path not in dead:
                    faults.append(Fault(f"{kind} {_kind(record)}", record.id, str(error)))
                dead.add(path)
            progress.advance()
    if decode:
        shown = {clip_key(record): record for record in records if timed(record) in lengths}
        requests = (clip_request(record, FrameConfig()) for record in shown.values())
        reader = ClipReader(backend=decoder)
        with Progress(len(shown), "decode videos") as progress, reader:
            for record, clip in zip(shown.values(), reader.read(requests), strict=True):
                if isinstance(clip, VideoError):
                    faults.append(Fault("undecodable video", record.id, str(clip)))
                progress.advance()
    return faults, lengths


def time_faults(record: Record, length: float | None) -> list[Fault]:
    """What does not go together with the file's length in seconds, or the annotated one."""
    faults = []
    annotated = record.metadata.get("duration")
    apart = None if annotated is None or length is None else abs(annotated - length)
    if apart is not None and apart > DURATION_TOLERANCE:
        detail = f"annotated {annotated:g} s, the file has {length:.2f} s"
        faults.append(Fault("duration mismatch", record.id, detail))
    duration = annotated if length is None else length
    if record.task == "tracking" and record.metadata.get("times") is None:
        detail = f"{len(record.answer)} boxes without their times are taken at equal steps"
        faults.append(Fault("boxes without times", record.id, detail))
    if duration is None:
        return faults
    begin = record.start or 0.0
    if begin >= duration:
        detail = f"starts at {begin:g} s of {duration:g} s"
        return [*faults, Fault("start past the end", record.id, detail)]
    end = duration if record.end is None else min(record.end, duration)
    spans = TASKS[record.task].spans
    last = begin + max((stop for _, stop in spans(record)), default=0.0) if spans else 0.0
    if last > end + _ROUNDING:
        detail = f"ends at {last:g} s of {end:g} s"
        faults.append(Fault("answer past the end", record.id, detail))
    return faults


def doubled_boxes(records: Sequence[Record]) -> list[Fault]:
    """Tracks that do not step evenly: on the whole the first two boxes overlap far more than later
    neighbours. VideoChat-R1's have eight boxes for its seven frames, the first one twice over; at
    equal steps all boxes but the first and last are then shown too late."""
    tracks = [record.answer for record in records if len(record.answer) > 2]
    if not tracks:
        return []
    first = fmean(box_ious([track[0] for track in tracks], [track[1] for track in tracks]))
    neighbours = [pair for track in tracks for pair in pairwise(track[1:])]
    later = fmean(box_ious([a for a, _ in neighbours], [b for _, b in neighbours]))
    if first < _STANDSTILL * later:
        return []
    detail = (
        f"first and second box of {len(tracks)} tracks overlap {first:.2f}, later neighbours "
        f"{later:.2f}: {len(tracks[0])} boxes at {len(tracks[0]) - 1} times?"
    )
    return [Fault("boxes out of step", records[0].id, detail)]


def _kind(record: Record) -> str:
    return "video" if record.image is None else "image"
