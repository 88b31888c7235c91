"""Log-probabilities of given tokens, entropy and log-sum-exp of rows of logits, in one pass.

For a row x of V logits with temperature T and labels y_k, with z = x / T and m = max z:

    lse     = m + log sum_j exp(z_j - m)
    logp_k  = (z_{y_k} - m) - log sum_j exp(z_j - m)
    entropy = log sum_j exp(z_j - m) - sum_j p_j (z_j - m),     p_j = exp(z_j - lse)

and for upstream gradients g_k (logps), h (entropy) and l (lse)

    dL/dx_j = (1/T) [ sum_{k: y_k = j} g_k + p_j (l - sum_k g_k) - h p_j (z_j - sum_i p_i z_i) ]

The entropy term is written so that it stays finite where p_j = 0: p_j (log p_j + entropy) would be
0 * -inf there. Everything is taken relative to m, because logits may share a large offset.
Logits at -inf have p = 0; a row of only -inf, or with +inf or NaN, gives NaN, but for the lse of
only -inf, which is -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vcr1_fast.ops import backend, host_memory
from vcr1_fast.ops.gather_reference import (
    KERNEL_DTYPES,
    LogProbs,
    allocate,
    reference_backward,
    reference_backward_,
    reference_forward,
)
from vcr1_fast.ops.gather_reference import reference as reference  # part of this module's API


def _forward_fake(logits, labels, mask, row_temperature, temperature, entropy):
    return allocate(logits, labels, entropy)


def _native_forward(logits, labels, mask, row_temperature, temperature, entropy):
    if logits.dtype not in KERNEL_DTYPES:
        return reference_forward(logits, labels, mask, row_temperature, temperature, entropy)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    logps, row_entropy, lse, stats = allocate(logits, labels, entropy)
    backend.native.gather_logprobs(
        logits,
        labels,
        mask,
        row_temperature,
        temperature,
        logps,
        row_entropy if entropy else None,
        lse,
        stats,
        torch.get_num_threads(),
    )
    return logps, row_entropy, lse, stats


def _native_backward(logits, *args):
    if logits.dtype not in KERNEL_DTYPES:
        return reference_backward(logits, *args)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.device.type == "cpu":
        grad = host_memory.empty(logits.shape, logits.dtype)
    else:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    backend.native.gather_logprobs_backward(logits, *args, grad, torch.get_num_threads())
    return grad


def _native_backward_(logits, *args):
    if logits.dtype not in KERNEL_DTYPES or logits.stride(-1) != 1:
        return reference_backward_(logits, *args)
    backend.native.gather_logprobs_backward(logits, *args, logits, torch.get_num_threads())


_STATE = "Tensor? mask, Tensor? row_temperature, float temperature"
_UPSTREAM = "Tensor grad_logps, Tensor? grad_entropy, Tensor? grad_lse"

forward_op = backend.Op(
    "gather_logprobs",
    f"(Tensor logits, Tensor labels, {_STATE}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
backward_op = backend.Op(
    "gather_logprobs_backward",
    f"(Tensor logits, Tensor labels, Tensor logps, Tensor stats, {_STATE}, {_UPSTREAM}) -> Tensor",
    lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
inplace_backward_op = backend.Op(
    "gather_logprobs_backward_",
    f"(Tensor(a!) logits, Tensor labels, Tensor logps, Tensor stats, {_STATE}, {_UPSTREAM}) -> ()",
    lambda logits, *_: None,
)
forward_op.register("reference", reference_forward)
backward_op.register("reference", reference_backward)
inplace_backward_op.register("reference", reference_backward_)
for _backend in ("cpu", "cuda"):
    forward_op.register(_backend, _native_forward)
    backward_op.register(_backend, _native_backward)
    inplace_backward_op.register(_backend, _native_backward_)
forward_op.register("triton", backend.from_triton("gather_logprobs", "forward"))
backward_op.register("triton", backend.from_triton("gather_logprobs", "backward"))
inplace_backward_op.register("triton", backend.from_triton("gather_logprobs", "backward_"))


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, mask, row_temperature, temperature, entropy, inplace):
        logps, row_entropy, lse, stats = forward_op(
            logits, labels, mask, row_temperature, temperature, entropy
        )
        ctx.save_for_backward(logits, labels, logps, stats, mask, row_temperature)
        ctx.temperature = temperature
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(row_entropy)
        return logps, row_entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps, grad_entropy, grad_lse):
        logits, labels, logps, stats, mask, row_temperature = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros_like(logps)
        grads = [g if g is None else g.contiguous() for g in (grad_logps, grad_entropy, grad_lse)]
        args = (labels, logps, stats, mask, row_temperature, ctx.temperature, *grads)
        if ctx.inplace:
            inplace_backward_op(logits, *args)
            # So that a second backward pass, or another user of the logits, raises.
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            grad = backward_op(logits, *args)
        return grad, None, None, None, None, None, None


def row_temperatures(temperature: float | Tensor, lead: torch.Size, device: torch.device):
    """`(row_temperature, temperature)` as the ops take them; ValueError unless positive."""
    if isinstance(temperature, Tensor):
        rows = temperature.detach().to(device, torch.float32)
        return rows.expand(lead).contiguous(), 1.0
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return None, float(temperature)


def row_mask(mask: Tensor | None, lead: torch.Size) -> Tensor | None:
    """`mask` as the ops take it: bool, contiguous, of shape `lead`."""
    if mask is None:
        return None
    return mask.to(torch.bool).expand(lead).contiguous()


def check_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V > 0, got {tuple(logits.shape)}")
    lead = logits.shape[:-1]
    if labels.shape != lead and not (labels.ndim == logits.ndim and labels.shape[:-1] == lead):
        raise ValueError(
            f"labels must be {tuple(lead)} or {(*lead, 'K')} for logits {tuple(logits.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")


def overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory (expanded rows, sliding windows)."""
    reach = 1  # elements that the dimensions so far, those of smaller strides, extend over
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def gather_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> LogProbs:
    """Log-probabilities of `labels` under softmax(logits / temperature), one pass, no copy.

    logits: (..., V) float32, bfloat16, float16 (float64 by the reference); rows may be strided.
    labels: (...) or (..., K) integers in [0, V); a row may ask for K tokens.
    temperature: positive; a number, or a tensor that broadcasts to (...), one value a row.
    mask: broadcasts to (...); rows where it is false are not read, give 0 and get gradient 0, and
        may hold any label.
    entropy: also return the entropy of each row, in nats.
    inplace_backward: the backward pass writes the gradient over the logits, which spares a second
        logits-sized tensor. Only when nothing else needs them; a second backward pass raises.
        Ignored inside torch.compile.
    out_dtype: of the results; sums are float32 (float64 for float64) whatever it is.

    Differentiable once in logps, entropy and lse with respect to the logits; not in temperature.
    Rows whose upstream gradients are all 0 cost a write of zeros. ValueError for shapes, dtypes,
    labels or temperatures that do not fit; on CUDA, where values are not looked at, a label out of
    range gives NaN.
    """
    check_logits(logits, labels)
    lead = logits.shape[:-1]
    several = labels.ndim == logits.ndim
    rows_t, scalar_t = row_temperatures(temperature, lead, logits.device)
    ids = labels if several else labels[..., None]
    # In place needs memory of its own for each row, and functional graphs cannot express it.
    inplace = inplace_backward and not torch.compiler.is_compiling() and not overlaps(logits)
    logps, row_entropy, lse = _GatherLogprobs.apply(
        logits,
        ids.to(torch.int64).contiguous(),
        row_mask(mask, lead),
        rows_t,
        scalar_t,
        entropy,
        inplace,
    )
    logps = logps if several else logps[..., 0]
    return LogProbs(
        logps.to(out_dtype), row_entropy.to(out_dtype) if entropy else None, lse.to(out_dtype)
    )
