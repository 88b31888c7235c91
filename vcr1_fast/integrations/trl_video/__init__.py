"""GRPO on video for users of TRL, whose `GRPOTrainer` takes only text and images.

    from vcr1_fast.integrations.trl_video import (
        VideoGRPOConfig, VideoGRPOTrainer, task_rewards, video_dataset)

    data = video_dataset("train.jsonl")
    trainer = VideoGRPOTrainer(
        "path/to/checkpoint", task_rewards(data), VideoGRPOConfig("out"), data)
    trainer.train()

Your own data set needs two columns, `prompt` (a user turn of text, a system turn before it if
need be) and `video` (a path; or `image`), and may have `start` and `end` (seconds); what else it
holds goes to the reward functions, as everywhere in TRL, and so does `duration` (seconds of the
part shown).

TRL's parts stay TRL's: arguments, reward functions, advantages, losses, logging, checkpoints,
PEFT, DDP. Ours: clips are decoded and cut into patches once for a group; the vision
encoder and the prompt run once for its G completions, in the rollout and in the forward pass of
policy and reference, with the losses and gradients of the unshared baseline (`model/forward.py`).

Groups stay together: a generation batch is split in its order, not shuffled row by row. A prompt is
shared by those of its completions that are in one micro-batch, so `per_device_train_batch_size`
should be a multiple of `num_generations`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "VideoGRPOConfig": "trainer",
    "VideoGRPOTrainer": "trainer",
    "task_rewards": "data",
    "video_dataset": "data",
}


def __getattr__(name: str) -> Any:
    """TRL is imported with the first of these names, so that this package can be without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
