"""Attention of packed groups by two varlen calls: against each completion alone with its own copy
of the prompt, in float64; what the calls get; shapes and sizes on the device "meta"."""

from itertools import accumulate, pairwise

import pytest
import torch
import torch.utils.checkpoint
from gpu_backend import needs_gpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vcr1_fast.model import attention, flex_attention, varlen_attention
from vcr1_fast.model.packing import Span, token_owners
from vcr1_fast.model.varlen_attention import missing_varlen, varlen_group_attention

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))
SCALING = 0.2
# (prompt, completions) of each group
PACKS = {
    "one group": [(11, (5, 9, 1))],
    "one completion": [(7, (4,))],
    "no completion": [(6, ())],
    "prompts alone": [(6, ()), (3, ()), (1, ())],
    "two groups": [(7, (4, 4)), (13, (1, 7, 10))],
    "a group without completions first": [(12, ()), (9, (3, 2))],
    "between": [(5, (2,)), (4, ()), (6, (1, 3))],
    "last": [(5, (2, 6)), (4, ())],
    "single tokens": [(1, (1,)), (2, (1, 1))],
}


def _spans(pack, device=CPU):
    spans = []
    for prompt, lengths in pack:
        spans.append(Span(spans[-1].end if spans else 0, prompt, lengths, device))
    return spans


def _inputs(pack, heads, dtype=torch.float64, seed=0):
    """Leaves q (1, H, N, D), k, v, and weights of the output (1, N, H, D)."""
    count, kv_heads, dim = heads
    rows = _spans(pack)[-1].end
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, rows, dim) for n in (count, kv_heads, kv_heads)] + [(1, rows, count, dim)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [x.requires_grad_() for x in values[:3]], values[3]


def _alone(query, key, value, pack):
    """Every prompt, and every completion behind a copy of its prompt, by a dense causal softmax."""
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))

    def causal(rows, last):
        q, k, v = (x[0][:, rows] for x in (query, key, value))
        seen = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        weights = (q @ k.mT * SCALING).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(0, 1)[-last:]

    outputs, row = [], 0
    for prompt, lengths in pack:
        own = torch.arange(row, row + prompt)
        outputs.append(causal(own, prompt))
        row += prompt
        for length in lengths:
            completion = torch.arange(row, row + length)
            outputs.append(causal(torch.cat([own, completion]), length))
            row += length
    return torch.cat(outputs)[None]


@pytest.fixture
def strict(monkeypatch):
    """The stand-in, with what the kernels ask of their arguments; returns the calls."""
    forward = varlen_attention.plain_varlen_forward
    backward = varlen_attention.plain_varlen_backward
    calls = []

    def check(a):
        for edges, longest, rows in (
            (a["cum_seq_q"], a["max_q"], a["query"]),
            (a["cum_seq_k"], a["max_k"], a["key"]),
        ):
            assert edges.dtype == torch.int32 and edges.is_contiguous()
            ends = edges.tolist()
            lengths = [end - start for start, end in pairwise(ends)]
            assert ends[0] == 0 and ends[-1] == len(rows)  # other rows would be uninitialised
            assert min(lengths) >= 1 and longest == max(2, *lengths)
        assert len(a["key"]) == len(a["value"])
        assert all(a[name].stride(-1) == 1 for name in ("query", "key", "value"))
        assert a["dropout_p"] == 0.0

    def checked_forward(**a):
        check(a)
        assert a["return_debug_mask"] is False
        calls.append(("forward", a["is_causal"], len(a["cum_seq_q"]) - 1))
        return forward(**a)

    def checked_backward(**a):
        check(a)
        assert all(a[name].is_contiguous() for name in ("grad_out", "out", "logsumexp"))
        assert a["grad_out"].shape == a["out"].shape == a["query"].shape
        assert a["logsumexp"].shape == (a["query"].shape[1], len(a["query"]))
        assert a["rng_state"].dtype == torch.uint64 and a["rng_state"].shape == (2,)
        calls.append(("backward", a["is_causal"], len(a["cum_seq_q"]) - 1))
        return backward(**a)

    monkeypatch.setattr(varlen_attention, "plain_varlen_forward", checked_forward)
    monkeypatch.setattr(varlen_attention, "plain_varlen_backward", checked_backward)
    return calls


