"""Fuzz target: the native module on guard pages, beside the plain torch form.

The public ops run on random shapes, layouts and values. On the way into `vcr1_fast._C` every tensor
is copied to memory between inaccessible pages (`guard_pages.py`) and, in half of the cases, one
argument is spoilt. Sound calls give what the reference gives, or the same kind of error. Spoilt
calls may do anything but end the process or write beside a tensor.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from guard_pages import Guarded

from vcr1_fast import ops
from vcr1_fast.ops import backend
from vcr1_fast.ops.grpo.config import LOSS_TYPES

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of values, relative to the largest; 2e-4 for other types: sums in another order."""
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)
ERRORS = (*REFUSALS, OverflowError, MemoryError)


class Spoilt(Exception):
    """The native call got a spoilt argument: its results mean nothing."""


class GuardedNative:
    """Stands for `vcr1_fast._C` in the ops; kernels get copies on guarded memory."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.rng = random.Random()
        self.spoil = False

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        is_kernel = callable(function) and "num_threads" in (function.__doc__ or "")
        if not is_kernel:
            return function
        return lambda *args, **given: self._run(function, dict(enumerate(args)) | given)

    def _run(self, function: Callable[..., Any], given: dict[Any, Any]) -> None:
        """given: arguments by place or name."""
        rng = self.rng
        if self.spoil:
            name = rng.choice(list(given))
            given = given | {name: spoilt(rng, given[name])}
        with Guarded() as memory:
            at_end = rng.random() < 0.7
            copies: list[tuple[torch.Tensor, torch.Tensor]] = []

            def placed(x: Any) -> Any:
                if isinstance(x, list | tuple):
                    return _like(x, [placed(one) for one in x])
                if not isinstance(x, torch.Tensor):
                    return x
                copies.append((x, memory.copy(x, at_end=at_end)))
                return copies[-1][1]

            try:
                copied = {name: placed(x) for name, x in given.items()}
                function(
                    *[x for name, x in copied.items() if isinstance(name, int)],
                    **{name: x for name, x in copied.items() if isinstance(name, str)},
                )
            finally:
                assert not memory.written_outside(), f"{function.__name__} wrote beside a tensor"
                if self.spoil:
                    raise Spoilt
            for original, copy in copies:
                if original.numel() and copy is not original:
                    _flat(original).copy_(_flat(copy))


def _like(x: Any, values: list[Any]) -> Any:
    """The values as a sequence of the type of x."""
    return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """The memory that a tensor spans, bit for bit."""
    x = x.detach()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).view(torch.uint8)


def spoilt(rng: random.Random, x: Any) -> Any:
    """Something else in the place of an argument."""
    if isinstance(x, torch.Tensor):
        return rng.choice(
            (
                lambda: x.to("meta"),
                lambda: x.to(rng.choice(DTYPES)),
                lambda: x[None],
                lambda: x.reshape(-1),
                lambda: x[:0] if x.dim() else x[None],
                lambda: x[..., :-1] if x.dim() else x[None],
                lambda: x.expand(2, *x.shape),
                lambda: x.t() if x.dim() == 2 else x[None, None],
                lambda: torch.zeros(rng.randrange(9)).to(x.dtype),
                lambda: _extreme(rng, x),
                lambda: None,
            )
        )()
    if isinstance(x, bool):
        return rng.choice((not x, None, 2))
    if isinstance(x, int):
        return rng.choice((0, 1, 2, 16, -1, 4096, 2**31 - 1, -(2**31), 2**40, None))
    if isinstance(x, float):
        return rng.choice((0.0, -1.0, math.nan, math.inf, 1e308, None, "x"))
    if isinstance(x, list | tuple) and x:
        result = list(x)
        at = rng.randrange(len(result))
        if rng.random() < 0.3:
            return result[:at]
        result[at] = spoilt(rng, result[at])
        return _like(x, result)
    if x is None:
        return torch.zeros(rng.randrange(9)).to(rng.choice(DTYPES))
    return rng.choice(("x", None, 3))


def _extreme(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """The same shape, one value of which is out of every range."""
    x = x.detach().clone().contiguous()
    if x.numel():
        values = (math.nan, math.inf, 3e38) if x.is_floating_point() else (-1, 2**62, -(2**63))
        if x.dtype in (torch.int64, *FLOATS):
            x.view(-1)[rng.randrange(x.numel())] = rng.choice(values)
    return x


# Arguments of the public ops.


def dims(rng: random.Random, count: int, most: int = 6) -> list[int]:
    return [rng.randrange(most + 1) for _ in range(count)]


def tensor(
    rng: random.Random, shape: list[int], dtype: torch.dtype, low: float = -2, high: float = 2
) -> torch.Tensor:
    """Values between low and high in a random layout."""
    layout = rng.randrange(4)
    padded = [*shape[:-1], shape[-1] + 3] if layout == 1 and shape else shape
    x = torch.rand(padded) * (high - low) + low
    x = (x < 0.5 * (low + high)) if dtype == torch.bool else x.to(dtype)
    if layout == 1 and shape:
        return x[..., : shape[-1]]
    if layout == 2 and len(shape) > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == 3 and len(shape) > 1 and shape[0]:
        return x[:1].expand(shape)
    return x


def maybe(rng: random.Random, make: Callable[[], Any]) -> Any:
    return make() if rng.random() < 0.5 else None


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def with_gradients(outputs: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and the gradients of a fixed weighting of them."""
    outputs = [x for x in outputs if x is not None]
    total = sum(
        (x.double() * torch.arange(1, x.numel() + 1).view(x.shape).sin()).sum()
        for x in outputs
        if x.requires_grad
    )
    grads: tuple[Any, ...] = ()
    if isinstance(total, torch.Tensor):
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return [x.detach() for x in outputs] + [x for x in grads if x is not None]


