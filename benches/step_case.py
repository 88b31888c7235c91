"""One GRPO policy step in both forms: group-shared, and as G copies of prompt and clip.

The unshared baseline is what the released VideoChat-R1 trainer runs: every completion with its own
copy of the prompt and its own pass of the vision encoder, logits over prompt and completion,
log-softmax row by row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vcr1_fast.model.forward import completion_hidden
from vcr1_fast.model.packing import Group
from vcr1_fast.model.prompt import next_position
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.train.groups import PolicyGroup, step_loss_config
from vcr1_fast.train.loop import policy_loss

MODELS = {
    "0.7M": TinyConfig(hidden_size=64, layers=6, vision_hidden=48, vocab_limit=4096),
    "6M": TinyConfig(
        hidden_size=256, layers=6, heads=8, kv_heads=4, vision_hidden=96, vocab_limit=4096
    ),
    "20M": TinyConfig(
        hidden_size=384, layers=10, heads=6, kv_heads=2, vision_hidden=192, vocab_limit=4096
    ),
}
# One token each, as far as the vocabulary goes.
NUMBERS = " ".join(f"{i / 100:.2f}" for i in range(6000))
TOKENS_A_GRID = 64  # of a frame pair of 224 x 224 pixels
STEP_LOSS = GRPOLossConfig(loss_type="grpo", beta=0.0)


@dataclass
class Clip:
    frames: np.ndarray
    fps: float


@dataclass(eq=False)
class Case:
    """A prompt with its completions, and the same as a batch of G sequences padded on the right."""

    group: Group
    advantages: Tensor
    batch: dict[str, Tensor]
    mask: Tensor  # (G, longest completion)

    @classmethod
    def make(cls, model: nn.Module, group: Group, advantages: Tensor) -> "Case":
        prompt, count = group.prompt, len(group.completions)
        completions = pad_sequence(list(group.completions), batch_first=True)
        mask = torch.arange(completions.shape[1]) < torch.tensor(group.lengths)[:, None]
        positions = prompt.positions
        after = next_position(positions) + torch.arange(completions.shape[1])
        positions = torch.cat([positions, after.expand(3, -1)], dim=1)
        tokens = torch.cat([prompt.input_ids.expand(count, -1), completions], dim=1)
        batch = {
            "input_ids": tokens,
            "attention_mask": torch.cat([torch.ones(count, len(prompt)), mask], dim=1).long(),
            "position_ids": positions[:, None].expand(-1, count, -1),
        }
        if prompt.pixel_values_videos is not None:
            batch["pixel_values_videos"] = prompt.pixel_values_videos.repeat(count, 1)
            batch["video_grid_thw"] = prompt.video_grid_thw.repeat(count, 1)
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        return cls(group, advantages, on_device, mask.to(model.device))

    @classmethod
    def random(
        cls, model: nn.Module, processor, prompt: int, length: int, count: int, *, video=True
    ) -> "Case":
        """About `prompt` tokens of a clip of noise, or of text, and completions of noise."""
        frames = (2 * (prompt // TOKENS_A_GRID), 224, 224, 3)
        noise = np.random.default_rng(0).integers(0, 256, frames if video else 0, dtype=np.uint8)
        clips = [Clip(noise, 2.0)] if video else []
        # A number is two tokens, or nearly, where the vocabulary holds a part of them.
        text = "When is it visible?" if video else " ".join(NUMBERS.split()[: prompt // 2])
        generator = torch.Generator().manual_seed(0)
        completions = torch.randint(250, (count, length), generator=generator)
        group = Group(processor.prompt(text, clips), list(completions))
        return cls.make(model, group, torch.linspace(-1, 1, count))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Prompt tokens, completion tokens of the longest, completions."""
        return len(self.group.prompt), self.mask.shape[1], len(self.mask)


