"""Records to prompts: which records a step takes, with clips decoded ahead, bad ones set aside."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from vcr1_fast.data.clip_cache import open_cache
from vcr1_fast.data.quarantine import Quarantine
from vcr1_fast.data.records import Record, load_records
from vcr1_fast.data.requests import clip_key, clip_request
from vcr1_fast.data.video import Clip, ClipReader, ClipRequest, VideoError, thinned
from vcr1_fast.model.processor import Processor, Prompt
from vcr1_fast.model.staging import Staging
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.config import DataConfig

V = TypeVar("V")
MAX_CACHED_IN_A_ROW = 256
"""Records planned ahead without finding one to decode; bounds the plan when all are cached."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A record ready for the model; `duration`: seconds of the clip it shows, None for an image.

    `shown`: a few of the clip's frames, for people; a copy, so that no whole clip is kept. `place`:
    in the step, over all ranks; `occurrence`: how often the record came before in the step.
    """

    record: Record
    prompt: Prompt
    duration: float | None
    shown: Clip | None = None
    place: int = 0
    occurrence: int = 0


def own_places(first: int, count: int, rank: int, ranks: int) -> range:
    """Those of the places first .. first + count - 1 that belong to one of `ranks`."""
    # Interleaved, so that a step's prompts are the same for any number of ranks.
    return range(first + (rank - first) % ranks, first + count, ranks)


@dataclass(frozen=True)
class Sampler:
    """Which record comes at which place of an endless sequence of epochs.

    Each epoch is shuffled; with `scores`, one a record, it is sorted, the highest first, and a
    record comes fewer than `window` places from where sorting puts it. A function of these fields
    and nothing else: the place reached is its whole state, and leaving a bad record out moves no
    other. `name` separates it from samplers of other records or scores, for checkpoints.
    """

    size: int
    seed: int
    scores: tuple[float, ...] | None = None
    window: int = 1
    name: str = "shuffled"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a sampler needs at least one record, got {self.size}")
        if self.scores is not None and len(self.scores) != self.size:
            raise ValueError(f"expected {self.size} scores, got {len(self.scores)}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def places(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> Iterator[int]:
        """Record numbers at places first .. first + count - 1, those of one of `ranks` only."""
        # One permutation per epoch, however many places are asked for.
        order, epoch = np.empty(0, np.int64), -1
        for place in own_places(first, count, rank, ranks):
            if place // self.size != epoch:
                epoch = place // self.size
                order = self._order(epoch)
            yield int(order[place % self.size])

    def _order(self, epoch: int) -> np.ndarray:
        # Seeded by epoch: a resumed run finds its place without replaying the epochs before.
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.size)
        if self.scores is None:
            return order
        # A stable sort of the shuffled order, so that equal scores come in another order each time.
        order = order[np.argsort(-np.asarray(self.scores)[order], kind="stable")]
        # A sorted key plus less than `window`: nothing moves by `window` places or more.
        later = np.arange(self.size) + generator.uniform(0, self.window, self.size)
        return order[np.argsort(later, kind="stable")] if self.window > 1 else order


class ByteCache(Generic[V]):
    """The values used last, up to a number of bytes as `size` counts them."""

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self.limit, self.size, self.bytes = limit, size, 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value, dropping the least recently used ones; one above the limit is not kept."""
        if key in self._values or self.size(value) > self.limit:
            return
        self._values[key] = value
        self.bytes += self.size(value)
        while self.bytes > self.limit:
            _, dropped = self._values.popitem(last=False)
            self.bytes -= self.size(dropped)


@dataclass(eq=False)
class _Slot:
    """Where a clip will be, shared by all planned records that show it."""

    clip: Clip | VideoError | None = None
    pending: bool = True


