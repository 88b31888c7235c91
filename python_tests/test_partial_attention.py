"""Parts of an attention, and what they merge to, against one softmax over all keys."""

import pytest
import torch

from vcr1_fast.model.partial_attention import merge, partial, partial_backward, partial_product

SCALING = 0.3


def _inputs(queries=5, keys=7, heads=2, share=3, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        normal(batch, heads * share, queries, 8),
        normal(batch, heads, keys, 8),
        normal(batch, heads, keys, 8),
    )


def _dense(query, key, value, seen=None):
    """(out, lse) in float64, every head with its own copy of the keys."""
    share = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    scores = query @ key.mT * SCALING
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def _close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.double(), b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("part", [partial, partial_product])
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_a_part_is_attention_over_its_keys(part, share, dtype, tolerance):
    q, k, v = _inputs(share=share, dtype=dtype)
    out, lse = part(q, k, v, SCALING)
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    _close((out, lse), _dense(q, k, v), tolerance)
    hidden = torch.zeros(2, 1, 1, 7, dtype=dtype)
    hidden[0, ..., 4:] = -torch.inf
    got = part(q, k, v, SCALING, bias=hidden)
    _close(got, _dense(q, k, v, hidden == 0), tolerance)


@pytest.mark.parametrize("share", [1, 3])
def test_a_causal_part(share):
    q, k, v = _inputs(queries=6, keys=6, share=share)
    _close(partial(q, k, v, SCALING, causal=True), _dense(q, k, v, torch.ones(6, 6).tril().bool()))


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_parts_merge_to_the_whole_and_so_do_their_gradients(share, causal):
    """Keys 0..8 seen by all queries, keys 9..14 by the causal rule or by all."""
    q, k, v = _inputs(queries=6, keys=15, share=share)
    seen = torch.ones(6, 15, dtype=torch.bool)
    if causal:
        seen[:, 9:] = torch.ones(6, 6).tril().bool()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = _dense(*leaves, seen)
    a = partial(q, k[:, :, :9], v[:, :, :9], SCALING)
    b = partial(q, k[:, :, 9:], v[:, :, 9:], SCALING, causal=causal)
    out, lse = merge(a, b)
    _close((out, lse), (expected.detach(), expected_lse.detach()))
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    expected.backward(grad)
    first = partial_backward(grad, q, k[:, :, :9], v[:, :, :9], out, lse, SCALING)
    second = partial_backward(grad, q, k[:, :, 9:], v[:, :, 9:], out, lse, SCALING, causal=causal)
    keys = zip(first[1:], second[1:], strict=True)
    ours = [first[0] + second[0], *(torch.cat(parts, dim=2) for parts in keys)]
    _close(ours, [leaf.grad for leaf in leaves])


def test_merging_survives_parts_of_no_weight():
    """Scores thousands apart: one part is all, and nothing overflows."""
    out = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    lse = torch.tensor([1e4]), torch.tensor([-1e4])
    for first, second in ((0, 1), (1, 0)):
        got = merge((out[first], lse[first]), (out[second], lse[second]))
        assert torch.equal(got[0], out[0]) and torch.equal(got[1], lse[0])
