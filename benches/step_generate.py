"""The unshared baseline's rollout: transformers' own `generate` on G copies of prompt and clip."""

import torch
from step_case import Case
from torch import nn


def generate(model: nn.Module, case: Case) -> None:
    """As many tokens as the longest completion has, in every row: a batch runs until its last row
    has ended."""
    prompt, length, _ = case.shape
    names = ("pixel_values_videos", "video_grid_thw")
    kept = {name: case.batch[name] for name in names}
    kept |= {name: case.batch[name][:, :prompt] for name in ("input_ids", "attention_mask")}
    kinds = 2 * (kept["input_ids"] == model.config.video_token_id).long()
    with torch.no_grad():
        model.generate(
            **kept,
            mm_token_type_ids=kinds,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            eos_token_id=len(model.lm_head.weight) - 1,
            pad_token_id=0,
        )
