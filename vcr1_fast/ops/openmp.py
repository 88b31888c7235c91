"""Torch's OpenMP threads, on which our CPU kernels run too.

They spin for milliseconds after each of torch's operators and wait for the next one. A second pool
of threads would compete with them for the cores: on two cores a pass over the logits right after an
operator takes 6.0 ms with the second pool and 4.3 ms on torch's threads. The native module is not
linked with OpenMP, so that one build serves every torch; it gets the runtime's entry point instead.

VCR1_THREADS=own selects the module's own pool, which also serves when the runtime is not found.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

_LIBRARY = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*$")


def entry_point() -> int:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded; 0 selects our pool.

    ValueError for a VCR1_THREADS that is neither "torch" nor "own".
    """
    wanted = os.environ.get("VCR1_THREADS", "torch")
    if wanted not in ("torch", "own"):
        raise ValueError(f'VCR1_THREADS must be "torch" or "own", got {wanted!r}')
    maps = Path("/proc/self/maps")
    if wanted == "own" or not maps.exists():
        return 0
    library = torchs_library(maps.read_text(), Path(torch.__file__).parents[1])
    if library is None:
        return 0
    # libomp and libiomp5 export it too, for programs that GCC has compiled.
    function = getattr(ctypes.CDLL(library), "GOMP_parallel", None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def torchs_library(maps: str, packages: Path) -> str | None:
    """Path of the OpenMP library that torch uses, out of what this process has loaded.

    maps: text of /proc/self/maps. packages: folder that holds the installed torch; of several
    libraries, the one that came with torch counts. None when that leaves a choice.
    """
    words = (line.split(maxsplit=5) for line in maps.splitlines())
    loaded = {path[5] for path in words if len(path) == 6 and _LIBRARY.search(path[5])}
    own = {path for path in loaded if path.startswith(f"{packages}/torch")} or loaded
    return own.pop() if len(own) == 1 else None
