"""IoU ops against exact rational arithmetic, float64 numpy and torchvision."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from gpu_backend import device_of, needs_gpu, through_gpu, with_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision_shim import require_torchvision

from vcr1_fast import ops
from vcr1_fast.ops.backend import native
from vcr1_fast.ops.iou import KINDS, _box, box_iou_reference

DTYPES = [torch.float32, torch.float64]
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@pytest.fixture(params=with_cuda(_box))
def backend(request, monkeypatch):
    if request.param == "cuda":
        for name in ("box_iou", "temporal_iou", "track_iou", "interval_set_iou"):
            monkeypatch.setattr(ops, name, through_gpu(getattr(ops, name)))
    with ops.use(request.param):
        yield request.param


def random_boxes(n, seed, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, 2, generator=generator, dtype=torch.float64) * spread
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1).to(dtype)


def exact_box_iou(a, b):
    """IoU and GIoU of two boxes of floats, without rounding."""
    a, b = ([Fraction(v) for v in box] for box in (a, b))
    zero = Fraction(0)

    def area(x0, y0, x1, y1):
        return max(x1 - x0, zero) * max(y1 - y0, zero)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    xs, ys = (a[0], a[2], b[0], b[2]), (a[1], a[3], b[1], b[3])
    hull = (max(xs) - min(xs)) * (max(ys) - min(ys))
    iou = shared / union if union else zero
    return iou, iou - ((hull - union) / hull if hull else zero)


def exact_span_iou(p, t):
    return exact_box_iou((p[0], 0, p[1], 1), (t[0], 0, t[1], 1))[0]


def measure_sets(p, t):
    """|P and T| / |P or T| by counting elementary pieces between all end points; None if empty."""
    p, t = ([tuple(map(Fraction, s)) for s in spans] for spans in (p, t))
    points = sorted({v for span in p + t for v in span})
    shared = union = Fraction(0)
    for start, end in itertools.pairwise(points):
        in_p, in_t = (any(s <= start and end <= e for s, e in spans) for spans in (p, t))
        shared += (end - start) * (in_p and in_t)
        union += (end - start) * (in_p or in_t)
    return shared / union if union else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 64, 1001])
def test_temporal_iou_is_exact(backend, dtype, n):
    # A quarter of the spans is reversed, a few are points.
    spans = (
        torch.randint(0, 40, (2, n, 2), generator=torch.Generator().manual_seed(n)).to(dtype) / 8
    )
    pred, target = spans[0], spans[1].sort(-1).values
    result = ops.temporal_iou(pred, target)
    assert result.dtype == dtype
    assert result.shape == (n,)
    expected = [exact_span_iou(*pair) for pair in zip(pred.tolist(), target.tolist(), strict=True)]
    expected = torch.tensor([float(v) for v in expected], dtype=torch.float64)
    torch.testing.assert_close(result.double(), expected, rtol=2 * EPS[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_box_iou_is_exact(backend, dtype, kind):
    a, b = random_boxes(60, 1, dtype), random_boxes(60, 2, dtype)
    a[:5, 2:] = a[:5, :2]  # points
    a[5:9] = a[5:9].flip(-1)  # reversed
    b[9:12] = a[9:12]
    result = ops.box_iou(a, b, kind=kind)
    for got, box_a, box_b in zip(result.tolist(), a.tolist(), b.tolist(), strict=True):
        expected = exact_box_iou(box_a, box_b)[kind == "giou"]
        assert abs(got - expected) <= 8 * EPS[dtype]


def numpy_box_iou(a, b, kind):
    a, b = a.double().numpy()[:, None], b.double().numpy()[None]
    lo, hi = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    wh_a, wh_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    shared = np.clip(hi - lo, 0, None).prod(-1)
    union = wh_a.prod(-1) + wh_b.prod(-1) - shared
    iou = shared / union
    hull = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
    if kind == "giou":
        return iou - (hull.prod(-1) - union) / hull.prod(-1)
    centres = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    diou = iou - (centres**2).sum(-1) / (hull**2).sum(-1)
    if kind == "ciou":
        v = (
            4
            / math.pi**2
            * (np.arctan(wh_a[..., 0] / wh_a[..., 1]) - np.arctan(wh_b[..., 0] / wh_b[..., 1])) ** 2
        )
        return diou - v * v / (1 - iou + v)
    return iou if kind == "iou" else diou


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (17, 5), (3, 130), (0, 4), (4, 0)])
def test_pairwise_boxes_equal_numpy(backend, dtype, kind, n, m):
    a, b = random_boxes(n, 3, dtype, 5.0), random_boxes(m, 4, dtype, 5.0)
    result = ops.box_iou(a, b, kind=kind, pairwise=True)
    assert result.dtype == dtype
    expected = torch.from_numpy(numpy_box_iou(a, b, kind))
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=32 * EPS[dtype])
    for i, j in ((0, 0), (n - 1, m - 1)) if n and m else ():
        paired = ops.box_iou(a[i : i + 1], b[j : j + 1], kind=kind)
        torch.testing.assert_close(paired[0], result[i, j], rtol=0, atol=8 * EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_spans_equal_paired_ones(backend, dtype):
    p, t = random_boxes(9, 5, dtype)[:, ::2], random_boxes(13, 6, dtype)[:, ::2]
    table = ops.temporal_iou(p, t, pairwise=True)
    assert table.shape == (9, 13)
    paired = ops.temporal_iou(p[:, None].expand(9, 13, 2), t[None].expand(9, 13, 2))
    assert torch.equal(table, paired)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_boxes_give_finite_numbers(backend, dtype, kind):
    inf, nan, big = math.inf, math.nan, torch.finfo(dtype).max
    odd = torch.tensor(
        [
            [0, 0, 0, 0],
            [1, 1, 1, 1],
            [0, 0, 2, 0],
            [2, 2, 1, 1],
            [0, 0, 1, 1],
            [0, 0, inf, 1],
            [nan, 0, 1, 1],
            [0, 0, 1, nan],
            [-big, -big, big, big],
        ],
        dtype=dtype,
    )
    table = ops.box_iou(odd, odd, kind=kind, pairwise=True)
    assert table.isfinite().all()
    lowest = {"iou": 0, "giou": -1, "diou": -1, "ciou": -1.5}[kind]
    assert table.min() >= lowest
    assert table.max() <= 1
    with ops.use("reference"):
        expected = ops.box_iou(odd, odd, kind=kind, pairwise=True)
    torch.testing.assert_close(table, expected, rtol=0, atol=8 * EPS[dtype])
    if kind == "iou":
        assert table[4, 4] == 1
        assert table[:4].eq(0).all()
        assert table[5:].eq(0).all()


def test_degenerate_spans_and_tracks_give_zero(backend):
    spans = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, math.inf], [math.nan, 1.0]])
    assert ops.temporal_iou(spans, spans, pairwise=True).eq(0).all()
    tracks = torch.zeros(2, 3, 4)
    assert ops.track_iou(tracks, tracks, torch.tensor([3, 0])).eq(0).all()


def test_empty_batches(backend):
    assert ops.track_iou(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4)).shape == (0,)
    assert ops.track_iou(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4)).tolist() == [0, 0]
    none, offsets = torch.zeros(0, 2), torch.tensor([0])
    assert ops.interval_set_iou(none, offsets, none, offsets).shape == (0,)
    assert ops.temporal_iou(torch.zeros(2), torch.ones(2)).shape == ()


@pytest.mark.parametrize("kind", KINDS)
def test_torchvision_convention(backend, kind):
    require_torchvision()
    from torchvision.ops import boxes

    names = {
        "iou": "box",
        "giou": "generalized_box",
        "diou": "distance_box",
        "ciou": "complete_box",
    }
    a, b = random_boxes(20, 7, spread=9.0), random_boxes(30, 8, spread=9.0)
    a[0, 2:] = a[0, :2]
    b[0] = a[0]
    expected = getattr(boxes, f"{names[kind]}_iou")(a, b)
    result = ops.box_iou(a, b, kind=kind, pairwise=True, convention="torchvision")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchvision_convention_without_it(backend, dtype):
    """0 / 0 is NaN, reversed boxes have a negative side, and 1e-7 keeps DIoU of points finite."""
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    for kind in ("iou", "giou"):
        assert ops.box_iou(point, point, kind=kind, convention="torchvision").isnan().all()
    a, b = random_boxes(20, 7, dtype), random_boxes(20, 8, dtype)
    a[:4] = a[:4].flip(-1)
    for kind in KINDS:
        result = ops.box_iou(a, b, kind=kind, convention="torchvision")
        expected = box_iou_reference(a.double(), b.double(), kind, False, "torchvision")
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=64 * EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_track_iou_is_the_mean(backend, dtype):
    pred = random_boxes(5 * 8, 9, dtype).view(5, 8, 4)
    target = random_boxes(5 * 8, 10, dtype).view(5, 8, 4)
    lengths = [8, 3, 1, 0, 7]
    for given_lengths in (lengths, None):
        tensor = None if given_lengths is None else torch.tensor(given_lengths)
        result = ops.track_iou(pred, target, tensor)
        assert result.dtype == dtype
        for i, length in enumerate(given_lengths or [8] * 5):
            ious = [
                exact_box_iou(pred[i, k].tolist(), target[i, k].tolist())[0] for k in range(length)
            ]
            expected = float(sum(ious, Fraction(0)) / max(length, 1))
            assert abs(float(result[i]) - expected) <= 4 * EPS[dtype]
    cut = ops.track_iou(pred, target, torch.tensor([99, -1, 8, 8, 8]))
    assert torch.equal(cut[0], ops.track_iou(pred, target)[0])
    assert cut[1] == 0


spans = st.lists(
    st.tuples(st.integers(0, 64), st.integers(0, 64)).map(lambda s: (s[0] / 8, s[1] / 8)),
    max_size=7,
)


@settings(max_examples=100, deadline=None)
@given(sets=st.lists(st.tuples(spans, spans), max_size=5), dtype=st.sampled_from(DTYPES))
def test_interval_sets_equal_exact_counting(sets, dtype):
    def pack(which):
        offsets = np.cumsum([0] + [len(s[which]) for s in sets])
        flat = [span for s in sets for span in s[which]]
        return torch.tensor(flat, dtype=dtype).view(-1, 2), torch.from_numpy(offsets)

    (p, p_offsets), (t, t_offsets) = pack(0), pack(1)
    before = p.clone()
    for name in _box.backends():
        with ops.use(name):
            result = ops.interval_set_iou(p, p_offsets, t, t_offsets, empty=0.25)
            swapped = ops.interval_set_iou(t, t_offsets, p, p_offsets, empty=0.25)
        assert result.dtype == dtype
        assert len(result) == len(sets)
        assert torch.equal(p, before)  # the kernel sorts a copy
        for got, back, (left, right) in zip(result, swapped, sets, strict=True):
            expected = measure_sets(left, right)
            expected = Fraction(1, 4) if expected is None else expected
            assert abs(Fraction(float(got)) - expected) <= 2 * EPS[dtype]
            assert abs(got - back) <= 2 * EPS[dtype]


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32),
        min_size=8,
        max_size=8,
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_iou_is_symmetric_and_bounded(values, dtype):
    a, b = torch.tensor(values, dtype=dtype).view(2, 1, 4)
    for name in _box.backends():
        with ops.use(name):
            forward, back = ops.box_iou(a, b), ops.box_iou(b, a)
            assert torch.equal(forward, back)
            assert 0 <= forward <= 1
            span = ops.temporal_iou(a[:, :2], b[:, :2])
            assert torch.equal(span, ops.temporal_iou(b[:, :2], a[:, :2]))
            assert 0 <= span <= 1
            assert -1 <= ops.box_iou(a, b, kind="giou") <= 1
            assert ops.box_iou(a, a) in (0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_iou_is_symmetric_on_every_instruction_set(dtype):
    if native is None:
        pytest.skip("the native module is not built")
    a, b = random_boxes(2000, 21, dtype), random_boxes(2000, 22, dtype)
    try:
        for isa in ("baseline", "avx2", "avx512"):
            try:
                native.choose_cpu_isa(isa)
            except ValueError:
                continue
            for kind in KINDS:
                assert torch.equal(ops.box_iou(a, b, kind=kind), ops.box_iou(b, a, kind=kind))
    finally:
        native.choose_cpu_isa("auto")


def test_gradients():
    a, b = random_boxes(6, 11), random_boxes(6, 12)
    b[0] = a[0] + 3  # apart: the IoU has no gradient, GIoU pulls
    a.requires_grad_(True)
    b.requires_grad_(True)
    for kind in ("iou", "giou", "diou"):
        assert torch.autograd.gradcheck(lambda x, y, k=kind: ops.box_iou(x, y, kind=k), (a, b))
    assert torch.autograd.gradcheck(
        lambda x, y: ops.temporal_iou(x, y, pairwise=True), (a[:, ::2], b[:, ::2])
    )
    assert torch.autograd.gradcheck(
        lambda x, y: ops.track_iou(x, y), (a.view(2, 3, 4), b.view(2, 3, 4))
    )
    # CIoU's weight takes no gradient by definition, so that finite differences do not apply.
    point = torch.ones(3, 4, requires_grad=True)
    for kind in KINDS:
        (grad,) = torch.autograd.grad(ops.box_iou(point, point + 0, kind=kind).sum(), point)
        assert grad.isfinite().all()
    with pytest.raises(ValueError, match="not differentiable"):
        offsets = torch.tensor([0, 6])
        ops.interval_set_iou(a[:, :2], offsets, b[:, :2].detach(), offsets)


def test_ciou_gradient_holds_its_weight_fixed():
    a, b = random_boxes(6, 13), random_boxes(6, 14)
    a.requires_grad_(True)
    (grad,) = torch.autograd.grad(ops.box_iou(a, b, kind="ciou").sum(), a)
    wh_a, wh_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    v = (
        4
        / math.pi**2
        * (torch.atan(wh_a[:, 0] / wh_a[:, 1]) - torch.atan(wh_b[:, 0] / wh_b[:, 1])) ** 2
    )
    alpha = (v / (1 - ops.box_iou(a, b) + v)).detach()
    (expected,) = torch.autograd.grad((ops.box_iou(a, b, kind="diou") - alpha * v).sum(), a)
    torch.testing.assert_close(grad, expected)


def test_same_bits_again_and_for_every_number_of_threads(backend):
    a, b = random_boxes(300, 15, torch.float32), random_boxes(200, 16, torch.float32)
    expected = ops.box_iou(a, b, kind="ciou", pairwise=True)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.box_iou(a, b, kind="ciou", pairwise=True), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(backend, kind):
    wide = torch.rand(12, 9, generator=torch.Generator().manual_seed(0))
    a, b = wide[::2, 1:5], wide.t()[:4].t()[:6]
    expected = ops.box_iou(a.clone(), b.contiguous(), kind=kind)
    assert torch.equal(ops.box_iou(a, b, kind=kind), expected)
    assert torch.equal(ops.box_iou(a[None], b[None], kind=kind), expected[None])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_and_cuda_give_the_same_bits(dtype):
    a, b = random_boxes(3000, 23, dtype), random_boxes(777, 24, dtype)
    a[:9] = a[:9].flip(-1)
    a[9:20, 2:] = a[9:20, :2]
    lengths = torch.arange(30) * 4
    tracks = a.view(30, 100, 4), a.flip(0).view(30, 100, 4)
    ends = torch.tensor([0] * 30 + [777])
    sets = a[:, ::2], torch.arange(0, 3001, 100), b[:, ::2], ends
    with ops.use("cpu,cuda"):
        for convention in ("zero", "torchvision"):
            for kind in KINDS:
                options = {"kind": kind, "pairwise": True, "convention": convention}
                expected = ops.box_iou(a, b, **options)
                result = ops.box_iou(a.cuda(), b.cuda(), **options)
                # The angles come from another library's arctangent.
                atol = 8 * EPS[dtype] if kind == "ciou" else 0
                torch.testing.assert_close(
                    result.cpu(), expected, rtol=0, atol=atol, equal_nan=True
                )
        expected = ops.track_iou(*tracks, lengths)
        result = ops.track_iou(*(t.cuda() for t in (*tracks, lengths)))
        assert torch.equal(result.cpu(), expected)
        expected = ops.interval_set_iou(*sets)
        assert torch.equal(ops.interval_set_iou(*(s.cuda() for s in sets)).cpu(), expected)


@needs_gpu
def test_offsets_that_are_none_give_nan_on_a_gpu():
    spans = torch.rand(6, 2).sort(-1).values.cuda()
    good, bad = torch.tensor([0, 2, 4, 6]).cuda(), torch.tensor([0, 4, 2, 7]).cuda()
    assert ops.interval_set_iou(spans, bad, spans, good).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    "shape", [(700, 3), (130, 8), (2, 1024), (3, 1500), (2, 2100), (4, 0)], ids=str
)
def test_tracks_of_any_length(shape, backend):
    pred, target = (random_boxes(math.prod(shape), s).float().view(*shape, 4) for s in (21, 22))
    lengths = torch.arange(shape[0]) * 37 % (shape[1] + 1)
    lengths[-1] = shape[1]
    each = box_iou_reference(pred.double(), target.double(), "iou", False, "zero")
    exact = [float(each[i, :n].mean()) if n else 0.0 for i, n in enumerate(lengths.tolist())]
    got = ops.track_iou(*(x.to(device_of(backend)) for x in (pred, target, lengths)))
    torch.testing.assert_close(
        got.double().cpu(), torch.tensor(exact).double(), rtol=1e-6, atol=1e-7
    )


def test_opcheck_and_compile(backend):
    a, b = (random_boxes(6, seed).to(device_of(backend)) for seed in (17, 18))
    offsets = torch.tensor([0, 2, 6], device=a.device)
    lengths = torch.tensor([3, 1], device=a.device)
    tracks = a.view(2, 3, 4), b.view(2, 3, 4)
    op = torch.ops.vcr1_fast
    for kind, pairwise in zip(KINDS, itertools.cycle((True, False))):
        torch.library.opcheck(op.box_iou.default, (a, b, kind, pairwise, "torchvision"))
    torch.library.opcheck(op.temporal_iou.default, (a[:, ::2], b[:, ::2], False))
    torch.library.opcheck(op.track_iou.default, (*tracks, lengths))
    torch.library.opcheck(
        op.interval_set_iou.default, (a[:, ::2], offsets, b[:, ::2], offsets, 0.0)
    )

    def step(a, b, p, t):
        sets = ops.interval_set_iou(a[:, ::2], offsets, b[:, ::2], offsets)
        table = ops.box_iou(a, b, kind="diou", pairwise=True).sum()
        return sets.sum() + table + ops.track_iou(p, t).sum() + ops.temporal_iou(a[:, :2], b[:, :2])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, *tracks), step(a, b, *tracks))


def test_the_gradient_compiles_whole():  # of plain torch, whatever the backend
    a, b = (random_boxes(6, seed) for seed in (17, 18))

    def loss(x):
        boxes = sum(ops.box_iou(x, b, kind=kind, pairwise=True).sum() for kind in KINDS)
        tracks = ops.track_iou(x.view(2, 3, 4), b.view(2, 3, 4)).sum()
        return boxes + tracks + ops.temporal_iou(x[:, ::2], b[:, ::2]).sum()

    eager, compiled = a.clone().requires_grad_(), a.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert eager.grad.abs().sum() > 0
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_errors_name_the_values(backend):
    a = random_boxes(4, 19)
    offsets = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="int64"):
        ops.box_iou(a.long(), a.long())
    with pytest.raises(ValueError, match=r"float64 and torch\.float32"):
        ops.box_iou(a, a.float())
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        ops.box_iou(a[:, :3], a)
    with pytest.raises(ValueError, match=r"\(2, 4\).*pairwise=True"):
        ops.box_iou(a[:2], a)
    with pytest.raises(ValueError, match="two dimensions"):
        ops.box_iou(a[None], a, pairwise=True)
    with pytest.raises(ValueError, match="'eiou'"):
        ops.box_iou(a, a, kind="eiou")
    with pytest.raises(ValueError, match="lengths"):
        ops.track_iou(a[None], a[None], torch.tensor([1, 2]))
    if backend == "cuda":
        return  # gives NaN instead: the values of the offsets are not at hand
    with pytest.raises(ValueError, match="rise from 0 to 4"):
        ops.interval_set_iou(a[:, :2], torch.tensor([0, 3]), a[:, :2], offsets)
    with pytest.raises(ValueError, match="rise from 0 to 4"):
        three = torch.tensor([0, 3, 4]), torch.tensor([0, 5, 4])
        ops.interval_set_iou(a[:, :2], three[0], a[:, :2], three[1])
