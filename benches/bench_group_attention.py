"""group_attention beside what else computes a group's attention.

"G copies" is what trainers without sharing run: causal SDPA over prompt and completion, G times.
"masked" is one SDPA for the completions of a group and one for its prompt; "torch's CPU kernels"
merges two parts by their log-sum-exps, and so does "varlen flash" with those for CUDA, two
calls for any number of groups; FlexAttention takes the pack in one call, compiled.

The limit, "one product", is a square matrix product of as many multiply-adds (2 D for each query,
head and key it sees forward, and 5 D more backward), on the CPU in float32, which the kernel
computes in, and by oneDNN, the faster of torch's two libraries. Bytes: queries, keys, values and
output once, and their gradients.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Bench, arguments, scaled_error
from torch import Tensor

from vcr1_fast.model.attention import masked_group_attention, merged_group_attention
from vcr1_fast.model.flex_attention import flex_group_attention
from vcr1_fast.model.packing import Span
from vcr1_fast.model.varlen_attention import varlen_group_attention
from vcr1_fast.ops import group_attention
from vcr1_fast.ops.group_attention import (
    group_attention_backward_reference,
    group_attention_reference,
)

# prompt, completion, completions; heads, key heads, dimensions of a head
CASES = [
    ((2080, 63, 8), (4, 2, 16), torch.float32),
    ((2080, 63, 8), (8, 4, 32), torch.float32),
    ((2080, 63, 8), (16, 2, 128), torch.float32),  # those of Qwen2.5-VL-3B
    ((2080, 63, 8), (16, 2, 128), torch.bfloat16),
    ((2080, 63, 8), (16, 4, 256), torch.float32),  # those of Qwen3.5-9B
    ((288, 63, 8), (4, 2, 16), torch.float32),
    ((96, 31, 8), (4, 2, 16), torch.float32),
]


def one_product(multiply_adds: float, dtype: torch.dtype, device: torch.device) -> Callable:
    side = round(multiply_adds ** (1 / 3))
    on_cpu = device.type == "cpu"
    a, b = torch.randn(2, side, side, device=device, dtype=torch.float32 if on_cpu else dtype)
    if on_cpu:
        return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return lambda: a @ b


def copies(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """G sequences, each with its prompt; that they are laid out so is the trainer's doing and not
    timed, that each key head is repeated is."""
    share = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, k, v, is_causal=True, scale=scale)


def as_copies(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(N, heads, D) of a pack to (G, heads, P + C, D)."""
    prompt, _, count = shape
    own = x[prompt:].unflatten(0, (count, -1))
    whole = torch.cat([x[:prompt].expand(count, -1, -1, -1), own], dim=1)
    return whole.transpose(1, 2).contiguous()


def bench_case(
    bench: Bench, shape: tuple[int, int, int], heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    prompt, length, count = shape
    span = Span(0, prompt, (length,) * count, bench.device)
    parts, rows = torch.tensor(span.parts(is_last=False)), span.end
    (queries, keys, dim), scale = heads, heads[2] ** -0.5
    q, k, v = (
        torch.randn(rows, h, dim, device=bench.device).to(dtype) for h in (queries, keys, keys)
    )
    upstream = torch.randn(q.shape, device=bench.device).to(dtype)

    def in_pack(backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: backend(*(t.transpose(0, 1)[None] for t in x), scale, [span])[0]

    packed = {
        "SDPA, masked": in_pack(masked_group_attention),
        "torch's CPU kernels, merged": in_pack(merged_group_attention),
        "ours": lambda *x: group_attention(*x, parts, scale=scale)[0],
    }
    if bench.device.type != "cpu":
        del packed["torch's CPU kernels, merged"]
        packed["FlexAttention"] = in_pack(flex_group_attention)
        if dtype != torch.float32:
            packed["varlen flash, merged"] = in_pack(varlen_group_attention)
    wide = [x.double() for x in (q, k, v)]
    exact, lse = group_attention_reference(*wide, parts, scale)
    wide_grads = group_attention_backward_reference(
        *wide, exact, lse, upstream.double(), parts, scale
    )
    forward: dict[str, Callable | str] = {}
    both: dict[str, Callable | str] = {}
    errors: dict[str, dict[str, float]] = {"forward": {}, "both": {}}
    for name, fn in packed.items():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        forward[name] = torch.no_grad()(lambda f=fn: f(q, k, v))
        both[name] = lambda f=fn, x=leaves: torch.autograd.grad(f(*x), x, upstream)
        errors["forward"][name] = scaled_error(forward[name](), exact)
        grads = both[name]()
        errors["both"][name] = max(map(scaled_error, grads, wide_grads))
    del wide, exact, lse, wide_grads
    *sequences, grad = (as_copies(x, shape) for x in (q, k, v, upstream))
    forward["SDPA, G copies"] = torch.no_grad()(lambda: copies(*sequences, scale))
    leaves = [x.clone().requires_grad_() for x in sequences]
    both["SDPA, G copies"] = lambda: torch.autograd.grad(copies(*leaves, scale), leaves, grad)
    answers = count * length
    pairs = prompt**2 / 2 + answers * prompt + answers * length / 2
    once = q.numel() * 2 + k.numel() * 2
    name = f"P={prompt} C={length} G={count}, {queries}/{keys} heads of {dim}"
    for op, fns, products, traffic in (
        ("forward", forward, 2, once),
        ("forward + backward", both, 7, 3 * once),
    ):
        fns["one product"] = one_product(products * pairs * queries * dim, dtype, bench.device)
        bench.run(
            f"group_attention {op}",
            name,
            str(dtype).removeprefix("torch."),
            fns,
            traffic * q.element_size(),
            limit="one product",
            errors=errors["forward" if op == "forward" else "both"],
            memory=op != "forward",
        )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("group_attention", **vars(args)) as bench:
        for case in CASES:
            bench_case(bench, *case)


if __name__ == "__main__":
    main()
