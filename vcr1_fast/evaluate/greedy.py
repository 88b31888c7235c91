"""Greedy answers of a model: read the clips, build the prompts, roll out at temperature 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vcr1_fast.data.records import Record
from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, VideoError
from vcr1_fast.evaluate.completions import Completion
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.model.processor import Processor, Prompt
from vcr1_fast.model.rollout import rollout
from vcr1_fast.model.sampling import SamplingConfig
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.wording import prompts_from


def greedy_answers(
    model: Any, processor: Processor, config: EvalConfig
) -> Callable[[Sequence[Sequence[Record]]], Iterator[list[Completion]]]:
    """A function from batches of records to one list of completions a batch, in order.

    Clips are read ahead by worker processes while the model decodes. A record that cannot be shown
    (its clip or its prompt is bad) becomes a completion with an error; the rest of its batch is
    answered without it.
    """
    frames = config.frames
    processor = processor.with_video(
        min_pixels=frames.min_pixels,
        max_pixels=frames.max_pixels,
        total_pixels=frames.total_pixels,
    )
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)

    def answer(batches: Sequence[Sequence[Record]]) -> Iterator[list[Completion]]:
        requests = (clip_request(record, config) for batch in batches for record in batch)
        with (
            prompts_from(config.prompts, TASKS, think=config.think),
            ClipReader(
                backend=config.decoder, timeout=config.decode_timeout, workers=config.decode_workers
            ) as reader,
        ):
            clips = reader.read(requests)
            for batch in batches:
                yield answer_batch([(record, next(clips)) for record in batch])

    def answer_batch(samples: list[tuple[Record, Clip | VideoError]]) -> list[Completion]:
        prompts, errors = {}, {}
        for record, clip in samples:
            try:
                prompts[record.id] = prompt(record, clip)
            except (ValueError, KeyError) as error:
                errors[record.id] = str(error)
        answered = {}
        if prompts:
            result = rollout(
                model,
                processor,
                list(prompts.values()),
                1,
                sampling,
                torch.Generator(),  # greedy, but the global generator would be drawn from
                convention=config.mrope,
            )
            for index, record_id in enumerate(prompts):
                answered[record_id] = Completion(
                    record_id,
                    text=result.texts[index][0],
                    tokens=len(result.tokens[index][0]),
                    finished=bool(result.finished[index][0]),
                )
        return [
            answered.get(record.id) or Completion(record.id, error=errors[record.id])
            for record, _ in samples
        ]

    def prompt(record: Record, clip: Clip | VideoError) -> Prompt:
        if isinstance(clip, VideoError):
            raise clip
        text = TASKS[record.task].prompt(record, config.think)
        return processor.prompt(text, [clip], system=config.system)

    return answer


def clip_request(record: Record, config: EvalConfig) -> ClipRequest:
    """What to read for a record: its part of the file, at the task's own times if it has such."""
    times = TASKS[record.task].times
    return ClipRequest(
        record.media,
        config.frames,
        start=record.start,
        end=record.end,
        times=None if times is None else partial(times, record),
        is_image=record.image is not None,
    )