Call = Callable[[], list[torch.Tensor]]


def gather_logprobs(rng: random.Random) -> Call:
    lead, vocab = dims(rng, rng.randrange(3)), rng.choice((1, 2, 3, 7, 16, 33, 100))
    logits = tensor(rng, [*lead, vocab], rng.choice(FLOATS))
    several = [rng.randrange(3)] if rng.random() < 0.3 else []
    labels = torch.randint(0, vocab, [*lead, *several])
    if labels.numel() and rng.random() < 0.1:
        labels.view(-1)[0] = rng.choice((-1, vocab, 2**62, -(2**63)))
    mask = maybe(rng, lambda: tensor(rng, lead, torch.bool))
    temperature = rng.choice((1.0, 0.5, 0.0, math.nan, tensor(rng, lead, torch.float32, 0.1)))
    entropy = rng.random() < 0.5

    def call() -> list[torch.Tensor]:
        x = leaf(logits)
        got = ops.gather_logprobs(x, labels, temperature=temperature, mask=mask, entropy=entropy)
        return with_gradients(got, [x])

    return call


def linear_logprobs(rng: random.Random) -> Call:
    rows, width, vocab = rng.randrange(9), rng.randrange(1, 20), rng.randrange(1, 50)
    dtype = rng.choice(FLOATS[:3])
    hidden, weight = tensor(rng, [rows, width], dtype), tensor(rng, [vocab, width], dtype)
    labels = torch.randint(0, vocab, (rows,))

    def call() -> list[torch.Tensor]:
        x, w = leaf(hidden), leaf(weight)
        return with_gradients(ops.linear_logprobs(x, w, labels, chunk_rows=3), [x, w])

    return call


def boxes(rng: random.Random) -> Call:
    pairwise, dtype = rng.random() < 0.5, rng.choice((torch.float32, torch.float64))
    lead = dims(rng, 1, 20) if pairwise else dims(rng, rng.randrange(3))
    a, b = tensor(rng, [*lead, 4], dtype), tensor(rng, [*lead, 4], dtype)
    options: dict[str, Any] = {"kind": rng.choice(("iou", "giou", "diou", "ciou"))}
    options |= {"pairwise": pairwise, "convention": rng.choice(("zero", "torchvision"))}
    return lambda: [ops.box_iou(a, b, **options)]


def spans(rng: random.Random) -> Call:
    pairwise, dtype = rng.random() < 0.5, rng.choice((torch.float32, torch.float64))
    lead = dims(rng, 1, 20) if pairwise else dims(rng, rng.randrange(3))
    a, b = tensor(rng, [*lead, 2], dtype), tensor(rng, [*lead, 2], dtype)
    return lambda: [ops.temporal_iou(a, b, pairwise=pairwise)]


def tracks(rng: random.Random) -> Call:
    dtype, (batch, length) = rng.choice((torch.float32, torch.float64)), dims(rng, 2, 9)
    a, b = tensor(rng, [batch, length, 4], dtype), tensor(rng, [batch, length, 4], dtype)
    odd = (0, 1, length, length + 3, -1, 2**62, -(2**62))
    lengths = maybe(rng, lambda: torch.tensor([rng.choice(odd) for _ in range(batch)]).long())
    return lambda: [ops.track_iou(a, b, lengths)]


