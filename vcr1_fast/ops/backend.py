"""Torch operators with several backends, and the choice of the one that runs.

An op is defined once (`Op`) with a schema and a fake; each implementation registers under a backend
name: "reference" (plain torch), "cpu" (C++), "cuda" (CUDA C++) or "triton". For each device the
first name of `PREFERENCE` that the op has is used. The environment variable VCR1_BACKEND and
`use()` override it; both take names separated by commas, and the first that the op has for the
tensor's device counts ("triton,cpu": Triton on GPUs, C++ on the CPU).

Two more backends take CPU tensors, for tests and by name only: "triton" with TRITON_INTERPRET=1,
and "cuda" in a build whose kernels run on an emulated GPU (csrc/emulation).

Nothing falls back silently: when the chosen backend is not installed, the call raises RuntimeError
and names the remedy.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vcr1_fast.ops import openmp

PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("reference", "cpu", "cuda", "triton")
_NAMESPACE = "vcr1_fast"


def _import_native() -> ModuleType | None:
    path = os.environ.get("VCR1_NATIVE")
    if path:  # another build of the module: `make sanitize` names the sanitizer build
        spec = importlib.util.spec_from_file_location("vcr1_fast._C", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"VCR1_NATIVE={path!r} is not an extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        from vcr1_fast import _C
    except ModuleNotFoundError as error:
        # A missing dependency of the module is an error, not a missing build.
        if error.name != "vcr1_fast._C":
            raise
        return None
    except ImportError as error:
        # `from package import missing` raises the base class; a broken binary must not count as a
        # missing one.
        if importlib.util.find_spec("vcr1_fast._C") is not None:
            raise ImportError(f"vcr1_fast._C is installed but cannot be loaded: {error}") from error
        return None
    return _C


native: Any = _import_native()
"""The compiled module `vcr1_fast._C`, or None when it was not built."""
emulation: Any = getattr(native, "emulation", None)
"""The GPU that a build with -DVCR1_EMULATE=ON emulates; None in every other."""
if native is not None:
    native.use_team(openmp.entry_point())


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run in this process, with the remedy; None when it can."""
    if backend in ("cpu", "cuda") and native is None:
        return (
            "the native module vcr1_fast._C is not built: run `pip install .` (or `make inplace`)"
        )
    if backend == "cuda" and not native.has_cuda:
        return (
            "vcr1_fast._C was built without CUDA: install nvcc (or set CUDACXX) and reinstall with "
            "VCR1_CUDA=ON"
        )
    if backend == "cuda":
        return _driver_problem(*native.cuda_versions())
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    return None


