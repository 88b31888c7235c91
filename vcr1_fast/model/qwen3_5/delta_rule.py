"""The gated delta rule: linear attention whose state forgets and corrects.

A head keeps a state S (Dk, Dv). With unit keys k_t, queries q_t / sqrt(Dk) of unit length, values
v_t, log-decays g_t <= 0 and strengths b_t in (0, 1), a token does

    S <- e^g_t S,   S <- S + b_t k_t (v_t - S^T k_t)^T,   o_t = S^T q_t

`chunked` computes chunks of tokens at once (Yang et al., arXiv 2412.06464, section 3.3). With
c_t = g_1 + ... + g_t within a chunk and S its state before the chunk,

    A_ts = b_t e^(c_t - c_s) k_t k_s^T  for s < t,   (I + A) [U, W] = [b_t v_t, b_t e^c_t k_t]
    V' = U - W S                                      the values that the tokens write
    o_t = e^c_t S^T q_t + sum_s<=t e^(c_t - c_s) (q_t k_s^T) v'_s
    S <- e^c_C S + sum_t e^(c_C - c_t) k_t v'_t^T

so that only the state passes from chunk to chunk one after another. A token with b = 0 and g = 0
leaves the state as it is: padding behind a sequence.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 64
_EPSILON = 1e-6  # of the keys' and queries' norms, as the checkpoints were trained


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, Dv), in the values' dtype, and the state after the last token.

    Differentiable, also in the state. By FLA's kernels for half precision on CUDA where they are
    installed; by torch's operators otherwise, in float32 (float64 for float64).

    Args:
        query, key: (B, T, H, Dk), of any length: they are normalised here.
        value: (B, T, H, Dv).
        decay: (B, T, H) log-decay g <= 0.
        beta: (B, T, H) strength b.
        state: (B, H, Dk, Dv), float32 or float64; None: zero.
    """
    arguments = (query, key, value, decay, beta, state)
    # Under autocast the products of float32 inputs would run in half precision: an error of 5e-3
    # instead of 3e-7, which decoding (`one_token`) does not make.
    with torch.autocast(value.device.type, enabled=False):
        if _fla_takes(value):
            return _by_fla(*arguments)
        if not torch.is_grad_enabled():
            return chunked(*arguments)
        # Recomputed in the backward pass: the intermediate results of a token are some 60 times
        # its inputs, 265 to 489 KiB a layer in the released sizes.
        return checkpoint(chunked, *arguments, use_reentrant=False, preserve_rng_state=False)


def chunked(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`delta_rule` by torch's operators."""
    exact = torch.promote_types(value.dtype, torch.float32)
    length = value.shape[1]
    # Short completions: half of a chunk of 64 would be padding.
    size = _CHUNK if length > _CHUNK // 2 else _CHUNK // 2

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, ...) to (B, H, chunks, size, ...)
        x = x.to(exact).transpose(1, 2).flatten(3)
        return F.pad(x, (0, 0, 0, -length % size)).unflatten(2, (-1, size))

    k, v = _unit(chunks(key)), chunks(value)
    q = _unit(chunks(query)) * key.shape[-1] ** -0.5
    b, g = (chunks(x[..., None]) for x in (beta, decay))  # (B, H, chunks, size, 1)
    total = g.cumsum(dim=3)
    end = total[:, :, :, -1:]
    above = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    # Masked before the exponential: above the diagonal the exponents are positive and may overflow.
    between = (total - total.mT).masked_fill(above, -torch.inf).exp()
    within = (q @ k.mT) * between
    # One system for both right-hand sides; the diagonal of the matrix is not read.
    sides = torch.cat([v * b, k * (b * total.exp())], dim=-1)
    solved = torch.linalg.solve_triangular(
        (k * b) @ k.mT * between, sides, upper=False, unitriangular=True
    )
    written, seen = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    q, k, end = q * total.exp(), k * (end - total).exp(), end.exp()
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[1], k.shape[-1], v.shape[-1])
    outputs = []
    for i in range(v.shape[2]):
        own = written[:, :, i] - seen[:, :, i] @ state
        outputs.append(q[:, :, i] @ state + within[:, :, i] @ own)
        state = end[:, :, i] * state + k[:, :, i].mT @ own
    out = torch.cat(outputs, dim=2)[:, :, :length]
    return out.transpose(1, 2).to(value.dtype), state


def rule_bytes(heads: int, key_dim: int, value_dim: int) -> float:
    """Bytes of a token that `chunked` keeps for its backward pass, and of the gradients there."""
    # Counted from what autograd saves, float32, for chunks of 64; gradients about half as much.
    return 1.5 * 4.0 * heads * (16 * key_dim + 6 * value_dim + 6 * _CHUNK)


def one_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """`delta_rule` for one token a row (T = 1), as it is defined; the state is updated in place.

    In place, because a CUDA graph holds the state's address. Without gradient.
    """
    q, k, v = (x.to(state.dtype).transpose(1, 2) for x in (query, key, value))  # (B, H, 1, D)
    g, b = (x.to(state.dtype).transpose(1, 2)[..., None] for x in (decay, beta))
    k = _unit(k)
    q = _unit(q) * k.shape[-1] ** -0.5
    with torch.autocast(value.device.type, enabled=False):
        state.mul_(g.exp())
        correction = b * (v - k @ state)
        # One product of a column and a row a head, added where the state lies.
        state.flatten(0, 1).baddbmm_(k.mT.flatten(0, 1), correction.flatten(0, 1))
        return (q @ state).transpose(1, 2).to(value.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPSILON)


def _fla_takes(value: Tensor) -> bool:
    """Whether FLA's kernels compute such values: they refuse float32."""
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and fla_is_installed()


@cache
def fla_is_installed() -> bool:
    """Whether the package flash-linear-attention is there."""
    return importlib.util.find_spec("fla") is not None


def _by_fla(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    kernel: Any = chunk_gated_delta_rule
    return kernel(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