def offsets(rng: random.Random, sets: int, total: int) -> torch.Tensor:
    inner = sorted(rng.randrange(total + 1) for _ in range(max(sets - 1, 0)))
    result = torch.tensor([0, *inner, total][: sets + 1] if sets else [0])
    if rng.random() < 0.15:
        result[rng.randrange(len(result))] = rng.choice((-1, total + 1, 2**40, -(2**63)))
    return result


def span_sets(rng: random.Random) -> Call:
    dtype, sets = rng.choice((torch.float32, torch.float64)), rng.randrange(5)
    counts = dims(rng, 2) if sets else [0, 0]
    a, b = (tensor(rng, [count, 2], dtype) for count in counts)
    a_offsets, b_offsets = (offsets(rng, sets, count) for count in counts)
    return lambda: [ops.interval_set_iou(a, a_offsets, b, b_offsets)]


def attention(rng: random.Random) -> Call:
    rows, groups, dim = rng.randrange(40), rng.choice((1, 2)), rng.choice((1, 3, 8, 17, 64, 128))
    heads, dtype = groups * rng.choice((1, 2, 3)), rng.choice(FLOATS)
    inputs = [tensor(rng, [rows, count, dim], dtype) for count in (heads, groups, groups)]
    before = rng.choice((None, None, 1, 40, 65))  # rows of a separate prefix
    prefixes = []
    if before is not None:
        prefixes = [tensor(rng, [before, groups, dim], dtype) for _ in range(2)]
    parts, at = [], 0
    while at < rows and len(parts) < 6:
        row = rng.randrange(at, min(at + 4, rows))
        limit = row if before is None else before
        prefix = rng.randrange(limit + 1)
        parts.append(
            [row, rng.randint(row + 1, min(rows, row + 12)), prefix, rng.randint(prefix, limit)]
        )
        at = parts[-1][1]
    if parts and rng.random() < 0.1:
        rng.choice(parts)[rng.randrange(4)] = rng.choice((-1, rows + 1, 2**40, -(2**63)))

    def call() -> list[torch.Tensor]:
        given = [leaf(x) for x in (*inputs, *prefixes)]
        prefix = (given[3], given[4]) if prefixes else None
        outputs = ops.group_attention(*given[:3], parts, scale=0.3, prefix=prefix)
        return with_gradients(outputs, given)

    return call


def loss(rng: random.Random) -> Call:
    (batch, length), dtype = dims(rng, 2), rng.choice((torch.float32, torch.float64))

    def tokens() -> torch.Tensor:
        return tensor(rng, [batch, length], dtype, -3, 0)

    logps, advantages = tokens(), tensor(rng, [batch], dtype)
    old, ref = maybe(rng, tokens), maybe(rng, tokens)
    mask = maybe(rng, lambda: tensor(rng, [batch, length], torch.bool))
    config = ops.GRPOLossConfig(
        loss_type=rng.choice(LOSS_TYPES), beta=0.0 if ref is None else 0.1, max_length=8
    )

    def call() -> list[torch.Tensor]:
        x = leaf(logps)
        value, _ = ops.grpo_loss(x, old, advantages, mask, ref_logps=ref, config=config)
        return with_gradients([value], [x])

    return call


def frames(rng: random.Random, height: int, width: int) -> torch.Tensor:
    x = tensor(rng, [rng.randrange(1, 4), height, width, 3], torch.float32, 0, 255)
    return x.to(torch.uint8) if rng.random() < 0.8 else x.to(torch.uint8).flip(1).flip(1)


def resize(rng: random.Random) -> Call:
    x = frames(rng, rng.randrange(1, 40), rng.randrange(1, 40))
    size = (rng.randrange(1, 60), rng.randrange(1, 60))
    options: dict[str, Any] = {"resample": rng.choice(("bicubic", "bilinear"))}
    options |= {"rounding": rng.choice(("u8", "pil", "f32", "none"))}
    options |= {"antialias": rng.random() < 0.7}
    return lambda: [ops.resize_frames(x, size, **options)]


def patches(rng: random.Random) -> Call:
    x = frames(rng, rng.randrange(1, 64), rng.randrange(1, 64))
    size = (28 * rng.randrange(1, 3), 28 * rng.randrange(1, 3))
    rounding, dtype = rng.choice(("u8", "pil", "f32")), rng.choice(FLOATS[:3])
    return lambda: [ops.video_patches(x, size, rounding=rounding, dtype=dtype)[0]]


