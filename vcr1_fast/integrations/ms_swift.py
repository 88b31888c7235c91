"""ms-swift on our ops: the log-probs and entropy of its GRPO, DPO and KTO trainers.

    from vcr1_fast.integrations.ms_swift import patch_ms_swift
    patch_ms_swift()

Or as a plugin: `swift rlhf --external_plugins examples/ms_swift_plugin.py`. With
`--use_liger_kernel true` its GRPO loss is Liger's, which `vcr1_fast.integrations.liger.patch_liger`
replaces; the plugin does both.
"""

from __future__ import annotations

from torch import Tensor

from vcr1_fast.integrations.patching import Patch, Swap
from vcr1_fast.integrations.rows import row_entropy, row_logprobs


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probs of `index`, (...) or (..., K), under softmax of `logits` (..., V), in the logits'
    dtype; differentiable."""
    return row_logprobs(logits, index, out_dtype=logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy (...) in nats, in the logits' dtype; differentiable. Nothing is copied, so that there
    is nothing to chunk."""
    return row_entropy(logits)


_TRAINERS = "swift.rlhf_trainers"
_SOFTMAX_ARGUMENTS = ("logits", "index")
patch_ms_swift = Patch(
    "ms-swift",
    ("4.5.3", "4.6.0"),
    {
        # ms-swift takes these functions from TRL, at two places of which one may be imported later.
        "logprobs": [
            Swap(
                f"{_TRAINERS}.{module}",
                "selective_log_softmax",
                lambda _: selective_log_softmax,
                _SOFTMAX_ARGUMENTS,
            )
            for module in ("rlhf_mixin", "grpo_trainer")
        ],
        "entropy": [
            Swap(
                f"{_TRAINERS}.grpo_trainer",
                "entropy_from_logits",
                lambda _: entropy_from_logits,
                ("logits", "chunk_size"),
            ),
        ],
    },
    package="swift",
)
"""Replaces the functions that ms-swift's trainers call; TRL's own modules stay as they are."""
