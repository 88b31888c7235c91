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
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

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


@dataclass(frozen=True)
class Footprint:
    """Bytes of a forward and backward pass per token, label and patch, and those `fixed`."""

    per_token: float
    per_label: float
    per_patch: float
    fixed: float
    head_chunk: float
    per_cached: float  # token whose keys and values are kept
    per_read: float  # token in one layer without gradient
    vocabulary: int
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
        kv_layers = len(family.kv_layers(language_model.config))
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
            per_cached=2.0 * sizes.text.keys * width * kv_layers,
            per_read=_layers(replace(sizes.text, depth=1), width, recomputed=False)
            + sizes.layer_bytes,
            vocabulary=sizes.vocabulary,
            per_state=sizes.state_bytes,
        )

    def bytes(self, tokens: int, labels: int, patches: int) -> float:
        """Bytes of a pass over `tokens`, of which `labels` are predicted, and `patches`."""
        # The head runs by chunks of rows: its logits never exceed two buffers.
        head = min(self.per_label * labels, self.head_chunk)
        return self.fixed + head + self.per_token * tokens + self.per_patch * patches

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

    def __init__(self, micro_batches: list[list[S]], number: int) -> None:
        self.micro_batches, self.number = micro_batches, number
        self.out_of_memory: str | None = None

    def __enter__(self) -> list[list[S]]:
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

    def parts(self, items: Sequence[S]) -> list[list[S]]:
        """`items`, in order, as micro-batches; an item larger than a micro-batch is split by its
        completions.

        ValueError, with the numbers, where one completion with its prompt does not fit.
        """
        available = self.available_bytes()
        parts: list[list[S]] = []
        for item in items:
            first = 0
            # Split by completions only: a prompt cannot be split, and each piece runs it again.
            while first < len(item.lengths):
                if parts and first == 0 and self._fits([*parts[-1], item], available):
                    parts[-1].append(item)
                    break
                last = len(item.lengths)
                while last > first + 1 and not self._fits([item.part(first, last)], available):
                    last -= 1
                piece = item if last - first == len(item.lengths) else item.part(first, last)
                self._check(piece, available)
                parts.append([piece])
                first = last
        return parts

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

    def predict(self, part: Sequence[Shaped]) -> float:
        """Estimated bytes of a pass over this micro-batch."""
        labels = sum(map(sum, (item.lengths for item in part)))
        return self.footprint.bytes(_tokens(part), labels, sum(item.patches for item in part))

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

    def _fits(self, part: Sequence[Shaped], available: float) -> bool:
        return _tokens(part) <= self.tokens and self.predict(part) <= available

    def _check(self, piece: Shaped, available: float) -> None:
        need = self.predict([piece])
        if need > available:
            raise ValueError(
                f"a prompt of {piece.prompt_tokens} tokens ({piece.patches} patches to encode) "
                f"with a completion of {piece.lengths[0]} needs about {need / GIB:.2f} GiB for "
                f"forward and backward; {available / GIB:.2f} GiB are free. Lower data.frames or "
                "rollout.max_new_tokens, set model.gradient_checkpointing or model.freeze_vision, "
                "or, where the estimate is wrong, set optim.memory_gib"
            )

    def _halve(self, parts: Sequence[Sequence[Shaped]], reason: str) -> None:
        largest = max(_tokens(part) for part in parts)
        if all(len(part) == 1 and len(part[0].lengths) == 1 for part in parts):
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
