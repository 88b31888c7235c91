"""Runs tests that were written for CPU tensors on a GPU, with the memory around the tensors.

With a build that emulates a GPU (VCR1_NATIVE, `make test`), "cuda" takes CPU tensors: the same
variants of the tests run, and nothing is moved.
"""

import functools

import numpy as np
import pytest
import torch

from vcr1_fast.ops import backend

EMULATED = backend.emulation is not None
_SKIP = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def needs_gpu(test):
    """Marks a test that runs on a GPU only."""
    return pytest.mark.gpu(_SKIP(test))


def with_cuda(op):
    """Parameters for a fixture: the backends that run `op` here and, where a GPU is, "cuda"."""
    if EMULATED or not torch.cuda.is_available():
        return list(op.backends())
    return [*op.backends(), pytest.param("cuda", marks=pytest.mark.gpu)]


def device_of(backend):
    return "cuda" if backend == "cuda" and not EMULATED else "cpu"


def to_gpu(x):
    """The whole storage goes over: the copy has the strides, and the same bytes around it."""
    storage = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(
        storage, x.storage_offset(), x.shape, x.stride()
    )


def through_gpu(fn):
    """`fn` for CPU arguments, computed on a separate stream; `out` comes back in its memory."""
    if EMULATED:
        return fn

    @functools.wraps(fn)
    def run(*args, out=None, **options):
        if isinstance(args[0], torch.Tensor) and args[0].is_cuda:
            return fn(*args, **options) if out is None else fn(*args, out=out, **options)
        args = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
        args = [to_gpu(a) if isinstance(a, torch.Tensor) else a for a in args]
        stream = torch.cuda.Stream()  # not the default one: kernels must follow torch's choice
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            target = None if out is None else to_gpu(out)
            result = fn(*args, **options) if out is None else fn(*args, out=target, **options)
        stream.synchronize()
        first, *rest = result if isinstance(result, tuple) else (result,)
        assert first.is_cuda
        if out is None:
            first = first.cpu()
        else:
            assert first is target
            out.untyped_storage().copy_(target.untyped_storage())
            first = out
        return (first, *rest) if rest else first

    return run
