"""A text model made on the spot, and short GRPO runs of TRL on it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

# A CPU has no kernels of TRL's to be read ahead of time, and its trainers are slow to import.
trl = pytest.importorskip("trl", reason="trl is not installed", exc_type=ImportError)
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

VOCAB = 97
G = 4


def write_model(folder: Path) -> Path:
    """A random Llama and a tokenizer of one token a word; the folder."""
    words = {word: i for i, word in enumerate(("<pad>", "<eos>", *(f"w{i}" for i in range(95))))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def even_share(completion_ids, **_):
    """Share of even tokens: every completion has a different reward."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Norms(TrainerCallback):
    """The gradient's norm at each step, in full precision (the log rounds it)."""

    def __init__(self):
        self.norms, self.trainer = [], None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in grads]).norm().item())


def make_trainer(folder: Path, output: Path, *, cls=None, peft_config=None, **settings):
    """GRPO on the CPU in float32: 4 updates on two batches of 2 prompts x 4 completions."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = list(range(1, 13))  # completions of all lengths
    rows = [
        {"prompt": " ".join(f"w{(7 * i + j) % 95}" for j in range(3 + i % 3))} for i in range(8)
    ]
    args = trl.GRPOConfig(
        **{
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 2 * G,
            "num_generations": G,
            "max_completion_length": 6,
            "max_steps": 4,
            "num_iterations": 2,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
            "gradient_checkpointing": False,
            "max_grad_norm": 0.0,
            **settings,
        }
    )
    norms = Norms()
    trainer = (cls or trl.GRPOTrainer)(
        model=model,
        reward_funcs=even_share,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[norms],
        peft_config=peft_config,
    )
    trainer.norms = norms.norms
    return trainer


def logged(trainer) -> list[dict[str, float]]:
    """Losses, norms and metrics of each step; no times."""
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    unlike = ("step_time", "epoch", "mfu", "flops", "runtime", "per_second")
    kept = [{k: v for k, v in row.items() if not any(u in k for u in unlike)} for row in rows]
    return [{**row, "exact_norm": norm} for row, norm in zip(kept, trainer.norms, strict=True)]
