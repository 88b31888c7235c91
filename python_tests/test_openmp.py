"""CPU kernels on torch's OpenMP threads: which library, and that nothing else changes."""

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from vcr1_fast.ops import gather_logprobs, openmp
from vcr1_fast.ops.backend import native

needs_native = pytest.mark.skipif(native is None, reason="needs the native module")
PACKAGES = Path("/env/lib/python3.11/site-packages")


def maps(*paths):
    lines = ["7f00-7f01 r--p 00000000 08:01 42  " + path for path in paths for _ in range(2)]
    return "\n".join([*lines, "7f02-7f03 rw-p 00000000 00:00 0"])


@pytest.mark.parametrize(
    ("loaded", "chosen"),
    [
        ([], None),
        (["/usr/lib/libc.so.6", "/usr/lib/libgomp_helper.so"], None),
        (["/usr/lib/x86_64-linux-gnu/libgomp.so.1"], 0),
        (["/usr/lib/libgomp.so.1", f"{PACKAGES}/torch/lib/libgomp.so.1"], 1),
        ([f"{PACKAGES}/sklearn.libs/libgomp-1.so", f"{PACKAGES}/torch.libs/libgomp-a3.so.1"], 1),
        (["/opt/intel/libiomp5.so", "/usr/lib/libgomp.so.1"], None),
        (["/path with spaces/libomp.so"], 0),
    ],
)
def test_the_library_that_came_with_torch(loaded, chosen):
    expected = None if chosen is None else loaded[chosen]
    assert openmp.torchs_library(maps(*loaded), PACKAGES) == expected


def test_the_variable_chooses(monkeypatch):
    monkeypatch.setenv("VCR1_THREADS", "own")
    assert openmp.entry_point() == 0
    monkeypatch.setenv("VCR1_THREADS", "two")
    with pytest.raises(ValueError, match='"torch" or "own", got \'two\''):
        openmp.entry_point()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    native.use_team(openmp.entry_point())


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 20_000, generator=generator)
    return logits, torch.randint(20_000, (64,), generator=generator)


@needs_native
def test_either_threads_give_the_same_bits(two_threads):
    native.use_team(0)
    own = gather_logprobs(*rows(), entropy=True)
    native.use_team(openmp.entry_point())
    for ours, theirs in zip(gather_logprobs(*rows(), entropy=True), own, strict=True):
        assert torch.equal(ours, theirs)


@needs_native
def test_threads_that_call_at_once(two_threads):
    expected = [gather_logprobs(*rows(seed)).logps for seed in range(4)]
    wrong = []

    def work(seed):
        for _ in range(20):
            if not torch.equal(gather_logprobs(*rows(seed)).logps, expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(inputs, queue):
    queue.put(gather_logprobs(*inputs).logps.tolist())


@needs_native
def test_a_forked_child_has_threads_of_its_own(two_threads):
    """OpenMP cannot start threads in a child whose parent has; the parent goes on as before."""
    inputs = rows()
    expected = gather_logprobs(*inputs).logps
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(inputs, queue))
    child.start()
    assert queue.get(timeout=60) == expected.tolist()
    child.join()
    assert torch.equal(gather_logprobs(*inputs).logps, expected)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is loaded on Linux alone")
def test_kernels_start_no_threads_beside_torchs():
    program = (
        "import os, torch\n"
        "from vcr1_fast.ops import gather_logprobs\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(64, 20000)\n"
        "x.sum()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "gather_logprobs(x, torch.zeros(64, dtype=torch.int64))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )

    def started(threads):
        environment = {**os.environ, "VCR1_THREADS": threads}
        run = [sys.executable, "-c", program]
        return int(subprocess.run(run, env=environment, check=True, capture_output=True).stdout)

    assert started("own") == 1
    assert started("torch") == (0 if openmp.entry_point() else 1)
