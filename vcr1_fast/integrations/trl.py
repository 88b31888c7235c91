"""TRL on our ops: `patch_trl()`, checked on TRL 1.15 and 1.16.

    from vcr1_fast.integrations.trl import patch_trl
    patch_trl()                    # all of it; patch_trl("logprobs") one part
    with patch_trl(): ...          # or for a while

head      the class behind TRL's fused LM head (GRPO, RLOO, DPO and others), by `linear_logprobs`.
          Left to TRL's own class: calls that ask for one of its other outputs (log_sum_sq_probs,
          mean_logits, is_top1: SFT and KTO do), a logit scale that is not positive, and tensors
          that are sharded or lie neither on a CPU nor on a GPU of CUDA's or ROCm's.
          Where TRL sends every position through the head (1.16 off a GPU), only those with a label
          go, as they do on its GPUs. TRL 1.15's own class runs on a GPU alone; ours on both.
logprobs  `selective_log_softmax`, `selective_log_softmax_and_entropy` and `entropy_from_logits`,
          wherever a module of TRL has imported them, by `gather_logprobs`. Results have TRL's
          dtypes: the logits' own, but float32 where TRL would run its GPU kernel. A logit of -inf
          adds nothing to an entropy (TRL: nan). Left to TRL: bfloat16 and float16 on a CPU, where
          its tests ask for the very bits of torch's steps, each rounded (ours: rounded once).
loss      `GRPOTrainer._compute_loss` by `grpo_loss`, for its eight loss types: `trl_loss.py`.

Under ZeRO-3 the head's weight is gathered for the backward pass too, as TRL does it; FSDP2 and PEFT
see no difference, since the head is handed over by TRL's own code. Trainers that have been created
already are patched as well: they look these names up in each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vcr1_fast.integrations.patching import Patch, Swap
from vcr1_fast.integrations.trl_loss import DIGESTS, HOOKS, fused_compute_loss
from vcr1_fast.ops import LogProbs, gather_logprobs, linear_logprobs
from vcr1_fast.ops.linear_logprobs import LinearLogprobs

_UTILS = "trl.trainer.utils"
_OUTPUTS = {"log_probs", "entropy"}
_ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _is_ours(tensor: Tensor) -> bool:
    return tensor.device.type in ("cpu", "cuda") and not isinstance(tensor, DTensor)


def _are_ours(logits: Tensor) -> bool:
    half_on_cpu = logits.device.type == "cpu" and logits.element_size() == 2
    return _is_ours(logits) and not half_on_cpu


def fused_head(original: Any) -> Any:
    """The replacement of TRL's `ChunkedLogProbFunction`, `original`."""

    class ChunkedLogProbFunction:
        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = _ALL_OUTPUTS,
        ) -> tuple[Tensor | None, ...]:
            """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) ->
            (log-probs (N,), entropy (N,) or None, None, None, None), float32."""
            tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
            if not (set(outputs) <= _OUTPUTS and logit_scale > 0 and all(map(_is_ours, tensors))):
                return original.apply(
                    hidden,
                    weight,
                    bias,
                    targets,
                    temperature,
                    chunk_size,
                    final_logit_softcapping,
                    logit_scale,
                    outputs,
                )
            # With a = c / s: c tanh(s x / c) / T = a tanh(x / a) / (T / s).
            softcap = final_logit_softcapping
            logps, entropy, _ = _head_logprobs(
                hidden,
                weight,
                bias,
                targets,
                temperature=temperature / logit_scale,
                softcap=softcap if softcap is None else softcap / logit_scale,
                entropy="entropy" in outputs,
            )
            return logps, entropy, None, None, None

        forward = original.forward  # a second patch checks this signature

    return ChunkedLogProbFunction


def _head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> LogProbs:
    if hasattr(weight, "ds_status"):  # a ZeRO-3 parameter, gathered now, away by the backward pass
        options = (temperature, softcap or 0.0, entropy, 0)
        logps, row_entropy, lse = _GatheredLogprobs.apply(
            hidden, weight, bias, targets[:, None], None, None, options
        )
        return LogProbs(logps[:, 0], row_entropy if entropy else None, lse)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = bias if bias is None else bias.to(hidden.dtype)
    return linear_logprobs(
        hidden,
        weight,
        targets,
        bias,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
    )


