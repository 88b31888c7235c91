"""Completions of prompts, drawn from the model: each prompt is read once for its whole group.

Prompts go through the model once, together; then all completions of all prompts advance by a token
a step. Positions are those of `forward.py`, so rollout and training see the same model. Completions
that have ended leave the batch.

How the loop runs is `SamplingConfig.decoding`; what is drawn is the same:
    dynamic    a step reads the keys in use; rows leave as soon as a fifth have ended
    static     shapes stay what they are until rows have halved or the buffer of keys is full
    graphs     static, each shape's step recorded as a CUDA graph and replayed
    auto       static on CUDA, dynamic elsewhere
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from vcr1_fast.model.attention import prepare_attention
from vcr1_fast.model.decode import SharedPrefix
from vcr1_fast.model.forward import embed, prompt_features
from vcr1_fast.model.packing import Span, prompt_positions
from vcr1_fast.model.positions import SpecialIds, next_position
from vcr1_fast.model.processor import Processor, Prompt
from vcr1_fast.model.sampling import Drawn, SamplingConfig, check_possible
from vcr1_fast.model.token_step import TokenStep, resolve_decoding, token_step
from vcr1_fast.model.wrapping import unwrap

__all__ = ["Rollout", "SamplingConfig", "rollout"]

# Rows are moved together when at least this share of them has nothing left to do.
_COMPACT_AT = 0.2


@dataclass(frozen=True, eq=False)
class Rollout:
    """Completions by [prompt][completion], on the CPU.

    tokens: (C,) int64, with the end-of-turn token where it was reached; logps: (C,)
    log-probabilities under the distribution they were drawn from; full_logps: under the plain
    softmax at the sampling temperature, without truncation or banned tokens: what a training
    forward gives; texts: decoded without special tokens; finished: ended by itself rather than by
    `max_new_tokens`; vision: for each prompt its video tokens' features, on the model's device, or
    None.
    """

    tokens: list[list[Tensor]]
    logps: list[list[Tensor]]
    full_logps: list[list[Tensor]]
    texts: list[list[str]]
    finished: list[list[bool]]
    vision: list[Tensor | None]


@torch.no_grad()
def rollout(
    model: nn.Module,
    processor: Processor,
    prompts: Sequence[Prompt],
    group_size: int,
    sampling: SamplingConfig,
    generator: torch.Generator | None = None,
    *,
    convention: str = "trained",
    vision: Sequence[Tensor | None] | None = None,
) -> Rollout:
    """Draw `group_size` completions for every prompt.

    Args:
        model: Qwen2.5-VL, wrapped by peft or not; put in evaluation mode meanwhile.
        processor: for the stop token, the tokens never drawn, and text.
        prompts: any lengths; read as one sequence without padding.
        group_size: completions a prompt, G >= 1.
        sampling: all that decides what is drawn, besides
        generator: a CPU generator (None: torch's default). Completion (i, j) uses its own numbers
            of it, whatever the others do: prompts rolled out one after another draw the same.
        convention: of the positions, see `positions.py`.
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
        hidden = run.prefill(prompts, features, convention)
        run.decode(hidden.repeat_interleave(group_size, dim=0), group_size, generator)
    finally:
        base.train(training)
    return run.result(group_size, features)


class _Run:
    """One rollout's state. Rows are completions of all prompts in order; row `total` is scrap."""

    def __init__(
        self,
        model: nn.Module,
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
        self.memory = SharedPrefix(lengths, static=decoding != "dynamic")
        banned = processor.banned_ids(len(weight)).to(self.device)
        self.first = TokenStep(model, self.memory, banned, sampling)
        self.further = token_step(self.first, decoding, self.device)
        shape = (total + 1, sampling.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
        exact = torch.promote_types(weight.dtype, torch.float32)
        self.logps = torch.zeros(2, *shape, dtype=exact, device=self.device)
        self.lengths = [sampling.max_new_tokens] * total
        self.finished = [False] * total
        self.resume = torch.zeros(0)  # (rows,) position of each row's first token

    def prefill(
        self, prompts: Sequence[Prompt], features: Sequence[Tensor | None], convention: str
    ) -> Tensor:
        """Read the prompts; hidden states (N, H) of their last tokens."""
        ids = SpecialIds.from_config(self.model.config)
        positions = [prompt_positions(prompt, ids, convention) for prompt in prompts]
        self.resume = torch.tensor([next_position(p) for p in positions], device=self.device)
        tokens = torch.cat([prompt.input_ids for prompt in prompts]).to(self.device)
        ends = list(accumulate(len(prompt) for prompt in prompts))
        given = [f for f in features if f is not None]
        embeddings = embed(
            self.model, tokens, torch.ones_like(tokens, dtype=torch.bool), given, ids
        )
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings[None],
            position_ids=torch.cat(positions, dim=1)[:, None].to(self.device),
            attention_mask={"full_attention": None},
            past_key_values=self.memory,
            use_cache=True,
            spans=tuple(
                Span(end - len(prompt), len(prompt), (), self.device)
                for end, prompt in zip(ends, prompts, strict=True)
            ),
        ).last_hidden_state[0]
        self.memory.start_decoding(self.total)
        return hidden[[end - 1 for end in ends]]

    def decode(self, hidden: Tensor, group_size: int, generator: torch.Generator | None) -> None:
        sampling = self.sampling
        # Prompt by prompt, so that what is drawn does not depend on which others are there.
        shape = (sampling.max_new_tokens, group_size)
        chance = [
            torch.rand(shape, dtype=torch.float64, generator=generator)
            for _ in range(self.total // group_size)
        ]
        uniforms = torch.cat(chance, dim=1).to(self.device)
        rows = torch.arange(self.total, device=self.device)
        resume = self.resume.repeat_interleave(group_size)
        alive = torch.ones(self.total, dtype=torch.bool)
        drawn = self.first.draw(hidden, uniforms[0])
        for step in range(sampling.max_new_tokens):
            tokens = drawn.tokens
            self.tokens[rows, step] = tokens
            self.logps[0, rows, step] = drawn.logps
            self.logps[1, rows, step] = drawn.full_logps
            ended = self._ended(drawn, rows, alive, step)
            if bool(ended.any()):
                alive &= ~ended
                kept = self._compact(alive)
                if kept is not None:
                    rows, alive = rows[kept], alive[kept.cpu()]
                    tokens, resume = tokens[kept], resume[kept]
                rows = rows.masked_fill(~alive.to(self.device), self.total)
            if not bool(alive.any()) or step + 1 == sampling.max_new_tokens:
                return
            self.memory.make_room()
            chance = uniforms[step + 1][rows.clamp(max=self.total - 1)]
            drawn = self.further(tokens, resume + step, chance)

    def _ended(self, drawn: Drawn, rows: Tensor, alive: Tensor, step: int) -> Tensor:
        """Which of the live rows end with this token; on the CPU (the step's only wait)."""
        ended, possible = torch.stack(
            [drawn.tokens == self.processor.stop_id, drawn.possible]
        ).cpu()
        check_possible(possible)
        ended = ended & alive
        if self.sampling.stop:
            for i in torch.nonzero(alive & ~ended).flatten().tolist():
                text = self.processor.decode(self.tokens[rows[i], : step + 1])
                ended[i] = any(stop in text for stop in self.sampling.stop)
        for row in rows.cpu()[ended].tolist() if bool(ended.any()) else ():
            self.lengths[row] = step + 1
            self.finished[row] = True
        return ended

    def _compact(self, alive: Tensor) -> Tensor | None:
        """Move the live rows together; None when that would not save enough.

        Groups must stay equally large: one that has fewer live rows than another keeps some of its
        ended rows as filling. With static shapes both numbers go down by halves alone.
        """
        grid = alive.view(len(self.memory.bias), -1)
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
        kept = (prompts[:, None] * grid.shape[1] + first[prompts, :size]).flatten().to(self.device)
        whole = number == len(grid)
        self.memory.select(None if whole else prompts.to(self.device), kept)
        return kept

    def result(self, group_size: int, features: list[Tensor | None]) -> Rollout:
        tokens, logps = self.tokens.cpu(), self.logps.cpu()

        def grouped(values):
            return [values[i : i + group_size] for i in range(0, self.total, group_size)]

        completions = [tokens[i, :n].clone() for i, n in enumerate(self.lengths)]
        return Rollout(
            tokens=grouped(completions),
            logps=grouped([logps[0, i, :n].clone() for i, n in enumerate(self.lengths)]),
            full_logps=grouped([logps[1, i, :n].clone() for i, n in enumerate(self.lengths)]),
            texts=grouped([self.processor.decode(c) for c in completions]),
            finished=grouped(self.finished),
            vision=list(features),
        )


def _halved(full: int, needed: int) -> int:
    """`full`, halved (rounding up) for as long as `needed` >= 1 still fits."""
    while full > 1 and (full + 1) // 2 >= needed:
        full = (full + 1) // 2
    return full
