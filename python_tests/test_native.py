import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vcr1_fast.ops.backend import native

pytestmark = pytest.mark.skipif(native is None, reason="vcr1_fast._C is not built")

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_describe_sees_what_torch_sees(dtype):
    x = torch.zeros(4, 6, 5).to(dtype)[1:, ::2].transpose(0, 2)
    name, shape, strides, address = native.describe(x)
    assert f"torch.{name}" == str(dtype)
    assert shape == tuple(x.shape)
    assert strides == x.stride()
    assert address == x.data_ptr()


@pytest.mark.parametrize(
    "x",
    [
        torch.nn.Parameter(torch.ones(3)),
        torch.ones(3, requires_grad=True) * 2,
        torch.empty(0, 4),
        torch.tensor(1.0),
    ],
    ids=["parameter", "in a graph", "empty", "scalar"],
)
def test_any_ordinary_tensor_is_accepted(x):
    _, shape, _, address = native.describe(x)
    assert shape == tuple(x.shape)
    assert address == x.data_ptr()


def test_tensors_without_memory_are_refused():
    with FakeTensorMode():
        fake = torch.empty(3)
    for x in (fake, torch.empty(3, device="meta")):
        with pytest.raises((ValueError, RuntimeError, BufferError)):
            native.describe(x)


def test_what_is_no_tensor_is_refused():
    for x in (None, 3, [1.0], torch.float32):
        with pytest.raises(TypeError, match=r"torch\.Tensor"):
            native.describe(x)


def test_too_many_dimensions_are_refused():
    with pytest.raises(ValueError, match="at most 8 dimensions, got 9"):
        native.describe(torch.empty([1] * 9))


def test_unknown_dtype_has_no_name():
    assert native.describe(torch.zeros(2, dtype=torch.complex64))[0] == "an unsupported dtype"


def test_signature_names_the_tensor():
    assert "torch.Tensor" in native.describe.__doc__


def test_protocol_follows_torch():
    expected = "dlpack" if hasattr(torch.Tensor, "__dlpack_c_exchange_api__") else "attributes"
    assert native.tensor_protocol() == expected


def test_isa_choice():
    best = native.cpu_isa()
    try:
        native.choose_cpu_isa("baseline")
        assert native.cpu_isa() == "baseline"
        with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
            native.choose_cpu_isa("sse9")
        assert native.cpu_isa() == "baseline"
    finally:
        native.choose_cpu_isa("auto")
    assert native.cpu_isa() == best


def test_older_torch_is_read_through_attributes():
    program = (
        "import torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from vcr1_fast import _C\n"
        "del torch.Tensor.__dlpack_c_exchange_api__\n"
        "x = torch.zeros(4, 6, dtype=torch.bfloat16)[1:, ::2]\n"
        "assert _C.describe(x) == ('bfloat16', (3, 3), (6, 2), x.data_ptr()), _C.describe(x)\n"
        "assert _C.tensor_protocol() == 'attributes'\n"
        "for x in (torch.empty(3, device='meta'), FakeTensorMode().from_tensor(torch.ones(3))):\n"
        "    try:\n"
        "        _C.describe(x)\n"
        "    except (ValueError, RuntimeError):\n"
        "        continue\n"
        "    raise SystemExit('a tensor without memory was accepted')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("release", ["11.5", "11.7"])
def test_an_nvcc_that_is_too_old_means_no_cuda(release, tmp_path):
    """Ubuntu 22.04's own is 11.5; kernels are launched by calls that came with 11.8."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no cmake")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    nvcc.chmod(0o755)

    def configure(choice):
        import pybind11

        command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / choice), f"-DVCR1_CUDA={choice}"]
        command += [f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        done = subprocess.run(
            command, env={**os.environ, "CUDACXX": str(nvcc)}, capture_output=True, text=True
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    code, said = configure("AUTO")
    assert code == 0, said
    assert f"nvcc {release} is too old (11.8 is needed): no CUDA kernels" in said
    assert "CUDA kernels OFF" in said
    code, said = configure("ON")
    assert code != 0 and "no usable nvcc of 11.8 or newer was found" in said


def _axis(n_in, n_out, columns, bits, dtype):
    return native.ResizeAxis(
        n_in=n_in,
        n_out=n_out,
        bits=bits,
        first=torch.zeros(max(n_out, 0), dtype=torch.int32),
        weights=torch.ones(max(n_out, 0), columns, dtype=dtype),
    )


@pytest.mark.parametrize("axis", ["vertical", "horizontal"])
@pytest.mark.parametrize(
    ("mode", "given", "message"),
    [
        ("int16", (8, 4, 0, 8), "positive multiple of 2 columns, got 0"),
        ("int16", (8, 4, 3, 8), "positive multiple of 2 columns, got 3"),
        ("int22", (8, 4, 0, 8), "positive multiple of 4 columns, got 0"),
        ("int22", (8, 4, 6, 8), "positive multiple of 4 columns, got 6"),
        ("float", (8, 4, 0, 0), "positive multiple of 1 columns, got 0"),
        ("int16", (8, 4, 2, 0), "bits: expected 1 to 22, got 0"),
        ("int22", (8, 4, 4, -1), "bits: expected 1 to 22, got -1"),
        ("int22", (8, 4, 4, 40), "bits: expected 1 to 22, got 40"),
        ("float", (0, 4, 1, 0), "n_in and n_out: expected at least 1, got 0 and 4"),
        ("copy", (4, -1, 1, 0), "n_in and n_out: expected at least 1, got 4 and -1"),
    ],
)
def test_bad_resize_plans_are_refused(mode, given, message, axis):
    """Tables of 0 columns ended the process with a segmentation fault."""
    dtype = torch.int16 if mode.startswith("int") else torch.float32
    columns = {"int16": 2, "int22": 4}.get(mode, 1)
    good = _axis(8, 8 if mode == "copy" else 4, columns, 8, dtype)
    axes = {"vertical": good, "horizontal": good, axis: _axis(*given, dtype)}
    with pytest.raises(ValueError, match=message):
        native.ResizePlan(mode=mode, **axes)


@pytest.mark.parametrize("threads", [-(2**31), 0, 4097, 2**31 - 1])
def test_absurd_numbers_of_threads_are_refused(threads):
    """libgomp ends the process when it cannot start a team."""
    boxes = torch.zeros(100_000, 4)
    arguments = {"kind": "iou", "pairwise": False, "torchvision": False}
    with pytest.raises(ValueError, match=f"num_threads: expected 1 to 4096, got {threads}"):
        native.box_iou(a=boxes, b=boxes, out=torch.empty(100_000), num_threads=threads, **arguments)
    axis = _axis(4, 4, 1, 0, torch.float32)
    plan = native.ResizePlan(mode="copy", vertical=axis, horizontal=axis)
    frames = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"num_threads: expected 1 to 4096, got {threads}"):
        native.resize_frames(
            frames=frames,
            out=frames.clone(),
            plan=plan,
            scratch=torch.empty(0, dtype=torch.uint8),
            num_threads=threads,
        )