class _GatheredLogprobs(LinearLogprobs):
    """With a head that is whole only inside TRL's context, which the backward pass enters again."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from trl.trainer import utils

        with utils.maybe_gather_lm_head_ctx(*ctx.saved_tensors[1:3]):
            return LinearLogprobs.backward(ctx, *gradients)


def compacting(original: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """TRL's question whether to leave positions without a label out of the head."""

    def compact(device: torch.device) -> bool:
        return original(device) or device.type == "cpu"

    return compact


def _out_dtype(logits: Tensor, index: Tensor | None, row_mask: Tensor | None) -> torch.dtype:
    """The dtype that TRL's function returns for these arguments."""
    from trl.trainer import utils

    on_gpu = utils._supports_trl_loss_kernel(logits, index, row_mask)
    return torch.float32 if on_gpu else logits.dtype


def selective_log_softmax(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The replacement of TRL's function of that name."""

    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        """logits (..., V), index (...) or (..., K) -> log-probs of the index' shape; 0 where
        row_mask, of that shape, is 0."""
        if not _are_ours(logits):
            return original(logits, index, temperature, row_mask)
        several = index.ndim == logits.ndim
        logps = gather_logprobs(
            logits,
            index,
            temperature=temperature,
            mask=None if row_mask is None or several else row_mask,
            out_dtype=_out_dtype(logits, index, row_mask),
        ).logps
        if row_mask is not None and several:  # one label of a row, not the row
            logps = logps.masked_fill(row_mask == 0, 0.0)
        return logps

    return selective_log_softmax


def selective_log_softmax_and_entropy(
    original: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The replacement of TRL's function of that name."""

    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """logits (..., V), index (...) -> (log-probs (...), entropy (...)) of logits / temperature;
        0 where row_mask (...) is 0."""
        if not _are_ours(logits) or index.ndim == logits.ndim:
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        found = gather_logprobs(
            logits,
            index,
            temperature=temperature,
            mask=row_mask,
            entropy=True,
            out_dtype=_out_dtype(logits, index, row_mask),
        )
        assert found.entropy is not None
        return found.logps, found.entropy if entropy_requires_grad else found.entropy.detach()

    return selective_log_softmax_and_entropy


def entropy_from_logits(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The replacement of TRL's function of that name."""

    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        """logits (..., V) -> entropy (...) in nats. Rows are never copied, whatever the size of
        the chunks."""
        if not _are_ours(logits):
            return original(logits, chunk_size)
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        dtype = _out_dtype(logits, None, None)
        found = gather_logprobs(logits, labels, entropy=True, out_dtype=dtype)
        assert found.entropy is not None
        return found.entropy

    return entropy_from_logits


patch_trl = Patch(
    "trl",
    ("1.15", "1.16"),
    {
        "head": (
            Swap(
                _UTILS,
                "_ChunkedLogProbFunction",
                fused_head,
                parameters=(
                    "ctx",
                    "hidden",
                    "weight",
                    "bias",
                    "targets",
                    "temperature",
                    "chunk_size",
                    "final_logit_softcapping",
                    "logit_scale",
                    "outputs",
                ),
            ),
            # The kernels ask the same question for what they can run: theirs stays.
            Swap(
                _UTILS,
                "_use_triton",
                compacting,
                parameters=("device",),
                copies=False,
                releases=("1.16",),
            ),
        ),
        "logprobs": (
            Swap(
                _UTILS,
                "selective_log_softmax",
                selective_log_softmax,
                parameters=("logits", "index", "temperature", "row_mask"),
            ),
            Swap(
                _UTILS,
                "selective_log_softmax_and_entropy",
                selective_log_softmax_and_entropy,
                parameters=("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
            ),
            Swap(
                _UTILS,
                "entropy_from_logits",
                entropy_from_logits,
                parameters=("logits", "chunk_size"),
            ),
        ),
        "loss": (
            Swap(
                "trl.trainer.grpo_trainer:GRPOTrainer",
                "_compute_loss",
                fused_compute_loss,
                parameters=("self", "model", "inputs"),
                digests=DIGESTS,
                relies_on=HOOKS,
            ),
        ),
    },
)
"""Replaces what the module names above, in the parts "head", "logprobs" and "loss"; see `Patch` for
how it is called and undone. `UnknownContract` for a release, a signature or a loss that it was not
checked on."""
