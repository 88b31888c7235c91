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
    """The kernels' static runtime needs a driver of the same major version; Triton does not."""
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


def _values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, 0.5).to(dtype)


def _tokens(**changes) -> dict:
    per_token = ("old_logps", "ref_logps", "rollout_logps", "token_weights")
    given = {name: _values(2, 3) for name in per_token}
    given |= {"advantages": _values(2), "mask": _values(2, 3, dtype=torch.bool)}
    return given | changes


_BETA = ops.GRPOLossConfig(beta=0.1)
_LABELS = torch.zeros(2, 3, dtype=torch.int64)
_OFFSETS = torch.tensor([0, 2, 6])
# Every public op with all of its tensors, by the names of its arguments.
CALLS = {
    "temporal_iou": {"pred": _values(2, 2), "target": _values(2, 2)},
    "box_iou": {"a": _values(2, 4), "b": _values(2, 4)},
    "track_iou": {
        "pred": _values(2, 3, 4),
        "target": _values(2, 3, 4),
        "lengths": torch.tensor([3, 3]),
    },
    "interval_set_iou": {
        "pred": _values(6, 2),
        "pred_offsets": _OFFSETS,
        "target": _values(6, 2),
        "target_offsets": _OFFSETS,
    },
    "gather_logprobs": {
        "logits": _values(2, 3, 5),
        "labels": _LABELS,
        "temperature": _values(2, 3),
        "mask": _values(2, 3, dtype=torch.bool),
    },
    "linear_logprobs": {
        "hidden": _values(2, 3, 4),
        "weight": _values(5, 4),
        "labels": _LABELS,
        "bias": _values(5),
        "temperature": _values(2, 3),
        "mask": _values(2, 3, dtype=torch.bool),
    },
    "grpo_loss": _tokens(logps=_values(2, 3), entropy=_values(2, 3), config=_BETA),
    "grpo_token_loss": _tokens(logps=_values(2, 3), config=_BETA),
    "logits_grpo_loss": _tokens(logits=_values(2, 3, 5), labels=_LABELS, config=_BETA),
    "linear_grpo_loss": _tokens(
        hidden=_values(2, 3, 4), weight=_values(5, 4), bias=_values(5), labels=_LABELS, config=_BETA
    ),
    "packed grpo_loss": {
        "logps": _values(6),
        "old_logps": None,
        "advantages": _values(2),
        "mask": None,
        "cu_seqlens": _OFFSETS,
    },
    "group_advantages": {
        "rewards": _values(4),
        "group_index": torch.tensor([0, 0, 1, 1]),
        "lengths": _values(4),
        "estimator": "opo",
    },
    "weighted group_advantages": {"rewards": _values(4, 2), "weights": _values(2), "group_size": 2},
    "divided group_advantages": {
        "rewards": _values(4),
        "stds": _values(4),
        "scale": "given",
        "group_size": 2,
    },
    "group_attention": {
        "query": _values(3, 2, 4),
        "key": _values(3, 1, 4),
        "value": _values(3, 1, 4),
        "parts": torch.tensor([[0, 3, 0, 0]]),
        "scale": 1.0,
    },
    "prefixed group_attention": {
        "query": _values(3, 2, 4),
        "key": _values(3, 1, 4),
        "value": _values(3, 1, 4),
        "parts": torch.tensor([[0, 3, 0, 2]]),
        "scale": 1.0,
        "prefix": (_values(2, 1, 4), _values(2, 1, 4)),
    },
    "resize_frames": {
        "frames": _values(1, 4, 4, 3, dtype=torch.uint8),
        "out": _values(1, 2, 2, 3, dtype=torch.uint8),
        "size": (2, 2),
    },
    "video_patches": {
        "frames": _values(2, 28, 28, 3, dtype=torch.uint8),
        "out": _values(4, 1176),
        "dtype": torch.float32,
    },
}
MIXED = [
    (call, name, backend)
    for call, arguments in CALLS.items()
    for name, value in arguments.items()
    for backend in ("cpu,reference", "reference")
    if isinstance(value, torch.Tensor)
]


def test_every_public_op_is_tried_on_mixed_devices():
    others = {"use", "GRPOLossConfig", "LogProbs", "TokenLosses", "grpo_loss_from_logits"}
    assert {call.split()[-1] for call in CALLS} == set(ops.__all__) - others


@pytest.mark.parametrize(("call", "name", "chosen"), MIXED)
def test_a_tensor_on_another_device_is_refused_by_name(call, name, chosen):
    """torch's dispatcher would run the fake, and return memory that nobody wrote."""
    op, arguments = getattr(ops, call.split()[-1]), CALLS[call]
    with ops.use(chosen):
        op(**arguments)
        on_meta = arguments | {name: arguments[name].to("meta")}
        # Of two tensors that differ the check names the second: the first says where the op runs.
        with pytest.raises(ValueError, match=rf"\b{name}\b.* on|meta") as raised:
            op(**on_meta)
    assert "meta" in str(raised.value) and "cpu" in str(raised.value).lower()


def test_a_gradient_does_not_pass_by_the_check():
    boxes = _values(1, 2, 4).requires_grad_()
    with pytest.raises(ValueError, match="lengths is on meta, but pred on cpu"):
        ops.track_iou(boxes, boxes, torch.tensor([2], device="meta"))


def test_calls_through_the_dispatcher_are_checked_too():
    spans, offsets = _values(6, 2), _OFFSETS
    with pytest.raises(ValueError, match="target_offsets is on meta, but pred on cpu"):
        torch.ops.vcr1_fast.interval_set_iou(spans, offsets, spans, offsets.to("meta"), 0.0)