CASES = (
    *(gather_logprobs, linear_logprobs, boxes, spans, tracks, span_sets, attention, loss, resize),
    patches,
)


def plan(rng: random.Random) -> None:
    """A resize by tables that no caller of ours would make."""
    native = backend.native
    mode = rng.choice(("copy", "int16", "int22", "float", "float_rounded", "x"))
    is_int = mode.startswith("int")
    sizes = [(rng.randrange(-1, 30), rng.randrange(-1, 30)) for _ in range(2)]
    axes = []
    for n_in, n_out in sizes:
        count = max(n_out, 0)
        columns = rng.randrange(5) * rng.choice((1, 2, 4)) + (rng.random() < 0.1)
        first = sorted(
            rng.randint(-1 if rng.random() < 0.2 else 0, max(n_in, 1)) for _ in range(count)
        )
        weights = torch.randint(-300, 300, (count, columns))
        axes.append(
            native.ResizeAxis(
                n_in=n_in,
                n_out=n_out,
                bits=rng.choice((0, 1, 8, 15, 22, 23, -1, 40)),
                first=torch.tensor(first, dtype=torch.int32),
                weights=weights.to(torch.int16 if is_int else torch.float32),
            )
        )
    made = native.ResizePlan(mode=mode, vertical=axes[0], horizontal=axes[1])
    count = rng.randrange(1, 3)
    (height, h), (width, w) = sizes
    native.resize_frames(
        frames=torch.randint(0, 256, (count, height, width, 3)).to(torch.uint8),
        out=torch.empty(count, h, w, 3, dtype=torch.float32 if mode == "float" else torch.uint8),
        plan=made,
        scratch=torch.empty(made.scratch_bytes, dtype=torch.uint8),
        num_threads=1,
    )


def native_ops(rng: random.Random) -> int:
    """One call of a public op, sound or with an argument spoilt on the way, or one of `plan`."""
    guarded = _installed()
    guarded.rng, guarded.spoil = rng, rng.random() < 0.5
    torch.manual_seed(rng.getrandbits(32))
    torch.set_num_threads(rng.choice((1, 2)))
    if rng.random() < 0.1:
        guarded.spoil = False
        with contextlib.suppress(*ERRORS):
            plan(rng)
        return 1
    case = rng.choice(CASES)
    call = case(rng)
    got = _outcome("cpu,reference", call)
    if guarded.spoil:
        guarded.spoil = False
        return 1
    expected = _outcome("reference", call)
    assert type(got) is type(expected), f"{case.__name__}: {got!r:.200} against {expected!r:.200}"
    if isinstance(got, list) and isinstance(expected, list):
        for number, (x, y) in enumerate(zip(got, expected, strict=True)):
            fault = _difference(x, y)
            assert not fault, f"{case.__name__}, result {number}: {fault}"
    return 2


def _outcome(names: str, call: Call) -> list[torch.Tensor] | str:
    """The results, or that the call was refused: backends may word it otherwise."""
    with ops.use(names):
        try:
            return call()
        except Spoilt:
            return "spoilt"
        except REFUSALS:
            return "refused"


def _difference(x: torch.Tensor, y: torch.Tensor) -> str:
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{x.dtype} {tuple(x.shape)} against {y.dtype} {tuple(y.shape)}"
    a, b = x.double(), y.double()
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return f"other values are not finite: {x.flatten()[:6]} against {y.flatten()[:6]}"
    if not finite.any():
        return ""
    most = float((a - b)[finite].abs().max())
    if most > TOLERANCE.get(x.dtype, 2e-4) * max(float(b[finite].abs().max()), 1.0):
        return f"differs by {most:g} of {float(b[finite].abs().max()):g}"
    return ""


_guarded: GuardedNative | None = None


def _installed() -> GuardedNative:
    """Put the stand-in into every module of ops that holds the native one."""
    global _guarded
    if _guarded is None:
        if backend.native is None:
            raise RuntimeError("vcr1_fast._C is not built")
        real, _guarded = backend.native, GuardedNative(backend.native)
        for name, module in list(sys.modules.items()):
            if name.startswith("vcr1_fast.ops") and getattr(module, "native", None) is real:
                module.native = _guarded  # type: ignore[attr-defined]
    return _guarded
