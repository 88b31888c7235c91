import ctypes
import math
import mmap
import multiprocessing
import os
import threading
import warnings

import numpy as np
import pytest
import torch
from gpu_backend import EMULATED

from vcr1_fast import ops
from vcr1_fast.ops import backend, gather_logprobs
from vcr1_fast.ops.gather_logprobs import allocate, backward_op, forward_op, reference

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
ISAS = ["baseline", "avx2", "avx512"]
# With TRITON_INTERPRET=1 alone, for `make test` runs those in a process of their own.
TRITON = [name for name in ("triton",) if name in forward_op.backends("cpu")]
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


def moved_to(device, fn):
    """`fn` of tensors that are first moved to `device`; results come back, gradients too."""

    def moved(*args, **options):
        place = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
        options = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
        }
        results = fn(*place, **options)
        return type(results)(*(x if x is None else x.cpu() for x in results))

    return moved


@pytest.fixture(
    params=[
        "reference",
        *(f"cpu:{isa}" for isa in ISAS),
        *TRITON,
        pytest.param("gpu:cuda", marks=() if EMULATED else GPU),
        pytest.param("gpu:triton", marks=GPU),
    ]
)
def variant(request, monkeypatch):
    """Each backend that can run here, the C++ one with each instruction set."""
    name, _, isa = request.param.partition(":")
    if name == "gpu":
        name = isa
        if EMULATED:  # on CPU tensors
            with ops.use(name):
                yield request.param
            return
        if name not in forward_op.backends("cuda"):
            pytest.skip(f"no {name} backend: {backend.unavailable(name)}")
        monkeypatch.setitem(globals(), "gather_logprobs", moved_to("cuda", gather_logprobs))
        with ops.use(name):
            yield request.param
        return
    if name not in forward_op.backends("cpu"):
        pytest.skip(f"{name}: {backend.unavailable(name)}")
    if isa:
        try:
            backend.native.choose_cpu_isa(isa)
        except ValueError as error:
            pytest.skip(str(error))
    # Interpreted kernels are numpy, which warns of the infinities that GPUs compute with.
    with ops.use(name), np.errstate(all="ignore"):
        yield request.param
    if isa:
        backend.native.choose_cpu_isa("auto")


def make(rows, vocab, dtype, k=None, scale=3.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=gen) * scale).to(dtype)
    labels = torch.randint(vocab, (rows,) if k is None else (rows, k), generator=gen)
    return logits, labels


def torch_form(logits, labels):
    """What one writes without this op, in the dtype of the logits."""
    log_p = logits.log_softmax(-1)
    several = labels.ndim == logits.ndim
    logps = log_p.gather(-1, labels if several else labels[:, None])
    return logps if several else logps[:, 0], -(log_p.exp() * log_p).sum(-1)


def on_gpu(variant):
    return variant.startswith("gpu")


def same(variant, a, b):
    """Equal; on a GPU to rounding, where the order of additions follows a row's alignment."""
    if on_gpu(variant):
        tolerance = 1e-6 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    return torch.equal(a, b)


def run(fn, logits, labels, w, h, **options):
    """Values and the gradient of sum(w logps) + sum(h entropy)."""
    leaf = logits.clone().requires_grad_()
    logps, entropy = fn(leaf, labels, **options)[:2]
    ((logps * w).sum() + (entropy * h).sum()).backward()
    return logps.detach(), entropy.detach(), leaf.grad


def ours(logits, labels, **options):
    return gather_logprobs(logits, labels, entropy=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (4, 131), (3, 8193), (2, 40009)])
