"""torchvision's Python half as a test oracle, where its compiled half does not match torch."""

import importlib.util

import pytest
import torch

_declared = []  # the declarations live as long as their Library object


def require_torchvision():
    """Makes `import torchvision` work, or skips the test and says why it cannot."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    if not hasattr(torch.ops.torchvision, "nms"):
        # Its import asks for two operators by name, even if their library does not load.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import: {error}")
