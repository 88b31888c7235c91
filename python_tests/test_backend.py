import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vcr1_fast import ops
from vcr1_fast.ops import backend


@pytest.fixture(scope="module")
def double() -> backend.Op:
    op = backend.Op("test_double", "(Tensor x) -> Tensor", torch.empty_like)
    op.register("reference", lambda x: 2 * x)
    op.register("cpu", lambda x: x + x + 100)  # another value shows which one ran
    return op


@pytest.fixture(autouse=True)
def default_choice():
    with ops.use(None):
        yield


ONE = torch.ones(1)


def test_default_prefers_the_kernel(double):
    assert double(ONE).item() == 102


def test_direct_is_a_call_on_devices_without_kernels(double):
    assert double.direct(ONE).item() == 102
    out = double.direct(torch.empty(3, device="meta"))
    assert out.shape == (3,) and out.device.type == "meta"


def test_use_as_context_and_as_call(double):
    with ops.use("reference"):
        assert double(ONE).item() == 2
        with ops.use("cpu"):
            assert double(ONE).item() == 102
        assert double(ONE).item() == 2
    assert double(ONE).item() == 102
    ops.use("reference")
    assert double(ONE).item() == 2


def test_a_list_names_the_choice_per_device(double):
    with ops.use("cuda,reference"):  # CPU tensors: "cuda" does not apply, so the second counts
        assert double(ONE).item() == 2


def test_unknown_name_is_refused(double):
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ops.use("fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        double.register("fast", lambda x: x)
    assert double(ONE).item() == 102


def test_backend_of_another_device_is_refused(double):
    with ops.use("cuda"), pytest.raises(RuntimeError, match="cannot take cpu tensors"):
        double(ONE)


def test_backend_the_op_lacks_is_refused(monkeypatch):
    op = backend.Op("test_reference_only", "(Tensor x) -> Tensor", torch.empty_like)
    op.register("reference", lambda x: 3 * x)
    assert op(ONE).item() == 3  # no kernel exists: the reference is the implementation
    with ops.use("cpu"), pytest.raises(RuntimeError, match="no 'cpu' backend, only reference"):
        op(ONE)


def test_missing_native_module_is_no_silent_fallback(double, monkeypatch):
    monkeypatch.setattr(backend, "native", None)
    double.forget_choice()
    with pytest.raises(RuntimeError, match="not built: run `pip install"):
        double(ONE)
    with ops.use("cpu"), pytest.raises(RuntimeError, match="not built: run `pip install"):
        double(ONE)
    with ops.use("reference"):
        assert double(ONE).item() == 2
    assert double.backends("cpu") == ("reference",)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (12080, "built for CUDA 13.0 and the NVIDIA driver supports CUDA 12.8: update the driver"),
        (0, "built for CUDA 13.0 and the NVIDIA driver is missing: update the driver"),
        (13000, None),
        (13020, None),
        (14010, None),
    ],
)
def test_a_driver_too_old_for_the_runtime_makes_cuda_unavailable(driver, reason, monkeypatch):
    """The kernels' static runtime needs a driver of its own major version; Triton does not."""
    built = SimpleNamespace(has_cuda=True, cuda_versions=lambda: (driver, 13000))
    monkeypatch.setattr(backend, "native", built)
    found = backend.unavailable("cuda")
    assert found is None if reason is None else reason in found
    op = backend.Op(f"test_driver_{driver}", "(Tensor x) -> Tensor", torch.empty_like)
    op.register("cuda", lambda x: "cuda")
    op.register("triton", lambda x: "triton")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name)
    assert op._choose("cuda")(ONE) == ("cuda" if reason is None else "triton")


def test_backends_lists_what_runs(double):
    assert double.backends("cpu") == ("reference", "cpu")


def test_environment_chooses():
    program = (
        "import torch\n"
        "from vcr1_fast.ops import backend\n"
        "op = backend.Op('env', '(Tensor x) -> Tensor', torch.empty_like)\n"
        "op.register('reference', lambda x: 2 * x)\n"
        "op.register('cpu', lambda x: 100 * x)\n"
        "print(op(torch.ones(1)).item())\n"
    )
    for value, expected in (("reference", "2.0"), ("", "100.0")):
        out = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "VCR1_BACKEND": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == expected


def test_opcheck_and_compile(double):
    torch.library.opcheck(torch.ops.vcr1_fast.test_double.default, (ONE,))
    compiled = torch.compile(lambda x: double(x) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(ONE).item() == 103


def test_ops_import_needs_torch_alone():
    program = (
        "import sys, vcr1_fast.ops\n"
        "bad = {'transformers', 'decord', 'av', 'accelerate'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
