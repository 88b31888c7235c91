"""`vcr1 doctor`: reports installed packages and the backends that will run. Changes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import platform
from importlib import metadata

import torch

import vcr1_fast
from vcr1_fast import integrations as package
from vcr1_fast import ops
from vcr1_fast.integrations.patching import Patch, UnknownContract
from vcr1_fast.model.family import families
from vcr1_fast.model.partial_attention import missing_kernels
from vcr1_fast.model.varlen_attention import missing_varlen
from vcr1_fast.ops import backend

# Package -> the extra of ours that asks for it ("": of the ops themselves, or optional).
PACKAGES = {
    "torch": "",
    "numpy": "",
    "triton": "",
    "transformers": "train",
    "accelerate": "train",
    "peft": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "decord": "",
    "av": "train",
    "pillow": "train",
    "pyyaml": "train",
    "pydantic": "train",
    "rich": "train",
    "matplotlib": "report",
    "tensorboard": "report",
}


def main() -> int:
    """Print the report. Exit status 1 when something that training needs is missing."""
    problems: list[str] = []
    sections = {
        "vcr1_fast": system(),
        "packages": packages(problems),
        "native module": native(problems),
        "ops: backends by preference (the first one runs)": op_backends(),
        "models": models(),
        "integrations: release installed, checked ones, what they replace": integrations(),
        "video decoders": decoders(problems),
        "CUDA": cuda(),
    }
    for title, rows in sections.items():
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")
    for problem in problems:
        print(f"problem: {problem}")
    print("all there" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def system() -> list[tuple[str, str]]:
    """Version, interpreter, machine, threads."""
    return [
        ("version", vcr1_fast.__version__),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        ("CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        ("VCR1_BACKEND", os.environ.get("VCR1_BACKEND") or "not set"),
    ]


def packages(problems: list[str]) -> list[tuple[str, str]]:
    """Versions by package metadata, without importing anything."""
    rows = []
    for name, extra in PACKAGES.items():
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
            if extra:
                problems.append(f"{name} is missing: pip install 'vcr1_fast[{extra}]'")
    return rows


def native(problems: list[str]) -> list[tuple[str, str]]:
    """Build options of the compiled module, and the instruction set it uses here."""
    module = backend.native
    reason = backend.unavailable("cpu")
    if module is None or reason is not None:
        problems.append(str(reason))
        return [("vcr1_fast._C", "not built")]
    return [
        ("CPU kernels", module.cpu_isa()),
        ("CUDA kernels", "compiled in" if module.has_cuda else "not compiled in"),
        ("tensors through", module.tensor_protocol()),
    ]


def op_backends() -> list[tuple[str, str]]:
    """For each op and device, the backends that can run in this process."""
    rows = []
    for op in backend.registered():
        live = []
        for device, preference in backend.PREFERENCE.items():
            usable = op.backends(device)
            names = [name for name in preference if name in usable]
            live.append(f"{device}: {', '.join(names) or 'none'}")
        rows.append((op.name, "; ".join(live)))
    return rows or [("none", f"no op is defined in {ops.__name__}")]


def models() -> list[tuple[str, str]]:
    """Model families, and the kernels that attention on the CPU runs on."""
    known = families()
    kernels = missing_kernels() or "torch's kernels with log-sum-exp"
    rows = [
        ("families by model_type", ", ".join(sorted(known))),
        ("attention on the CPU", kernels),
    ]
    if torch.cuda.is_available():
        # Heads of a model of 3 B parameters; a run's own are checked when it is loaded.
        reason = missing_varlen(torch.device("cuda"), torch.bfloat16, 16, 2, 128)
        rows.append(("attention on CUDA", reason or "torch's varlen flash kernels"))
    if importlib.util.find_spec("transformers") is None:
        return rows  # listed as missing; families compare themselves with it
    # A family may serve several types.
    reports = {id(family): family.report for family in known.values()}
    return rows + [row for report in reports.values() for row in report()]


def integrations() -> list[tuple[str, str]]:
    """For each patch of another trainer: the installed release, whether the patch was checked on
    it, and the functions it would replace. Imports none of those packages; the patch checks their
    signatures when it is called."""
    rows = []
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        if module.endswith("_plugin"):  # patches when imported
            continue
        loaded = importlib.import_module(f"{package.__name__}.{module}")
        for name, patch in vars(loaded).items():
            if isinstance(patch, Patch) and name.startswith("patch_"):
                rows += _patch_rows(f"{module}.{name}", patch)
    return rows


def _patch_rows(name: str, patch: Patch) -> list[tuple[str, str]]:
    checked = f"checked on {', '.join(patch.releases)}"
    if patch.version is None:
        return [(name, f"{patch.distribution} is not installed ({checked})")]
    try:
        patch.check_version()
    except UnknownContract:
        state = f"{patch.distribution} {patch.version} is not a checked release ({checked})"
        return [(name, f"refuses: {state}")]
    rows = [(name, f"{patch.distribution} {patch.version} ({checked})")]
    for part, swaps in patch.parts.items():
        owners: dict[str, list[str]] = {}
        for swap in swaps:
            owners.setdefault(swap.owner.replace(":", "."), []).append(swap.name)
        state = "in place" if part in patch.applied else "would set"
        for owner, names in owners.items():
            rows.append((f"  {part}", f"{state} {', '.join(names)} of {owner}"))
    return rows


def decoders(problems: list[str]) -> list[tuple[str, str]]:
    """Which video decoders can be imported. Every file's timeline is read by PyAV."""
    found = {name: importlib.util.find_spec(name) is not None for name in ("av", "decord")}
    if not found["av"]:
        problems.append("no video decoder: pip install av")
    names = {"av": "pyav (default)", "decord": "decord (optional)"}
    return [(names[name], "present" if there else "missing") for name, there in found.items()]


def cuda() -> list[tuple[str, str]]:
    """torch's CUDA build and the devices it sees."""
    if torch.version.cuda is None:
        return [("torch", "built without CUDA")]
    if not torch.cuda.is_available():
        return [("torch", f"built for CUDA {torch.version.cuda}; it sees no device or driver")]
    rows = [("torch", f"built for CUDA {torch.version.cuda}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        capability = f"compute capability {device.major}.{device.minor}"
        rows.append((f"device {index}", f"{device.name}, {memory:.0f} GiB, {capability}"))
    return rows
