"""How groups are cut into micro-batches, and prompts into rollouts: by tokens, and by memory.

What a forward and backward pass holds at its peak, in bytes, with b those of a number in the
model's dtype, H the width, K that of all key heads together, I that of the MLP; for a token in a
layer:

    norms       2 (max(4, b) H + 2 b H)     each one's input and normalised input, and its output
    attention   b (2 H + 2 K)               queries, keys, values, output
    MLP         4 b I                       gate, its activation, up, their product

times the layers; where activations are recomputed, b H in each layer and all of the above in one.
The vision tower likewise, by patches, if it is trained, with the patches themselves and what is
kept to join them. To that come the backward pass's own tensors in one layer, the logits of a chunk
of the head with their gradient, and the head's gradient in float32.

A rollout holds keys and values, 2 K b in each layer, of every prompt as if it were the longest, and
of G completions twice their length, since their buffer doubles; one layer of the prompts' forward
pass; and, to draw from them, 24 bytes for each logit of each completion (float32 scores, their
exponentials, and these summed in float64), or 48 with top-k or top-p, which sort.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import psutil
import torch
from torch import nn

from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops.lm_head import most_bytes
from vcr1_fast.train.optim import MasterAdamW

R = TypeVar("R")
GIB = 2**30
# Passes were measured to take up to 1.26 of the prediction (benches/notes/step.md), and an
# allocator's free memory comes in pieces.
_USABLE = 0.75
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Shaped(Protocol):
    """What is planned: a group, or some of its completions with their prompt."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each completion."""

    @property
    def patches(self) -> int:
        """Patches that the vision tower encodes in the pass."""

    def part(self, first: int, last: int) -> Any:
        """The same prompt with completions first .. last - 1."""


S = TypeVar("S", bound=Shaped)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a forward and backward pass by what goes through it; `fixed`: whatever does."""

    per_token: float
    per_label: float
    per_patch: float
    fixed: float
    head_chunk: float
    per_cached: float  # token whose keys and values are kept
    per_read: float  # token in one layer without gradient
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> "Footprint":
        """From the model's configuration, dtype, device, trained parts and checkpointing."""
        base = unwrap(model)
        text, vision = base.config.text_config, base.config.vision_config
        weight = base.get_output_embeddings().weight
        width = weight.element_size()
        recomputed = getattr(base.model.language_model.layers[0], "gradient_checkpointing", False)
        keys = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
        tower = any(p.requires_grad for p in base.model.visual.parameters())
        head = text.vocab_size * text.hidden_size
        return cls(
            per_token=_layers(
                text.num_hidden_layers,
                text.hidden_size,
                keys,
                text.intermediate_size,
                width,
                recomputed,
            ),
            per_label=2.0 * text.vocab_size * width,
            per_patch=tower
            * (
                _layers(
                    vision.depth,
                    vision.hidden_size,
                    # A window's queries, keys and values are also gathered from the others.
                    2.5 * vision.hidden_size,
                    vision.intermediate_size,
                    width,
                    recomputed,
                )
                + width * (vision.patch_size**2 * vision.temporal_patch_size * 3)
                + 5 * width * vision.hidden_size
            ),
            fixed=4.0 * head if weight.requires_grad else 0.0,
            head_chunk=2.0 * most_bytes(weight.device),
            per_cached=2.0 * keys * width * text.num_hidden_layers,
            per_read=_layers(
                1, text.hidden_size, keys, text.intermediate_size, width, recomputed=False
            ),
            vocabulary=text.vocab_size,
        )

    def bytes(self, tokens: int, labels: int, patches: int) -> float:
        """Of a pass over `tokens`, of which `labels` are predicted, and `patches`."""
        head = min(self.per_label * labels, self.head_chunk)
        return self.fixed + head + self.per_token * tokens + self.per_patch * patches

    def rollout_bytes(
        self, prompts: Sequence[int], count: int, length: int, *, truncated: bool
    ) -> float:
        """Of drawing `count` completions of up to `length` tokens for each of `prompts` (tokens);
        truncated: by top-k or top-p."""
        rows = count * len(prompts)
        cached = len(prompts) * max(prompts) + 2 * rows * length
        drawing = (48.0 if truncated else 24.0) * self.vocabulary * rows
        return self.per_cached * cached + self.per_read * sum(prompts) + drawing


def _layers(depth: int, width: int, keys: float, mlp: int, b: int, recomputed: bool) -> float:
    kept = 2 * (max(4, b) + 2 * b) * width + b * (2 * width + 2 * keys) + 4 * b * mlp
    backward = b * (4 * width + 3 * mlp)
    return (depth * b * width + kept if recomputed else depth * kept) + backward


