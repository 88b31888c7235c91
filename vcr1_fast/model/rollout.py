"""Sample completions of prompts: each prompt is read once for its whole group.

Prompts go through the model once, together; then all completions of all prompts advance by a token
a step. Positions are those of the prompts and of `packing.py`, so rollout and training see the same
model. Completions that have ended leave the batch.

`SamplingConfig.decoding` sets how the loop runs; the completions are the same:
    dynamic    a step reads the keys in use; rows leave as soon as a fifth have ended
    static     shapes stay the same until rows have halved or the buffer of keys is full
    graphs     static, each shape's step recorded as a CUDA graph and replayed
    auto       static on CUDA, dynamic elsewhere

With static shapes (`decode.SharedPrefix`) a step's kernels can be recorded once and replayed:
`graphs.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.decode import SharedPrefix
from vcr1_fast.model.forward import embed, language_model_forward, lm_head, prompt_features
from vcr1_fast.model.graphs import PREFIX_STEP, GraphedStep
from vcr1_fast.model.packing import Span
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.prompt import Prompt, next_position
from vcr1_fast.model.sampling import Sampled, SamplingConfig, check_possible, sample
from vcr1_fast.model.wrapping import unwrap

__all__ = ["Rollout", "SamplingConfig", "Segment", "rollout"]

Step = Callable[[Tensor, Tensor, Tensor], Sampled]
T = TypeVar("T")
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for all prompts of a rollout, or one for each; None: torch's default."""

