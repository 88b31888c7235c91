"""Greedy answers of a model: read the clips, build the prompts, roll out at temperature 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vcr1_fast.data.clip_cache import open_cache
from vcr1_fast.data.records import Record
from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.video import Clip, ClipReader, VideoError
from vcr1_fast.engines.sampler import OwnSampler, Sampler
from vcr1_fast.evaluate.completions import Completion, Pass
from vcr1_fast.evaluate.config import EvalConfig, PerceptionConfig
from vcr1_fast.evaluate.perception import (
    LETTERED,
    Span,
    Zoom,
    evidence_prompt,
    in_real_time,
    key_spans,
    read_evidence,
    same_spans,
    zoom,
)
from vcr1_fast.model.processor import Processor, Prompt
from vcr1_fast.model.sampling import SamplingConfig
from vcr1_fast.model.staging import staging
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.prompt_template import prompts_from


@dataclass
class RecordState:
    """A record while it is answered: the clip as it is shown now, and every pass so far."""

    record: Record
    clip: Clip
    plain_times: list[float]
    """Seconds of the frames that the frame rule takes."""
    played: Zoom
    spans: tuple[Span, ...] = ()
    """Evidence that is shown more densely now."""
    settled: bool = False
    """Another pass would show the same frames."""
    passes: list[Pass] = field(default_factory=list)
    vision: torch.Tensor | None = None
    """Features of the clip as it is shown now."""
    error: str | None = None

    @classmethod
    def first(cls, record: Record, clip: Clip) -> RecordState:
        # An image has no length, hence nothing to show more densely.
        plain = zoom((), clip.duration or 1.0, 1.0)
        return cls(record, clip, clip.times.tolist(), plain, settled=clip.duration is None)

    @property
    def may_be_asked_again(self) -> bool:
        """Whether a further pass could show other frames."""
        return self.record.task in LETTERED and not self.settled and self.error is None

    def aim(self, perception: PerceptionConfig) -> bool:
        """Choose what to show next from the last completion; False where that is the same again.

        Evidence that is absent, unreadable or wholly outside the clip leaves the aim as it is.
        """
        found = read_evidence(self.passes[-1].text, self.record)
        duration, fps = self.clip.duration, self.clip.fps
        assert duration is not None and fps is not None  # an image is settled from the start
        shown = key_spans(found, duration, perception.max_spans)
        spans = tuple(self.played.real_spans(shown))
        # Borders nearer than half the distance between frames take the same frames, or almost.
        tolerance = 0.5 / fps
        self.settled = not spans or same_spans(spans, self.spans, tolerance)
        if not self.settled:
            self.spans = spans
            self.played = zoom(spans, duration, perception.density)
        return not self.settled

    def completion(self) -> Completion:
        if self.error is not None:
            return Completion(self.record.id, error=self.error)
        last = self.passes[-1]
        text = in_real_time(last.text, self.played) if self.spans else last.text
        return Completion(
            self.record.id, text, last.tokens, last.finished, passes=tuple(self.passes)
        )


def greedy_answers(
    model: Any, processor: Processor, config: EvalConfig, sampler: Sampler | None = None
) -> Callable[[Sequence[Sequence[Record]]], Iterator[list[Completion]]]:
    """A function from batches of records to one list of completions a batch, in order.

    Clips are read ahead by worker processes while the model decodes. A record that cannot be shown
    (its clip or its prompt is bad) becomes a completion with an error; the rest of its batch is
    answered without it. With `config.perception` lettered questions are looked at several times,
    all records of a batch together. `sampler`: the engine that answers, with the model's weights;
    None: our own.
    """
    perception = config.perception
    shown = processor.with_frames(config.frames, media_first=config.media_first)
    processor = replace(shown, mrope=config.mrope, video_text=config.video_text)
    engine = sampler or OwnSampler(model, processor)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)
    stage = staging(model, processor, config.resized_by)

    def answer(batches: Sequence[Sequence[Record]]) -> Iterator[list[Completion]]:
        frames = processor.frames
        requests = (clip_request(record, frames) for batch in batches for record in batch)
        with (
            prompts_from(config.prompts, TASKS, think=config.think),
            ClipReader(
                backend=config.decoder,
                timeout=config.decode_timeout,
                workers=config.decode_workers,
                prefetch_bytes=config.prefetch_mb << 20,
                cache=open_cache(config.cache_dir, config.cache_dir_gib),
                fit=processor.fit() if stage is None else None,
                stage=stage,
            ) as reader,
        ):
            clips = reader.read(requests)
            for batch in batches:
                yield answer_batch(batch, clips, reader)

    def answer_batch(
        batch: Sequence[Record], clips: Iterator[Clip | VideoError], reader: ClipReader
    ) -> list[Completion]:
        began = time.perf_counter()
        states, errors = [], {}
        for record in batch:
            clip = next(clips)
            if isinstance(clip, VideoError):
                errors[record.id] = str(clip)
            else:
                states.append(RecordState.first(record, clip))
        for _ in range(perception.passes - 1):
            again = [state for state in states if state.may_be_asked_again]
            ask(again, evidence_prompt, began)
            began = time.perf_counter()
            aimed = [state for state in again if state.error is None and state.aim(perception)]
            show(aimed, reader)
        ask([state for state in states if state.error is None], task_prompt, began)
        done = {state.record.id: state.completion() for state in states}
        return [
            done.get(record.id) or Completion(record.id, error=errors[record.id])
            for record in batch
        ]

    def show(states: Sequence[RecordState], reader: ClipReader) -> None:
        """Read the frames that each record shows next."""
        requests = [
            replace(
                clip_request(state.record, processor.frames),
                times=state.played.real_times(state.plain_times),
            )
            for state in states
        ]
        for state, clip in zip(states, reader.read(requests), strict=True):
            if isinstance(clip, VideoError):
                state.error = str(clip)
            else:
                # Played in zoomed time: the model is given the times of the first pass, which the
                # answer's are mapped back from.
                state.clip = replace(clip, fps=state.clip.fps, times=state.clip.times)
                state.vision = None

    def ask(
        states: Sequence[RecordState], text: Callable[[Record, bool], str], began: float
    ) -> None:
        """Put one question about each record's clip, all in one batch, and keep the answers."""
        prompts: list[tuple[RecordState, Prompt]] = []
        for state in states:
            try:
                question = text(state.record, config.think)
                prompt = processor.prompt(
                    question, [state.clip], system=config.system, think=config.think
                )
                prompts.append((state, prompt))
            except (ValueError, KeyError) as error:
                state.error = str(error)
        if not prompts:
            return
        result = engine.rollout(
            [prompt for _, prompt in prompts],
            1,
            sampling,
            torch.Generator(),  # greedy, but the global generator would advance
            [state.vision for state, _ in prompts],
        )
        share = (time.perf_counter() - began) / len(prompts)
        for index, (state, prompt) in enumerate(prompts):
            state.vision = result.vision[index] if perception.passes > 1 else None
            state.passes.append(
                Pass(
                    text=result.texts[index][0],
                    spans=state.spans,
                    frames=len(state.clip.frames),
                    prompt_tokens=len(prompt),
                    tokens=len(result.tokens[index][0]),
                    finished=bool(result.finished[index][0]),
                    seconds=round(share, 4),
                )
            )

    return answer


def task_prompt(record: Record, think: bool) -> str:
    """The task's own question."""
    return TASKS[record.task].prompt(record, think)