def _assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("heads", [(2, 2, 8), (6, 2, 16), (4, 1, 24)], ids=str)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_values_and_gradients_equal_each_completion_alone(strict, pack, heads, is_last):
    leaves, weights = _inputs(pack, heads)
    spans = _spans(pack)
    if is_last:  # only these rows are used, and only they send gradients
        unread = torch.ones(spans[-1].end, dtype=torch.bool)
        unread[torch.cat([span.read for span in spans])] = False
        weights[:, unread] = 0
    out = varlen_group_attention(*leaves, SCALING, spans, is_last)
    grads = torch.autograd.grad(out, leaves, weights)
    expected = _alone(*leaves, pack)
    theirs = torch.autograd.grad(expected, leaves, weights)
    if is_last:
        assert (out[:, unread] == 0).all()
        expected = expected.masked_fill(unread[None, :, None, None], 0)
    _assert_close((out, *grads), (expected, *theirs))
    # One call, or two where there are completions, whatever the number of groups.
    parts = 2 if any(lengths for _, lengths in pack) else 1
    assert len(strict) == 2 * parts
    assert [name for name, *_ in strict] == ["forward"] * parts + ["backward"] * parts


def test_unread_rows_may_send_any_gradient_in_the_last_layer(strict):
    """Their output is a constant."""
    pack = PACKS["between"]
    leaves, weights = _inputs(pack, (4, 2, 8))
    out = varlen_group_attention(*leaves, SCALING, _spans(pack), True)
    grads = torch.autograd.grad(out, leaves, weights, retain_graph=True)
    unread = torch.ones(len(weights[0]), dtype=torch.bool)
    unread[torch.cat([span.read for span in _spans(pack)])] = False
    weights[:, unread] = torch.inf
    _assert_close(torch.autograd.grad(out, leaves, weights), grads)


def test_heads_laid_out_as_the_model_has_them_and_as_it_has_not(strict):
    """The projections give (1, N, H, D) seen as (1, H, N, D); a last dimension that is not dense is
    copied."""
    pack = PACKS["two groups"]
    leaves, weights = _inputs(pack, (4, 2, 8))
    want = varlen_group_attention(*leaves, SCALING, _spans(pack))
    grads = torch.autograd.grad(want, leaves, weights)
    for layout in ((0, 2, 1, 3), (3, 0, 1, 2)):
        back = [layout.index(i) for i in range(4)]
        other = [x.detach().permute(layout).contiguous().permute(back) for x in leaves]
        assert not other[0].is_contiguous()
        other = [x.requires_grad_() for x in other]
        out = varlen_group_attention(*other, SCALING, _spans(pack))
        strided = weights.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
        _assert_close((out, *torch.autograd.grad(out, other, strided)), (want, *grads))


def test_scores_far_apart_in_the_two_parts():
    """The weights of the parts are 0 and 1: neither part's sums may overflow or become NaN."""
    pack = [(9, (4, 3))]
    for factor in (300.0, -300.0):
        leaves, weights = _inputs(pack, (2, 1, 8))
        with torch.no_grad():
            # Prompt keys score high with every query, or low.
            leaves[0][..., 0] = 10.0
            leaves[1][:, :, :9, 0] = factor
        out = varlen_group_attention(*leaves, SCALING, _spans(pack))
        expected = _alone(*leaves, pack)
        grads = (torch.autograd.grad(x, leaves, weights) for x in (out, expected))
        assert torch.allclose(out, expected, rtol=0, atol=1e-11)
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.0), (torch.float16, 2.0)])
def test_half_precision_rounds_as_a_dense_softmax_does(dtype, bound):
    """DESIGN.md: at most twice the error of plain torch in the same dtype."""
    pack = [(60, (20, 33, 5)), (30, (8, 8))]
    (q, k, v), weights = _inputs(pack, (4, 2, 64), dtype)
    truth = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = _alone(*truth, pack)
    exact = (exact, *torch.autograd.grad(exact, truth, weights.double()))
    found = []
    for compute in (
        lambda: varlen_group_attention(q, k, v, SCALING, _spans(pack)),
        lambda: attention.masked_group_attention(q, k, v, SCALING, _spans(pack)),
    ):
        out = compute()
        grads = torch.autograd.grad(out, (q, k, v), weights)
        pairs = zip((out.detach(), *grads), exact, strict=True)
        found.append([float((a - b.detach()).norm()) for a, b in pairs])
    for ours, plain in zip(*found, strict=True):
        assert ours <= bound * plain


