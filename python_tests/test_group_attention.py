"""Attention within packs against one dense softmax in float64, differentiated by autograd."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vcr1_fast import ops
from vcr1_fast.model.attention import merged_group_attention
from vcr1_fast.model.packing import Span
from vcr1_fast.ops import group_attention
from vcr1_fast.ops.backend import native
from vcr1_fast.ops.group_attention import MAX_DIM, _forward

SCALE = 0.3
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ISAS = ("baseline", "avx2", "avx512", "auto")


@pytest.fixture(params=_forward.backends())
def backend(request):
    with ops.use(request.param):
        yield request.param


@pytest.fixture
def isa(request):
    try:
        native.choose_cpu_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.choose_cpu_isa("auto")


def pack(*groups):
    """(parts, rows) of groups, each (prompt, [completions]) in tokens."""
    parts, at = [], 0
    for prompt, completions in groups:
        start, middle = at, at + prompt
        parts.append((start, middle, start, start))
        for row, end in itertools.pairwise(itertools.accumulate(completions, initial=middle)):
            parts.append((row, end, start, middle))
        at = parts[-1][1]
    return parts, at


def normal(rows, heads, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, dim, generator=generator, dtype=torch.float64).to(dtype)


def inputs(rows, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    return [normal(rows, h, dim, dtype, i) for i, h in enumerate((heads, kv_heads, kv_heads))]


def seen(parts, rows):
    """Which keys each query sees, from the words of the docstring."""
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for row, end, prefix, prefix_end in parts:
        for i in range(row, end):
            mask[i, prefix:prefix_end] = True
            mask[i, row : i + 1] = True
    return mask


def dense(query, key, value, parts):
    """(out, lse) in float64, every head with its own copy of the keys. A query in no part sees
    itself: what comes of it is for nobody to read, but no NaN."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * SCALE
    mask = seen(parts, len(query))
    mask |= torch.eye(len(query), dtype=torch.bool) & ~mask.any(1)
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), value), scores.logsumexp(-1)


def assert_close(ours, exact, tolerance):
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        a, b = a.detach().double(), b.detach()
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (scale + 1))


def check(query, key, value, parts, dtype, tolerance=None):
    """Values and gradients of `group_attention` against `dense` on the same numbers."""
    tolerance = tolerance or TOLERANCE[dtype]
    ours = [x.detach().requires_grad_() for x in (query, key, value)]
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    out, lse = group_attention(*ours, parts, scale=SCALE)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    expected = dense(*exact, parts)
    assert_close((out, lse), expected, tolerance)
    upstream = normal(*out.shape, dtype, seed=9)
    out.backward(upstream)
    expected[0].backward(upstream.double())
    assert all(x.grad.dtype == dtype for x in ours)
    assert_close([x.grad for x in ours], [x.grad for x in exact], 2 * tolerance)


PACKS = {
    "one token": [(1, [])],
    "a prompt": [(77, [])],
    "tiles exactly": [(64, [32, 32])],
    "a tile and one": [(65, [33, 1])],
    "short completions in a block": [(70, [1, 2, 3, 4, 5, 6, 7, 8])],
    "long completions": [(40, [130, 67])],
    "ragged groups": [(77, [10, 63, 1, 33, 7]), (150, [5, 70]), (3, [])],
    "prompts alone": [(5, []), (40, []), (2, [])],
}


@pytest.mark.parametrize("groups", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients(backend, groups, dtype):
    parts, rows = pack(*groups)
    check(*inputs(rows, dtype=dtype), parts, dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 1, 16), (3, 3, 8), (8, 4, 32), (2, 1, 80), (2, 2, MAX_DIM), (2, 1, 1), (6, 2, 37)],
)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_heads(backend, heads, kv_heads, dim, dtype):
    parts, rows = pack((50, [20, 9, 41]), (12, [3]))
    check(*inputs(rows, heads, kv_heads, dim, dtype), parts, dtype)


