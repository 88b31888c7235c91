"""Compiles Triton kernels for GPUs that are not here, and reads what they need of them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _AbsentGPU:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


def kernels(*modules) -> dict[str, JITFunction]:
    """The kernels (not their helpers) of modules, by name."""
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[f"{module.__name__.rpartition('.')[2]}.{name}"] = value
    return found


@contextlib.contextmanager
def compiling_for(target: str, *modules) -> Iterator[dict[str, JITFunction]]:
    """Launches inside compile for `target` instead, whatever device the tensors are on.

    Yields the modules' kernels; `variants` has what each compiled to. The file cache is a folder of
    its own, so that everything really compiles.
    """
    found = kernels(*modules)
    run = JITFunction.run

    def compile_only(self, *args, **options):
        return run(self, *args, **{**options, "warmup": True})

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", TRITON_CACHE_DIR=folder),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(driver, "_active", _AbsentGPU(TARGETS[target])),
    ):
        for kernel in found.values():
            kernel.device_caches.clear()
        yield found


def variants(kernel: JITFunction) -> list:
    """What `kernel` has compiled to so far."""
    return list(kernel.device_caches[0][0].values())


def resources(compiled) -> dict[str, int]:
    """Registers a thread, spilled ones (NVIDIA: bytes of stack), shared memory in bytes."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run(
                [tool, "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        patterns = {"registers": r"REG:(\d+)", "spills": r"STACK:(\d+)"}
    else:
        text = compiled.asm["amdgcn"]
        patterns = {"registers": r"\.vgpr_count:\s+(\d+)", "spills": r"\.vgpr_spill_count:\s+(\d+)"}
    found = {name: int(re.search(pattern, text)[1]) for name, pattern in patterns.items()}
    return {**found, "shared": compiled.metadata.shared}