class PromptSource:
    """Batches of prompts, steps ahead of the consumer where workers decode.

    `stage` makes the patches of clips on the model's device; None: workers resize the frames. A
    record that cannot be shown goes to `quarantine` and is missing from its batch; all other
    records stay where they are. Use it in a `with` statement.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor,
        config: DataConfig,
        quarantine: Quarantine,
        sampler: Sampler,
        stage: Staging | None = None,
    ) -> None:
        self.records, self.processor, self.config = records, processor, config
        self.quarantine, self.sampler, self.stage = quarantine, sampler, stage
        self._seconds = 0.0
        self._cache = ByteCache[Clip](config.cache_mb * 2**20, lambda clip: clip.frames.nbytes)
        # Ids, not places: a bad record comes again in every epoch and is quarantined once.
        self._bad: set[str] = set()
        self._reader = ClipReader(
            backend=config.decoder,
            timeout=config.decode_timeout,
            workers=config.decode_workers,
            prefetch_bytes=config.prefetch_mb << 20,
            cache=open_cache(config.cache_dir, config.cache_dir_gib),
            # Small frames leave the worker, unless a GPU resizes them faster than it does.
            fit=processor.fit() if stage is None else None,
            stage=stage,
        )

    def batches(
        self, first_step: int, last_step: int, size: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[list[Sample]]:
        """The batches of steps first_step .. last_step - 1; each is this rank's part of `size`
        places. ValueError when no record of the data is left."""
        # One stream over all steps, so that workers read ahead across the borders of steps; places
        # are taken as the reader needs them: a run may have more steps than a list should hold.
        places = self.sampler.places(
            first_step * size, (last_step - first_step) * size, rank, ranks
        )
        stream = self._stream(self.records[i] for i in places)
        for step in range(first_step, last_step):
            began = time.perf_counter()
            batch = []
            for place, occurrence in self._occurrences(step * size, size, rank, ranks):
                # No name may hold the last clip of a batch while the step runs.
                sample = self._sample(*next(stream))
                if sample is not None:
                    batch.append(replace(sample, place=place, occurrence=occurrence))
            if len(self._bad) == len(self.records):
                last = self.quarantine.items[-1]
                raise ValueError(
                    f"none of the {len(self.records)} records can be used; "
                    f"the last one, {last.record_id}: {last.reason}"
                )
            self._seconds += time.perf_counter() - began
            yield batch

    def _occurrences(self, first: int, size: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        """(place in the step, how often its record came before in the step) at this rank's places
        of the step that begins at place `first`."""
        own = own_places(first, size, rank, ranks)
        seen: Counter[int] = Counter()
        found = []
        # All ranks' places: a record's number in the step must not depend on how many ranks share.
        for place, i in enumerate(self.sampler.places(first, size), start=first):
            if place in own:
                found.append((place - first, seen[i]))
            seen[i] += 1
        return found

    def take_seconds(self) -> float:
        """Time spent waiting for clips and cutting patches since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _stream(self, plan: Iterator[Record]) -> Iterator[tuple[Record, Clip | VideoError | None]]:
        """Each planned record with its clip, its error, or None where it is known to be bad.

        The reader takes requests ahead of its results, and so plans ahead; `planned` holds the
        records taken, `waiting` the slots that the reader has not filled yet, in its order.
        """
        planned: deque[tuple[Record, _Slot]] = deque()
        waiting: deque[tuple[Hashable, _Slot]] = deque()
        requested: dict[Hashable, _Slot] = {}
        ended = False

        def requests() -> Iterator[ClipRequest]:
            nonlocal ended
            in_a_row = 0
            for record in plan:
                key = clip_key(record)
                known = record.id in self._bad or self._cache.get(key)
                slot = requested.get(key)
                if slot is None:
                    slot = _Slot(known if isinstance(known, Clip) else None, pending=not known)
                planned.append((record, slot))
                in_a_row += 1
                if slot.pending and key not in requested:
                    requested[key] = slot
                    waiting.append((key, slot))
                    in_a_row = 0
                    yield clip_request(record, self.processor.frames)
                # Or a small data set, cached whole, would be planned to the run's end at once.
                if in_a_row == MAX_CACHED_IN_A_ROW:
                    return
            ended = True

        results = self._reader.read(requests())
        while True:
            if planned and not planned[0][1].pending:
                yield _opened(*planned.popleft())
            elif (result := next(results, None)) is not None:
                key, slot = waiting.popleft()
                slot.clip, slot.pending = result, False
                del requested[key]
                if isinstance(result, Clip):
                    # In main memory alone: patches on the device are the step's.
                    self._cache.put(key, replace(result, staged=None))
                del result, slot
            elif planned:
                # Looking for a request, the reader has planned cached records up to its limit.
                assert not planned[0][1].pending, "the reader left a request without an answer"
            elif ended:
                return
            else:
                results = self._reader.read(requests())

    def _sample(self, record: Record, clip: Clip | VideoError | None) -> Sample | None:
        if clip is None or record.id in self._bad:
            return None
        try:
            if isinstance(clip, VideoError):
                raise clip
            if self.stage is not None and clip.staged is None:
                clip = self.stage.stage(clip)  # from the cache, or there was no memory before
            text = TASKS[record.task].prompt(record, self.config.think)
            prompt = self.processor.prompt(
                text, [clip], system=self.config.system, think=self.config.think
            )
        except (ValueError, KeyError) as error:
            self._bad.add(record.id)
            self.quarantine.add(record.id, record.media, str(error))
            return None
        return Sample(record, prompt, clip.duration, thinned(clip))

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "PromptSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _opened(record: Record, slot: _Slot) -> tuple[Record, Clip | VideoError | None]:
    return record, slot.clip


def training_records(config: DataConfig, quarantine: Quarantine) -> list[Record]:
    """The usable rows of the data file; bad rows go to `quarantine`. ValueError for none at all."""
    records = load_records(
        config.train,
        media_root=config.media_root,
        inside_root=config.inside_root,
        tasks=config.tasks,
        on_error="quarantine",
        quarantine=quarantine,
        columns=config.columns,
    )
    if not records:
        first = f", the first: {quarantine.items[0].reason}" if len(quarantine) else ""
        listed = f" (all in {quarantine.path})" if quarantine.path is not None else ""
        raise ValueError(
            f"{config.train}: no usable record, {len(quarantine)} refused{first}{listed}"
        )
    return records