def test_a_repeated_backward_pass_gives_the_same_bits():
    pack = PACKS["between"]
    leaves, weights = _inputs(pack, (4, 2, 8), torch.float32)
    out = varlen_group_attention(*leaves, SCALING, _spans(pack))
    first = torch.autograd.grad(out, leaves, weights, retain_graph=True)
    second = torch.autograd.grad(out, leaves, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layouts_are_made_once_a_pass_and_not_shared_by_others(monkeypatch):
    made = []
    make = varlen_attention.VarlenLayout.of
    monkeypatch.setattr(
        varlen_attention.VarlenLayout,
        "of",
        lambda spans, is_last: (made.append(is_last), make(spans, is_last))[1],
    )
    pack = PACKS["two groups"]
    leaves, _ = _inputs(pack, (2, 1, 8))
    spans = _spans(pack)
    for _ in range(3):
        varlen_group_attention(*leaves, SCALING, spans, False)
        varlen_group_attention(*leaves, SCALING, tuple(spans), True)
    assert made == [False, True]
    # The same first span in another pack.
    rows = spans[0].end
    varlen_group_attention(*(x[:, :, :rows] for x in leaves), SCALING, spans[:1])
    assert made == [False, True, False]


def test_groups_that_do_not_tile_the_sequence_are_refused():
    leaves, _ = _inputs([(3, (2,)), (4, ())], (2, 1, 8))
    spans = [Span(0, 3, (2,), CPU), Span(6, 3, (), CPU)]
    with pytest.raises(ValueError, match=r"groups start at \[0, 6\], end at \[5, 9\]"):
        varlen_group_attention(*leaves, SCALING, spans)
    with pytest.raises(ValueError, match="groups end at row 5, the sequence has 9"):
        varlen_group_attention(*leaves, SCALING, spans[:1])


class Operators(TorchDispatchMode):
    """Names, devices and largest results of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names, self.largest, self.devices = [], 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.devices.add((x.device.type, x.numel() > 1000))
        return out


def _on_meta(pack, heads, is_last=False):
    """The operators of a layer forward, and backward; checks shapes and dtypes."""
    count, kv_heads, dim = heads
    spans = _spans(pack, META)
    rows = spans[-1].end
    # As the projections lay them out.
    q, k, v = (
        torch.empty(1, rows, n, dim, dtype=torch.bfloat16, device=META, requires_grad=True)
        for n in (count, kv_heads, kv_heads)
    )
    views = [x.transpose(1, 2) for x in (q, k, v)]
    varlen_group_attention(*views, SCALING, spans, is_last)  # the layout is made
    with Operators() as forward:
        out = varlen_group_attention(*views, SCALING, spans, is_last)
    assert (out.shape, out.dtype) == ((1, rows, count, dim), torch.bfloat16)
    with Operators() as backward:
        out.backward(torch.empty_like(out))
    for x in (q, k, v):
        assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    return forward, backward


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("groups", [1, 2, 64])
def test_the_kernels_are_called_twice_for_any_groups_and_nothing_is_as_large_as_a_mask(
    groups, dim, is_last
):
    """On the device "meta" torch's own operators run: their names, shapes and dtypes."""
    pack = [(3600, (200, 150, 201) * 3)] * groups
    rows = sum(prompt + sum(lengths) for prompt, lengths in pack)
    forward, backward = _on_meta(pack, (16, 2, dim), is_last)
    assert forward.names.count("_flash_attention_forward") == 2
    assert backward.names.count("_flash_attention_backward") == 2
    # A mask of one group would have S (P + S), 8.7 million; the pack's own tensors rows * H * D.
    assert max(forward.largest, backward.largest) == rows * 16 * dim
    assert {device for device, _ in forward.devices | backward.devices} == {"meta"}


def test_a_single_group_is_not_gathered():
    for is_last in (False, True):
        for run in _on_meta([(100, (10, 20))], (4, 2, 64), is_last):
            assert not {"index_select", "index_copy_", "index_add_"} & set(run.names)
        for run in _on_meta([(100, (10, 20))] * 2, (4, 2, 64), is_last):
            assert "index_select" in run.names


def test_operators_do_not_grow_with_the_number_of_groups():
    few, many = (_on_meta([(100, (10, 20))] * n, (4, 2, 64)) for n in (2, 32))
    assert [run.names for run in few] == [run.names for run in many]


def test_masks_and_layouts_are_made_on_the_device():
    """No tensor of the pack's size on the host; edges and ranges are copied from there."""
    spans = _spans([(300, (40, 50)), (200, (60,))], META)
    with Operators() as run:
        for span in spans:
            assert span.mask.shape == (sum(span.lengths), span.end - span.start)
            assert span.mask.device == span.valid.device == span.padded.device == META
        token_owners(spans)
        flex_attention.block_mask(spans, 1024)
    assert ("cpu", True) not in run.devices
    for pack in PACKS.values():
        for span in _spans(pack):
            lengths = torch.tensor(span.lengths, dtype=torch.int64)
            owner = torch.arange(len(lengths)).repeat_interleave(lengths)
            own = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
            assert torch.equal(span.mask[:, span.prompt :], own)
            assert span.mask[:, : span.prompt].all()


# --- the check that decides whether the kernels are used


def _errors(dtype=torch.bfloat16):
    return varlen_attention._errors(CPU, dtype, 4, 2, 16)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        # A quarter of what the check lets through.
        (torch.bfloat16, varlen_attention._TOLERANCE / 4),
        (torch.float16, varlen_attention._TOLERANCE / 4),
    ],
)
def test_the_check_finds_nothing_in_what_is_right(dtype, bound):
    errors = _errors(dtype)
    assert len(errors) == 8
    assert max(errors.values()) < bound