def plain_step(model: nn.Module, case: Case, share: float = 1.0) -> None:
    """Forward and backward as in `_get_per_token_logps` and `compute_loss` of the R1-V family;
    share: of this group in a step of several."""
    logits = model(**case.batch, use_cache=False).logits[:, :-1]
    rows = [
        row.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
        for row, ids in zip(logits, case.batch["input_ids"][:, 1:], strict=True)
    ]
    logps = torch.stack(rows)[:, -case.shape[1] :]
    ratio = torch.exp(logps - logps.detach())
    loss = -(ratio * case.advantages.to(logps.device)[:, None] * case.mask).sum(1)
    ((loss / case.mask.sum(1)).mean() * share).backward()


def plain_by_sequence(model: nn.Module, case: Case) -> None:
    """`plain_step` of each completion by itself: the same gradient in less memory."""
    count = len(case.mask)
    for i in range(count):
        own = Case.make(model, case.group.part(i, i + 1), case.advantages[i : i + 1])
        plain_step(model, own, 1 / count)


def shared_step(model: nn.Module, case: Case) -> None:
    """What `vcr1 train` runs for a micro-batch."""
    tokens = int(case.mask.sum())
    loss, _ = policy_loss(
        model,
        [PolicyGroup(case.group, case.advantages, torch.zeros(tokens))],
        step_loss_config(STEP_LOSS, len(case.mask), tokens),
        temperature=1.0,
        on_policy=True,
    )
    loss.backward()


def bare_products(model: nn.Module, case: Case) -> Callable[[], None]:
    """A callable that multiplies what the linear layers multiply, forward and backward."""
    sizes: list[tuple[int, nn.Linear]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: sizes.append((inputs[0].numel() // module.in_features, module))
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        completion_hidden(model, [case.group])
    for hook in hooks:
        hook.remove()
    sizes.append((int(case.mask.sum()), model.get_output_embeddings()))
    products = [
        (torch.randn(rows, layer.in_features, device=model.device), layer.weight.detach())
        for rows, layer in sizes
    ]

    def run() -> None:
        for x, weight in products:
            out = x @ weight.t()
            out @ weight
            out.t() @ x

    return run


def operations(model: nn.Module, case: Case) -> tuple[float, float]:
    """Multiply-adds of the plain and of the shared form, forward (backward is twice both)."""
    text, visual = model.config.text_config, model.model.visual
    prompt, length, count = case.shape

    def linear(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    layers = sum(map(linear, model.model.language_model.layers))
    per_pair = 2 * text.num_hidden_layers * text.hidden_size
    head = text.hidden_size * text.vocab_size
    encoder = 0.0
    if case.group.prompt.patches:
        # In the merger four patches are one row.
        patches = case.group.prompt.patches
        encoder = patches * (linear(visual.patch_embed) + sum(map(linear, visual.blocks)))
        encoder += patches / 4 * linear(visual.merger)
        grid = case.group.prompt.video_grid_thw[0]
        for i in range(len(visual.blocks)):
            full = i in model.config.vision_config.fullatt_block_indexes
            seen = int(grid[1] * grid[2]) if full else 64
            encoder += 2 * patches * seen * model.config.vision_config.hidden_size
    row = prompt + length
    plain = count * (encoder + row * (layers + head) + per_pair * row * row / 2)
    answers = int(case.mask.sum())
    pairs = prompt**2 / 2 + answers * prompt + answers * length / 2
    # Of the prompt the last layer computes keys and values alone.
    unused = prompt * linear(model.model.language_model.layers[-1].mlp)
    unused += per_pair / text.num_hidden_layers * prompt**2 / 2
    shared = encoder + (prompt + answers) * layers - unused + answers * head + per_pair * pairs
    return plain, shared


def assert_same_gradient(ours: nn.Module, theirs: nn.Module) -> None:
    """Of parameters in the same order; what one side has no gradient of, the other has none of."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            scale = float(b.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-3 * scale + 1e-7, msg=name)
