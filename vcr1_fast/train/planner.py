"""Micro-batches and rollouts planned by tokens and by memory.

Peak bytes of a forward and backward pass, with b bytes a number in the model's dtype, H the hidden
size, Q and K the widths of all query and key heads together, I that of the MLP; for a token in a
layer:

    norms       2 (max(4, b) H + 2 b H)     each one's input and normalised input, and its output
    attention   b (2 Q + 2 K)               queries, keys, values, output
    MLP         4 b I                       gate, its activation, up, their product

times the layers; with activation checkpointing, b H in each layer and all of the above in one. A
trained vision encoder adds the same by patches, the patches themselves and the copies that join
them. On top come the backward pass's own tensors in one layer, the logits of a chunk of the head
with their gradient, and the head's gradient in float32.

A family may add bytes of a token in one layer (`ModelSizes.layer_bytes`).

A group runs by the first of three schedules that fits. With a bytes a token, p bytes a patch, c
bytes of a token's keys and values in all layers, g those of their gradients (float32 in half
precision), P tokens of the prompt, S of all completions and S_m of the largest suffix:

    packed   a (P + S) + p patches                    prompt and completions in one pass
    split    a (P + S_m) + p patches + (g + k) P      the prompt's graph stays while its completions
                                                      run suffix by suffix (model/prompt_state.py);
                                                      k is c with checkpointing, else 0: the graph
                                                      holds keys and values anyway
    twice    the larger of  a S_m + (c + g) P         the suffixes run on a prompt without a graph,
             and  a P + p patches + (g + k) P         which then runs again, with one

each with the head's bytes where completions run. `split` runs as many tokens as `packed`; `twice`
runs the prompt once more, forward alone. Attention by masks copies keys and values for each suffix:
c (P + S_m) more, with checkpointing in one layer.

A rollout holds keys and values, 2 K b in each layer with keys, of every prompt padded to the
longest, and of G completions twice their length, since their buffer doubles; a state of each prompt
and completion in the layers without keys; one layer of the prompts' forward pass; and, for
sampling, 24 bytes per logit of each completion (float32 scores, their exponentials, and these
summed in float64), or 48 with top-k or top-p, which sort.
"""

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import nn

from vcr1_fast.model.attention import copies_prefix
from vcr1_fast.model.family import LayerSizes, family_of
from vcr1_fast.model.graphs import forget_recordings
from vcr1_fast.model.vision import vision_is_frozen
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops.lm_head import most_bytes
from vcr1_fast.ops.memory import available_bytes
from vcr1_fast.train.optim import MasterAdamW

GIB = 2**30
# Measured passes take up to 1.26 of the prediction (benches/notes/step.md), and an allocator's
# free memory is fragmented.
_USABLE = 0.75
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Shaped(Protocol):
    """An item to plan: a group, or some of its completions with their prompt."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each completion."""

    @property
    def patches(self) -> int:
        """Patches that the vision encoder encodes in the pass."""

    def part(self, first: int, last: int) -> Any:
        """The same prompt with completions first .. last - 1."""


S = TypeVar("S", bound=Shaped)
Schedule = Literal["packed", "split", "twice"]


