"""Laws of the formulae for every input: sums, bounds, symmetries, invariances.

Where a law is exact in real numbers only, numbers are multiples of a power of two, so that adding
an offset to them rounds nothing.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vcr1_fast import ops
from vcr1_fast.ops.backend import unavailable

every_input = settings(derandomize=True, deadline=None, database=None, max_examples=40)
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason or ""))
    for name in ("reference", "cpu")
    for reason in (unavailable(name),)
]
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def steps(limit, step=64):
    """Multiples of 1/step within +-limit."""
    return st.integers(-limit * step, limit * step).map(lambda i: i / step)


@st.composite
def tensors(draw, shape, elements, dtype="float32"):
    return torch.from_numpy(draw(arrays(dtype, shape, elements=elements)))


@st.composite
def logits_and_labels(draw):
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    logits = draw(tensors((rows, vocab), steps(draw(st.sampled_from([1, 16, 80])))))
    labels = draw(tensors((rows,), st.integers(0, vocab - 1), "int64"))
    return logits, labels


# -- log-probs -----------------------------------------------------------------------------------


@both_backends
@every_input
@given(case=logits_and_labels(), data=st.data())
def test_gradients_of_the_logits_sum_to_zero_in_each_row(backend, case, data):
    logits, labels = case
    upstream = data.draw(tensors((2, len(labels)), steps(4)))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 1.7]))
    leaf = logits.clone().requires_grad_()
    with ops.use(backend):
        logps, entropy, _ = ops.gather_logprobs(leaf, labels, temperature=temperature, entropy=True)
        (logps * upstream[0] + entropy * upstream[1]).sum().backward()
    gradient = leaf.grad.double()
    # Rounding: the probabilities sum to 1 within a few ulp, the entropy's term is a difference.
    tolerance = 4e-6 * (1 + logits.abs().max()) * (1 + upstream.abs().max()) / temperature
    assert (gradient.sum(-1).abs() <= tolerance).all(), gradient.sum(-1)
    moved = (logps.detach() < -0.01) & (upstream[0].abs() > 0.1) & (upstream[1] == 0)
    assert (gradient[moved].abs().sum(-1) > 0).all()


@both_backends
@every_input
@given(case=logits_and_labels(), offset=steps(512))
def test_an_offset_of_the_logits_moves_the_log_sum_alone(backend, case, offset):
    logits, labels = case
    with ops.use(backend):
        plain = ops.gather_logprobs(logits, labels, entropy=True)
        moved = ops.gather_logprobs(logits + offset, labels, entropy=True)
    torch.testing.assert_close(moved.logps, plain.logps, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(moved.entropy, plain.entropy, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(moved.lse, plain.lse + offset, rtol=1e-6, atol=1e-5)


@both_backends
@every_input
@given(case=logits_and_labels())
def test_entropy_and_probabilities_are_within_their_bounds(backend, case):
    logits, labels = case
    with ops.use(backend):
        logps, entropy, _ = ops.gather_logprobs(logits, labels, entropy=True)
        flat = ops.gather_logprobs(torch.zeros_like(logits), labels, entropy=True)
        everything = torch.arange(logits.shape[1]).expand_as(logits)
        whole = ops.gather_logprobs(logits, everything.contiguous()).logps
    most = math.log(logits.shape[1])
    assert (entropy >= -1e-5).all() and (entropy <= most + 1e-5).all(), (entropy, most)
    assert (logps <= 1e-6).all()
    torch.testing.assert_close(flat.entropy, torch.full_like(entropy, most), rtol=0, atol=2e-6)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones_like(entropy), rtol=0, atol=2e-6)


# -- loss and advantages -------------------------------------------------------------------------

ON_POLICY = {  # loss type -> options, weight of a token from (its row's tokens, all tokens, rows)
    "grpo": ({}, lambda n, total, rows: 1 / (n * rows)),
    "sapo": ({}, lambda n, total, rows: 1 / (n * rows)),
    "bnpo": ({}, lambda n, total, rows: 1 / total),
    "dapo": ({"num_items": 50}, lambda n, total, rows: 1 / 50),
    "dr_grpo": ({"max_length": 9}, lambda n, total, rows: 1 / (9 * rows)),
    "cispo": ({"eps_high": 3.0, "num_items": 50}, lambda n, total, rows: 1 / 50),
    "luspo": ({}, lambda n, total, rows: 1 / rows),
}


@both_backends
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ON_POLICY)
@settings(every_input, max_examples=8)
@given(data=st.data())
def test_on_policy_the_gradient_is_minus_advantage_by_weight(backend, level, loss_type, data):
    """There the ratio is 1, no clip acts, and every form comes down to plain policy gradient."""
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    logps = data.draw(tensors((rows, columns), steps(30).map(lambda x: -abs(x)))).requires_grad_()
    advantages = data.draw(tensors((rows,), steps(3)))
    mask = data.draw(tensors((rows, columns), st.booleans(), "bool"))
    options, weight = ON_POLICY[loss_type]
    config = ops.GRPOLossConfig(loss_type=loss_type, level=level, **options)
    with ops.use(backend):
        loss, metrics = ops.grpo_loss(logps, logps.detach(), advantages, mask, config=config)
    loss.backward()
    counts = mask.sum(-1).clamp(min=1)[:, None]
    weights = mask * weight(counts, mask.sum().clamp(min=1), rows)
    expected = -advantages[:, None] * weights
    torch.testing.assert_close(logps.grad, expected, rtol=2e-6, atol=1e-7)
    if loss_type not in ("sapo", "cispo"):
        torch.testing.assert_close(loss.detach(), expected.sum(), rtol=2e-6, atol=1e-6)
    if mask.any():
        for name in ("ratio_mean", "ratio_min", "ratio_max"):
            assert metrics[name].item() == pytest.approx(1, abs=1e-6)


@every_input
@given(data=st.data(), shift=steps(100))
def test_advantages_sum_to_zero_and_ignore_a_shift_of_the_rewards(data, shift):
    size, groups = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4))
    rewards = data.draw(tensors((size * groups,), steps(8)))
    for estimator, scale in (*(("grpo", s) for s in ("group", "none", "batch")), ("rloo", "none")):
        plain, moved = (
            ops.group_advantages(r, size, estimator=estimator, scale=scale)
            for r in (rewards, rewards + shift)
        )
        torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-5)
        sums = plain.double().view(groups, size).sum(-1)
        assert (sums.abs() <= 1e-6 * (1 + plain.abs().sum())).all(), (estimator, scale, sums)
        order = plain.view(groups, size).argsort(-1)
        assert (rewards.view(groups, size).gather(-1, order).diff(dim=-1) >= 0).all()


# -- overlap -------------------------------------------------------------------------------------


@st.composite
def boxes(draw, count, dtype="float32"):
    """(count, 4), some empty or reversed."""
    return draw(tensors((count, 4), steps(40, 4), dtype))


@both_backends
@every_input
@given(a=boxes(3), b=boxes(4))
def test_box_iou_is_symmetric_and_within_its_bounds(backend, a, b):
    bounds = {"iou": 0, "giou": -1, "diou": -1, "ciou": -1.5}
    for kind, low in bounds.items():
        with ops.use(backend):
            ab, ba, aa = (
                ops.box_iou(x, y, kind=kind, pairwise=True) for x, y in ((a, b), (b, a), (a, a))
            )
        assert torch.equal(ab, ba.t()), kind
        assert (ab >= low - 1e-6).all() and (ab <= 1 + 1e-6).all(), (kind, ab)
        full = ((a[:, 2:] - a[:, :2]) > 0).all(-1)
        assert torch.equal(aa.diagonal()[full], torch.ones(int(full.sum()))), kind


@both_backends
@every_input
@given(data=st.data())
def test_spans_sets_and_tracks_are_symmetric_and_within_0_and_1(backend, data):
    p, t = (data.draw(tensors((6, 2), steps(40, 4))) for _ in range(2))
    cuts = data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=2).map(sorted))
    offsets = torch.tensor([0, *cuts, 6])
    track_p, track_t = (data.draw(boxes(6)).view(2, 3, 4) for _ in range(2))
    with ops.use(backend):
        pairs = {
            "spans": [ops.temporal_iou(*x) for x in ((p, t), (t, p), (p, p))],
            "sets": [
                ops.interval_set_iou(x, offsets, y, offsets) for x, y in ((p, t), (t, p), (p, p))
            ],
            "tracks": [
                ops.track_iou(*x)
                for x in ((track_p, track_t), (track_t, track_p), (track_p, track_p))
            ],
        }
    for name, (forward, backward, own) in pairs.items():
        torch.testing.assert_close(forward, backward, rtol=1e-6, atol=1e-7)
        assert ((forward >= 0) & (forward <= 1)).all(), (name, forward)
        if name == "spans":
            assert torch.equal(own, (p[:, 1] > p[:, 0]).float())
        if name == "sets":
            filled = [(x[:, 1] > x[:, 0]).any() for x in p.tensor_split(offsets[1:-1])]
            torch.testing.assert_close(own, torch.tensor(filled).float(), rtol=1e-6, atol=0)


# -- frames --------------------------------------------------------------------------------------

ROUNDING = ("u8", "pil", "f32", "none")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@both_backends
@settings(every_input, max_examples=25)
@given(data=st.data())
def test_a_constant_frame_stays_constant(backend, data):
    shape = [data.draw(st.integers(1, 40)) for _ in range(2)]
    size = [data.draw(st.integers(1, 40)) for _ in range(2)]
    colour = torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=3, max_size=3)))
    frames = colour.to(torch.uint8).expand(2, *shape, 3).contiguous()
    for rounding in ROUNDING:
        for resample in ("bicubic", "bilinear"):
            with ops.use(backend):
                out = ops.resize_frames(frames, size, resample=resample, rounding=rounding)
            assert out.shape == (2, *size, 3)
            tolerance = 1e-3 if rounding == "none" else 0
            assert ((out.double() - colour).abs() <= tolerance).all(), (rounding, resample, colour)


@both_backends
@settings(every_input, max_examples=15)
@given(data=st.data())
def test_patches_of_a_constant_clip_are_constant_in_each_channel(backend, data):
    count = data.draw(st.integers(1, 5))
    shape = [data.draw(st.integers(8, 60)) for _ in range(2)]
    size = [28 * data.draw(st.integers(1, 2)) for _ in range(2)]
    colour = torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=3, max_size=3)))
    frames = colour.to(torch.uint8).expand(count, *shape, 3).contiguous()
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (CLIP_MEAN, CLIP_STD))
    expected = (colour / 255 - mean) / std
    for rounding in ROUNDING:
        with ops.use(backend):
            patches, grid = ops.video_patches(frames, size, rounding=rounding, dtype=torch.float32)
        channels = patches.view(len(patches), 3, -1).double()
        assert grid.tolist() == [(count + 1) // 2, size[0] // 14, size[1] // 14]
        tolerance = 2e-5 if rounding == "none" else 2e-6
        assert ((channels - expected[:, None]).abs() <= tolerance).all(), (rounding, colour)
