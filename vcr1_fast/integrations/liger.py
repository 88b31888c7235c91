"""Liger-Kernel's GRPO functions on our ops, with its names, signatures, defaults and results.

    from vcr1_fast.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

Numbers are Liger's, with its conventions: log-ratios and KL are not clamped, cispo is bounded above
by the raw epsilon_high alone, the KL metric is taken after the bias correction. Faster here: masked
rows never reach the LM head or the softmax, rows may have any stride, and the forward pass makes
the gradient without an fp32 copy of the head.

Differences, all because Liger reads padding and we never do. Its fused luspo loss counts padding
tokens; ours follows its unfused one (tokens) or TRL's (sequences), which agree without padding. Its
vespo adds rollout ratios of padding tokens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.integrations.patching import Patch, Swap
from vcr1_fast.ops import (
    GRPOLossConfig,
    TokenLosses,
    gather_logprobs,
    grpo_loss,
    grpo_token_loss,
    linear_grpo_loss,
    linear_logprobs,
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


def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probs (B, L) in float32 of `input_ids`, without gradient; 0 where `mask` is 0.

    logits: (B, L + 1, V), whose last position is not read. input_ids, mask: (B, >= L), the
    last L columns count.
    """
    length = logits.shape[1] - 1
    with torch.no_grad():
        return gather_logprobs(
            logits[:, :-1],
            input_ids[:, input_ids.shape[1] - length :],
            temperature=temperature,
            mask=None if mask is None else mask[:, mask.shape[1] - length :],
        ).logps


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """GRPO loss of logits in memory, (B, L + 1, V): the last position predicts nothing.

    old_logp, ref_logp, completion_ids: (B, L); advantages: (B,), here also (B, L);
    vllm_is_ratio: (B,), (B, 1) or (B, L).
    inplace: the backward pass writes the gradient over the logits; a second one raises.

    Returns (loss, [mean KL if beta, share of clipped tokens]) if `reduce`, else the (B, L) tensors
    (loss, KL or None, clipped). ValueError for options that exclude each other.
    """
    length = completion_ids.shape[1]
    if logits.shape[:2] != (len(completion_ids), length + 1):
        raise ValueError(
            f"logits must be (B, L + 1, V) for completion_ids {tuple(completion_ids.shape)}, got "
            f"{tuple(logits.shape)}"
        )
    if completion_mask is None:
        completion_mask = torch.ones_like(completion_ids, dtype=torch.bool)
    config = liger_config(
        loss_type,
        importance_sampling_level,
        delta,
        beta=beta,
        eps_low=eps_low,
        eps_high=eps_high,
        max_length=length if max_completion_length is None else max_completion_length,
        kl_bias_correction=use_bias_correction_kl,
        sapo_tau_pos=sapo_temperature_pos,
        sapo_tau_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        num_items=dapo_tokens(loss_type, completion_mask, num_items_in_batch) if reduce else None,
    )
    # All L + 1 rows, the last one masked: a slice would cost its gradient a copy of the logits.
    logps = gather_logprobs(
        logits,
        torch.nn.functional.pad(completion_ids, (0, 1)),
        temperature=temperature,
        mask=torch.nn.functional.pad(completion_mask != 0, (0, 1)),
        inplace_backward=inplace,
    ).logps[:, :-1]
    call = GRPOCall(config, advantages, completion_mask, old_logp, ref_logp, vllm_is_ratio)
    if not reduce:
        out = call.per_token(logps)
        return out.loss, out.kl if beta else None, out.clipped
    loss, metrics = call.padded_luspo(logps) if loss_type == "luspo" else call.reduced(logps)
    return loss, list(metrics)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO loss of an LM head's tokens, without the logits in memory.

    Arguments in Liger's order and with its defaults. `compiled` and `chunk_size` have no effect:
    nothing is compiled, and `chunk_rows` sets the chunks.

    chunk_rows, softcap: as in `vcr1_fast.ops.linear_grpo_loss`.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        chunk_rows: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self.chunk_rows = chunk_rows
        self.softcap = softcap
        self._config(None, False)  # raises here, not at the first call, for impossible options

    def _config(self, num_items: Tensor | None, with_kl: bool) -> Any:
        # Read at each call, because trainers set attributes of the loss after it is made.
        return liger_config(
            self.loss_type,
            self.importance_sampling_level,
            self.delta,
            beta=self.beta if with_kl else 0.0,
            eps_low=self.epsilon_low,
            eps_high=self.epsilon_high,
            max_length=self.max_completion_length,
            kl_bias_correction=self.use_bias_correction_kl,
            sapo_tau_pos=self.sapo_temperature_pos,
            sapo_tau_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            num_items=num_items,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (mean KL if beta, share of clipped tokens)).

        _input, ref_input: (B, T, H); lin_weight, ref_weight: (V, H); selected_token_ids,
        attention_mask and the log-probs: (B, T); advantages: (B,), here also (B, T).
        Without `use_ref_model` the policy is its own reference: no KL, and 0 as its metric.
        ValueError if `use_ref_model` is set and no reference is given.
        """
        head: dict[str, Any] = {
            "temperature": self.temperature,
            "softcap": self.softcap,
            "chunk_rows": self.chunk_rows,
        }
        with_kl = self.use_ref_model and self.beta != 0
        if self.use_ref_model and ref_per_token_logps is None and ref_input is None:
            raise ValueError("use_ref_model needs ref_per_token_logps or ref_input")
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(
                "ref_per_token_logps and ref_input are both given; the former counts", stacklevel=2
            )
        if with_kl and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("ref_input needs ref_weight, got None")
            with torch.no_grad():
                ref_per_token_logps = linear_logprobs(
                    ref_input,
                    ref_weight.to(ref_input.dtype),
                    selected_token_ids,
                    None if ref_bias is None else ref_bias.to(ref_input.dtype),
                    mask=attention_mask,
                    **head,
                ).logps
        items = dapo_tokens(self.loss_type, attention_mask, num_items_in_batch)
        call = GRPOCall(
            self._config(items, with_kl),
            advantages,
            attention_mask,
            old_per_token_logps,
            ref_per_token_logps if with_kl else None,
            check_ratio(vllm_is_ratio, selected_token_ids.shape),
        )
        weight = lin_weight.to(_input.dtype)
        bias = None if bias is None else bias.to(_input.dtype)
        padded_luspo = self.loss_type == "luspo" and self.importance_sampling_level == "token"
        if call.needs_logps or padded_luspo:
            out = linear_logprobs(
                _input, weight, selected_token_ids, bias, mask=attention_mask, **head
            )
            loss, metrics = (call.padded_luspo if padded_luspo else call.reduced)(out.logps)
        else:
            loss, metrics = call.reduced_head(_input, weight, selected_token_ids, bias, head)
        if self.beta != 0 and not with_kl:
            metrics = (torch.zeros_like(metrics[-1]), *metrics)
        return loss, metrics


class LigerFusedLinearGRPOFunction:
    """The function form: `apply` takes Liger's arguments in its order."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        vllm_is_ratio: Tensor | None = None,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `LigerFusedLinearGRPOLoss(...)(...)`."""
        loss = LigerFusedLinearGRPOLoss(
            beta, compiled, use_ref_model, chunk_size, epsilon_low, epsilon_high, loss_type,
            max_completion_length, importance_sampling_level, sapo_temperature_pos,
            sapo_temperature_neg, temperature, delta, use_bias_correction_kl, vespo_k_pos,
            vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg,
        )  # fmt: skip
        return loss(
            _input, weight, selected_token_ids, attention_mask, advantages, bias,
            ref_per_token_logps, old_per_token_logps, ref_input, ref_weight, ref_bias,
            vllm_is_ratio, num_items_in_batch,
        )  # fmt: skip