def _driver_problem(driver: int, runtime: int) -> str | None:
    """Why the CUDA driver cannot serve the runtime of the native module; None when it can.

    Versions are 1000 major + 10 minor. Within a major version older drivers serve newer runtimes.
    """
    if driver // 1000 >= runtime // 1000:
        return None
    found = f"supports CUDA {_version(driver)}" if driver else "is missing"
    return (
        f"vcr1_fast._C was built for CUDA {_version(runtime)} and the NVIDIA driver {found}: "
        "update the driver, or reinstall with an nvcc that it supports (CUDACXX)"
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def from_triton(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of ops/triton/<module>.py, imported at its first call.

    Triton takes long to import, and only its own backend needs it.
    """

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"vcr1_fast.ops.triton.{module}"), name)(*args)

    return run


def _parse(names: str) -> tuple[str, ...]:
    parsed = tuple(name.strip() for name in names.split(","))
    for name in parsed:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return parsed


def _from_environment() -> tuple[str, ...] | None:
    names = os.environ.get("VCR1_BACKEND", "")
    return _parse(names) if names else None


_override: tuple[str, ...] | None = _from_environment()
_ops: list[Op] = []


def _set_override(names: tuple[str, ...] | None) -> None:
    global _override
    _override = names
    # An op remembers its choice for a device, which must not outlive the setting.
    for op in _ops:
        op.forget_choice()


def registered() -> tuple[Op, ...]:
    """All ops, in order of definition."""
    return tuple(_ops)


class use:
    """Choose the backend of every op, from now on or inside a `with` block.

    `names`: backend names separated by commas, or None for the default choice. The setting holds
    for the process, since autograd runs backward passes on its own threads: do not change it while
    another thread computes. ValueError for an unknown name.
    """

    def __init__(self, names: str | None) -> None:
        parsed = None if names is None else _parse(names)
        self._previous = _override
        _set_override(parsed)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _set_override(self._previous)


def _serves(backend: str, device: str) -> bool:
    if backend == "triton" and device == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "cuda" and device == "cpu":
        return emulation is not None
    return backend in PREFERENCE[device] or backend == "reference"


def _emulated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The "cuda" implementation `fn`, for CPU tensors that the native module takes for CUDA's."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = emulation.present_cpu_as_cuda(True)
        try:
            return fn(*args, **kwargs)
        finally:
            emulation.present_cpu_as_cuda(before)

    return run


# Types of arguments that `direct` takes past the dispatcher. Subclasses of Tensor (fake, traced,
# distributed) must dispatch.
_PLAIN_TYPES = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple)
)


def _observed() -> bool:
    """Whether compilers, modes, functorch, a tracer or a profiler must see an op's call."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _device_check(name: str, on_cpu: tuple[str, ...] = ()) -> Callable[..., None]:
    """A check that all tensors of a call of the op `name` are on one device.

    Takes the call's arguments by position and by name; ValueError names the argument that differs.
    """
    arguments = getattr(getattr(torch.ops, _NAMESPACE), name).default._schema.arguments
    tensor = torch._C.OptionalType(torch._C.TensorType.get())
    places = [i for i, argument in enumerate(arguments) if argument.type.isSubtypeOf(tensor)]
    names = [argument.name for argument in arguments]

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count = len(args)
        for i in places:
            x = args[i] if i < count else kwargs.get(names[i])
            # The usual case first, and by `is_cpu`: reading `device` takes four times as long.
            if x is None or (x.is_cpu and args[0].is_cpu):
                continue
            expected = torch.device("cpu") if names[i] in on_cpu else args[0].device
            # A number on the CPU goes with any device, as in torch.
            if x.device != expected and not (x.is_cpu and x.dim() == 0):
                raise ValueError(
                    f"{name}: {names[i]} is on {x.device}, but "
                    + ("must be on cpu" if names[i] in on_cpu else f"{names[0]} on {expected}")
                )

    return check


def check_one_device(first_name: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """ValueError naming the first of `others` that is not on the device of `first`.

    For public functions that compute in plain torch; ops check their own arguments.
    """
    for name, x in others.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, but {first_name} on {first.device}")


class Op:
    """A torch operator `torch.ops.vcr1_fast.<name>` with one implementation a backend.

    `schema` as in `torch.library.define`, without the name; `fake` computes output shapes only.
    Autograd is not part of the op: wrap calls in a `torch.autograd.Function`. A call whose tensors
    are on several devices raises ValueError; those named in `on_cpu` are on the CPU in any case,
    and 0-d tensors may be.
    """

    def __init__(
        self, name: str, schema: str, fake: Callable[..., Any], *, on_cpu: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        qualified = f"{_NAMESPACE}::{name}"
        torch.library.define(qualified, schema)
        self._check_devices = _device_check(name, on_cpu)
        torch.library.register_fake(qualified, self._checked(fake))
        self._runners = {device: self._runner(device) for device in PREFERENCE}
        for device, run in self._runners.items():
            torch.library.impl(qualified, device, run)
        self._implementations: dict[str, Callable[..., Any]] = {}
        self._chosen: dict[str, Callable[..., Any]] = {}
        self._call = getattr(getattr(torch.ops, _NAMESPACE), name)
        _ops.append(self)

    def register(self, backend: str, fn: Callable[..., Any]) -> None:
        """Add the implementation `fn`.

        It gets the schema's arguments by position, those after `*` by name. Register
        unconditionally: the call checks whether the backend can run here.
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
        # An earlier call may have chosen another backend for want of this one.
        self._implementations[backend] = fn
        self._chosen.clear()

    def backends(self, device: str = "cpu") -> tuple[str, ...]:
        """Names of the backends that can run this op on `device` in this process."""
        return tuple(
            name
            for name in BACKENDS
            if name in self._implementations and _serves(name, device) and not unavailable(name)
        )

    def forget_choice(self) -> None:
        self._chosen.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def direct(self, *args: Any) -> Any:
        """Call the op past torch's dispatcher when nothing observes the call.

        Only for an op without side effects whose first argument is a tensor, where no gradient is
        recorded.
        """
        # The dispatcher is 1.5 us of a small call (benches/notes/iou.md), as much as its kernel.
        if _observed() or not _PLAIN_TYPES.issuperset(map(type, args)):
            return self._call(*args)
        self._check_devices(args, {})
        run = self._runners.get(args[0].device.type)
        # On a device without kernels, meta among them, torch has the fake or the right error.
        return (run or self._call)(*args)

    def _checked(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._check_devices(args, kwargs)
            return fn(*args, **kwargs)

        return run

    def _runner(self, device: str) -> Callable[..., Any]:
        # The dispatcher runs the CPU's kernel only when all tensors are on the CPU, CUDA's when any
        # is on a GPU, and the fake when any is a meta tensor: the last would return memory that
        # nobody wrote, as a tensor of the device that the others are on.
        check = device != "cpu"

        def run(*args: Any, **kwargs: Any) -> Any:
            if check:
                self._check_devices(args, kwargs)
            fn = self._chosen.get(device)
            return (fn or self._choose(device))(*args, **kwargs)

        return run

    def _choose(self, device: str) -> Callable[..., Any]:
        if _override is None:
            fn = self._choose_default(device)
        else:
            fn = self._choose_named(device, _override)
        self._chosen[device] = fn
        return fn

    def _choose_default(self, device: str) -> Callable[..., Any]:
        # The reference is the choice only where an op has no kernel at all for the device.
        candidates = [name for name in PREFERENCE[device] if name in self._implementations]
        kernels = [name for name in candidates if name != "reference"] or candidates
        reasons = {name: unavailable(name) for name in kernels}
        for name, reason in reasons.items():
            if reason is None:
                return self._implementations[name]
        details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(
            f"{self.name}: no backend for {device} tensors. {details}. The slower plain torch form "
            "runs with VCR1_BACKEND=reference or vcr1_fast.ops.use('reference')"
        )

    def _choose_named(self, device: str, names: tuple[str, ...]) -> Callable[..., Any]:
        serving = [name for name in names if _serves(name, device)]
        if not serving:
            raise RuntimeError(
                f"{self.name}: backend {','.join(names)!r} was chosen, which cannot take {device} "
                "tensors (Triton takes CPU tensors only with TRITON_INTERPRET=1)"
            )
        name = next((name for name in serving if name in self._implementations), None)
        if name is None:
            raise RuntimeError(
                f"{self.name} has no {serving[0]!r} backend, only "
                f"{', '.join(sorted(self._implementations))}; give a second choice, as in "
                f"VCR1_BACKEND={serving[0]},reference"
            )
        reason = unavailable(name)
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {name!r} was chosen, but {reason}")
        fn = self._implementations[name]
        return _emulated(fn) if name == "cuda" and device == "cpu" else fn


_SCHEMA_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    list[bool]: "bool[]",
}


def schema_of(arguments: type) -> str:
    """The arguments of an operator's schema, from the fields of a NamedTuple.

    The implementation reads `arguments(*args)` by name, so that no second list of names has to
    follow the order of the schema.
    """
    fields = typing.get_type_hints(arguments).items()
    return ", ".join(f"{_SCHEMA_TYPES[annotation]} {name}" for name, annotation in fields)


def opaque(
    name: str, schema: str, fn: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """`fn` as the torch operator `torch.ops.vcr1_fast.<name>`, which compilers do not trace.

    For functions built of ops that a graph cannot express, such as loops over chunks whose number
    depends on values. It has no kernel, so no backends: the ops inside choose theirs.
    """
    qualified = f"{_NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    check = _device_check(name)

    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            check(args, kwargs)
            return run(*args, **kwargs)

        return call

    torch.library.impl(qualified, "default", checked(fn))
    torch.library.register_fake(qualified, checked(fake))
    operator: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name)
    return operator