def _base_2(out, lse, scale):
    return out, lse / torch.tensor(2.0).log()


def _unscaled(out, lse, scale):
    return out, lse / scale


def _a_third_too_large(out, lse, scale):
    """The parts' sums, by a factor e^0.3: the merge cancels it, the gradients do not."""
    return out, lse + 0.3


def _rows_first(out, lse, scale):
    return out, lse.t().reshape(lse.shape)


def _nan(out, lse, scale):
    return out.index_fill(0, torch.tensor([len(out) - 1]), torch.nan), lse


@pytest.mark.parametrize("fault", [_base_2, _unscaled, _a_third_too_large, _rows_first, _nan])
def test_the_check_finds_kernels_that_differ(monkeypatch, fault):
    """Faults of a kernel's forward pass, in half precision and its tolerance."""
    run = varlen_attention.plain_varlen_forward
    monkeypatch.setattr(
        varlen_attention, "plain_varlen_forward", lambda **a: fault(*run(**a), a["scale"])
    )
    errors = _errors()
    assert not all(error <= varlen_attention._TOLERANCE for error in errors.values())


def test_the_check_finds_a_backward_kernel_that_recomputes_the_sum_of_its_part(monkeypatch):
    """As one would that ignores the log-sum-exp it is given."""
    run, forward = varlen_attention.plain_varlen_backward, varlen_attention.plain_varlen_forward

    def own_sum(**a):
        given = {name: a[name] for name in a if name in varlen_attention._FORWARD}
        _, lse = forward(**given, return_debug_mask=False)
        return run(**{**a, "logsumexp": lse})

    monkeypatch.setattr(varlen_attention, "plain_varlen_backward", own_sum)
    assert max(_errors().values()) > 2 * varlen_attention._TOLERANCE


def test_the_check_leaves_the_users_random_numbers_and_modes():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    with torch.inference_mode():
        assert max(_errors(torch.float64).values()) < 1e-12
        assert torch.equal(torch.rand(1), want)


def test_the_check_may_be_first_called_under_checkpointing_and_autocast():
    """A pass's recomputation does not check again: tensors that the check saved would be missed."""
    found = []

    def layer(x):
        if not found:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(max(_errors(torch.float32).values()))
        return (x * x).exp()

    x = torch.linspace(0, 1, 4, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    out.sum().backward()
    assert found[0] < 1e-5
    assert torch.allclose(x.grad, 2 * x * (x * x).exp())


@pytest.fixture
def capable(monkeypatch):
    """As on a GPU that runs the kernels, as far as the host can see; the check passes."""
    missing_varlen.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(varlen_attention, "_errors", lambda *a: {"values": 0.001})
    yield
    missing_varlen.cache_clear()


BF16 = torch.bfloat16


def test_the_kernels_serve_half_precision_and_heads_up_to_256(capable):
    for dim in (64, 80, 128, 256):
        assert missing_varlen(CUDA, BF16, 16, 2, dim) is None
    assert missing_varlen(META, BF16, 16, 2, 128) is None
    assert "not float32" in missing_varlen(CUDA, torch.float32, 16, 2, 128)
    assert "not 264" in missing_varlen(CUDA, BF16, 16, 2, 264)
    assert "not 60" in missing_varlen(CUDA, BF16, 16, 2, 60)
    assert "for xpu" in missing_varlen(torch.device("xpu"), BF16, 16, 2, 64)


def test_what_the_host_sees_missing_is_named(capable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0" in missing_varlen(CUDA, BF16, 16, 2, 64)
    monkeypatch.setattr(varlen_attention, "_FORWARD", {"query"})
    missing_varlen.cache_clear()
    assert "changed the parameters of aten::_flash_attention_forward" in missing_varlen(
        CUDA, BF16, 16, 2, 64
    )


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"values": 0.001, "gradients of keys": 0.5}, "gradients of keys differ .* by 0.5"),
        ({"values": float("nan")}, "values differ .* by nan"),
        (RuntimeError("CUDA error: no kernel\nmore"), "failed: CUDA error: no kernel$"),
    ],
)
def test_a_failed_check_is_a_reason(capable, monkeypatch, result, reason):
    def errors(*_):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(varlen_attention, "_errors", errors)
    with pytest.warns(RuntimeWarning, match=r"masks of S x \(P \+ S\) bytes a group.*" + reason):
        assert attention.resolve_backend("auto", CUDA, BF16, (16, 2, 64)) == "masked"
    with pytest.raises(ValueError, match=r"'varlen' cannot run.*'masked'"):
        attention.resolve_backend("varlen", CUDA, BF16, (16, 2, 64))