@dataclass(frozen=True, eq=False)
class MicroBatch(Generic[S]):
    """Items that run in one pass, or one item by `split` or `twice` (see above): then completions
    edges[i] .. edges[i + 1] - 1 are the i-th suffix."""

    items: list[S]
    schedule: Schedule = "packed"
    edges: tuple[int, ...] = ()

    @property
    def suffixes(self) -> list[S]:
        """The item's completions by suffix, each with the same prompt."""
        (item,) = self.items
        return [item.part(first, last) for first, last in itertools.pairwise(self.edges)]

    @property
    def prompt_passes(self) -> int:
        """Times that the prompts run forward."""
        return 2 if self.schedule == "twice" else 1

    @property
    def tokens(self) -> int:
        """Most tokens whose activations are in memory at a time."""
        if self.schedule == "packed":
            return _tokens(self.items)
        (item,) = self.items
        suffix = max(sum(item.lengths[a:b]) for a, b in itertools.pairwise(self.edges))
        return _tokens_in_memory(self.schedule, item.prompt_tokens, suffix)

    @property
    def is_smallest(self) -> bool:
        """Whether no schedule of fewer tokens in memory exists."""
        if self.schedule == "packed":
            return len(self.items) == 1 and len(self.items[0].lengths) == 1
        return self.schedule == "twice" and len(self.edges) == 1 + len(self.items[0].lengths)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a forward and backward pass per token, label and patch, and those `fixed`."""

    per_token: float
    per_label: float
    per_patch: float
    fixed: float
    head_chunk: float
    per_cached: float  # token whose keys and values are kept
    per_cached_gradient: float  # the gradients of these, summed over suffixes
    per_copied: float  # token whose keys and values attention copies for a suffix
    per_read: float  # token in one layer without gradient
    vocabulary: int
    recomputed: bool  # activations in the backward pass
    per_state: float = 0.0  # completion whose layers keep a state instead of keys

    @classmethod
    def of(cls, model: nn.Module) -> "Footprint":
        """From the model's configuration, dtype, device, trained parts and checkpointing."""
        base = unwrap(model)
        family = family_of(base)
        sizes = family.sizes(base.config)
        weight = base.get_output_embeddings().weight
        width = weight.element_size()
        language_model: Any = family.language_model(base)
        recomputed = getattr(language_model.layers[0], "gradient_checkpointing", False)
        head = sizes.vocabulary * sizes.text.width
        kv_layers = family.kv_layers(language_model.config)
        cached = 2.0 * sizes.text.keys * width * len(kv_layers)
        copies = copies_prefix(language_model.layers[kv_layers[0]].self_attn)
        copied = cached if copies else 0.0
        per_patch = 0.0
        # A frozen encoder keeps no activations.
        if not vision_is_frozen(base):
            per_patch = (
                _layers(sizes.vision, width, recomputed)
                + width * family.layout.values
                + 5 * width * sizes.vision.width
            )
        return cls(
            per_token=_layers(sizes.text, width, recomputed) + sizes.layer_bytes,
            per_label=2.0 * sizes.vocabulary * width,
            per_patch=per_patch,
            fixed=4.0 * head if weight.requires_grad else 0.0,
            head_chunk=2.0 * most_bytes(weight.device),
            per_cached=cached,
            per_cached_gradient=cached * max(4, width) / width,
            per_copied=copied / len(kv_layers) if recomputed else copied,
            per_read=_layers(replace(sizes.text, depth=1), width, recomputed=False)
            + sizes.layer_bytes,
            vocabulary=sizes.vocabulary,
            recomputed=recomputed,
            per_state=sizes.state_bytes,
        )

    def bytes(self, tokens: int, labels: int, patches: int) -> float:
        """Bytes of a pass over `tokens`, of which `labels` are predicted, and `patches`."""
        # The head runs by chunks of rows: its logits never exceed two buffers.
        head = min(self.per_label * labels, self.head_chunk)
        return self.fixed + head + self.per_token * tokens + self.per_patch * patches

    def suffix_bytes(
        self, schedule: Schedule, prompt: int, suffix: int, labels: int, patches: int
    ) -> float:
        """Bytes of a group by `split` or `twice`, whose prompt has `prompt` tokens and `patches` to
        encode, and whose largest suffix has `suffix` tokens, of which `labels` are predicted."""
        # A state of layers without keys, and its gradient, are float32.
        gradients = self.per_cached_gradient * prompt + 2.0 * self.per_state
        # Kept beside the prompt's graph only where that does not hold them itself.
        kept = self.per_cached * prompt if self.recomputed else 0.0
        copied = self.per_copied * (prompt + suffix)
        if schedule == "split":
            return self.bytes(prompt + suffix, labels, patches) + gradients + kept + copied
        completions = self.bytes(suffix, labels, 0) + self.per_cached * prompt + gradients + copied
        return max(completions, self.bytes(prompt, 0, patches) + gradients + kept)

    def rollout_bytes(
        self, prompts: Sequence[int], count: int, length: int, *, truncated: bool
    ) -> float:
        """Bytes of sampling `count` completions of up to `length` tokens for each of `prompts`
        (tokens); truncated: by top-k or top-p."""
        rows = count * len(prompts)
        # The cache pads prompts to the longest, and doubles a completion's buffer when it is full.
        cached = len(prompts) * max(prompts) + 2 * rows * length
        sampling = (48.0 if truncated else 24.0) * self.vocabulary * rows
        # The prompts' own states are copied to their completions.
        states = self.per_state * (len(prompts) + rows)
        return self.per_cached * cached + self.per_read * sum(prompts) + states + sampling


