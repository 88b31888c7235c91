"""CUDA kernels on the emulated GPU (csrc/emulation), beside the CPU kernels and float64.

The "cuda" variants of every op's own tests run there too (`make test`). Here is what these cannot
see: launches, devices, errors, lanes that disagree, and random inputs of all ops.
"""

import math
import random

import pytest
import torch

from vcr1_fast import ops
from vcr1_fast.ops import GRPOLossConfig, backend
from vcr1_fast.ops.gather_logprobs import backward_op, forward_op, inplace_backward_op
from vcr1_fast.ops.grpo.config import LOSS_TYPES, encode
from vcr1_fast.ops.grpo.loss import grpo_loss_op, multiply_op

emulation = backend.emulation
pytestmark = pytest.mark.skipif(emulation is None, reason="no build with -DVCR1_EMULATE=ON")
HALVES = (torch.bfloat16, torch.float16)
HELD = 256  # threads of a block of the one-pass kernel


@pytest.fixture(autouse=True)
def the_emulated_gpu():
    """The default device, and no launches from before; threads run in a known order."""
    emulation.set_device()
    emulation.seed(1)
    emulation.take_launches()
    with ops.use("cuda,cpu,reference"):
        yield
    emulation.set_device()


@pytest.fixture
def uninitialised_is_nan():
    """`torch.empty` holds NaN, and not by chance what a kernel forgot to write."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def on_cpu(fn, *args, **options):
    with ops.use("cpu,reference"):
        return fn(*args, **options)


def loss_and_gradient(logits, labels, *, inplace=False, **options):
    leaf = logits.detach().requires_grad_()
    advantages = torch.ones(len(logits))
    loss, metrics = ops.logits_grpo_loss(leaf, labels, advantages, None, inplace=inplace, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics


@pytest.mark.parametrize("vocab", [257, 2000, 30000])
def test_all_threads_agree_whether_a_row_has_a_gradient(vocab):
    """Each thread computes the ratio from its own copy of the row's sums, and a barrier follows
    where the gradient is not 0. Ratios within ulps of the clip bound show copies that differ."""
    steps = 16
    for seed in range(12 if vocab < 30000 else 3):
        generator = torch.Generator().manual_seed(seed)
        row = 3 * torch.randn(vocab, generator=generator)
        row -= row.logsumexp(0)
        row[5] = 0.0  # half of the probability: then an ulp of the sums is one of the log-prob
        bound = row.double().log_softmax(-1)[5].item() - math.log(1.2)
        near = torch.tensor(bound, dtype=torch.float32).view(torch.int32)
        old = (near + torch.arange(-steps // 2, steps // 2, dtype=torch.int32)).view(torch.float32)
        logits = row.expand(1, steps, vocab).contiguous()
        labels = torch.full((1, steps), 5)
        _, gradient, _ = loss_and_gradient(logits, labels, old_logps=old[None])
        zeros = (gradient[0] == 0).float().mean(-1)
        assert ((zeros == 1) | (zeros < 0.01)).all()
        assert 0 < int((zeros == 1).sum()) < steps  # both sides of the bound were met


@pytest.mark.parametrize("vocab", [20000, 60000, 151936])
def test_code_without_clusters_runs_on_a_device_that_has_them(vocab):
    """PTX for sm_80, compiled by the driver for an H200: its cluster barriers are nothing."""
    logits = torch.randn(1, 2, vocab).bfloat16()
    labels = torch.randint(vocab, (1, 2))
    _, expected, metrics = on_cpu(loss_and_gradient, logits, labels, entropy=True)
    emulation.set_device(major=9, code=80)
    _, got, got_metrics = loss_and_gradient(logits, labels, entropy=True)
    assert all(cluster == 1 for _, _, cluster, _ in emulation.take_launches())
    torch.testing.assert_close(got_metrics["entropy"], metrics["entropy"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-7)


def test_a_refused_launch_leaves_no_error_to_the_next():
    frames = torch.randint(0, 255, (1, 200, 300, 3), dtype=torch.uint8)
    emulation.set_device(shared_bytes=20000)
    with pytest.raises(RuntimeError, match=r"resize_frames: cudaErrorInvalidValue \(more shared"):
        ops.resize_frames(frames, (56, 84))
    assert emulation.take_error() == "cudaSuccess"
    boxes = torch.rand(3, 4)
    assert torch.equal(ops.box_iou(boxes, boxes), on_cpu(ops.box_iou, boxes, boxes))


V = 151936


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(2, 3, V).bfloat16()[:, :-1],
        torch.randn(2, 3, V).bfloat16()[:, -2:],
        torch.randn(1, 3, V).bfloat16()[:, :-1],
        torch.randn(1, 3, V).bfloat16()[:, :-1].contiguous(),
        torch.randn(2, 2, V).bfloat16(),
    ],
    ids=["without the last", "the last", "one completion", "one, contiguous", "whole"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_sliced_logits_are_read_once(logits, inplace):
    if inplace:  # parameters are made once
        logits = logits + 0 if logits.is_contiguous() else logits._base.clone()[:, :2]
    labels = torch.randint(V, logits.shape[:-1])
    rows = labels.numel()

    def launch(**options):
        emulation.take_launches()
        loss_and_gradient(logits, labels, inplace=inplace, **options)
        return emulation.take_launches()[2]  # after the two that weigh the tokens

    assert launch() == (16 * rows, HELD, 16, 0)  # the row, in the registers of sixteen blocks
    # Entropy needs the logits again: in shared memory, with more blocks where rows are few.
    assert launch(entropy=True) == (16 * rows, HELD, 16, 18992)
    emulation.set_device(multiprocessors=1)
    assert launch(entropy=True) == (8 * rows, HELD, 8, 37984)
    emulation.set_device(largest_cluster=8)
    assert launch() == (8 * rows, HELD, 8, 37984)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_are_split_over_the_gpu(rows, inplace):
    """Against float64; labels at both sides of every border between blocks."""
    vocab = 151_936
    x = (3 * torch.randn(rows, vocab)).bfloat16()
    step = vocab // 8 // 37 * 8
    labels = torch.tensor(
        [0, vocab - 1, *(b + d for b in range(step, vocab, step) for d in (-1, 0))]
    )
    labels = labels[torch.randperm(len(labels))][:40].expand(rows, -1).contiguous()
    state = (None, None, 0.8)
    logps, entropy, lse, stats = forward_op(x, labels, *state, True)
    exact = on_cpu(forward_op, x.double(), labels, *state, True)
    for got, expected in zip((logps, entropy, lse), exact, strict=False):
        torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=6e-6)
    grads = (torch.randn(logps.shape), torch.randn(rows), torch.randn(rows))
    expected = on_cpu(backward_op, x, labels, logps, stats, *state, *grads)
    if inplace:
        inplace_backward_op(x, labels, logps, stats, *state, *grads)
    else:
        x = backward_op(x, labels, logps, stats, *state, *grads)
    torch.testing.assert_close(x, expected, rtol=8e-3, atol=2e-6)
    assert emulation.take_launches() == [(16 * rows, 512, 16, 0), (37 * rows, 512, 1, 0)]
    emulation.set_device(multiprocessors=1, largest_cluster=8)
    forward_op(x, labels, *state, False)
    assert emulation.take_launches() == [((2, rows)[rows > 1], 512, (2, 1)[rows > 1], 0)]


def test_rows_of_other_alignments_are_read_twice():
    logits = torch.randn(2, 3, 2001).bfloat16()[:, :-1]
    labels = torch.randint(2001, logits.shape[:-1])
    _, got, _ = loss_and_gradient(logits, labels)
    assert emulation.take_launches()[2] == (4, HELD, 1, 0)
    _, expected, _ = on_cpu(loss_and_gradient, logits, labels)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(
    "shape", [(3, 5), (7, 40001), (0, 4), (1,)], ids=["small", "parts", "empty", "one"]
)
def test_a_gradient_times_its_upstream(dtype, factor_dtype, shape):
    x = torch.randn(shape).to(dtype)
    factor = torch.tensor(-1.7, dtype=factor_dtype)
    expected = x * factor
    multiply_op(x, factor)
    tolerance = {"rtol": 1e-6 if dtype in (torch.float32, torch.float64) else 1e-2, "atol": 0}
    torch.testing.assert_close(x, expected, **tolerance)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_strided_rows_times_their_upstream(offset):
    whole = torch.randn(2, 4, 50)
    x, before = whole[:, 1:3, offset : offset + 41], whole.clone()
    multiply_op(x, torch.tensor(2.0))
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[:, 1:3, offset : offset + 41] = True
    assert torch.equal(whole, torch.where(inside, 2 * before, before))


def test_an_upstream_of_one_leaves_the_gradient_alone():
    """A signalling NaN would come back quiet from a multiplication, and from a copy in float32."""
    bits = torch.full((3, 700), 0x7F81, dtype=torch.int16)
    x = bits.clone().view(torch.bfloat16)
    multiply_op(x, torch.tensor(1.0))
    assert torch.equal(x.view(torch.int16), bits)
    multiply_op(x, torch.tensor(2.0))
    assert not (x.view(torch.int16) == bits).any()
    assert len(emulation.take_launches()) == 2


def test_a_backward_pass_of_any_head_multiplies_on_the_device():
    logits = torch.randn(2, 3, 40).requires_grad_()
    loss, _ = ops.logits_grpo_loss(logits, torch.zeros(2, 3).long(), torch.ones(2), None)
    before = len(emulation.take_launches())
    loss.backward()
    assert before > 0 and emulation.take_launches() == [(1, 256, 1, 0)]


# --- random inputs


def strided(x, rng):
    """The values of `x`, (..., V), in rows that start anywhere; around them NaN."""
    left, right = rng.choice((0, 0, 1, 3, 8)), rng.choice((0, 0, 1, 5, 16))
    shape = (*x.shape[:-1], left + x.shape[-1] + right)
    whole = torch.full(shape, math.nan).to(x.dtype)
    view = whole[..., left : left + x.shape[-1]]
    view.copy_(x)
    return view


SIZES = (1, 2, 7, 8, 9, 31, 33, 64, 255, 1025, 2048, 2049, 4095, 8193, 16400)


@pytest.mark.parametrize("seed", range(25))
def test_random_gather_logprobs(seed, uninitialised_is_nan):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    emulation.seed(seed)
    emulation.set_device(multiprocessors=rng.choice((1, 132)), largest_cluster=rng.choice((8, 16)))
    vocab, k = rng.choice(SIZES), rng.choice((1, 1, 2, 3, 33))
    rows = rng.randint(1, 3 if vocab > 3000 else 19)
    dtype = rng.choice((torch.float32, *HALVES))
    x = (rng.choice((0.1, 1, 5, 30)) * torch.randn(rows, vocab)).to(dtype)
    if rng.random() < 0.3:
        x[torch.rand(rows, vocab) < 0.3] = -math.inf
        x[:, 0] = 0
    x = strided(x, rng)
    labels = torch.randint(vocab, (rows, k))
    labels = torch.where(x.gather(1, labels).isinf(), 0, labels)
    mask = torch.rand(rows) < 0.7 if rng.random() < 0.4 else None
    row_temperature = torch.rand(rows) + 0.3 if rng.random() < 0.4 else None
    state = (mask, row_temperature, rng.choice((1.0, 0.7, 2.5)))
    entropy = rng.random() < 0.6
    got = forward_op(x, labels, *state, entropy)
    exact = on_cpu(forward_op, x.double(), labels, *state, entropy)
    for name, a, b in zip(("logps", "entropy", "lse"), got, exact, strict=False):
        torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=6e-6, msg=name)
    grads = (
        torch.randn(rows, k),
        torch.randn(rows) if entropy else None,
        torch.randn(rows) if rng.random() < 0.3 else None,
    )
    state = (labels, got[0], got[3], *state)
    gradient = backward_op(x, *state, *grads)
    expected = on_cpu(backward_op, x, *state, *grads)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    size = grads[0].abs().sum(-1).max()
    torch.testing.assert_close(
        gradient, expected, rtol=tolerance, atol=2e-6 * float(size), equal_nan=True
    )


@pytest.mark.parametrize("seed", range(16))
def test_random_logits_grpo_loss(seed, uninitialised_is_nan):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    emulation.seed(seed)
    emulation.set_device(multiprocessors=rng.choice((1, 132)), largest_cluster=rng.choice((8, 16)))
    vocab = rng.choice((*SIZES, 22536, 33000))
    shape = (2, rng.randint(1, 3))
    dtype = rng.choice((torch.float32, *HALVES))
    logits = strided((3 * torch.randn(*shape, vocab)).to(dtype), rng)
    labels = torch.randint(vocab, shape)
    logps = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    token_losses = [name for name in LOSS_TYPES if name != "vespo"]
    config = GRPOLossConfig(
        loss_type=rng.choice(token_losses),
        beta=0.1,
        max_length=4,
        entropy_coef=rng.choice((0.0, 0.2)),
    )
    given = {
        "old_logps": logps + 0.3 * torch.randn(shape),
        "ref_logps": logps + 0.3 * torch.randn(shape),
        "config": config,
    }
    loss, got, _ = loss_and_gradient(logits, labels, **given)
    exact = on_cpu(loss_and_gradient, logits.double(), labels, **given)
    torch.testing.assert_close(loss.double(), exact[0].double(), rtol=2e-5, atol=2e-6)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.double(), exact[1].double(), rtol=tolerance, atol=3e-7)
    _, inplace, _ = loss_and_gradient(logits, labels, inplace=True, **given)
    assert inplace.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(inplace.double(), exact[1].double(), rtol=tolerance, atol=3e-7)
    outside = torch.isnan(logits._base).sum()
    assert outside == logits._base.numel() - logits.numel()


@pytest.mark.parametrize("seed", range(30))
def test_random_grpo_loss(seed, uninitialised_is_nan):
    """Against the CPU kernel: packed or padded, every loss, correction and bonus."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    emulation.seed(seed)
    dtype = rng.choice((torch.float32, torch.float64))
    loss = rng.choice(LOSS_TYPES)
    options = {"loss_type": loss, "max_length": 7, "beta": 0.1}
    options["kl"] = rng.choice(("k1", "k2", "k3", "abs"))
    if loss != "vespo":
        options["level"] = rng.choice(("token", "sequence", "sequence_token"))
    if rng.random() < 0.4:
        kind, level = rng.choice(("truncate", "mask", "icepop")), rng.choice(("token", "sequence"))
        options |= {"rollout_correction": f"{level}_{kind}", "rollout_min": 0.3, "rollout_max": 3.0}
    if rng.random() < 0.3:
        options["off_policy_threshold"] = 0.05
    if rng.random() < 0.4:
        options["entropy_coef"] = 0.2
    config = encode(GRPOLossConfig(**options))
    offsets = None
    if rng.random() < 0.5:
        counts = [rng.choice((0, 1, 5, 31, 33, 130, 300)) for _ in range(rng.randint(1, 12))]
        offsets = torch.tensor([0, *counts]).cumsum(0)
        shape, sequences = (int(offsets[-1]),), len(counts)
    else:
        shape = (rng.randint(1, 11), rng.choice((1, 2, 31, 32, 33, 127, 129, 257, 400)))
        sequences = shape[0]
    logps = torch.randn(shape, dtype=dtype) - 2
    mask = torch.rand(shape) < 0.8 if rng.random() < 0.7 else None

    def near():
        x = logps + 0.3 * torch.randn(shape, dtype=dtype)
        return x if mask is None else torch.where(mask, x, math.nan)

    advantages = torch.randn(sequences, dtype=dtype)
    entropy = torch.rand(shape, dtype=dtype)
    weights = torch.rand(shape, dtype=dtype) if rng.random() < 0.5 else None
    inputs = (logps, near(), advantages, mask, near(), entropy, near(), weights, offsets)
    got = grpo_loss_op(*inputs, None, None, config)
    expected = on_cpu(grpo_loss_op, *inputs, None, None, config)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-10
    for name, a, b in zip(("loss", "grad", "grad_entropy", "metrics"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("seed", range(20))
def test_random_iou_has_the_bits_of_the_cpu(seed, uninitialised_is_nan):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    emulation.seed(seed)
    dtype = rng.choice((torch.float32, torch.float64))

    def boxes(n):
        corner = torch.randn(n, 2, dtype=dtype)
        return torch.cat([corner, corner + torch.randn(n, 2, dtype=dtype)], 1)

    n, m = rng.choice((1, 31, 33, 129)), rng.choice((1, 127, 129, 260))
    pairwise = rng.random() < 0.5
    a, b = boxes(n), boxes(m if pairwise else n)
    options = {
        "kind": rng.choice(("iou", "giou", "diou", "ciou")),
        "pairwise": pairwise,
        "convention": rng.choice(("zero", "torchvision")),
    }
    got, expected = ops.box_iou(a, b, **options), on_cpu(ops.box_iou, a, b, **options)
    if options["kind"] == "ciou":  # arctangents of other libraries
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    batch, steps = rng.choice((1, 4, 9)), rng.choice((1, 31, 33, 70))
    pred, target = (torch.rand(batch, steps, 4, dtype=dtype).sort(-1).values for _ in range(2))
    track = (pred, target, torch.randint(0, steps + 1, (batch,)))
    assert torch.equal(ops.track_iou(*track), on_cpu(ops.track_iou, *track))
    counts = [torch.randint(0, 6, (rng.choice((1, 130)),))] * 2
    offsets = [torch.cat([c.new_zeros(1), c.cumsum(0)]) for c in counts]
    spans = [torch.rand(int(c.sum()), 2, dtype=dtype) for c in counts]
    sets = (spans[0], offsets[0], spans[1], offsets[1])
    assert torch.equal(ops.interval_set_iou(*sets), on_cpu(ops.interval_set_iou, *sets))


@pytest.mark.parametrize("seed", range(24))
def test_random_frames_have_the_bits_of_the_cpu(seed, uninitialised_is_nan):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    emulation.seed(seed)
    t, height, width = rng.randint(1, 3), rng.randint(1, 90), rng.choice((16, 32, 33, 70, 96, 160))
    order = rng.choice(("pixels", "planes", "wide", "four"))
    if order == "planes":
        frames = torch.randint(0, 256, (t, 3, height, width), dtype=torch.uint8).movedim(1, -1)
    elif order == "wide":
        frames = torch.randint(0, 256, (t, height, width + 16, 3), dtype=torch.uint8)[:, :, :width]
    elif order == "four":
        frames = torch.randint(0, 256, (t, height, width, 4), dtype=torch.uint8)[..., :3]
    else:
        frames = torch.randint(0, 256, (t, height, width, 3), dtype=torch.uint8)
    options = {
        "resample": rng.choice(("bicubic", "bilinear")),
        "rounding": rng.choice(("u8", "u8", "pil", "f32", "none")),
    }
    if rng.random() < 0.5:
        size = (28 * rng.randint(1, 2), 28 * rng.randint(1, 3))
        dtype = rng.choice((torch.float32, *HALVES))
        got, _ = ops.video_patches(frames, size, dtype=dtype, **options)
        expected, _ = on_cpu(ops.video_patches, frames, size, dtype=dtype, **options)
    else:
        size = (rng.randint(1, 60), rng.randint(1, 100))
        got = ops.resize_frames(frames, size, **options)
        expected = on_cpu(ops.resize_frames, frames, size, **options)
    assert torch.equal(got, expected)
