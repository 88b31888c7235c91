import numpy as np
import pytest
import torch

from vcr1_fast import ops
from vcr1_fast.ops import gather_logprobs, linear_logprobs, lm_head
from vcr1_fast.ops.gather_logprobs import forward_op as gather_op
from vcr1_fast.ops.linear_logprobs import backward_op, forward_op, reference
from vcr1_fast.ops.lm_head import rows_per_chunk
from vcr1_fast.ops.memory import available_bytes

DTYPES = [torch.float32, torch.bfloat16]
N, H, V = 13, 16, 97


# Interpreted, in the process that runs it, Triton takes part where that costs little.
TRITON = [name for name in ("triton",) if name in gather_op.backends("cpu")]
EACH = pytest.mark.parametrize("backend_name", ["reference", "cpu", *TRITON], indirect=True)


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Interpreted kernels are numpy, which warns of the infinities that GPUs compute with."""
    with np.errstate(all="ignore"):
        yield


# "cuda" where a GPU is emulated.
CUDA = [name for name in ("cuda",) if name in gather_op.backends("cpu")]


@pytest.fixture(params=["reference", "cpu", *CUDA])
def backend_name(request):
    if request.param not in gather_op.backends("cpu"):
        pytest.skip(f"{request.param} cannot run here")
    with ops.use(request.param):
        yield request.param


def make(dtype=torch.float32, k=None, seed=0):
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=gen).to(dtype)
    weight = (torch.randn(V, H, generator=gen) / 2).to(dtype)
    bias = torch.randn(V, generator=gen).to(dtype)
    labels = torch.randint(V, (N,) if k is None else (N, k), generator=gen)
    return hidden, weight, bias, labels


def run(fn, hidden, weight, bias, labels, **options):
    """logps, entropy, and the gradients of a fixed function of both and of lse."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = fn(leaves[0], leaves[1], labels, leaves[2], entropy=True, **options)
    w = torch.linspace(-1, 1, out.logps.numel()).view(out.logps.shape)
    h = torch.linspace(1, -1, out.lse.numel()).view(out.lse.shape)
    ((out.logps * w).sum() + (out.entropy * h).sum() + 0.1 * (out.lse * h).sum()).backward()
    return [out.logps.detach(), out.entropy.detach(), out.lse.detach(), *(x.grad for x in leaves)]


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("chunk_rows", [1, 4, 13, None])
def test_error_is_within_twice_torchs(backend_name, dtype, k, chunk_rows):
    inputs = make(dtype, k)
    wide = [x.double() for x in inputs[:3]]
    temperature = torch.linspace(0.5, 2, N)
    truth = run(reference, *wide, inputs[3], temperature=temperature.double())
    theirs = run(reference, *inputs, temperature=temperature)
    mine = run(linear_logprobs, *inputs, temperature=temperature, chunk_rows=chunk_rows)
    for name, got, plain, exact in zip(
        ("logps", "entropy", "lse", "dhidden", "dweight", "dbias"), mine, theirs, truth, strict=True
    ):
        slack = 1e-6 if dtype == torch.float32 else 1e-3
        allowed = 2 * error(plain, exact) + slack * (1 + exact.abs().max().item())
        assert error(got, exact) <= allowed, (name, error(got, exact), allowed)
    assert mine[0].dtype == mine[1].dtype == mine[2].dtype == torch.float32
    assert [x.dtype for x in mine[3:]] == [dtype] * 3


