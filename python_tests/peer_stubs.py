"""Stand-ins for other trainers' packages: module names and signatures only, as their releases have
them. What they compute is compared where the packages are there (test_peer_sources.py)."""

import sys
from inspect import Parameter, Signature
from types import ModuleType

from vcr1_fast.integrations import patching


def stub(name, *parameters):
    """A function of that name and these parameters that nobody may call."""

    def original(*_args, **_kwargs):
        raise AssertionError(f"the original {name} ran")

    original.__name__ = name
    kind = Parameter.POSITIONAL_OR_KEYWORD
    original.__signature__ = Signature([Parameter(p, kind) for p in parameters])
    return original


def install(monkeypatch, distribution, version, modules):
    """Puts `modules`, {dotted name: {name: object}}, in sys.modules as release `version` of
    `distribution`; returns them by dotted name. Parent packages are made as needed."""
    dotted = set(modules)
    for name in modules:
        parts = name.split(".")
        dotted |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    roots = {name.partition(".")[0] for name in dotted}
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] in roots:
            monkeypatch.delitem(sys.modules, loaded)
    made = {}
    for name in sorted(dotted):
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
        made[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    known = patching.metadata.version
    monkeypatch.setattr(
        patching.metadata, "version", lambda n: version if n == distribution else known(n)
    )
    return made


def everything(modules):
    """{(module, name): object} of stubbed modules, to see that an undo brings all back."""
    found = {}
    for name, module in modules.items():
        for key, value in vars(module).items():
            found[name, key] = dict(value) if type(value) is dict and key.isupper() else value
    return found