def test_running_out_of_memory_is_no_reason(capable, monkeypatch):
    def errors(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(varlen_attention, "_errors", errors)
    with pytest.raises(torch.OutOfMemoryError):
        missing_varlen(CUDA, BF16, 16, 2, 64)


def test_auto_takes_the_kernels_where_they_run(capable):
    heads = (16, 2, 64)
    assert attention.resolve_backend("auto", CUDA, BF16, heads) == "varlen"
    assert attention.resolve_backend("auto", CPU, BF16, heads) == "fused"
    assert attention.resolve_backend("masked", CUDA, BF16, heads) == "masked"
    for backend in ("fused", "merged"):
        with pytest.raises(ValueError, match="is for the CPU, the model is on cuda: 'auto'"):
            attention.check_backend(backend, CUDA, BF16, heads)
    with pytest.warns(RuntimeWarning, match="not float32"):
        assert attention.resolve_backend("auto", CUDA, torch.float32, heads) == "masked"
    # Float32 parameters may serve queries of half precision: only the first pass can tell.
    attention.check_backend("auto", CUDA, torch.float32, heads)


# --- FlexAttention's blocks


@pytest.mark.parametrize("size", [None, 1536])
def test_flex_blocks_equal_those_of_the_whole_mask(size):
    from torch.nn.attention.flex_attention import create_block_mask

    spans = _spans([(300, (256, 100, 60)), (212, (1, 150)), (128, ())])
    size = size or spans[-1].end
    ours = flex_attention.block_mask(spans, size)
    pieces = [n for span in spans for n in (span.prompt, *span.lengths)]
    assert size - spans[-1].end == (329 if size == 1536 else 0)
    # The rule, written as a dense mask by its pieces; the padding sees itself.
    dense = torch.zeros(size, size, dtype=torch.bool)
    for start, end in pairwise([0, *accumulate(pieces), size]):
        dense[start:end, start:end] = True
    for span in spans:
        dense[span.middle : span.end, span.start : span.middle] = True
    dense &= torch.ones(size, size).tril().bool()
    i, j = torch.arange(size)[:, None], torch.arange(size)
    assert torch.equal(ours.mask_mod(None, None, i, j), dense)
    whole = create_block_mask(lambda b, h, i, j: dense[i, j], None, None, size, size, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(ours, f"{name}_num_blocks")[0, 0].tolist()
        for mine, other, count in zip(
            getattr(ours, f"{name}_indices")[0, 0],
            getattr(whole, f"{name}_indices")[0, 0],
            counts,
            strict=True,
        ):
            assert mine[:count].tolist() == other[:count].tolist(), name


def test_packs_are_padded_to_few_sizes():
    sizes = [flex_attention.padded_size(n) for n in range(1, 40_000)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.125 * n + 128 for n, size in enumerate(sizes, 1))
    assert all(size % 128 == 0 for size in sizes)
    assert len({size for size in sizes if 4096 < size <= 32768}) == 24


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4, 64), (16, 2, 128), (8, 2, 256)], ids=str)
def test_the_kernels_on_a_gpu(heads, dtype):
    assert missing_varlen(CUDA, dtype, *heads) is None
    errors = varlen_attention._errors(CUDA, dtype, *heads)
    assert max(errors.values()) < varlen_attention._TOLERANCE / 2


@needs_gpu
@pytest.mark.filterwarnings("ignore:attention by masks:RuntimeWarning")
def test_flex_attention_on_a_gpu():
    for pack in ([(150, (33, 1)), (40, (140, 3))], [(700, (90, 90))]):
        (q, k, v), weights = _inputs(pack, (4, 2, 64), torch.bfloat16)
        q, k, v = (x.detach().cuda().requires_grad_() for x in (q, k, v))
        found = []
        for compute in (flex_attention.flex_group_attention, attention.masked_group_attention):
            out = compute(q, k, v, SCALING, _spans(pack, CUDA))
            found.append((out, *torch.autograd.grad(out, (q, k, v), weights.cuda())))
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() < 0.02 * b.norm()
