"""Our records as a data set of TRL's, and our tasks' rewards as its reward functions."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from vcr1_fast.data import requests
from vcr1_fast.data.records import Record, load_records, parse_record
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import ClipRequest
from vcr1_fast.tasks import TASKS, Columns, Task

COLUMNS = ("prompt", "video", "image", "start", "end", "record", "think")
RewardFunction = Callable[..., list[float | None]]


def video_dataset(
    records: str | os.PathLike[str] | Iterable[Record], *, think: bool = False
) -> Dataset:
    """Records, or the JSONL file that holds them, with a column each for the prompt (a user turn),
    the path of the video or image, `start` and `end` in seconds, and the record (JSON) for
    `task_rewards`.

    `think`: whether the prompts ask for reasoning first. RecordError for a bad row, ValueError for
    none at all.
    """
    if isinstance(records, str | os.PathLike):
        records = load_records(records)
    rows = [
        {
            "prompt": [{"role": "user", "content": TASKS[one.task].prompt(one, think)}],
            **{name: path and str(Path(path).absolute()) for name, path in _media(one).items()},
            "start": one.start,
            "end": one.end,
            "record": _written(one),
            "think": think,
        }
        for one in records
    ]
    if not rows:
        raise ValueError("no records")
    return Dataset.from_list(rows)


def _media(record: Record) -> dict[str, str | None]:
    return {"video": record.video, "image": record.image}


def _written(record: Record) -> str:
    row = {k: v for k, v in dataclasses.asdict(record).items() if v is not None}
    row |= {name: str(Path(path).absolute()) for name, path in _media(record).items() if path}
    return json.dumps(row)


def read_record(text: str) -> Record:
    """The record of a row of `video_dataset`."""
    return parse_record(json.loads(text))


def task_rewards(*data: Dataset | str) -> list[RewardFunction]:
    """One reward function for each reward of each task, to be passed to a trainer together.

    data: names of tasks, or data sets of `video_dataset`, which stand for the tasks in them. A
    function returns None for another task's samples, so TRL adds up the rewards of each sample's
    task. The functions of a task share one parse of a batch. ValueError for an unknown task.
    """
    names: dict[str, None] = {}
    for one in data:
        found = [one] if isinstance(one, str) else [json.loads(r)["task"] for r in one["record"]]
        names |= dict.fromkeys(found)
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks {unknown}: expected some of {sorted(TASKS)}")
    return [reward for task in names for reward in _rewards(TASKS[task])]


def _rewards(task: Task) -> list[RewardFunction]:
    """The reward functions of one task; TRL calls one after the other with the same batch."""
    cached: tuple[Any, list[Record | None], Columns] | None = None

    def columns(
        texts: list[str], written: list[str], durations: list[float], think: list[bool]
    ) -> tuple[list[Record | None], Columns]:
        nonlocal cached
        key = (texts, written, durations, think)
        if cached is None or cached[0] != key:
            records = [one if one.task == task.name else None for one in map(read_record, written)]
            cached = key, records, _scores(task, texts, records, durations, think)
        return cached[1], cached[2]

    def function(name: str) -> RewardFunction:
        def score(
            completions: list[Any],
            record: list[str],
            duration: list[float],
            think: list[bool],
            opened: list[str] | None = None,
            **_: Any,
        ) -> list[float | None]:
            # The reasoning that the chat template opened is a part of the turn; a trainer that is
            # not ours has no such column.
            opened = [""] * len(completions) if opened is None else opened
            texts = [
                begun + turns[0]["content"]
                for begun, turns in zip(opened, completions, strict=True)
            ]
            records, scores = columns(texts, list(record), list(duration), list(think))
            values = iter(scores[name])
            return [None if one is None else next(values) for one in records]

        score.__name__ = f"{task.name}/{name}"
        return score

    return [function(name) for name in task.reward_names]


def _scores(
    task: Task,
    texts: list[str],
    records: list[Record | None],
    durations: list[float],
    think: list[bool],
) -> Columns:
    """The task's rewards of its samples, in order."""
    own = [i for i, record in enumerate(records) if record is not None]
    mine = [record for record in records if record is not None]
    answers = task.answers([texts[i] for i in own], mine)
    seconds = [durations[i] for i in own]
    columns = task.score_batch(answers, mine, seconds, think=None)
    # A batch may hold prompts with and without reasoning.
    columns["format"] = [
        task.format_reward(answer, think[i]) for answer, i in zip(answers, own, strict=True)
    ]
    return columns


def clip_request(row: dict[str, Any], frames: FrameConfig) -> ClipRequest:
    """The frames that a row's task wants to see."""
    video, image = row.get("video"), row.get("image")
    if (video is None) == (image is None):
        raise ValueError(f"a row needs a video or an image, got {video!r} and {image!r}")
    start, end = row.get("start"), row.get("end")
    if row.get("record"):
        record = read_record(row["record"])
        shown = dataclasses.replace(record, video=video, image=image, start=start, end=end)
        return requests.clip_request(shown, frames)
    path: Any = image if video is None else video  # one of them is there
    return ClipRequest(path=path, config=frames, is_image=video is None, start=start, end=end)


def prompt_texts(messages: Any) -> tuple[str, str | None]:
    """(user's text, system's or None) of a conversational prompt; ValueError for another one."""
    found = {m["role"]: m["content"] for m in messages} if isinstance(messages, list) else {}
    ordered = [m["role"] for m in messages] if found else []
    if ordered not in (["user"], ["system", "user"]) or not all(
        isinstance(text, str) for text in found.values()
    ):
        raise ValueError(
            "prompt must be a user turn of text, with or without a system turn before it (the clip "
            f"follows the text), got {messages!r}"
        )
    return found["user"], found.get("system")
