"""torchvision's Python half as a test oracle, where its compiled half does not match torch."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "peers", Path(__file__).resolve().parents[1] / "benches/peers.py"
)
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)


def require_torchvision():
    """Makes `import torchvision` work, or skips the test and says why it cannot."""
    found = peers.torchvision("ops", folder=None)
    if isinstance(found, str):
        pytest.skip(f"torchvision: {found}")
