"""Options and metrics that the forms of Liger's GRPO loss share, mapped to ours and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.ops import (
    GRPOLossConfig,
    TokenLosses,
    grpo_loss,
    grpo_token_loss,
    linear_grpo_loss,
)


def liger_config(
    loss_type: str, level: str, delta: float | None, *, max_length: int | None, **options: Any
) -> GRPOLossConfig:
    """Liger's options as ours. ValueError where Liger refuses a combination."""
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {level!r}")
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(
            f"Sequence-level importance sampling is not supported for loss_type={loss_type!r}"
        )
    return GRPOLossConfig(
        loss_type=loss_type,
        level=level,
        delta=delta,
        max_length=max_length if loss_type == "dr_grpo" else None,
        log_ratio_clamp=None,
        kl_input_clamp=None,
        **options,
    )


def dapo_tokens(loss_type: str, mask: Tensor, num_items: Tensor | float | None) -> Tensor | None:
    """The divisor of dapo, cispo and vespo on this process: `num_items` of all processes, or the
    tokens of all processes' masks, over the number of processes. None: this call's tokens."""
    if loss_type not in ("dapo", "cispo", "vespo"):
        return None
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
    if num_items is None:
        if processes == 1:
            return None
        num_items = mask.to(torch.float32).sum()
        torch.distributed.all_reduce(num_items)
    return torch.as_tensor(num_items, dtype=torch.float32, device=mask.device) / processes


def check_ratio(ratio: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`vllm_is_ratio` as (B, 1) or (B, T); ValueError for another shape."""
    if ratio is None:
        return None
    rows, length = shape
    if ratio.ndim == 1:
        ratio = ratio[:, None]
    if ratio.ndim != 2 or ratio.shape[0] != rows or ratio.shape[1] not in (1, length):
        raise ValueError(
            f"vllm_is_ratio must be ({rows},), ({rows}, 1) or ({rows}, {length}), got "
            f"{tuple(ratio.shape)}"
        )
    return ratio


@dataclass(frozen=True)
class GRPOCall:
    """One call's tensors, and its loss from log-probs or from the head's input."""

    config: GRPOLossConfig
    advantages: Tensor
    mask: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    ratio: Tensor | None

    @property
    def corrected_kl(self) -> bool:
        return self.config.kl_bias_correction and self.config.beta != 0

    @property
    def folds_ratio(self) -> bool:
        """Whether the rollout's ratio goes into vespo's weight."""
        return self.ratio is not None and self.config.loss_type == "vespo"

    @property
    def needs_logps(self) -> bool:
        """Whether a metric, or an input, is made from the policy's own log-probs."""
        return self.corrected_kl or (self.folds_ratio and self.old_logps is None)

    def _tokens(self, logps: Tensor | None) -> tuple[GRPOLossConfig, dict[str, Any]]:
        """Config and per-token inputs with the rollout's ratio in the form our losses take."""
        config, shape = self.config, self.mask.shape
        tokens = {"ref_logps": self.ref_logps if config.beta else None}
        ratio = check_ratio(self.ratio, shape)
        if ratio is None:
            return config, tokens
        if not self.folds_ratio:
            return config, {**tokens, "token_weights": ratio.expand(shape)}
        # The sampler's log-probs that have this ratio to the old ones; one for a whole completion
        # stands at its first token.
        old = self.old_logps
        if old is None:
            assert logps is not None  # `needs_logps` says so
            old = logps.detach()
        gap, kind = ratio.to(torch.float32).log().expand(shape), "token_truncate"
        if ratio.shape[1] == 1:
            valid = self.mask != 0
            gap = torch.where(valid & (valid.cumsum(-1) == 1), gap, 0.0)
            kind = "sequence_truncate"
        return replace(config, rollout_correction=kind), {**tokens, "rollout_logps": old - gap}

    def per_token(self, logps: Tensor) -> TokenLosses:
        config, tokens = self._tokens(logps)
        return grpo_token_loss(
            logps, self.old_logps, self.advantages, self.mask, config=config, **tokens
        )

    def reduced(self, logps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        config, tokens = self._tokens(logps)
        loss, metrics = grpo_loss(
            logps, self.old_logps, self.advantages, self.mask, config=config, **tokens
        )
        if self.corrected_kl:
            with torch.no_grad():
                metrics["kl"] = self._mean(self.per_token(logps).kl)
        return loss, self._metrics(metrics)

    def reduced_head(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: dict[str, Any],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        config, tokens = self._tokens(None)
        loss, metrics = linear_grpo_loss(
            hidden,
            weight,
            labels,
            self.advantages,
            self.mask,
            old_logps=self.old_logps,
            bias=bias,
            config=config,
            **tokens,
            **head,
        )
        return loss, self._metrics(metrics)

    def padded_luspo(self, logps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Liger's mean for luspo: of (tokens of the completion) x loss over all B L positions,
        padding included, where the loss is 0."""
        out = self.per_token(logps)
        lengths = (self.mask != 0).sum(-1, keepdim=True)
        metrics = {"kl": self._mean(out.kl), "clip_region": self._mean(out.clipped)}
        return (out.loss * lengths).mean(), self._metrics(metrics)

    def _mean(self, values: Tensor) -> Tensor:
        return values.sum() / (self.mask != 0).sum().clamp(min=1)

    def _metrics(self, metrics: dict[str, Tensor]) -> tuple[Tensor, ...]:
        clipped = metrics.get("clip_region")
        if clipped is None:  # sapo and vespo have nothing to clip
            clipped = torch.zeros((), device=self.mask.device)
        return (metrics["kl"], clipped) if self.config.beta else (clipped,)
