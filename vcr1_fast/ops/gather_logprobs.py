"""Log-probabilities of given tokens, entropy and log-sum-exp of rows of logits, in one pass.

For a row x of V logits with temperature T and labels y_k, with z = x / T and m = max z:

    lse     = m + log sum_j exp(z_j - m)
    logp_k  = (z_{y_k} - m) - log sum_j exp(z_j - m)
    entropy = log sum_j exp(z_j - m) - sum_j p_j (z_j - m),     p_j = exp(z_j - lse)

and for upstream gradients g_k (logps), h (entropy) and l (lse)

    dL/dx_j = (1/T) [ sum_{k: y_k = j} g_k + p_j (l - sum_k g_k) - h p_j (z_j - sum_i p_i z_i) ]

The entropy term is written so that it stays finite where p_j = 0: p_j (log p_j + entropy) would be
0 * -inf there. Everything is relative to m, because logits may share a large offset. Logits at -inf
have p = 0. A row of only -inf, or with +inf or NaN, gives NaN, except that the lse of only -inf is
-inf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vcr1_fast.ops import backend, host_memory

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LogProbs(NamedTuple):
    """`logps` has the shape of the labels, `entropy` (None unless requested) and `lse` that of the
    logits without the vocabulary.

    A row of only -inf is no distribution: its lse is -inf, the sum of no terms, on every backend;
    everything else, gradients included, is NaN. With +inf or NaN in a row, lse is NaN too (for
    +inf, the reference in plain torch gives +inf).
    """

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
) -> LogProbs:
    """The specification in plain torch, differentiable; computes in float32 (float64 for float64).

    Arguments as in `gather_logprobs`. Masked rows must hold valid labels and finite logits.
    """
    x = logits.to(accumulation_dtype(logits))
    z = x / temperature[..., None] if isinstance(temperature, Tensor) else x / temperature
    log_p = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    several = labels.ndim == logits.ndim
    logps = log_p.gather(-1, labels if several else labels[..., None])
    logps = logps if several else logps[..., 0]
    # A logit at -inf has no share in the entropy: 0 * -inf would be NaN.
    row_entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    if mask is not None:
        logps = logps.masked_fill(~(mask[..., None] if several else mask), 0)
        lse = lse.masked_fill(~mask, 0)
        row_entropy = row_entropy.masked_fill(~mask, 0)
    return LogProbs(logps, row_entropy if entropy else None, lse)


# The ops take labels (..., K), mask (...) bool, row_temperature (...) float32, all contiguous.
# `stats` (..., 3) carries max x, log sum exp(z - m) and sum p (z - m) to the backward pass.


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the ops compute: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def allocate(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    lead = logits.shape[:-1]
    dtype = accumulation_dtype(logits)
    shapes = (labels.shape, lead if entropy else (0,), lead, (*lead, 3))
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)


def _scaled(
    logits: Tensor, mask: Tensor | None, row_temperature: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor | float]:
    """((logits - maximum) / T in the accumulation dtype, maximum (..., 1), T (..., 1))."""
    x = logits.to(accumulation_dtype(logits))
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    t = temperature if row_temperature is None else row_temperature[..., None].to(x.dtype)
    # The maximum is subtracted before the division, as in the kernels: the backends round alike.
    top = x.amax(-1, keepdim=True)
    return (x - top) / t, top, t


def check_values(
    labels: Tensor, mask: Tensor | None, row_temperature: Tensor | None, vocab: int
) -> None:
    """ValueError for labels or temperatures of unmasked rows that are out of range; CPU only."""
    if labels.device.type != "cpu":
        return  # reading values of a GPU would synchronise
    bad = (labels < 0) | (labels >= vocab)
    if mask is not None:
        bad &= mask[..., None]
    if bad.any():
        raise ValueError(f"labels: {labels[bad][0].item()} is outside a vocabulary of {vocab}")
    if row_temperature is None:
        return
    bad = ~((row_temperature > 0) & row_temperature.isfinite())
    if mask is not None:
        bad &= mask
    if bad.any():
        raise ValueError(
            f"temperature: a row holds {row_temperature[bad][0].item()}, expected a positive one"
        )


def reference_forward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, ...]:
    if logits.numel() == 0:
        return allocate(logits, labels, entropy)
    check_values(labels, mask, row_temperature, logits.shape[-1])
    d, top, t = _scaled(logits, mask, row_temperature, temperature)
    # d <= 0, so no exponential overflows and the sum is at least 1.
    log_sum = d.exp().sum(-1, keepdim=True).log()
    index = labels if mask is None else labels.masked_fill(~mask[..., None], 0)
    logps = d.gather(-1, index) - log_sum
    mean_d = ((d - log_sum).exp() * d.masked_fill(d == -torch.inf, 0)).sum(-1, keepdim=True)
    # A row of only -inf: the shifted logits are NaN, the sum of no terms is -inf.
    lse = torch.where(top == -torch.inf, top, top / t + log_sum)
    row_entropy, stats = log_sum - mean_d, torch.cat([top, log_sum, mean_d], -1)
    if mask is not None:
        logps, row_entropy, lse, stats = (
            x.masked_fill(~mask[..., None], 0) for x in (logps, row_entropy, lse, stats)
        )
    return logps, row_entropy[..., 0] if entropy else lse.new_empty(0), lse[..., 0], stats


class BackwardArguments(NamedTuple):
    """Arguments of the backward ops after the logits, in schema order."""

    labels: Tensor
    logps: Tensor
    stats: Tensor
    mask: Tensor | None
    row_temperature: Tensor | None
    temperature: float
    grad_logps: Tensor
    grad_entropy: Tensor | None
    grad_lse: Tensor | None


def reference_backward(logits: Tensor, *args: Any) -> Tensor:
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    a = BackwardArguments(*args)
    mask, grads, grad_entropy = a.mask, a.grad_logps, a.grad_entropy
    d, _, t = _scaled(logits, mask, a.row_temperature, a.temperature)
    p = (d - a.stats[..., 1:2]).exp()
    grad = p * -grads.sum(-1, keepdim=True)
    if a.grad_lse is not None:
        grad += p * a.grad_lse[..., None]
    if grad_entropy is not None:
        shifted = d.masked_fill(d == -torch.inf, 0) - a.stats[..., 2:3]
        grad -= p * grad_entropy[..., None] * shifted
    index = a.labels if mask is None else a.labels.masked_fill(~mask[..., None], 0)
    grad = grad.scatter_add(-1, index, grads) / t
    # As the kernels: a row without upstream gradient is not read, and NaN in it does no harm.
    dead = (grads == 0).all(-1)
    for upstream in (grad_entropy, a.grad_lse):
        if upstream is not None:
            dead &= upstream == 0
    if mask is not None:
        dead |= ~mask
    return grad.masked_fill(dead[..., None], 0).to(logits.dtype)


def reference_backward_(logits: Tensor, *args: Any) -> None:
    logits.copy_(reference_backward(logits, *args))


def _forward_fake(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, entropy = rest
    return allocate(logits, labels, entropy)


def _native_forward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, ...]:
    if logits.dtype not in KERNEL_DTYPES:
        return reference_forward(logits, labels, mask, row_temperature, temperature, entropy)
    if logits.stride(-1) != 1:
        # The kernels read a row as one stretch; rows may have any distance.
        logits = logits.contiguous()
    logps, row_entropy, lse, stats = allocate(logits, labels, entropy)
    backend.native.gather_logprobs(
        logits=logits,
        labels=labels,
        mask=mask,
        row_temperature=row_temperature,
        temperature=temperature,
        logps=logps,
        entropy=row_entropy if entropy else None,
        lse=lse,
        stats=stats,
        num_threads=torch.get_num_threads(),
    )
    return logps, row_entropy, lse, stats


def _native_backward(logits: Tensor, *args: Any) -> Tensor:
    if logits.dtype not in KERNEL_DTYPES:
        return reference_backward(logits, *args)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.device.type == "cpu":
        # Memory of earlier results: the system's zeroing of new pages costs more than the kernel.
        grad = host_memory.empty(logits.shape, logits.dtype)
    else:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch_backward(logits, args, grad)
    return grad


def _native_backward_(logits: Tensor, *args: Any) -> None:
    # The gradient of a contiguous copy would not reach the caller's memory.
    if logits.dtype not in KERNEL_DTYPES or logits.stride(-1) != 1:
        reference_backward_(logits, *args)
    else:
        _launch_backward(logits, args, logits)


def _launch_backward(logits: Tensor, args: tuple[Any, ...], grad: Tensor) -> None:
    given = BackwardArguments(*args)._asdict()
    threads = torch.get_num_threads()
    backend.native.gather_logprobs_backward(logits=logits, **given, grad=grad, num_threads=threads)


_STATE = "Tensor? mask, Tensor? row_temperature, float temperature"
_BACKWARD = backend.schema_of(BackwardArguments)

forward_op = backend.Op(
    "gather_logprobs",
    f"(Tensor logits, Tensor labels, {_STATE}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
backward_op = backend.Op(
    "gather_logprobs_backward",
    f"(Tensor logits, {_BACKWARD}) -> Tensor",
    lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
inplace_backward_op = backend.Op(
    "gather_logprobs_backward_",
    f"(Tensor(a!) logits, {_BACKWARD}) -> ()",
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
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        row_temperature: Tensor | None,
        options: tuple[float, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """options: temperature, entropy, inplace."""
        temperature, entropy, inplace = options
        logps, row_entropy, lse, stats = forward_op(
            logits, labels, mask, row_temperature, temperature, entropy
        )
        ctx.save_for_backward(logits, labels, logps, stats, mask, row_temperature)
        ctx.temperature = temperature
        ctx.inplace = inplace
        # None for an unused result, instead of zeros that the kernel would have to read.
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(row_entropy)
        return logps, row_entropy, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
    ) -> Any:
        logits, labels, logps, stats, mask, row_temperature = ctx.saved_tensors
        # Only entropy or lse were used; the op needs the log-probs' gradient in any case.
        if grad_logps is None:
            grad_logps = torch.zeros_like(logps)
        grads = [g if g is None else g.contiguous() for g in (grad_logps, grad_entropy, grad_lse)]
        args = (labels, logps, stats, mask, row_temperature, ctx.temperature, *grads)
        if ctx.inplace:
            inplace_backward_op(logits, *args)
            # Makes a second backward pass, or another user of the logits, raise.
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            grad = backward_op(logits, *args)
        return grad, None, None, None, None


def row_temperatures(
    temperature: float | Tensor, lead: torch.Size, device: torch.device
) -> tuple[Tensor | None, float]:
    """`(row_temperature, temperature)` as the ops take them; ValueError unless positive.

    A tensor is moved to `device`; its values are checked by the kernels, on the CPU only.
    """
    if isinstance(temperature, Tensor):
        if temperature.is_meta and device.type != "meta":
            raise ValueError(f"temperature is on meta, but the op's other inputs on {device}")
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
    inplace_backward: the backward pass writes the gradient over the logits, which saves a second
        logits-sized tensor. Only when nothing else needs them; a second backward pass raises.
        Ignored inside torch.compile.
    out_dtype: dtype of the results; sums are float32 (float64 for float64) in any case.

    Differentiable once in logps, entropy and lse with respect to the logits; not in temperature.
    Rows whose upstream gradients are all 0 cost a write of zeros. ValueError for shapes, dtypes,
    labels or temperatures that do not fit. On CUDA values are not checked: a label out of range
    gives NaN.
    """
    check_logits(logits, labels)
    lead = logits.shape[:-1]
    several = labels.ndim == logits.ndim
    rows_t, scalar_t = row_temperatures(temperature, lead, logits.device)
    ids = labels if several else labels[..., None]
    # In place needs rows that share no memory, and functional graphs cannot express it.
    inplace = inplace_backward and not torch.compiler.is_compiling() and not overlaps(logits)
    logps, row_entropy, lse = _GatherLogprobs.apply(
        logits,
        ids.to(torch.int64).contiguous(),
        row_mask(mask, lead),
        rows_t,
        (scalar_t, entropy, inplace),
    )
    logps = logps if several else logps[..., 0]
    return LogProbs(
        logps.to(out_dtype), row_entropy.to(out_dtype) if entropy else None, lse.to(out_dtype)
    )