# Rows are moved together when at least this share of them has nothing left to do.
_COMPACT_AT = 0.2


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of a completion's tokens (n,) int64, all sampled by the policy or all given to it.

    vision: features (vision tokens, levels * H) of clips and images that given tokens show.
    """

    tokens: Tensor
    sampled: bool = True
    vision: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rollout:
    """Completions by [prompt][completion], on the CPU.

    tokens: (C,) int64, with the end-of-turn token where it was reached; logps: (C,)
    log-probabilities under the distribution they were sampled from; full_logps: under the plain
    softmax at the sampling temperature, without truncation or banned tokens: the ones that a
    training forward gives; an engine that reports one of the two only leaves nan in the other.
    texts: the assistant's whole turns, decoded without special tokens, with what the chat template
    opened for them (`Prompt.opened`); finished: ended by itself rather than by `max_new_tokens`;
    vision: for each prompt the features of its clips and images (vision tokens, levels * H), on
    the model's device, or None; turns: the segments that make up each completion's tokens, None
    where each completion is one sampled segment.
    """

    tokens: list[list[Tensor]]
    logps: list[list[Tensor]]
    full_logps: list[list[Tensor]]
    texts: list[list[str]]
    finished: list[list[bool]]
    vision: list[Tensor | None]
    turns: list[list[tuple[Segment, ...]]] | None = None

    def segments(self, prompt: int, completion: int) -> tuple[Segment, ...]:
        """The segments of one completion, in order."""
        if self.turns is None:
            return (Segment(self.tokens[prompt][completion]),)
        return self.turns[prompt][completion]

    def part(self, prompt: int) -> "Rollout":
        """The completions of one prompt."""
        parts: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            parts[one.name] = None if value is None else [value[prompt]]
        return Rollout(**parts)


@torch.no_grad()
def rollout(
    model: nn.Module,
    processor: Processor,
    prompts: Sequence[Prompt],
    group_size: int,
    sampling: SamplingConfig,
    generator: Generators = None,
    *,
    vision: Sequence[Tensor | None] | None = None,
) -> Rollout:
    """Sample `group_size` completions for every prompt.

    Args:
        model: wrapped by peft or not; in evaluation mode during the rollout.
        processor: for the stop token, the tokens never sampled, and text.
        prompts: any lengths; read as one sequence without padding.
        group_size: completions a prompt, G >= 1.
        sampling: temperature, truncation, length, stop texts, and how the loop runs.
        generator: a CPU generator for all prompts (None: torch's default), or one for each.
            Completion (i, j) uses its own numbers of it, whatever the others do: prompts rolled out
            one after another give the same, and so does another group size or length.
        vision: features of the prompts' clips where they are known (`prompt_features`).

    Raises:
        ValueError: for no prompts, a group size below 1, logits that are nan or infinite, or
            decoding by graphs without CUDA.
    """
    if not prompts or group_size < 1:
        raise ValueError(f"got {len(prompts)} prompts and a group size of {group_size}")
    base = unwrap(model)
    prepare_attention(base)
    training = base.training
    base.eval()
    try:
        features = prompt_features(base, prompts, vision)
        run = _Run(base, processor, sampling, [len(prompt) for prompt in prompts], group_size)
        hidden = run.prefill(prompts, features)
        run.decode(hidden.repeat_interleave(group_size, dim=0), group_size, generator)
    finally:
        base.train(training)
    return run.result(group_size, features, prompts)


class TokenStep:
    """Feed a token to every row and sample the next. `memory` must have room (`make_room`)."""

    def __init__(
        self, model: Any, memory: SharedPrefix, banned: Tensor, sampling: SamplingConfig
    ) -> None:
        self.model, self.memory = model, memory
        self.banned, self.sampling = banned, sampling
        self.embedding = model.get_input_embeddings()
        self.weight, self.bias = lm_head(model)

    def __call__(self, tokens: Tensor, positions: Tensor, uniforms: Tensor) -> Sampled:
        """tokens (R,) int64, sampled last; positions (R,) of these, the same on all three axes;
        uniforms (R,) float64 for `sample`."""
        hidden = language_model_forward(
            self.model,
            self.embedding(tokens[:, None]),
            positions[None, :, None].expand(3, -1, -1),
            kv_cache=self.memory,
            shared_prefix=self.memory,
        )
        return self.sample(hidden[:, 0], uniforms)

    def sample(self, hidden: Tensor, uniforms: Tensor) -> Sampled:
        """The next token of hidden states (R, H)."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return sample(logits, uniforms, self.banned, self.sampling)


def token_step(step: TokenStep, decoding: str, device: torch.device) -> Step:
    """`step`, recorded as a graph if `decoding` says so. ValueError for graphs without CUDA."""
    if decoding != "graphs":
        return step
    if device.type != "cuda":
        raise ValueError(f"decoding 'graphs' needs a CUDA device, the model is on {device}")
    return GraphedStep(step)


def resolve_decoding(decoding: str, device: torch.device) -> str:
    """The decoding that "auto" stands for: static shapes on CUDA, dynamic ones elsewhere, which are
    less work.

    Not graphs until their recording has been measured on a GPU: they are asked for by name.
    """
    if decoding != "auto":
        return decoding
    return "static" if device.type == "cuda" else "dynamic"


class _Run:
    """State of one rollout. Rows are completions of all prompts in order; the last row, `total`, is
    a dummy slot, which rows that have ended write to."""

    def __init__(
        self,
        model: Any,
        processor: Processor,
        sampling: SamplingConfig,
        lengths: Sequence[int],
        group_size: int,
    ) -> None:
        """lengths: tokens of each prompt."""
        self.model, self.processor, self.sampling = model, processor, sampling
        self.total = total = group_size * len(lengths)
        weight = model.get_output_embeddings().weight
        self.device = weight.device
        decoding = resolve_decoding(sampling.decoding, self.device)
        self.memory = SharedPrefix(
            lengths,
            static=decoding != "dynamic",
            prefix_step=PREFIX_STEP if decoding == "graphs" else 1,
        )
        banned = processor.banned_ids(len(weight)).to(self.device)
        self.first_step = TokenStep(model, self.memory, banned, sampling)
        self.decode_step = token_step(self.first_step, decoding, self.device)
        shape = (total + 1, sampling.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        exact = torch.promote_types(weight.dtype, torch.float32)
        self.logps = torch.zeros(2, *shape, dtype=exact, device=self.device)
        self.lengths = [sampling.max_new_tokens] * total
        self.finished = [False] * total
        # On the host, for stop strings: each row's tokens so far.
        self.written: list[list[int]] = [[] for _ in range(total)]
        self.resume = torch.zeros(0)  # (rows,) position of each row's first token

    def prefill(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None]) -> Tensor:
        """Read the prompts; hidden states (N, H) of their last tokens."""
        starts = [next_position(prompt.positions) for prompt in prompts]
        self.resume = torch.tensor(starts, device=self.device)
        tokens = torch.cat([prompt.input_ids for prompt in prompts]).to(self.device)
        is_vision = torch.cat([prompt.is_vision for prompt in prompts]).to(self.device)
        positions = torch.cat([prompt.positions for prompt in prompts], dim=1).to(self.device)
        ends = list(accumulate(len(prompt) for prompt in prompts))
        embeddings, inputs = embed(self.model, tokens, is_vision, features)
        hidden = language_model_forward(
            self.model,
            embeddings[None],
            positions[:, None],
            kv_cache=self.memory,
            shared_prefix=self.memory,  # layers without keys keep their states there
            spans=tuple(
                Span(end - len(prompt), len(prompt), (), self.device)
                for end, prompt in zip(ends, prompts, strict=True)
            ),
            **inputs,
        )
        self.memory.start_decoding(self.total)
        return hidden[0][[end - 1 for end in ends]]

    def decode(self, hidden: Tensor, group_size: int, generator: Generators) -> None:
        """Sample all completions, the first token from `hidden` (rows, H)."""
        sampling = self.sampling
        prompts = self.total // group_size
        shared = generator is None or isinstance(generator, torch.Generator)
        generators: Any = [generator] * prompts if shared else generator
        numbers = [
            completion_uniforms(one, sampling.max_new_tokens)
            for one in generators
            for _ in range(group_size)
        ]
        uniforms = torch.stack(numbers, dim=1).to(self.device)
        places = torch.arange(self.total)  # on the host, and `rows` on the device
        rows = places.to(self.device)
        resume = self.resume.repeat_interleave(group_size)
        alive = torch.ones(self.total, dtype=torch.bool)
        sampled = self.first_step.sample(hidden, uniforms[0])
        for step in range(sampling.max_new_tokens):
            tokens = sampled.tokens
            self.tokens[rows, step] = tokens
            self.logps[0, rows, step] = sampled.logps
            self.logps[1, rows, step] = sampled.full_logps
            ended = self._ended(sampled, places, alive, step)
            if bool(ended.any()):
                alive &= ~ended
                kept = self._compact(alive)
                if kept is not None:
                    places, alive = places[kept], alive[kept]
                    moved = kept.to(self.device)
                    tokens, resume = tokens[moved], resume[moved]
                # Ended rows that stay in the batch write to the dummy slot.
                places = places.masked_fill(~alive, self.total)
                rows = places.to(self.device)
            if not bool(alive.any()) or step + 1 == sampling.max_new_tokens:
                return
            self.memory.make_room()
            numbers_of_rows = uniforms[step + 1][rows.clamp(max=self.total - 1)]
            sampled = self.decode_step(tokens, resume + step, numbers_of_rows)

    def _ended(self, sampled: Sampled, places: Tensor, alive: Tensor, step: int) -> Tensor:
        """Which of the live rows end with this token; on the CPU (the step's only wait)."""
        wanted = [sampled.tokens == self.processor.stop_id, sampled.possible]
        if self.sampling.stop:
            wanted.append(sampled.tokens)  # in the same copy
        ended, possible, *tokens = torch.stack(wanted).cpu()
        check_possible(possible.bool())
        ended = ended.bool() & alive
        if self.sampling.stop:
            for i in torch.nonzero(alive & ~ended).flatten().tolist():
                written = self.written[int(places[i])]
                written.append(int(tokens[0][i]))
                ended[i] = self._stops(written)
        for row in places[ended].tolist():
            self.lengths[row] = step + 1
            self.finished[row] = True
        return ended

    def _stops(self, written: list[int]) -> bool:
        """Whether the last of these tokens completes a stop string."""
        # Every token that is sampled has a byte at least, and the first may begin within a letter.
        longest = max(len(stop.encode()) for stop in self.sampling.stop) + 4
        text = self.processor.decode(torch.tensor(written[-longest:]))
        return any(stop in text for stop in self.sampling.stop)

    def _compact(self, alive: Tensor) -> Tensor | None:
        """Move the live rows together; which they were, on the CPU. None when that would not save
        enough.

        Groups must stay equally large: one that has fewer live rows than another keeps some of its
        ended rows as filling. With static shapes both numbers go down by halves alone.
        """
        grid = alive.view(self.memory.prompts, -1)
        counts = grid.sum(dim=1)
        number, size = int((counts > 0).sum()), int(counts.max())
        if number and self.memory.static:
            number, size = _halved(len(grid), number), _halved(grid.shape[1], size)
        if number == 0 or number * size > (1 - _COMPACT_AT) * alive.numel():
            return None
        prompts, first = (
            (x > 0).to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
            for x in (counts, grid)
        )
        prompts = prompts[:number].sort().values
        kept = (prompts[:, None] * grid.shape[1] + first[prompts, :size]).flatten()
        whole = number == len(grid)
        self.memory.select(None if whole else prompts.to(self.device), kept.to(self.device))
        return kept

    def result(
        self, group_size: int, features: Sequence[Tensor | None], prompts: Sequence[Prompt]
    ) -> Rollout:
        tokens, logps = self.tokens.cpu(), self.logps.cpu()

        def grouped(values: Sequence[T]) -> list[list[T]]:
            return [list(values[i : i + group_size]) for i in range(0, self.total, group_size)]

        completions = [tokens[i, :n].clone() for i, n in enumerate(self.lengths)]
        return Rollout(
            tokens=grouped(completions),
            logps=grouped([logps[0, i, :n].clone() for i, n in enumerate(self.lengths)]),
            full_logps=grouped([logps[1, i, :n].clone() for i, n in enumerate(self.lengths)]),
            texts=grouped(
                [
                    self.processor.turn(prompts[i // group_size], completion)
                    for i, completion in enumerate(completions)
                ]
            ),
            finished=grouped(self.finished),
            vision=list(features),
        )


def completion_uniforms(generator: torch.Generator | None, length: int) -> Tensor:
    """(length,) float64 numbers in [0, 1) of a prompt's next completion.

    They start from one number of `generator`, so that the next completion's do not depend on
    `length`, nor a completion's on how many follow it.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    own = torch.Generator().manual_seed(seed)
    return torch.rand(length, dtype=torch.float64, generator=own)


def _halved(full: int, needed: int) -> int:
    """`full`, halved (rounding up) for as long as `needed` >= 1 still fits."""
    while full > 1 and (full + 1) // 2 >= needed:
        full = (full + 1) // 2
    return full
