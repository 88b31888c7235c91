"""transformers' models without their casts to float32, whose rounding would hide differences."""

import importlib
import inspect
import re
import types
from pathlib import Path

_CASTS = {
    "torch.float32": "torch.float64",
    ".float()": ".double()",
    "dtype=torch.float)": "dtype=torch.float64)",
}


def without_casts(monkeypatch, family: str) -> None:
    """Patch the norms, linear attention and functions of a family's modelling file: their source
    with float64 in the place of float32."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    source = Path(module.__file__).read_text()
    for cast, exact in _CASTS.items():
        source = source.replace(cast, exact)
    twin = types.ModuleType(module.__name__)
    twin.__package__ = module.__package__
    exec(compile(source, module.__file__, "exec"), vars(twin))
    patched = 0
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) and re.search("Norm|DeltaNet", name) and "forward" in vars(value):
            monkeypatch.setattr(value, "forward", vars(getattr(twin, name))["forward"])
            patched += 1
        elif inspect.isfunction(value):
            monkeypatch.setattr(module, name, getattr(twin, name))
            patched += 1
    assert patched > 3, f"nothing to patch in {module.__file__}"