def _swap(owner: str, ours: Any, checked: Callable[..., Any], *first: str) -> Swap:
    """A swap of the object of the same name for `ours`; its parameters must equal `checked`'s."""
    parameters = inspect.signature(checked).parameters.values()
    names = (p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return Swap(owner, ours.__name__, lambda _: ours, (*first, *names))


patch_liger = Patch(
    "liger-kernel",
    ("0.8.4", "0.8.5"),
    {
        "grpo_loss": [
            _swap("liger_kernel.transformers.grpo_loss", triton_grpo_loss, triton_grpo_loss),
            _swap(
                "liger_kernel.ops.grpo_loss",
                fused_selective_log_softmax,
                fused_selective_log_softmax,
            ),
        ],
        "fused_linear": [
            _swap(
                "liger_kernel.chunked_loss.grpo_loss",
                LigerFusedLinearGRPOLoss,
                LigerFusedLinearGRPOLoss.forward,
            ),
            _swap(
                "liger_kernel.chunked_loss.grpo_loss",
                LigerFusedLinearGRPOFunction,
                LigerFusedLinearGRPOFunction.apply,
                "ctx",
            ),
        ],
    },
    package="liger_kernel",
)
"""Replaces Liger's GRPO functions wherever `liger_kernel` itself holds them; code that imported
them by value before keeps the originals."""