class Planner:
    """Micro-batches of at most `tokens` tokens and of the memory that there is.

    `tokens` shrinks when a pass runs out of memory all the same. `memory`: bytes a pass may take;
    None asks the device, and leaves room for what the optimiser has yet to allocate. `tell` is
    given a line when the budget shrinks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MasterAdamW,
        tokens: int,
        *,
        memory: float | None = None,
        tell: Callable[[str], Any] = print,
    ) -> None:
        self.footprint, self.optimizer = Footprint.of(model), optimizer
        self.tokens, self.memory, self.tell = tokens, memory, tell

    def parts(self, items: Sequence[S]) -> list[list[S]]:
        """`items`, in order, as micro-batches. One whose own prompt and completions are more than
        a micro-batch is split by its completions.

        ValueError, with the numbers, where even one completion with its prompt would not fit.
        """
        room = self.room()
        parts: list[list[S]] = []
        for item in items:
            first = 0
            while first < len(item.lengths):
                if parts and first == 0 and self._fits([*parts[-1], item], room):
                    parts[-1].append(item)
                    break
                last = len(item.lengths)
                while last > first + 1 and not self._fits([item.part(first, last)], room):
                    last -= 1
                piece = item if last - first == len(item.lengths) else item.part(first, last)
                self._check(piece, room)
                parts.append([piece])
                first = last
        return parts

    def run(
        self, items: Sequence[S], work: Callable[[list[S]], R], restart: Callable[[], Sequence[S]]
    ) -> list[R]:
        """`work` on each micro-batch of `items`. When one runs out of memory, `restart` undoes what
        has been done (a backward pass that breaks off leaves a part of its gradients) and returns
        the items with which all begins again, with half the tokens."""
        while True:
            parts = self.parts(items)
            try:
                return [work(part) for part in parts]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
            # Outside the handler, whose traceback holds the tensors of the pass.
            items = restart()
            free_unused()
            self._halve(parts, reason)

    def room(self) -> float:
        """Bytes a pass may take."""
        if self.memory is not None:
            return self.memory
        free = free_bytes(self.optimizer.parameters[0].device)
        return _USABLE * free - self.optimizer.pending_bytes()

    def predict(self, part: Sequence[Shaped]) -> float:
        """Bytes that a pass over this micro-batch takes."""
        labels = sum(map(sum, (item.lengths for item in part)))
        return self.footprint.bytes(_tokens(part), labels, sum(item.patches for item in part))

    def prompts(
        self, lengths: Sequence[int], count: int, length: int, *, truncated: bool = False
    ) -> int:
        """How many of the first prompts, of `lengths` tokens, may be rolled out together; see
        `Footprint.rollout_bytes`. ValueError, with the numbers, where one alone would not fit."""
        room = self.room()
        for fitting in range(len(lengths), 0, -1):
            need = self.footprint.rollout_bytes(
                lengths[:fitting], count, length, truncated=truncated
            )
            if need <= room:
                return fitting
        raise ValueError(
            f"{count} completions of up to {length} tokens for a prompt of {lengths[0]} need about "
            f"{need / GIB:.2f} GiB while they are drawn; {room / GIB:.2f} GiB are free. Lower "
            "data.frames, rollout.group_size or rollout.max_new_tokens, or, where the estimate is "
            "wrong, set optim.memory_gib"
        )

    def _fits(self, part: Sequence[Shaped], room: float) -> bool:
        return _tokens(part) <= self.tokens and self.predict(part) <= room

    def _check(self, piece: Shaped, room: float) -> None:
        need = self.predict([piece])
        if need > room:
            raise ValueError(
                f"a prompt of {piece.prompt_tokens} tokens ({piece.patches} patches to encode) "
                f"with a completion of {piece.lengths[0]} needs about {need / GIB:.2f} GiB for "
                f"forward and backward; {room / GIB:.2f} GiB are free. Lower data.frames or "
                "rollout.max_new_tokens, set model.gradient_checkpointing or model.freeze_vision, "
                "or, where the estimate is wrong, set optim.memory_gib"
            )

    def _halve(self, parts: Sequence[Sequence[Shaped]], reason: str) -> None:
        largest = max(_tokens(part) for part in parts)
        if all(len(part) == 1 and len(part[0].lengths) == 1 for part in parts):
            raise ValueError(
                f"out of memory with one completion at a time ({largest} tokens): {reason}"
            )
        # What ran out may have been far below the budget.
        self.tokens = max(1, min(self.tokens, largest) // 2)
        self.tell(f"out of memory ({reason}): going on with micro-batches of {self.tokens} tokens")


def _tokens(part: Sequence[Shaped]) -> int:
    return sum(item.prompt_tokens + sum(item.lengths) for item in part)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an allocator had nothing left: torch's for the GPU or the CPU, or, past torch's, our
    own (`ops/host_memory.py`), the driver's or that of a library which allocates for itself."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in _OUT_OF_MEMORY
    )


def free_unused() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> float:
    """What can still be allocated there."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + cached)
