"""Triton kernels compile for NVIDIA and AMD GPUs, one variant for every length.

What they compute is tested with the other backends of each op, by `TRITON_INTERPRET=1 pytest -k
triton` (Triton cannot compile and interpret in one process; `make test` runs both).
"""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch

from vcr1_fast.ops import GRPOLossConfig, backend
from vcr1_fast.ops.grpo.config import encode

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton was asked to interpret"
    ),
]


@pytest.fixture(params=["sm_90", "gfx942"])
def target(request):
    return request.param


def gather(module, rows, vocab, k, dtype, *, stride=None, options=True):
    """The launches of forward, backward and in-place backward."""
    lead = (rows,)
    logits = torch.zeros(rows, stride or vocab, dtype=dtype)[:, :vocab]
    labels, values = torch.zeros(rows, k, dtype=torch.int64), torch.zeros(rows, k)
    row = torch.ones(lead) if options else None
    state = (torch.ones(lead, dtype=torch.bool) if options else None, row, 1.0)
    module.forward(logits, labels, *state, options)
    args = (logits, labels, values, torch.zeros(rows, 3), *state, values, row, row)
    module.backward(*args)
    module.backward_(*args)


def test_gather_logprobs_compiles_once_for_all_lengths(target):
    from triton_targets import compiling_for, resources, variants

    from vcr1_fast.ops.triton import gather_logprobs as module

    with compiling_for(target, module) as kernels:
        assert len(kernels) == 2
        for dtype in (torch.float32, torch.bfloat16):
            for rows, vocab, k in itertools.product((1, 2, 16), (16, 4096, 48), (1, 3, 16)):
                gather(module, rows, vocab, k, dtype)
            gather(module, 5, 64, 2, dtype, stride=160)
        for name, kernel in kernels.items():
            assert len(variants(kernel)) == 2, name  # one a dtype
            signature = variants(kernel)[0].src.signature
            assert {signature[x] for x in signature if "stride" in x} == {"i64"}
        for vocab in (1, 17, 100):
            gather(module, 3, vocab, 1, torch.float32)
        for name, kernel in kernels.items():
            assert len(variants(kernel)) == 3, name  # and one for rows out of alignment
        gather(module, 3, 64, 1, torch.float16, options=False)
        for name, kernel in kernels.items():
            compiled = variants(kernel)
            assert len(compiled) == 4, name
            for variant in compiled:
                assert resources(variant)["spills"] == 0, name
            wide = "v4.b32" if target == "sm_90" else "dwordx4"
            text = compiled[1].asm["ptx" if target == "sm_90" else "amdgcn"]
            assert wide in text, "bfloat16 rows are read 16 bytes at a time"


GRPO = {
    "default": GRPOLossConfig(),
    "everything": GRPOLossConfig(
        level="sequence",
        beta=0.1,
        kl_bias_correction=True,
        entropy_coef=0.1,
        rollout_correction="sequence_icepop",
        rollout_min=0.5,
        rollout_max=2.0,
        off_policy_threshold=0.1,
    ),
    "sapo": GRPOLossConfig(loss_type="sapo", level="sequence_token", kl="k2"),
    "vespo": GRPOLossConfig(
        loss_type="vespo", beta=0.1, kl="abs", rollout_correction="token_truncate"
    ),
}


@pytest.mark.parametrize("name", GRPO)
def test_grpo_loss_compiles_once_for_all_lengths_and_values(target, name):
    from triton_targets import compiling_for, resources, variants

    from vcr1_fast.ops.triton import grpo_loss as module

    def launch(config, rows, columns, packed=False):
        x = torch.zeros((rows * columns,) if packed else (rows, columns))
        offsets = torch.arange(0, rows * columns + 1, columns) if packed else None
        more = None if name == "default" else x
        module.grpo_loss(
            x, x, torch.zeros(rows), x == 0, more, more, more, more, offsets, None, None,
            encode(config),
        )  # fmt: skip

    with compiling_for(target, module) as kernels:
        assert len(kernels) == 2
        for rows, columns in itertools.product((1, 2, 16), (1, 17, 512)):
            launch(GRPO[name], rows, columns)
            other = dataclasses.replace(
                GRPO[name], eps_high=0.28 + columns, num_sequences=rows, kl_input_clamp=None
            )
            launch(other, rows, columns)
        for kernel, compiled in kernels.items():
            assert len(variants(compiled)) == 1, kernel
        if name == "everything":
            for rows, columns in itertools.product((2, 16), (17, 512)):
                launch(GRPO[name], rows, columns, packed=True)
        for kernel, compiled in kernels.items():
            assert len(variants(compiled)) == (2 if name == "everything" else 1), kernel
            assert all(resources(variant)["spills"] == 0 for variant in variants(compiled)), kernel


def test_import_and_absence():
    code = (
        "import sys, importlib.util, torch, vcr1_fast.ops as ops\n"
        "assert 'triton' not in sys.modules\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
        "with ops.use('triton'):\n"
        "    ops.gather_logprobs(torch.zeros(1, 3), torch.tensor([0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip().endswith(
        "RuntimeError: gather_logprobs: backend 'triton' was chosen, but Triton is not installed: "
        "run `pip install triton`"
    ), done.stderr


def test_cpu_tensors_are_refused_unless_interpreted():
    assert not any("triton" in op.backends("cpu") for op in backend.registered())
