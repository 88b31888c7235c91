"""Sizes of the demo: the model, the clips, and how long each stage runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.synth import SynthConfig
from vcr1_fast.demo.blur import BlurConfig
from vcr1_fast.model.family import Family, family_named
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.train.reward_config import RewardsConfig

WARM_START = Path(__file__).parent / "warm_start"
"""The shipped checkpoint, made by `vcr1 demo --make-warm-start`."""

# Two frames a second at their exact times, so that half seconds in an answer mean frames.
FRAMES = FrameConfig(
    fps=2.0,
    min_frames=4,
    max_frames=24,
    min_pixels=56 * 56,
    max_pixels=56 * 56,
    total_pixels=None,
    rule="hf",
)

FAMILY = family_named("qwen2_5_vl")
"""The family of the shipped checkpoint: the one place outside its folder that names one."""


def frames_of(family: Family) -> FrameConfig:
    """The demo's frames in front of a model of this family: two tokens high and wide."""
    pixels = (2 * family.layout.token) ** 2
    return replace(FRAMES, min_pixels=pixels, max_pixels=pixels)


# A small head needs fast rotations: with theta 10 neighbouring rows, columns and seconds differ by
# angles that attention can separate, on all three axes.
MODEL = FAMILY.tiny_config(
    hidden_size=64,
    layers=3,
    heads=2,
    kv_heads=2,
    mlp_ratio=2.0,
    vocab_limit=1024,
    mrope_section=(6, 5, 5),
    rope_theta=10.0,
    vision_hidden=48,
    vision_heads=2,
    vision_mlp_ratio=2.0,
    tokens_per_second=1,
    initializer_range=0.05,
    min_pixels=56 * 56,
    max_pixels=56 * 56,
)


@dataclass(frozen=True)
class DemoConfig:
    """One demo. Clips per split, steps per stage, prompts per step.

    family: of the model, by `model_type`. Another family than the shipped checkpoint's starts from
    a random model, which is first fine-tuned on the right answers for `scratch_steps`.
    """

    output: str = "runs/demo"
    seed: int = 0
    family: str = FAMILY.model_types[0]
    scratch_steps: int = 1500
    scratch_lr: float = 2e-3
    clips: SynthConfig = field(default_factory=lambda: SynthConfig(train=400, val=0, test=100))
    blur: BlurConfig = field(default_factory=BlurConfig)
    sft_steps: int = 40
    sft_prompts: int = 48
    sft_lr: float = 5e-4
    grpo_steps: int = 300
    grpo_prompts: int = 16
    grpo_lr: float = 3e-4
    group_size: int = 8
    max_new_tokens: int = 112
    tokens_per_microbatch: int = 4096
    loss: GRPOLossConfig = field(default_factory=lambda: GRPOLossConfig(loss_type="grpo", beta=0.0))
    """Averages over a completion's tokens first: a tracking answer has ten times the tokens of the
    others and must not have ten times the weight."""
    rewards: RewardsConfig = field(
        default_factory=lambda: RewardsConfig(weights={"caption.recall": 0.0, "caption.F1": 1.0})
    )
    """Recall alone would reward a caption that lists every possible event."""


QUICK = DemoConfig(
    clips=SynthConfig(train=60, val=0, test=30),
    scratch_steps=20,
    sft_steps=10,
    grpo_steps=20,
    grpo_prompts=8,
)
"""`vcr1 demo --quick`: every stage, too short to learn much."""


@dataclass(frozen=True)
class WarmStartConfig:
    """Settings of the shipped checkpoint. One in `tracking` of the tracking records is used.

    Demo seeds other than 1 render training clips that it has not seen; test clips are unseen under
    every seed.
    """

    seed: int = 1
    clips: int = 2500
    tracking: int = 3
    steps: int = 6000
    prompts: int = 48
    lr: float = 2e-3
    warmup_steps: int = 100
