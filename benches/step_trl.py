"""The policy step of TRL's own GRPOTrainer, on text: it has no video."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peers import load_module
from step_case import Case
from torch import nn


def trl_step(folder: Path, model: nn.Module, case: Case) -> Callable[[], None] | str:
    """A callable that runs forward and backward of GRPOTrainer's loss on `model`, as its
    `training_step` does; or the reason why it cannot run here.

    Its best setting: the fused LM head that is its default, no recomputation of activations, no
    KL term, the loss of the released trainer.
    """
    trl, datasets = load_module("trl"), load_module("datasets")
    for module in (trl, datasets):
        if isinstance(module, str):
            return module
    from transformers import PreTrainedTokenizerFast

    prompt, length, count = case.shape
    with tempfile.TemporaryDirectory() as output, warnings.catch_warnings():
        # transformers has renamed an argument that TRL still passes.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated")
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=output,
                per_device_train_batch_size=count,
                num_generations=count,
                max_completion_length=length,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=model.device.type == "cpu",
                loss_type="grpo",
                beta=0.0,
                report_to=[],
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * count),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        )
    tokens, seen = case.batch["input_ids"], case.batch["attention_mask"]
    inputs = {
        "prompt_ids": tokens[:, :prompt],
        "prompt_mask": seen[:, :prompt],
        "completion_ids": tokens[:, prompt:],
        "completion_mask": seen[:, prompt:],
        "advantages": case.advantages.to(tokens.device),
        "num_items_in_batch": torch.tensor(int(case.mask.sum()), device=tokens.device),
    }

    def run() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()

    return run
