"""Attention over a part of the keys, and parts merged into the whole.

A part is (out, lse): the softmax over its keys alone, times their values, and the logarithm of the
softmax's denominator. Parts over disjoint keys merge exactly:

    lse = log(sum_i e^lse_i),  out = sum_i out_i e^(lse_i - lse)

(the rule by which attention is computed in blocks: Milakov and Gimelshein, arXiv 1805.02867). The
kernels are torch's own for the CPU, which keep the log-sum-exp; where a torch release lacks them
(`missing_kernels`), plain operators compute the same.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
# The private kernels' parameters, in the order in which they are called here.
_SIGNATURES = {
    _FORWARD: (
        "query",
        "key",
        "value",
        "dropout_p",
        "is_causal",
        "attn_mask",
        "scale",
    ),
    f"{_FORWARD}_backward": (
        "grad_out",
        "query",
        "key",
        "value",
        "out",
        "logsumexp",
        "dropout_p",
        "is_causal",
        "attn_mask",
        "scale",
    ),
}


@cache
def missing_kernels() -> str | None:
    """Why `partial` and its backward pass run on plain operators, or None where torch's kernels
    serve them.

    The kernels are not part of torch's public interface (2.9 to 2.13 have them): their presence and
    the names of their parameters are checked, since a changed order would compute silently wrong.
    """
    for name, expected in _SIGNATURES.items():
        packet = getattr(torch.ops.aten, name, None)
        found = packet and tuple(one.name for one in packet.default._schema.arguments)
        if found != expected:
            state = "has no" if packet is None else "changed the parameters of"
            return (
                f"torch {torch.__version__} {state} aten::{name}: attention on the CPU runs on "
                "plain operators, slower and with all scores in memory"
            )
    return None


def partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One part, on the CPU. query (B, H, N, D), key and value (B, heads, M, D), heads dividing H;
    bias, added to the scores, broadcasts to (B, 1, 1, M) and excludes `causal`.

    Returns out (B, H, N, D) and lse (B, H, N), in float32, or float64 for such queries.
    """
    share = query.shape[1] // key.shape[1]
    forward = plain_forward
    if missing_kernels() is None:
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = forward(
        fold_heads(query, share, causal=causal),
        _fold_keys(key, share, causal),
        _fold_keys(value, share, causal),
        0.0,
        causal,
        attn_mask=bias,
        scale=scaling,
    )
    lse = unfold_heads(lse[..., None], share, causal=causal)[..., 0]
    return unfold_heads(out, share, causal=causal), lse


def partial_product(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`partial` of few queries from matrix products, on any device, without a causal mask. Keys and
    values are read in their own dtype; only the scores, (B, heads, share * N, M), are float32."""
    share = query.shape[1] // key.shape[1]
    scores = _product(fold_heads(query, share, causal=False), key.mT) * scaling
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1, keepdim=True)
    out = _product((scores - lse).exp().to(value.dtype), value).to(value.dtype)
    out, lse = (unfold_heads(x, share, causal=False) for x in (out, lse))
    return out, lse[..., 0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (B, heads, ...), in float32 where the factors are of less."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
    return out.unflatten(0, a.shape[:2])


def partial_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scaling: float,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through this part, given what the parts merged to.

    With out and lse of the whole, e^(score - lse) is the whole's probability of a key: each part's
    gradient for its keys is then the whole's, and those of the query add up.
    """
    share = query.shape[1] // key.shape[1]
    grad, query, out = (fold_heads(x, share, causal=causal) for x in (grad, query, out))
    backward = plain_backward
    if missing_kernels() is None:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = backward(
        grad,
        query,
        _fold_keys(key, share, causal),
        _fold_keys(value, share, causal),
        out,
        fold_heads(lse[..., None], share, causal=causal)[..., 0],
        0.0,
        causal,
        scale=scaling,
    )
    of_query, of_key, of_value = grads
    if causal and share > 1:
        of_key, of_value = (x.unflatten(0, (share, -1)).sum(0) for x in (of_key, of_value))
    return unfold_heads(of_query, share, causal=causal), of_key, of_value


def plain_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """torch's CPU kernel from public operators: out (B, H, N, D) and lse (B, H, N), computed in
    float32 or more; `dropout_p` must be 0."""
    scores = _scores(query, key, is_causal, scale)
    if attn_mask is not None:
        scores = scores + attn_mask
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ value.to(scores.dtype)
    return out.to(query.dtype), lse[..., 0]


def plain_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, as torch's CPU kernel gives them.

    With p = e^(score - lse): dV = p^T dO, dS = p (dO V^T - rowsum(dO O)), dQ = s dS K,
    dK = s dS^T Q (Dao et al., arXiv 2205.14135, appendix B.2).
    """
    scores = _scores(query, key, is_causal, scale)
    exact = scores.dtype
    grad, q, k, v, o = (x.to(exact) for x in (grad_out, query, key, value, out))
    p = (scores - logsumexp.to(exact)[..., None]).exp()
    of_scores = p * (grad @ v.mT - (grad * o).sum(-1, keepdim=True)) * scale
    grads = of_scores @ k, of_scores.mT @ q, p.mT @ grad
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _scores(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    """(B, H, N, M) in float32, or float64 for such queries; causal: -inf where m > n."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).mT * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def merge(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The whole's (out, lse) of two parts; out in the parts' dtype, computed in that of lse."""
    (a, lse_a), (b, lse_b) = first, second
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [(x - lse).exp_()[..., None] for x in (lse_a, lse_b)]
    out = a * weights[0] + b * weights[1]
    return out.to(a.dtype), lse


def join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """The out of `merge` alone, in fewer operators: lse_a - L is log sigmoid(lse_a - lse_b)."""
    share = torch.sigmoid(lse - other_lse)[..., None]
    return torch.lerp(other.to(share.dtype), out.to(share.dtype), share).to(out.dtype)


def fold_heads(x: Tensor, share: int, *, causal: bool) -> Tensor:
    """(B, heads * share, N, D), heads that share a key side by side, to (B, heads, share * N, D),
    or, where a causal mask counts queries, to (share * B, heads, N, D)."""
    if share == 1:
        return x
    x = x.unflatten(1, (-1, share))
    return x.movedim(2, 0).flatten(0, 1) if causal else x.flatten(2, 3)


def unfold_heads(x: Tensor, share: int, *, causal: bool) -> Tensor:
    """The way back from `fold_heads`."""
    if share == 1:
        return x
    if causal:
        return x.unflatten(0, (share, -1)).movedim(0, 2).flatten(1, 2)
    return x.unflatten(2, (share, -1)).flatten(1, 2)


def _fold_keys(x: Tensor, share: int, causal: bool) -> Tensor:
    """Keys or values to go with folded queries; of a batch of one they stay where they are."""
    return x.expand(share, *x.shape).flatten(0, 1) if causal and share > 1 else x