# (prompt, completions behind it)
SUFFIXES = {
    "one completion": (70, [9]),
    "tiles exactly": (64, [32, 32]),
    "short completions in a block": (65, [1, 2, 3, 4, 5, 6, 7, 8]),
    "long completions": (40, [130, 67]),
    "one key": (1, [3, 40]),
}


@pytest.mark.parametrize("groups", SUFFIXES.values(), ids=SUFFIXES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_prefix_of_an_earlier_pass(backend, groups, dtype):
    """Values and gradients are those of the completions in the whole sequence; where the prompt has
    no queries, the gradients of its keys and values come from the completions alone."""
    prompt, completions = groups
    parts, rows = pack((prompt, completions))
    whole = inputs(rows, dtype=dtype)
    exact = [x.detach().double().clone().requires_grad_() for x in whole]
    expected, expected_lse = dense(*exact, parts)
    upstream = normal(rows - prompt, 4, 16, dtype, seed=9)
    expected[prompt:].backward(upstream.double())
    query, *own = (x[prompt:].clone().requires_grad_() for x in whole)
    prefix = tuple(x[:prompt].clone().requires_grad_() for x in whole[1:])
    behind = [(row - prompt, end - prompt, 0, prompt) for row, end, _, _ in parts[1:]]
    out, lse = group_attention(query, *own, behind, scale=SCALE, prefix=prefix)
    assert out.dtype == dtype
    assert_close((out, lse), (expected[prompt:], expected_lse[:, prompt:]), TOLERANCE[dtype])
    out.backward(upstream)
    ours = [query.grad, *(torch.cat([a.grad, b.grad]) for a, b in zip(prefix, own, strict=True))]
    exact_grads = [exact[0].grad[prompt:], exact[1].grad, exact[2].grad]
    assert_close(ours, exact_grads, 2 * TOLERANCE[dtype])


def test_a_prefix_is_read_by_the_numbers_of_its_rows(backend):
    """Parts that see different stretches of it, strided views, a query in no part."""
    wide = normal(40, 3, 32, torch.float32, 5)
    prefix = wide[:, :2, :16], wide[:, 1:, 16:]
    query, key, value = inputs(20, dtype=torch.float32)
    parts = [(0, 5, 0, 40), (5, 9, 3, 17), (10, 20, 8, 8)]
    out, lse = group_attention(query, key, value, parts, scale=SCALE, prefix=prefix)
    # In one sequence: the prefix first, as rows in no part.
    zeros = torch.zeros(40, 4, 16)
    joined = [torch.cat(pair) for pair in ((zeros, query), (prefix[0], key), (prefix[1], value))]
    shifted = [(row + 40, end + 40, *seen) for row, end, *seen in parts]
    expected, expected_lse = group_attention(*joined, shifted, scale=SCALE)
    assert torch.equal(out, expected[40:]) and torch.equal(lse, expected_lse[:, 40:])
    assert torch.equal(out[9], torch.zeros(4, 16))


def test_gradcheck_of_a_prefix(backend):
    query, key, value, *prefix = (
        normal(rows, heads, 4, torch.float64, i).requires_grad_()
        for i, (rows, heads) in enumerate(((5, 2), (5, 1), (5, 1), (3, 1), (3, 1)))
    )

    def run(q, k, v, pk, pv):
        parts = [(0, 2, 0, 3), (2, 5, 0, 3)]
        return group_attention(q, k, v, parts, scale=SCALE, prefix=(pk, pv))[0]

    assert torch.autograd.gradcheck(run, (query, key, value, *prefix), atol=1e-6)


UNUSUAL = {
    "a gap between completions": [(0, 20, 0, 0), (20, 26, 0, 20), (29, 33, 0, 20)],
    "prefixes that begin apart": [(0, 20, 0, 0), (20, 26, 0, 20), (26, 33, 5, 20)],
    "prefixes that end apart": [(0, 20, 0, 0), (20, 26, 0, 20), (26, 33, 0, 12)],
    "a prefix within another part": [(0, 20, 0, 0), (20, 26, 3, 9), (26, 33, 21, 25)],
    "a prefix in no part": [(10, 20, 2, 7), (25, 33, 20, 24)],
    "one query, all keys": [(32, 33, 0, 32)],
}


@pytest.mark.parametrize("parts", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_parts(backend, parts):
    query, key, value = inputs(33, dtype=torch.float32)
    rows = [i for row, end, _, _ in parts for i in range(row, end)]
    upstream = torch.zeros(33, 4, 16)
    upstream[rows] = normal(len(rows), 4, 16, torch.float32, seed=4)
    ours = [x.clone().requires_grad_() for x in (query, key, value)]
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    out, expected = group_attention(*ours, parts, scale=SCALE)[0], dense(*exact, parts)[0]
    assert_close([out[rows]], [expected[rows]], 4e-6)
    out.backward(upstream)
    expected.backward(upstream.double())
    assert_close([x.grad for x in ours], [x.grad for x in exact], 8e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nothing_at_all(backend, dtype):
    for rows, parts in ((0, []), (5, [])):
        leaves = [x.requires_grad_() for x in inputs(rows, dtype=dtype)]
        out, lse = group_attention(*leaves, parts, scale=SCALE)
        assert out.shape == (rows, 4, 16) and bool((out == 0).all())
        assert lse.shape == (4, rows) and bool((lse == -torch.inf).all())
        out.sum().backward()
        assert all(x.grad.shape == x.shape and bool((x.grad == 0).all()) for x in leaves)


@pytest.mark.skipif(native is None, reason="the native module is not built")
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", (8, 16, 48))
def test_instruction_sets(isa, dtype, dim):
    parts, rows = pack((150, [5, 70, 31]), (33, [1, 1, 1]))
    check(*inputs(rows, 4, 2, dim, dtype), parts, dtype)


def test_random_packs(backend):
    generator = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(12):
        groups = [
            (draw(1, 150), [draw(1, 70) for _ in range(draw(0, 6))]) for _ in range(draw(1, 4))
        ]
        parts, rows = pack(*groups)
        check(*inputs(rows, dtype=torch.float32), parts, torch.float32)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_strides(backend, dtype):
    """As the model has them: heads first in memory, a slice of a larger tensor, a dense last row
    only after a copy."""
    parts, rows = pack((40, [7, 25]))
    query, key, value = inputs(rows, dtype=dtype)
    by_head = query.transpose(0, 1).contiguous().transpose(0, 1)
    slice_of = torch.cat([key, key + 1], dim=2)[:, :, :16]
    turned = value.transpose(0, 2).contiguous().transpose(0, 2)
    assert by_head.stride() != query.stride() and turned.stride(-1) != 1
    check(by_head, slice_of, turned, parts, dtype)
    out = group_attention(by_head, slice_of, turned, parts, scale=SCALE)[0]
    dense_rows = group_attention(query, key, value, parts, scale=SCALE)[0]
    assert_close([out], [dense_rows.double()], TOLERANCE[dtype])
    one_key = key[:, :1].expand(-1, 2, -1)
    check(query, one_key, one_key, parts, dtype)
    leaves = [[x.clone().requires_grad_() for x in (query, key, value)] for _ in range(2)]
    for x, upstream in zip(
        leaves, (torch.ones(()).expand(out.shape), torch.ones(out.shape)), strict=True
    ):
        group_attention(*x, parts, scale=SCALE)[0].backward(upstream.to(dtype))
    ours, expected = ([x.grad for x in side] for side in leaves)
    assert_close(ours, [x.double() for x in expected], 2 * TOLERANCE[dtype])
    gaps = torch.tensor(parts).repeat_interleave(2, dim=0)[::2]
    assert torch.equal(dense_rows, group_attention(query, key, value, gaps, scale=SCALE)[0])


def test_only_out_is_differentiable_and_once(backend):
    parts, rows = pack((5, [3]))
    leaves = [x.requires_grad_() for x in inputs(rows)]
    out, lse = group_attention(*leaves, parts, scale=SCALE)
    assert out.requires_grad and not lse.requires_grad
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_recomputed_and_under_autocast(backend):
    """Products stay in the inputs' precision, and a recomputed pass gives the same bits."""
    parts, rows = pack((40, [7, 25]))
    grads = []
    for way in range(3):
        leaves = [x.requires_grad_() for x in inputs(rows, dtype=torch.float32)]

        def run(*x):
            return group_attention(*x, parts, scale=SCALE)[0]

        with torch.autocast("cpu", torch.bfloat16, enabled=way == 2):
            out = checkpoint(run, *leaves, use_reentrant=False) if way else run(*leaves)
            assert out.dtype == torch.float32
            out.square().sum().backward()
        grads.append([x.grad for x in leaves])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_another_default_device(backend):
    parts, rows = pack((5, [3]))
    tensors = inputs(rows)
    expected = group_attention(*tensors, parts, scale=SCALE)[0]
    with torch.device("meta"):
        assert torch.equal(group_attention(*tensors, parts, scale=SCALE)[0], expected)


def test_queries_in_no_part_are_zero_and_have_no_gradient(backend):
    """As in the last layer, where of a prompt the last token alone is a query."""
    parts = [(19, 20, 0, 19), (20, 26, 0, 20), (26, 27, 0, 20), (30, 33, 30, 30)]
    query, key, value = (x.requires_grad_() for x in inputs(35, dtype=torch.float32))
    out, lse = group_attention(query, key, value, parts, scale=SCALE)
    unused = [*range(19), 27, 28, 29, 33, 34]
    read = [i for i in range(35) if i not in unused]
    assert torch.equal(out[unused], torch.zeros(len(unused), 4, 16))
    assert bool((lse[:, unused] == -torch.inf).all())
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected, expected_lse = dense(*exact, parts)
    assert_close((out[read], lse[:, read]), (expected[read], expected_lse[:, read]), 4e-6)
    upstream = normal(*out.shape, torch.float32, seed=3)
    out.backward(upstream)  # what comes for rows that nobody reads counts for nothing
    expected[read].backward(upstream[read].double())
    assert_close([x.grad for x in (query, key, value)], [x.grad for x in exact], 8e-6)


def test_no_query_sees_another_completion_or_group(backend):
    """What the second completion's keys and values are makes no bit of difference to the others,
    and none of their gradient comes to it."""
    parts, rows = pack((40, [30, 9, 33]), (20, [5]))
    query, key, value = inputs(rows, dtype=torch.float32)
    clean = group_attention(query, key, value, parts, scale=SCALE)[0]
    hidden = slice(70, 79)
    others = [i for i in range(rows) if not 70 <= i < 79]
    changed = [query.clone(), key.clone(), value.clone()]
    for x in changed[1:]:
        x[hidden] = 50 * x[hidden] + 7
    leaves = [x.requires_grad_() for x in changed]
    out = group_attention(*leaves, parts, scale=SCALE)[0]
    assert torch.equal(out[others], clean[others])
    assert not torch.equal(out[hidden], clean[hidden])
    out[others].sum().backward()
    assert all(bool((x.grad[hidden] == 0).all()) for x in leaves)


def test_nan_stays_in_its_group(backend):
    parts, rows = pack((40, [30, 9]), (20, [5]))
    query, key, value = inputs(rows, dtype=torch.float32)
    clean = group_attention(query, key, value, parts, scale=SCALE)[0]
    for x in (query, key, value):
        x = x[60]
        kept = x.clone()
        x.fill_(torch.nan)
        out = group_attention(query, key, value, parts, scale=SCALE)[0]
        assert torch.equal(out[79:], clean[79:]) and torch.equal(out[:40], clean[:40])
        assert out[60].isnan().all()
        x.copy_(kept)


def test_large_scores(backend):
    """Nothing overflows; a score of 100 is known to 1e-5, and so are the values."""
    parts, rows = pack((70, [40]))
    query, key, value = inputs(rows, dtype=torch.float32)
    out, lse = group_attention(query * 5, key * 5, value, parts, scale=SCALE)
    assert lse.max() > 100
    exact = dense(query.double() * 5, key.double() * 5, value.double(), parts)
    assert_close((out, lse), exact, 3e-5)
    # Of scores of a million little is known but that a probability is at most 1.
    leaves = [x.requires_grad_() for x in (query * 1e3, key * 1e3, value)]
    out, lse = group_attention(*leaves, parts, scale=SCALE)
    assert out.isfinite().all() and lse.isfinite().all()
    out.sum().backward()
    assert leaves[2].grad.max() <= 2 * rows  # two query heads to a key head


def test_hidden_keys_weigh_nothing_beside_very_low_scores(backend):
    """Every score is about -30,000: a mask of any finite number would be higher."""
    parts, rows = pack((40, [30, 9]))
    query, key, value = inputs(rows, dtype=torch.float32)
    query, key = query.abs() + 50, -(key.abs() + 120)
    assert group_attention(query, key, value, parts, scale=SCALE)[1].max() < -1e4
    check(query, key, value, parts, torch.float32, tolerance=2e-2)


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_errors_are_below_twice_those_of_torchs_kernels():
    """On sums of thousands of terms, eight query heads to a key head."""
    span = Span(0, 700, (60,) * 6, torch.device("cpu"))
    parts, rows = span.parts(is_last=False), span.end
    given = inputs(rows, 8, 1, 32, torch.float32)
    upstream = normal(rows, 8, 32, torch.float32, seed=7)

    def results(fn, tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        return [
            fn(*leaves),
            *torch.autograd.grad(fn(*leaves), leaves, upstream.to(leaves[0].dtype)),
        ]

    def theirs(*x):
        by_head = (t.transpose(0, 1)[None] for t in x)
        return merged_group_attention(*by_head, SCALE, [span])[0]

    def ours(*x):
        return group_attention(*x, parts, scale=SCALE)[0]

    exact = results(lambda *x: dense(*x, parts)[0], [x.double() for x in given])
    for a, b, c in zip(results(ours, given), results(theirs, given), exact, strict=True):
        assert (a.double() - c).abs().max() < 2 * (b.double() - c).abs().max()
        assert (a.double() - c).abs().mean() < 2 * (b.double() - c).abs().mean()


@pytest.mark.skipif(native is None, reason="the native module is not built")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    parts, rows = pack((150, [40, 3, 70]), (60, [33]))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [x.requires_grad_() for x in inputs(rows, dtype=dtype)]
            out, lse = group_attention(*leaves, parts, scale=SCALE)
            out.backward(normal(*out.shape, dtype, seed=5))
            results.append([out.detach(), lse, *(x.grad for x in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck(backend):
    parts, rows = pack((5, [3, 2]), (2, [1]))
    leaves = [x.requires_grad_() for x in inputs(rows, 2, 1, 4)]
    assert torch.autograd.gradcheck(
        lambda *x: group_attention(*x, parts, scale=SCALE)[0], leaves, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_opcheck_and_compile(backend):
    parts, rows = pack((40, [7, 25]))
    parts = torch.tensor(parts)
    query, key, value = inputs(rows, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            torch.ops.vcr1_fast.group_attention.default,
            (*(x.to(dtype) for x in (query, key, value)), parts, SCALE),
        )
    out, lse = group_attention(query, key, value, parts, scale=SCALE)
    behind = torch.tensor([(0, 40, 0, 9), (40, 72, 3, 9)])
    for given, prefix in ((parts, ()), (behind, inputs(9, dtype=torch.float32)[1:])):
        torch.library.opcheck(
            torch.ops.vcr1_fast.group_attention.default, (query, key, value, given, SCALE, *prefix)
        )
        torch.library.opcheck(
            torch.ops.vcr1_fast.group_attention_backward.default,
            (query, key, value, out, lse, torch.ones_like(out), given, SCALE, *prefix),
        )

    def step(q, k, v):
        return group_attention(q, k, v, parts, scale=SCALE)[0].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        loss = fn(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("shapes", "parts", "message"),
    [
        (((4, 2, 8), (4, 2, 8), (4, 2, 4)), [], "must be"),
        (((4, 2), (4, 2), (4, 2)), [], "must be"),
        (((4, 2, 8), (5, 2, 8), (5, 2, 8)), [], "agree in N and D"),
        (((4, 3, 8), (4, 2, 8), (4, 2, 8)), [], "heads must divide H"),
        (((4, 0, 8), (4, 2, 8), (4, 2, 8)), [], "at least 1; got 2, 0"),
        (((4, 2, 8), (4, 0, 8), (4, 0, 8)), [], "at least 1; got 0, 2"),
        (((4, 2, 0),) * 3, [], "D >= 1"),
        (((4, 2, 8), (4, 2, 8), (4, 1, 8)), [], "the last two alike"),
        (((4, 2, 8),) * 3, [(0, 4, 0)], r"four whole numbers, got \(0, 4, 0\)"),
        (((4, 2, 8),) * 3, [(0.9, 4.7, 0, 0)], "four whole numbers"),
        (((4, 2, 8),) * 3, [[]], r"four whole numbers, got \[\]"),
        (((4, 2, 8),) * 3, [(0, 1, 0, 0, 1, 2, 0, 0)], "four whole numbers"),
        (((4, 2, 8),) * 3, torch.zeros(1, 4, device="meta").long(), "on the CPU, got meta"),
        (((4, 2, 8),) * 3, [(0, 5, 0, 0)], r"part 0 is \[0, 5, 0, 0\]: rows must rise within 4"),
        (((4, 2, 8),) * 3, [(0, 2, 0, 0), (1, 4, 0, 0)], "part 1 is"),
        (((4, 2, 8),) * 3, [(2, 2, 0, 0)], "part 0 is"),
        (((4, 2, 8),) * 3, [(1, 4, 0, 2)], "a prefix end at or before"),
        (((4, 2, 8),) * 3, [(1, 4, -1, 1)], "part 0 is"),
        (((4, 2, 8),) * 3, [(2, 4, 1, 0)], "part 0 is"),
        (((4, 2, 8),) * 3, torch.zeros(1, 3).long(), r"parts must be int64 \(n, 4\)"),
        (((4, 2, 8),) * 3, torch.zeros(1, 4), "parts must be int64"),
    ],
)
def test_errors(shapes, parts, message):
    with pytest.raises(ValueError, match=message):
        group_attention(*(torch.zeros(shape) for shape in shapes), parts, scale=1.0)


def test_other_errors():
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="of one dtype"):
        group_attention(x, x.double(), x, [], scale=1.0)
    with pytest.raises(ValueError, match="of one dtype"):
        group_attention(*(x.long() for _ in range(3)), [], scale=1.0)
    with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'meta', 'cpu'\]"):
        group_attention(x, x.to("meta"), x, [(0, 4, 0, 0)], scale=1.0)
    for prefix, message in (
        ((x, x[:3]), "P the same for both"),
        ((x[:, :1], x[:, :1]), r"prefix keys must be \(P, 2, 8\)"),
        ((x, x[0]), "prefix values must be"),
        ((x.double(), x.double()), "prefix keys must be torch.float32"),
        ((x.to("meta"), x.to("meta")), "got torch.float32 on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            group_attention(x, x, x, [(0, 4, 0, 0)], scale=1.0, prefix=prefix)
    for part in ((0, 4, 0, 4), (0, 4, -1, 2), (0, 4, 2, 1)):
        with pytest.raises(ValueError, match="a prefix end at or before 3 rows"):
            group_attention(x, x, x, [part], scale=1.0, prefix=(x[:3], x[:3]))
    if native is not None:
        wide = torch.zeros(4, 1, MAX_DIM + 1)
        with pytest.raises(ValueError, match=f"heads of 1 to {MAX_DIM}, got {MAX_DIM + 1}"):
            group_attention(wide, wide, wide, [(0, 4, 0, 0)], scale=1.0)


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_the_binding_checks_what_the_kernel_trusts():
    x, lse, scratch = torch.zeros(4, 2, 8), torch.zeros(2, 4), torch.zeros(4096)
    good = torch.tensor([[0, 4, 0, 0]])

    def forward(query=x, key=x, parts=good, out=x, lse=lse, scratch=scratch, prefix=(None, None)):
        native.group_attention(query, key, key, *prefix, parts, 1.0, out, lse, scratch, 1)

    forward()
    forward(prefix=(x, x), parts=torch.tensor([[0, 4, 1, 4]]))
    for wrong, message in (
        ({"parts": torch.tensor([[0, 5, 0, 0]])}, "rising queries within 4"),
        ({"parts": torch.tensor([[2, 4, 0, 3]])}, "a prefix before query 2"),
        ({"parts": torch.tensor([[0, 2, 0, 0], [1, 3, 0, 0]])}, "rising queries"),
        ({"parts": torch.zeros(1, 3).long()}, r"\(n, 4\)"),
        ({"key": x.double()}, "expected float32"),
        ({"key": torch.zeros(4, 3, 8)}, "no multiple of 3"),
        ({"out": torch.zeros(3, 2, 8)}, "out: expected"),
        ({"out": torch.zeros(4, 8, 2).transpose(1, 2)}, "stride 1"),
        ({"lse": torch.zeros(4, 2)}, r"lse: expected \(2, 4\), got \(4, 2\)"),
        ({"scratch": torch.zeros(255)}, "scratch: expected 256 elements"),
        ({"prefix": (x, x), "scratch": torch.zeros(511)}, "scratch: expected 512 elements"),
        ({"prefix": (x, None)}, "expected both or neither"),
        ({"prefix": (x[:3], x)}, r"prefix_value: expected \(3, 2, 8\)"),
        ({"prefix": (x[:, :1], x)}, r"prefix_key: expected \(4, 2, 8\)"),
        ({"prefix": (x.double(), x)}, "prefix_key: expected float32"),
        (
            {"prefix": (x[:3], x[:3]), "parts": torch.tensor([[0, 4, 0, 4]])},
            "a prefix before its row 3, got 0 to 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            forward(**wrong)

    def backward(tasks, scratch=scratch):
        grads = [torch.zeros(4, 2, 8) for _ in range(3)]
        native.group_attention_backward(
            x, x, x, None, None, good, 1.0, x, lse, x, *grads, None, None, scratch, tasks, 1
        )

    def backward_of_prefix(given, grad_given):
        grads = [torch.zeros(4, 2, 8) for _ in range(3)]
        scratch = torch.zeros(4 * 512)
        native.group_attention_backward(
            x, x, x, *given, good, 1.0, x, lse, x, *grads, *grad_given, scratch, 3, 1
        )

    backward_of_prefix((x, x), (x.clone(), x.clone()))
    for given, grad_given in (((x, x), (None, None)), ((None, None), (x, x)), ((x, x), (x, None))):
        with pytest.raises(ValueError, match="expected both with a prefix, else neither"):
            backward_of_prefix(given, grad_given)
    with pytest.raises(ValueError, match=r"grad_prefix_value: expected \(4, 2, 8\)"):
        backward_of_prefix((x, x), (x.clone(), x[:3].clone()))
    backward(3, torch.zeros(4 * 256))
    with pytest.raises(ValueError, match="scratch: expected 1024 elements"):
        backward(3, torch.zeros(4 * 256 - 1))
    for tasks in (0, -1, 2**56 - 1):
        with pytest.raises(ValueError, match="tasks: expected 1 to 1024"):
            backward(tasks)