def _layers(sizes: LayerSizes, b: int, recomputed: bool) -> float:
    width, mlp = sizes.width, sizes.mlp
    attention = b * (2 * sizes.queries + 2 * sizes.keys)
    # RMSNorm computes in float32, so half-precision models keep 4 bytes there.
    kept = 2 * (max(4, b) + 2 * b) * width + attention + 4 * b * mlp
    backward = b * (4 * width + 3 * mlp)
    depth = sizes.depth
    return (depth * b * width + kept if recomputed else depth * kept) + backward


class Attempt(Generic[S]):
    """One pass over all micro-batches. Leaving its `with` block on an out-of-memory error records
    the reason instead of raising, and drops the traceback, which holds the pass's tensors."""

    def __init__(self, micro_batches: list[MicroBatch[S]], number: int) -> None:
        self.micro_batches, self.number = micro_batches, number
        self.out_of_memory: str | None = None

    def __enter__(self) -> list[MicroBatch[S]]:
        return self.micro_batches

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self.out_of_memory = str(error).partition("\n")[0] or type(error).__name__
        return True


class Planner:
    """Micro-batches of at most `tokens` tokens that fit in the available memory.

    `tokens` halves on out-of-memory. `memory`: bytes a pass may take; None asks the device and
    subtracts the optimiser's memory that is not allocated yet. `log` receives a line when `tokens`
    halves.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MasterAdamW,
        tokens: int,
        *,
        memory: float | None = None,
        log: Callable[[str], Any] = print,
    ) -> None:
        self.footprint, self.optimizer = Footprint.of(model), optimizer
        self.tokens, self.memory, self.log = tokens, memory, log

    def parts(self, items: Sequence[S]) -> list[MicroBatch[S]]:
        """`items`, in order, as micro-batches; an item larger than a micro-batch is split by its
        completions, its prompt running once for all of them, or twice.

        ValueError, with the numbers, where one completion with its prompt does not fit.
        """
        available = self.available_bytes()
        batches: list[MicroBatch[S]] = []
        for item in items:
            if batches and batches[-1].schedule == "packed":
                together = MicroBatch([*batches[-1].items, item])
                if self._fits(together, available):
                    batches[-1] = together
                    continue
            batches.append(self._alone(item, available))
        return batches

    def _alone(self, item: S, available: float) -> MicroBatch[S]:
        """The item as a micro-batch, by the first schedule that fits."""
        count = len(item.lengths)
        packed = MicroBatch([item])
        if self._fits(packed, available):
            return packed
        smallest = packed
        if count > 1:  # else its prompt runs once anyway, and there is nothing to split
            schedules: tuple[Schedule, ...] = ("split", "twice")
            for schedule in schedules:
                edges = self._edges(item, schedule, available)
                if edges is not None:
                    return MicroBatch([item], schedule, edges)
            smallest = MicroBatch([item], "twice", tuple(range(count + 1)))
        # It has more tokens than a micro-batch, whatever the schedule. It still goes through where
        # memory allows: the number of tokens is a setting, and cannot be met.
        self._check(smallest, available)
        return smallest

    def _edges(self, item: S, schedule: Schedule, available: float) -> tuple[int, ...] | None:
        """Suffixes as large as fit; None where one completion does not."""
        lengths = list(item.lengths)
        edges = [0]
        while edges[-1] < len(lengths):
            first = edges[-1]
            for last in range(len(lengths), first, -1):
                suffix = sum(lengths[first:last])
                tokens = _tokens_in_memory(schedule, item.prompt_tokens, suffix)
                need = self.footprint.suffix_bytes(
                    schedule, item.prompt_tokens, suffix, suffix, item.patches
                )
                if tokens <= self.tokens and need <= available:
                    edges.append(last)
                    break
            else:
                return None
        return tuple(edges)

    def attempts(
        self, items: Sequence[S], retry: Sequence[S] | None = None
    ) -> Iterator["Attempt[S]"]:
        """Passes over the micro-batches of `items` until one of them does not run out of memory.

            for attempt in planner.attempts(groups):
                with attempt as micro_batches:
                    ...  # begins from scratch: an earlier attempt may have left parts of gradients

        After an out-of-memory error, `retry` (default: `items`) is cut into micro-batches of half
        the tokens. ValueError where one completion at a time does not fit.
        """
        for number in itertools.count():
            attempt = Attempt(self.parts(items), number)
            yield attempt
            if attempt.out_of_memory is None:
                return
            free_unused()
            self._halve(attempt.micro_batches, attempt.out_of_memory)
            items = items if retry is None else retry

    def available_bytes(self) -> float:
        """Bytes that a pass may take."""
        if self.memory is not None:
            return self.memory
        free = available_bytes(self.optimizer.device)
        return _USABLE * free - self.optimizer.pending_bytes()

    def predict(self, batch: MicroBatch[Any]) -> float:
        """Estimated bytes of the passes over this micro-batch."""
        patches = sum(item.patches for item in batch.items)
        if batch.schedule == "packed":
            labels = sum(map(sum, (item.lengths for item in batch.items)))
            return self.footprint.bytes(batch.tokens, labels, patches)
        suffix = max(sum(part.lengths) for part in batch.suffixes)
        prompt = batch.items[0].prompt_tokens
        return self.footprint.suffix_bytes(batch.schedule, prompt, suffix, suffix, patches)

    def prompts(
        self, lengths: Sequence[int], count: int, length: int, *, truncated: bool = False
    ) -> int:
        """How many of the first prompts, of `lengths` tokens, fit in one rollout; see
        `Footprint.rollout_bytes`. ValueError, with the numbers, where one alone does not fit."""
        available = self.available_bytes()
        for fitting in range(len(lengths), 0, -1):
            need = self.footprint.rollout_bytes(
                lengths[:fitting], count, length, truncated=truncated
            )
            if need <= available:
                return fitting
        raise ValueError(
            f"{count} completions of up to {length} tokens for a prompt of {lengths[0]} need about "
            f"{need / GIB:.2f} GiB while they are sampled; {available / GIB:.2f} GiB are free. "
            "Lower data.frames, rollout.group_size or rollout.max_new_tokens, or, if the estimate "
            "is wrong, set optim.memory_gib"
        )

    def _fits(self, batch: MicroBatch[Any], available: float) -> bool:
        return batch.tokens <= self.tokens and self.predict(batch) <= available

    def _check(self, batch: MicroBatch[Any], available: float) -> None:
        need = self.predict(batch)
        if need > available:
            (piece,) = batch.items
            raise ValueError(
                f"a prompt of {piece.prompt_tokens} tokens ({piece.patches} patches to encode) "
                f"with a completion of {max(piece.lengths)} needs about {need / GIB:.2f} GiB for "
                f"forward and backward; {available / GIB:.2f} GiB are free. Lower data.frames or "
                "rollout.max_new_tokens, set model.gradient_checkpointing or model.freeze_vision, "
                "or, where the estimate is wrong, set optim.memory_gib"
            )

    def _halve(self, batches: Sequence[MicroBatch[Any]], reason: str) -> None:
        largest = max(batch.tokens for batch in batches)
        if all(batch.is_smallest for batch in batches):
            raise ValueError(
                f"out of memory with one completion at a time ({largest} tokens): {reason}"
            )
        # The micro-batch that ran out may have been far below the budget.
        self.tokens = max(1, min(self.tokens, largest) // 2)
        self.log(f"out of memory ({reason}): retrying with micro-batches of {self.tokens} tokens")


def longest_first(items: Iterable[S]) -> list[S]:
    """Sorted by tokens, prompt and completions, descending: a micro-batch that does not fit in
    memory comes first, before work is lost."""
    return sorted(items, key=lambda item: _tokens([item]), reverse=True)


def _tokens(part: Sequence[Shaped]) -> int:
    return sum(item.prompt_tokens + sum(item.lengths) for item in part)


def _tokens_in_memory(schedule: Schedule, prompt: int, suffix: int) -> int:
    return max(prompt, suffix) if schedule == "twice" else prompt + suffix


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed: torch's for GPU or CPU, ours (`ops/host_memory.py`), the
    driver's, or a library's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def free_unused() -> None:
    """Drop recorded decoding steps, collect garbage and return cached GPU memory."""
    forget_recordings()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
