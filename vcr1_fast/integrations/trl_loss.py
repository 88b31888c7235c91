"""Computes TRL's `GRPOTrainer._compute_loss` by `grpo_loss`, with its arguments and metrics.

Left to TRL's own method: adaptive entropy; vespo with a bias-corrected KL at sequence level; a
trainer whose subclass overrides one of the methods in `HOOKS`, or that brings importance ratios
without the sampler's log-probs they come from; devices without our kernels.

Two differences. Metrics are reduced over the processes together and waited for once, not one by
one. With `off_policy_mask_threshold` after an update, a token that the sampler gave no log-prob
(nan) counts with its drift since the rollout, where TRL counts 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.ops import GRPOLossConfig, grpo_loss
from vcr1_fast.ops.grpo.config import CLIPPED_LOSSES, DEFAULT_AGGREGATION

HOOKS = ("get_off_policy_mask", "get_gamma_weights")
DIGESTS = ("6278f2efa0e5d410",)
"""Of `_compute_loss` and `HOOKS`: the same text in TRL 1.15 and 1.16."""

_FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def fused_compute_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The replacement of `GRPOTrainer._compute_loss`, `original`."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    hooks = {name: getattr(GRPOTrainer, name) for name in HOOKS}

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        overridden = any(getattr(type(self), name, f) is not f for name, f in hooks.items())
        if overridden or not _is_ours(self, inputs):
            return original(self, model, inputs)
        return compute_loss(self, model, inputs)

    return _compute_loss


def _is_ours(trainer: Any, inputs: dict[str, Any]) -> bool:
    corrected_kl = trainer.beta != 0.0 and trainer.args.use_bias_correction_kl
    odd_vespo = trainer.loss_type == "vespo" and trainer.importance_sampling_level != "token"
    return not (
        (trainer._entropy_bonus_enabled and trainer.use_adaptive_entropy)
        or (odd_vespo and corrected_kl)
        or (_corrects_rollout(trainer) and "sampling_per_token_logps" not in inputs)
        or trainer.loss_type not in DEFAULT_AGGREGATION
        or trainer.importance_sampling_level not in ("token", "sequence")
        or inputs["completion_ids"].device.type not in ("cpu", "cuda")
    )


def _corrects_rollout(trainer: Any) -> bool:
    return trainer.use_vllm and trainer.vllm_importance_sampling_correction


def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The loss of one micro-batch, 0-d, divided as TRL divides it; its metrics go to
    `trainer._metrics`."""
    prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
    completion_mask = inputs["completion_mask"]
    mask = completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]
    logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([prompt_ids, completion_ids], dim=1),
        torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
        completion_ids.size(1),
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{key: inputs.get(key) for key in _FORWARD_KEYS},
    )
    entropy_mask = None
    if trainer.top_entropy_quantile < 1.0:
        quantile = 1 - trainer.top_entropy_quantile
        entropy_mask = trainer.get_high_entropy_mask(entropies, mask, quantile)

    mode = "train" if trainer.model.training else "eval"
    accumulation = trainer.current_gradient_accumulation_steps if mode == "train" else 1.0
    config = loss_config(trainer, inputs["num_items_in_batch"], mode, accumulation)
    sampled = inputs.get("sampling_per_token_logps")
    needs_sampled = config.rollout_correction or config.off_policy_threshold is not None
    loss, metrics = grpo_loss(
        logps,
        inputs.get("old_per_token_logps"),
        inputs["advantages"],
        mask,
        ref_logps=inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
        entropy=entropies,
        rollout_logps=sampled if needs_sampled else None,
        token_weights=None if entropy_mask is None else entropy_mask.to(logps.dtype),
        config=config,
    )
    log = _Log(trainer, mode, mask)
    if trainer._entropy_bonus_enabled:
        acting = mask if entropy_mask is None else mask * entropy_mask
        bonus = (entropies.detach() * acting).sum() / acting.sum().clamp(min=1.0)
        log.gathered("policy_loss", loss.detach() + config.entropy_coef * bonus, Tensor.nanmean)
    if config.resolved_aggregation != "num_items":
        loss = loss / accumulation
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * aux_loss / accumulation
        log.gathered("aux_loss", aux_loss.detach(), Tensor.mean)
    log.token_mean("kl", _logged_kl(trainer, inputs, logps.detach(), mask, metrics))
    log.token_mean("entropy", metrics["entropy"] * metrics["num_tokens"])
    _log_ratios(trainer, log, inputs, logps.detach(), mask)
    log.write()
    if trainer._entropy_bonus_enabled and mode == "train" and trainer.accelerator.sync_gradients:
        trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)
    return loss


def loss_config(trainer: Any, num_items: Tensor, mode: str, accumulation: float) -> GRPOLossConfig:
    """The trainer's settings as ours. Sums over tokens are divided by the tokens of the
    accumulation window; the caller divides all other losses."""
    args, loss_type = trainer.args, trainer.loss_type
    by_items = DEFAULT_AGGREGATION[loss_type] == "num_items"
    if by_items:
        num_items = num_items.clamp(min=1.0) / trainer.accelerator.num_processes
        if mode == "train":  # the count spans the batch that was generated
            num_items = num_items * accumulation / args.steps_per_generation
    entropy_coef = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    corrects = _corrects_rollout(trainer)
    return GRPOLossConfig(
        loss_type=loss_type,
        level="token" if loss_type == "vespo" else trainer.importance_sampling_level,
        eps_low=trainer.epsilon_low,
        eps_high=trainer.epsilon_high,
        delta=args.delta if loss_type in CLIPPED_LOSSES else None,
        beta=trainer.beta,
        kl_input_clamp=None,
        kl_bias_correction=bool(args.use_bias_correction_kl),
        log_ratio_clamp=None,
        sapo_tau_pos=args.sapo_temperature_pos,
        sapo_tau_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        rollout_correction=trainer.vllm_importance_sampling_mode if corrects else None,
        rollout_min=trainer.vllm_importance_sampling_clip_min if corrects else None,
        rollout_max=trainer.vllm_importance_sampling_clip_max if corrects else None,
        off_policy_threshold=trainer.off_policy_mask_threshold,
        entropy_coef=entropy_coef / accumulation if by_items else entropy_coef,
        entropy_aggregation="token_mean",
        max_length=trainer.max_completion_length,
        num_items=num_items if by_items else None,
    )