def test_same_as_the_two_steps(backend_name):
    hidden, weight, bias, labels = make()
    out = linear_logprobs(hidden, weight, labels, bias, entropy=True)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    for a, b in zip(out, gather_logprobs(logits, labels, entropy=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_masked_rows_take_no_part(backend_name):
    hidden, weight, bias, labels = make()
    mask = torch.arange(N) % 3 == 1
    hidden[~mask], labels[~mask] = float("nan"), -100
    got = run(linear_logprobs, hidden, weight, bias, labels, mask=mask, chunk_rows=2)
    for x in got[:4]:
        assert (x[~mask] == 0).all()
        assert x[mask].isfinite().all()
    assert got[4].isfinite().all() and got[5].isfinite().all()
    kept = linear_logprobs(hidden[mask], weight, labels[mask], bias, entropy=True)
    torch.testing.assert_close(got[0][mask], kept.logps)
    torch.testing.assert_close(got[1][mask], kept.entropy)


def test_rows_without_upstream_gradient_are_left_out(backend_name):
    hidden, weight, bias, labels = make()
    a, b = (hidden.clone().requires_grad_() for _ in range(2))
    w = torch.where(torch.arange(N) < 5, 1.0, 0.0)
    (linear_logprobs(a, weight, labels, bias).logps * w).sum().backward()
    linear_logprobs(b, weight, labels, bias, mask=w > 0).logps.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert (a.grad[5:] == 0).all() and (a.grad[:5] != 0).any()


def test_nothing_inside_the_mask(backend_name):
    hidden, weight, bias, labels = make()
    got = run(linear_logprobs, hidden, weight, bias, labels, mask=torch.zeros(N, dtype=torch.bool))
    assert all((x == 0).all() for x in got)
    got = run(linear_logprobs, hidden[:0], weight, bias, labels[:0])
    assert got[0].shape == (0,) and (got[4] == 0).all()


def test_frozen_weight_costs_no_product():
    hidden, weight, bias, labels = make()
    hidden.requires_grad_()
    out = linear_logprobs(hidden, weight, labels, bias)
    seen = []
    op = torch.ops.vcr1_fast.linear_logprobs_backward

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is op.default:
                seen.append([g.numel() for g in result])
            return result

    with Watch():
        out.logps.sum().backward()
    assert seen == [[N * H, 0, 0]]
    assert weight.grad is None and bias.grad is None


def test_tied_embeddings(backend_name):
    hidden, weight, _, labels = make()
    weights = [weight.clone().requires_grad_() for _ in range(2)]
    for fn, w in zip((linear_logprobs, reference), weights, strict=True):
        x = torch.nn.functional.embedding(labels, w) + hidden
        fn(x, w, labels).logps.sum().backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_strides(backend_name):
    hidden, weight, bias, labels = make()
    flat = linear_logprobs(hidden[:12], weight, labels[:12], bias)
    folded = linear_logprobs(hidden[:12].view(3, 4, H), weight, labels[:12].view(3, 4), bias)
    assert torch.equal(flat.logps.view(3, 4), folded.logps)
    spread = torch.zeros(N, 2 * H)
    spread[:, ::2] = hidden
    strided = linear_logprobs(spread[:12, ::2], weight.t().contiguous().t(), labels[:12], bias)
    torch.testing.assert_close(flat.logps, strided.logps)


def test_under_autocast(backend_name):
    hidden, weight, bias, labels = make()
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprobs(hidden, weight, labels, bias)
        halves = [x.detach().bfloat16() for x in (hidden, weight)]
        expected = gather_logprobs(torch.nn.functional.linear(*halves, bias.bfloat16()), labels)
    torch.testing.assert_close(out.logps, expected.logps, rtol=0, atol=0.05)
    out.logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert hidden.grad.abs().sum() > 0


def test_gradcheck():
    hidden, weight, bias, labels = make(torch.float64)
    hidden, weight, bias = hidden[:3, :4], weight[:6, :4], bias[:6]
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(
            h, w, labels[:3] % 6, b, temperature=0.7, entropy=True, chunk_rows=2
        ),
        leaves,
    )


def test_bits_repeat(backend_name):
    inputs = make()
    first, second = (run(linear_logprobs, *inputs, chunk_rows=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wrong_arguments_are_refused():
    hidden, weight, bias, labels = make()
    for args, options, message in [
        ((hidden, weight, labels[:3]), {}, "do not fit"),
        ((hidden, weight[:, :3], labels), {}, r"weight must be \(V, 16\)"),
        ((hidden, weight, labels, bias[:3]), {}, r"bias must be \(97,\)"),
        ((hidden, weight.bfloat16(), labels), {}, "weight is torch.bfloat16, hidden"),
        ((hidden, weight, labels), {"chunk_rows": 0}, "chunk_rows must be positive, got 0"),
        ((hidden, weight, labels), {"softcap": 0.0}, "softcap must be positive and finite, or No"),
        ((hidden, weight, labels), {"softcap": float("nan")}, "softcap must be .* got nan"),
        ((hidden, weight, labels + V), {}, "outside a vocabulary of 97"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_logprobs(*args, **options)


def test_chunks_bound_the_memory(monkeypatch):
    hidden, vocab = torch.zeros(1, 8), 151_936
    free = {"bytes": 64 << 30}
    monkeypatch.setattr(lm_head, "available_bytes", lambda _: free["bytes"])
    rows = rows_per_chunk(hidden, vocab, 0)
    assert rows > 400 and rows * vocab * 4 <= 256 << 20
    assert rows_per_chunk(hidden, vocab, 0, doubled=True) == rows // 2
    assert rows_per_chunk(hidden.bfloat16(), vocab, 0) in (2 * rows, 2 * rows + 1)
    assert rows_per_chunk(hidden, 10, 0) == 8192
    free["bytes"] = 1 << 30  # an eighth of it
    assert 0 < rows_per_chunk(hidden, vocab, 0) * vocab * 4 <= 128 << 20
    same = rows_per_chunk(hidden, vocab, 0)
    free["bytes"] += 100 << 20  # a little more memory does not change the order of sums
    assert rows_per_chunk(hidden, vocab, 0) == same
    free["bytes"] = 0
    assert rows_per_chunk(hidden, vocab, 0) == 1
    assert rows_per_chunk(hidden, vocab, 7) == 7


def test_free_memory_is_read():
    assert 1 << 20 < available_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_softcap(backend_name, dtype, chunk_rows):
    hidden, weight, bias, labels = make()
    inputs = [(3 * hidden).to(dtype), weight.to(dtype), bias.to(dtype)]
    truth = run(reference, *(x.double() for x in inputs), labels, softcap=4.0, temperature=0.7)
    plain = run(reference, *inputs, labels, softcap=4.0, temperature=0.7)
    got = run(linear_logprobs, *inputs, labels, softcap=4.0, temperature=0.7, chunk_rows=chunk_rows)
    for mine, theirs, exact in zip(got, plain, truth, strict=True):
        eps = max(torch.finfo(dtype).eps, 1e-12)
        allowed = 2 * error(theirs, exact) + eps * (1 + exact.abs().max().item())
        assert error(mine, exact) <= allowed
    far = run(reference, *(x.double() for x in inputs), labels, temperature=0.7)
    assert error(far[0], truth[0]) > 0.5  # the cap bites on these logits


@pytest.mark.parametrize("chunk_rows", [4, None])
def test_half_precision_keeps_small_gradients(backend_name, chunk_rows):
    """Most of a row's gradient is below float16's smallest number, the sums over it are not."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).half()
    weight = (torch.randn(V, H, generator=generator) / 2).half()
    labels = torch.randint(V, (N,), generator=generator)
    upstream = 1e-4 * torch.linspace(0.3, 1, N)
    results = []
    for dtype, fn in ((torch.float64, reference), (torch.float16, linear_logprobs)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        options = {} if fn is reference else {"chunk_rows": chunk_rows}
        logps = fn(*leaves, labels, **options).logps
        (logps * upstream).sum().backward()
        results.append([x.grad.double() for x in leaves])
    for exact, got in zip(*results, strict=True):
        assert (got - exact).norm() < 3e-3 * exact.norm()


@EACH
def test_opcheck(backend_name):
    hidden, weight, bias, labels = make(k=2)
    mask, temperatures = torch.arange(N) % 2 == 0, torch.linspace(0.5, 2, N)
    args = (hidden, weight, bias, labels, mask, temperatures, 1.0, 5.0, True, 4)
    torch.library.opcheck(torch.ops.vcr1_fast.linear_logprobs.default, args)
    logps, _, lse, stats = forward_op(*args)
    needed = [True, True, False]
    args = (*args, logps, stats, needed, torch.ones_like(logps), torch.ones_like(lse), None)
    torch.library.opcheck(torch.ops.vcr1_fast.linear_logprobs_backward.default, args)
    assert [g.shape for g in backward_op(*args)] == [hidden.shape, weight.shape, (0,)]


# torch's tracer makes a Function object while it inspects one, and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@EACH
def test_compiles_whole(backend_name):
    hidden, weight, bias, labels = make()
    mask = labels > 9

    def loss(x, w):
        out = linear_logprobs(x * 2, w, labels, bias, mask=mask, entropy=True)
        return out.logps.sum() + out.entropy.sum()

    eager = [x.clone().requires_grad_() for x in (hidden, weight)]
    traced = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*traced).backward()
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a.grad, b.grad)
