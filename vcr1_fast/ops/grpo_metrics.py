"""The metrics of the GRPO losses by name: which of them mean something."""

from __future__ import annotations

from itertools import product

from torch import Tensor

from vcr1_fast.ops.grpo_config import LOSS_TYPES, GRPOLossConfig
from vcr1_fast.ops.grpo_reference import METRICS

_Names = tuple[tuple[str, int], ...]  # with indices in the op's vector


def name_metrics(
    metrics: Tensor, config: GRPOLossConfig, tokens: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """The op's vector as a dict of those that mean something for this call: 0-d views of it.

    Making them takes as long as the loss of a small batch. A dict that made them late would be
    empty to all that reads a dict past its methods: json, torch's pytrees, `torch.load`.
    """
    key = (
        config.loss_type,
        tokens["ref_logps"] is not None,
        tokens["entropy"] is not None,
        tokens["rollout_logps"] is not None,
        config.delta is not None,
        config.off_policy_threshold is not None,
    )
    values = metrics.unbind()
    return {name: values[index] for name, index in _NAMED[key]}


def _meaningful(
    loss_type: str, ref: bool, entropy: bool, rollout: bool, delta: bool, threshold: bool
) -> _Names:
    """Names and indices of the metrics that say something with these inputs and options."""
    meaningful = {
        "kl": ref,
        "entropy": entropy,
        "clip_delta": delta,
        "vespo_phi": loss_type == "vespo",
        "off_policy_kept": threshold,
        **dict.fromkeys(
            ("clip_low", "clip_high", "clip_region"), loss_type not in ("sapo", "vespo")
        ),
        **{name: rollout for name in METRICS if name.startswith("rollout_")},
    }
    return tuple((name, i) for i, name in enumerate(METRICS) if meaningful.get(name, True))


_NAMED = {key: _meaningful(*key) for key in product(LOSS_TYPES, *[(False, True)] * 5)}