@pytest.mark.parametrize("k", [None, 3])
def test_error_is_within_twice_torchs(variant, dtype, shape, k):
    logits, labels = make(*shape, dtype, k)
    gen = torch.Generator().manual_seed(1)
    w, h = torch.randn(labels.shape, generator=gen), torch.randn(shape[0], generator=gen)
    truth = run(torch_form, logits.double(), labels, w.double(), h.double())
    theirs = run(torch_form, logits, labels, w, h)
    mine = run(ours, logits, labels, w, h)
    eps = torch.finfo(torch.float32).eps
    for name, got, plain, exact in zip(
        ("logps", "entropy", "gradient"), mine, theirs, truth, strict=True
    ):
        error = (got.double() - exact).abs().max().item()
        largest = exact.abs().max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item() + 4 * eps * (1 + largest)
        if variant == "triton" and dtype == torch.bfloat16 and name == "gradient":
            allowed += 2**-8 * largest  # interpreted, bfloat16 is cut; GPUs round
        assert error <= allowed, (name, error, allowed)
        if name != "gradient":  # sums are float32 whatever the logits are
            assert got.dtype == torch.float32
            assert error <= 8 * eps * (1 + largest), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(variant, dtype):
    logits, labels = make(6, 501, dtype)
    rows = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.3, 20.0])
    w, h = torch.arange(1.0, 7), torch.linspace(-1, 1, 6)
    for temperature in (0.7, rows, rows[:1]):
        exact = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
        spec = run(
            lambda x, y, exact=exact: reference(
                x,
                y,
                temperature=exact.expand(6) if isinstance(exact, torch.Tensor) else exact,
                entropy=True,
            ),
            logits.double(),
            labels,
            w.double(),
            h.double(),
        )
        got = run(ours, logits, labels, w, h, temperature=temperature)
        for a, b in zip(got[:2], spec[:2], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(got[2].double(), spec[2], rtol=tolerance, atol=tolerance)


def test_lse_and_its_gradient(variant):
    logits, labels = make(4, 301, torch.float32)
    a, b = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = gather_logprobs(a, labels, temperature=0.8)
    exact = (b / 0.8).logsumexp(-1)
    torch.testing.assert_close(out.lse.double(), exact, rtol=1e-6, atol=1e-6)
    assert out.entropy is None
    out.lse.square().sum().backward()
    exact.square().sum().backward()
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_not_read(variant, dtype):
    logits, labels = make(5, 333, dtype)
    mask = torch.tensor([True, False, True, False, True])
    logits[1] = float("nan")
    labels[3] = -100
    w, h = torch.ones(5), torch.ones(5)
    got = run(ours, logits, labels, w, h, mask=mask)
    for x in got:
        assert (x[~mask] == 0).all()
    kept = run(ours, logits[mask], labels[mask], w[mask], h[mask])
    for x, y in zip(got, kept, strict=True):
        assert same(variant, x[mask], y)


def test_rows_without_upstream_gradient_are_exact_zeros(variant):
    logits, labels = make(4, 100, torch.float32)
    leaf = logits.clone().requires_grad_()
    gather_logprobs(leaf, labels).logps.backward(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert (leaf.grad[1::2] == 0).all()
    assert (leaf.grad[::2] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(variant, dtype):
    whole = make(4 * 6, 130, dtype)[0].view(4, 6, 130)
    labels = make(4 * 6, 120, dtype)[1].view(4, 6)
    views = {
        "shifted": (whole[:, :-1], labels[:, 1:]),
        "cut columns": (whole[..., 3:123], labels),
        "swapped": (whole.transpose(0, 1), labels.T),
        "steps": (whole[::2, 1::3, :120], labels[::2, 1::3]),
        "columns": (whole.transpose(0, 2)[:9], torch.ones(9, 6, dtype=torch.int64)),
        "expanded": (whole[:1].expand(4, 6, 130), labels),
    }
    for name, (x, y) in views.items():
        w = torch.linspace(-1, 1, y.numel()).view(y.shape)
        plain = run(ours, x.contiguous(), y, w, w)
        leaf = x.detach().requires_grad_()
        out = ours(leaf, y)
        ((out.logps * w).sum() + (out.entropy * w).sum()).backward()
        for a, b in zip((out.logps, out.entropy, leaf.grad), plain, strict=True):
            assert same(variant, a.detach(), b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_and_infinities(variant, dtype):
    offset = 4096.0 if dtype == torch.float16 else 1e6
    logits, labels = make(6, 257, dtype)
    logits[0] += offset
    logits[1] -= offset
    logits[2, 5:] = -torch.inf
    labels[2] = 3
    logits[3, labels[3]] = -torch.inf
    logits[4] = -torch.inf
    logits[4, labels[4]] = 2.0
    logits[5] = torch.finfo(dtype).min / 2
    logits[5, 0] = torch.finfo(dtype).max / 4
    w = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    h = torch.ones(6)
    truth = reference(logits.double(), labels, entropy=True)
    leaf = logits.clone().requires_grad_()
    out = ours(leaf, labels)
    assert out.logps[3] == -torch.inf
    torch.testing.assert_close(out.logps.double(), truth.logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.entropy.double(), truth.entropy, rtol=2e-6, atol=2e-6)
    ((out.logps * w)[w != 0].sum() + (out.entropy * h).sum()).backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[2, 5:] == 0).all()
    assert (leaf.grad[4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_in_any_order(variant, dtype):
    """The running maximum: rising all the way, none before the end, alone far above the rest."""
    logits = make(6, 40009, dtype)[0]
    logits[0] = logits[0].sort().values
    logits[1] = logits[1].sort(descending=True).values
    logits[2, :-2] = -torch.inf
    logits[3, 39990] = 40.0
    logits[4, 20000] = 25.0
    logits[5, 1:] -= 60.0
    logits[5, 0] = 60.0
    labels = torch.stack([logits.argmax(-1), logits.argmin(-1), torch.full((6,), 40008)], -1)
    labels[2, 1] = 40007
    w, h = torch.tensor([[1.0, 0.5, -2.0]]).expand(6, 3), torch.linspace(-1, 1, 6)
    truth = run(
        lambda x, y: reference(x, y, entropy=True), logits.double(), labels, w.double(), h.double()
    )
    got = run(ours, logits, labels, w, h)
    for a, b in zip(got[:2], truth[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    assert (got[0] <= 0).all() and (got[1] >= -1e-6).all()
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    if variant == "triton" and dtype == torch.bfloat16:
        tolerance *= 2  # interpreted, bfloat16 is cut; GPUs round
    torch.testing.assert_close(got[2].double(), truth[2], rtol=tolerance, atol=tolerance / 4)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("place", [0, 5000, 31000, 40007])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_distribution_gives_nan(variant, bad, place, dtype):
    logits, labels = make(2, 40009, dtype)
    logits[0, place] = bad
    out = ours(logits, labels)
    assert out.logps[0].isnan() and out.entropy[0].isnan()
    assert out.logps[1].isfinite() and out.entropy[1].isfinite()
    logits[0] = -torch.inf
    assert ours(logits, labels).logps[0].isnan()
    if bad != bad:
        logits[0, place] = bad
        assert ours(logits, labels).logps[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_nothing_has_lse_minus_infinity_and_no_more(variant, dtype):
    logits, labels = make(3, 257, dtype)
    logits[1] = -torch.inf
    leaf = logits.requires_grad_()
    out = ours(leaf, labels)
    truth = reference(logits.detach().double(), labels, entropy=True)
    torch.testing.assert_close(out.lse.double(), truth.lse, rtol=2e-6, atol=2e-6)
    assert out.lse[1] == -torch.inf and out.logps[1].isnan() and out.entropy[1].isnan()
    out.logps.sum().backward()
    assert leaf.grad[1].isnan().all() and leaf.grad[0::2].isfinite().all()


def test_repeated_labels_share_an_element(variant):
    logits, _ = make(1, 50, torch.float32)
    leaf = logits.clone().requires_grad_()
    out = gather_logprobs(leaf, torch.tensor([[7, 7, 9]]))
    out.logps.backward(torch.tensor([[1.0, 2.0, -0.5]]))
    once = logits.clone().requires_grad_()
    weights = torch.tensor([[3.0, -0.5]])
    gather_logprobs(once, torch.tensor([[7, 9]])).logps.backward(weights)
    torch.testing.assert_close(leaf.grad, once.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward_writes_over_the_logits(variant, dtype):
    if on_gpu(variant):
        pytest.skip("what is moved to a GPU is a copy; test_on_a_gpu_in_place looks there")
    logits, labels = make(4, 5000, dtype)
    w, h = torch.tensor([1.0, -2.0, 0.0, 0.5]), torch.tensor([1.0, 0.0, 0.0, -1.0])
    expected = run(ours, logits, labels, w, h)[2]
    leaf = logits.clone().requires_grad_()
    out = ours(leaf, labels, inplace_backward=True)
    loss = (out.logps * w).sum() + (out.entropy * h).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("stride", [0, 4])
def test_inplace_backward_spares_rows_that_share_memory(variant, stride):
    labels = torch.tensor([0, 5, 10])
    grads = []
    for inplace in (False, True):
        memory = torch.linspace(-1, 1, 19)
        leaf = memory.as_strided((3, 11), (stride, 1)).requires_grad_()
        out = gather_logprobs(leaf, labels, inplace_backward=inplace)
        grads += torch.autograd.grad(out.logps.sum(), leaf)
        assert torch.equal(memory, torch.linspace(-1, 1, 19))
    assert torch.equal(*grads)


def test_inplace_backward_leaves_the_neighbours_alone(variant):
    """Rows inside a larger buffer: what lies around them must not change."""
    if on_gpu(variant):
        pytest.skip("what is moved to a GPU is a copy; test_on_a_gpu_in_place looks there")
    buffer = torch.full((6, 3, 140), 77.0)
    x = buffer[1:5, 1:2, 3:134]
    source, labels = make(4, 131, torch.float32)
    x.copy_(source[:, None])
    before = buffer.clone()
    leaf = x.detach().requires_grad_()
    gather_logprobs(leaf, labels[:, None], inplace_backward=True).logps.sum().backward()
    assert not torch.equal(x, before[1:5, 1:2, 3:134])
    x.fill_(0)
    before[1:5, 1:2, 3:134] = 0
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits(variant, dtype):
    """Two rows 2^31 elements apart, in address space of which a few pages are ever used."""
    item, gap, vocab = dtype.itemsize, 2**31 + 64, 9000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, (gap + vocab) * item, flags=flags), dtype=dtype)
    x = memory.as_strided((2, vocab), (gap, 1))
    logits, labels = make(2, vocab, dtype)
    x.copy_(logits)
    w, h = torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2.0])
    expected = run(ours, logits, labels, w, h)
    leaf = x.detach().requires_grad_()
    out = ours(leaf, labels, inplace_backward=True)
    ((out.logps * w).sum() + (out.entropy * h).sum()).backward()
    assert torch.equal(out.logps, expected[0]) and torch.equal(out.entropy, expected[1])
    assert torch.equal(leaf.grad, expected[2])
    assert torch.equal(x, expected[2])  # the gradient that torch keeps for such strides is a copy


def forbid_reading(page):
    """A (3, 1024) float32 tensor whose middle row lies on a page that faults when touched."""
    size = 4 * 1024
    memory = mmap.mmap(-1, 4 * size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    logits = torch.frombuffer(memory, dtype=torch.float32)[: 3 * 1024].view(3, 1024)
    logits.copy_(make(3, 1024, torch.float32)[0])
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + page * size), size, 0) == 0
    return logits


def without_the_middle_row():
    leaf = forbid_reading(1).requires_grad_()
    labels = torch.tensor([[1], [-100], [3]])
    mask = torch.tensor([True, False, True])
    args = (leaf.detach(), labels, mask, None, 1.0)
    logps, _, _, stats = forward_op(*args, True)
    assert logps[1] == 0 and (logps[::2] < 0).all()
    for live in (mask, None):  # masked, and live without any gradient
        upstream = torch.tensor([[1.0], [0.0], [1.0]])
        grad = backward_op(
            leaf.detach(), labels.clamp(min=0), logps, stats, live, None, 1.0, upstream, None, None
        )
        assert (grad[1] == 0).all() and grad[0].abs().sum() > 0


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="the rows are pages of 4096 bytes")
def test_dead_rows_are_never_touched():
    """In a child, which dies of a fault where they are."""
    if "cpu" not in forward_op.backends("cpu"):
        pytest.skip(backend.unavailable("cpu"))
    with ops.use("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(target=without_the_middle_row)
        child.start()
        child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_and_used_memory_get_the_same_gradient(variant, dtype):
    """Pages are made, lines streamed or stored, whichever is fastest for the memory at hand."""
    if not variant.startswith("cpu"):
        pytest.skip("other backends make their own buffers")
    logits, labels = make(3, 40016, dtype, k=2)
    logps, _, _, stats = forward_op(logits, labels, None, None, 1.0, True)
    args = (logits, labels, logps, stats, None, None, 1.0, torch.ones(3, 2), torch.ones(3), None)
    grads = []
    for fresh in (True, False):
        memory = torch.frombuffer(mmap.mmap(-1, logits.numel() * logits.itemsize), dtype=dtype)
        if not fresh:
            memory.fill_(7.0)
        grads.append(memory.view(3, 40016))
        backend.native.gather_logprobs_backward(*args, grads[-1], 1)
    odd = torch.full((logits.numel() + 1,), 7.0, dtype=dtype)[1:].view(3, 40016)
    backend.native.gather_logprobs_backward(*args, odd, 1)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], odd)
    assert torch.equal(grads[0], backward_op(*args))


def test_outputs_do_not_spill(variant):
    if not variant.startswith("cpu"):
        pytest.skip("other backends make their own buffers")
    logits, labels = make(3, 37, torch.bfloat16)
    outs = [torch.full((n + 16,), 77.0) for n in (3, 3, 3, 9)]
    views = [out[8:-8] for out in outs]
    grad = torch.full((3 * 37 + 16,), 77.0, dtype=torch.bfloat16)
    labels = labels[:, None]
    backend.native.gather_logprobs(logits, labels, None, None, 1.0, *views, 1)
    args = (logits, labels, views[0].view(3, 1), views[3].view(3, 3), None, None, 1.0)
    g = torch.ones(3, 1)
    backend.native.gather_logprobs_backward(*args, g, None, None, grad[8:-8].view(3, 37), 1)
    for out in (*outs, grad):
        assert (out[:8] == 77).all() and (out[-8:] == 77).all()
        assert (out[8:-8] != 77).all()


@pytest.mark.parametrize("rows,vocab", [(0, 10), (0, 1)])
def test_no_rows(variant, rows, vocab):
    leaf = torch.empty(rows, vocab, requires_grad=True)
    out = ours(leaf, torch.empty(rows, dtype=torch.int64))
    assert out.logps.shape == out.entropy.shape == out.lse.shape == (0,)
    out.logps.sum().backward()
    assert leaf.grad.shape == (rows, vocab)
    assert gather_logprobs(torch.ones(3, 4), torch.empty(3, 0, dtype=torch.int64)).logps.shape == (
        3,
        0,
    )


def test_single_row_and_many_dimensions(variant):
    logits, labels = make(24, 19, torch.float32)
    flat = ours(logits, labels)
    folded = ours(logits.view(2, 3, 4, 19), labels.view(2, 3, 4).to(torch.int32))
    one = ours(logits[0], labels[0])
    for a, b, c in zip(flat, folded, one, strict=True):
        assert torch.equal(a.view(2, 3, 4), b)
        assert torch.equal(a[0], c)


def test_bits_repeat_whatever_the_number_of_threads(variant):
    logits, labels = make(33, 3001, torch.float32)
    w = torch.linspace(-1, 1, 33)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(run(ours, logits, labels, w, w))
    finally:
        torch.set_num_threads(before)
    if variant == "reference":
        pytest.skip("plain torch does not promise it")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_kernels_run_in_a_forked_child_and_beside_each_other():
    """A fork loses the pool's threads; two Python threads share one pool."""
    logits, labels = make(64, 5000, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = gather_logprobs(logits, labels).logps
        seen = []
        threads = [
            threading.Thread(target=lambda: seen.append(gather_logprobs(logits, labels).logps))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(seen) == 4 and all(torch.equal(x, expected) for x in seen)
        with warnings.catch_warnings():  # Python warns of forks with threads: our subject here
            warnings.simplefilter("ignore", DeprecationWarning)
            child = multiprocessing.get_context("fork").Process(
                target=lambda: gather_logprobs(logits, labels)
            )
            child.start()
        child.join(30)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


def test_out_dtype(variant):
    logits, labels = make(2, 9, torch.bfloat16)
    exact = gather_logprobs(logits, labels)
    for dtype in (torch.bfloat16, torch.float64):
        out = gather_logprobs(logits, labels, entropy=True, out_dtype=dtype)
        assert out.logps.dtype == out.entropy.dtype == out.lse.dtype == dtype
        assert torch.equal(out.logps, exact.logps.to(dtype))


def test_gradcheck_in_float64(variant):
    logits = make(3, 6, torch.float64)[0].double().requires_grad_()
    labels = torch.tensor([[0, 0], [5, 2], [1, 3]])
    temperature = torch.tensor([0.5, 1.0, 2.0])
    torch.autograd.gradcheck(
        lambda x: gather_logprobs(
            x, labels, temperature=temperature, entropy=True, out_dtype=torch.float64
        ),
        (logits,),
    )


def test_wrong_arguments_are_refused(variant):
    if on_gpu(variant):
        pytest.skip("labels and temperatures on a GPU are not looked at")
    x, y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    cases = [
        ((x, y[:2]), {}, r"labels must be \(3,\) or \(3, 'K'\)"),
        ((x, y.float()), {}, "labels must be integers, got torch.float32"),
        ((x.long(), y), {}, "logits must be floating point, got torch.int64"),
        ((torch.zeros(3, 0), y), {}, "V > 0"),
        ((x, y + 5), {}, "labels: .*5.* outside a vocabulary of 5"),
        ((x, y - 1), {}, "labels: .*-1.* outside a vocabulary of 5"),
        ((x, y), {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ((x, y), {"temperature": float("nan")}, "temperature must be positive"),
        ((x, y), {"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature: .* holds 0"),
        ((x, y), {"temperature": torch.tensor([1.0, 1.0, torch.inf])}, "temperature: .* holds inf"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            gather_logprobs(*args, **options)


def test_native_checks_its_arguments():
    if backend.native is None:
        pytest.skip("vcr1_fast._C is not built")
    x, y = torch.zeros(3, 5), torch.zeros(3, 1, dtype=torch.int64)
    good = [torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), torch.zeros(3, 3)]

    def call(logits=x, labels=y, outs=good, temperature=None):
        backend.native.gather_logprobs(logits, labels, None, temperature, 1.0, *outs, 1)

    call()
    for options, message in [
        ({"logits": x.double()}, "logits: expected float32, bfloat16 or float16, got float64"),
        ({"logits": torch.zeros(5, 3).T}, "stride 1 along the last dimension, got 3"),
        ({"labels": y.int()}, "labels: expected int64, got int32"),
        ({"labels": y[:2]}, "labels: expected 3 elements, got 2"),
        ({"outs": [good[0].half(), *good[1:]]}, "logps: expected float32, got float16"),
        ({"outs": [*good[:3], torch.zeros(3, 6)[:, ::2]]}, "stats: expected a contiguous tensor"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "temperature: row 1 holds -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**options)


@pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("vocab", [37, 64, 4097])
def test_triton_outputs_do_not_spill(monkeypatch, vocab):
    from vcr1_fast.ops.triton import gather_logprobs as module

    buffers = []

    def guarded(logits, labels, entropy):
        outs = [torch.full((x.numel() + 64,), 77.0) for x in allocate(logits, labels, entropy)]
        buffers.extend(outs)
        views = zip(outs, allocate(logits, labels, entropy), strict=True)
        return tuple(out[32:-32].view(x.shape) for out, x in views)

    monkeypatch.setattr(module, "allocate", guarded)
    logits, labels = make(3, vocab, torch.bfloat16, k=40)
    with ops.use("triton"), np.errstate(all="ignore"):
        got = gather_logprobs(logits, labels, entropy=True)
        assert not any((buffer[32:-32] == 77).any() for buffer in buffers)
    for buffer in buffers:
        assert (buffer[:32] == 77).all() and (buffer[-32:] == 77).all()
    exact = reference(logits.double(), labels)  # more labels than the kernel takes at a time
    torch.testing.assert_close(got.logps.double(), exact.logps, rtol=2e-6, atol=2e-6)


def test_triton_is_tested_where_it_is_interpreted():
    assert bool(TRITON) == (os.environ.get("TRITON_INTERPRET") == "1")


@pytest.mark.parametrize("name", ["reference", "cpu", *TRITON])
def test_opcheck(name):
    if name not in forward_op.backends("cpu"):
        pytest.skip(f"{name}: {backend.unavailable(name)}")
    logits, labels = make(3, 11, torch.float32, k=2)
    mask, rows = torch.tensor([True, False, True]), torch.tensor([1.0, 2.0, 0.5])
    namespace = torch.ops.vcr1_fast
    with ops.use(name), np.errstate(all="ignore"):
        args = (logits, labels, mask, rows, 1.0, True)
        torch.library.opcheck(namespace.gather_logprobs.default, args)
        logps, _, _, stats = forward_op(*args)
        grads = (torch.ones(3, 2), torch.ones(3), None)
        args = (logits, labels, logps, stats, mask, rows, 1.0, *grads)
        torch.library.opcheck(namespace.gather_logprobs_backward.default, args)
        torch.library.opcheck(namespace.gather_logprobs_backward_.default, args)
        assert backward_op(*args).shape == logits.shape


# torch's tracer makes a Function object while it inspects one, and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["reference", "cpu", *TRITON])
def test_compiles_whole(name, inplace):
    if name not in forward_op.backends("cpu"):
        pytest.skip(f"{name}: {backend.unavailable(name)}")
    logits, labels = make(4, 50, torch.float32)
    w = torch.linspace(-1, 1, 4)

    def loss(x):
        out = gather_logprobs(
            x * 1.5, labels, entropy=True, mask=labels > 3, inplace_backward=inplace
        )
        return (out.logps * w).sum() + out.entropy.sum() + out.lse.sum()

    a, b = (logits.clone().requires_grad_() for _ in range(2))
    with ops.use(name), np.errstate(all="ignore"):
        eager, compiled = loss(a), torch.compile(loss, fullgraph=True, backend="aot_eager")(b)
        eager.backward()
        compiled.backward()
    assert torch.equal(eager, compiled)
    assert torch.equal(a.grad, b.grad)


def on_a_gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (5, 8193), (70, 1000), (4, 151_936), (4, 151_937)])
def test_cuda_agrees_with_float64(dtype, shape):
    logits, labels = make(*shape, dtype, k=2)
    w, h = torch.randn(labels.shape), torch.randn(shape[0])
    truth = run(torch_form, logits.double(), labels, w.double(), h.double())
    stream = torch.cuda.Stream()  # not the default one: kernels must follow torch's choice
    with torch.cuda.stream(stream):
        got = run(ours, logits.cuda(), labels.cuda(), w.cuda(), h.cuda())
    stream.synchronize()
    for value, exact in zip(got[:2], truth[:2], strict=True):
        torch.testing.assert_close(value.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got[2].cpu().double(), truth[2], rtol=tolerance, atol=tolerance)


def in_place(buffer, view, labels, w):
    """The gradient, and what it left of the buffer around the rows, which holds 77 there."""
    leaf = view(buffer).detach().requires_grad_()
    out = gather_logprobs(leaf, labels, entropy=True, inplace_backward=True)
    (grad,) = torch.autograd.grad(((out.logps + out.entropy) * w).sum(), leaf)
    assert grad.data_ptr() == leaf.data_ptr()
    grad = grad.clone()
    view(buffer).fill_(77)
    return grad, (buffer == 77).all()


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 131, 1030, 9001, 20_011, 151_937])
@pytest.mark.parametrize("start", [0, 1, 3, 8])
def test_on_a_gpu_in_place(dtype, vocab, start):
    """Rows of any alignment inside a larger buffer."""
    logits, labels = make(6, vocab, dtype)
    w = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.0, 1.0])
    expected = run(ours, logits.float(), labels, w, w)[2]
    buffer = torch.full((6, 2, vocab + 11), 77.0, dtype=dtype, device="cuda")

    def view(x):
        return x[:, 1, start : start + vocab]

    view(buffer).copy_(logits)
    grad, intact = in_place(buffer, view, labels.cuda(), w.cuda())
    assert intact
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(grad.float().cpu(), expected, rtol=tolerance, atol=1e-6)


@on_a_gpu
def test_on_a_gpu_bits_repeat():
    logits, labels = (x.cuda() for x in make(300, 50_001, torch.bfloat16))
    w = torch.linspace(-1, 1, 300, device="cuda")
    first, second = (run(ours, logits, labels, w, w) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@on_a_gpu
def test_on_a_gpu_more_than_two_billion_elements():
    """Offsets into the logits do not fit 32 bits."""
    rows, vocab = 15_000, 151_936
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1, 7] = 3.0
    labels = torch.full((rows,), 7, device="cuda")
    out = gather_logprobs(logits, labels)
    torch.testing.assert_close(out.logps[0].item(), -math.log(vocab), rtol=1e-6, atol=1e-6)
    exact = 3 - math.log(vocab - 1 + math.exp(3))
    torch.testing.assert_close(out.logps[-1].item(), exact, rtol=1e-6, atol=1e-6)