def _logged_kl(
    trainer: Any, inputs: dict[str, Any], logps: Tensor, mask: Tensor, metrics: dict[str, Tensor]
) -> Tensor | None:
    """Sum of what TRL logs as kl: the estimator with its bias correction."""
    if trainer.beta == 0.0:
        return None
    if not trainer.args.use_bias_correction_kl:
        return metrics["kl"] * metrics["num_tokens"]
    gap = inputs["ref_per_token_logps"] - logps
    return ((gap.exp() - gap - 1) * _ratio(trainer, inputs, logps, mask) * mask).sum()


def _ratio(trainer: Any, inputs: dict[str, Any], logps: Tensor, mask: Tensor) -> Tensor:
    """(B, T), or (B, 1) at sequence level."""
    old = inputs.get("old_per_token_logps")
    log_ratio = torch.zeros_like(logps) if old is None else logps - old
    if trainer.importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True)
        log_ratio = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return log_ratio.exp()


def _log_ratios(
    trainer: Any, log: _Log, inputs: dict[str, Any], logps: Tensor, mask: Tensor
) -> None:
    """What TRL logs of the ratios, by loss type."""
    advantages, loss_type = inputs["advantages"], trainer.loss_type
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    if loss_type == "vespo":
        args, old = trainer.args, inputs.get("old_per_token_logps")
        weights = trainer.get_gamma_weights(
            advantages=advantages,
            log_ratio_per_token=torch.zeros_like(logps) if old is None else logps - old,
            mask=mask,
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            k_pos=args.vespo_k_pos,
            lambda_pos=args.vespo_lambda_pos,
            k_neg=args.vespo_k_neg,
            lambda_neg=args.vespo_lambda_neg,
        )
        log.masked_mean("vespo/phi_seq_mean", weights)
    elif loss_type == "cispo":
        ratio = _ratio(trainer, inputs, logps, mask)
        over = (ratio > trainer.epsilon_high) & (advantages > 0)
        log.masked_mean("cispo_clip_ratio", over.float())
    elif loss_type in CLIPPED_LOSSES:
        ratio = _ratio(trainer, inputs, logps, mask)
        if trainer.args.delta is not None:
            ratio = ratio.clamp(max=trainer.args.delta)
        low = ((ratio < 1 - trainer.epsilon_low) & (advantages < 0)).float()
        high = ((ratio > 1 + trainer.epsilon_high) & (advantages > 0)).float()
        log.masked_mean("clip_ratio/low_mean", low)
        log.masked_mean("clip_ratio/high_mean", high)
        log.masked_mean("clip_ratio/region_mean", low + high)
        log.extremes(low, high)


class _Log:
    """Metrics of one micro-batch, held on the device until all of them are written together."""

    def __init__(self, trainer: Any, mode: str, mask: Tensor) -> None:
        self._accelerator, self._metrics = trainer.accelerator, trainer._metrics[mode]
        self._mask, self._tokens = mask, mask.sum().float()
        self._means: dict[str, tuple[Tensor, Tensor]] = {}
        self._values: dict[str, Tensor] = {}

    def token_mean(self, name: str, total: Tensor | None) -> None:
        """`total` over the tokens of all processes; None is left out."""
        if total is not None:
            self._means[name] = (total, self._tokens)

    def masked_mean(self, name: str, x: Tensor) -> None:
        """Mean of x (B, T) over tokens, or of x (B, 1) over completions, over all processes."""
        if x.shape[1] == 1:
            self._means[name] = (x.sum(), self._tokens.new_tensor(len(x)))
        else:
            self.token_mean(name, (x * self._mask).sum())

    def gathered(self, name: str, value: Tensor, reduction: Callable[[Tensor], Tensor]) -> None:
        """One value of each process."""
        self._values[name] = reduction(self._accelerator.gather(value))

    def extremes(self, low: Tensor, high: Tensor) -> None:
        """The least and the most clipped completion; one without tokens (nan) is passed over."""
        from trl.trainer.utils import nanmax, nanmin

        both = torch.stack([low, high], dim=1)
        if low.shape[1] > 1:
            both = (both * self._mask[:, None]).sum(-1, keepdim=True)
            both = both / self._mask.sum(-1)[:, None, None]
        both = self._accelerator.gather(both[:, :, 0])
        self._values["clip_ratio/low_min"] = nanmin(both[:, 0])
        self._values["clip_ratio/high_max"] = nanmax(both[:, 1])

    def write(self) -> None:
        """One collective for all means, one wait for all numbers."""
        pairs = torch.stack([torch.stack([a.float(), b]) for a, b in self._means.values()])
        totals = self._accelerator.reduce(pairs, reduction="sum")
        means = totals[:, 0] / totals[:, 1].clamp(min=1.0)
        names = [*self._means, *self._values]
        numbers = torch.cat([means, *(v.float().reshape(1) for v in self._values.values())])
        for name, number in zip(names, numbers.tolist(), strict=True):
            self._metrics[name].append(number)
