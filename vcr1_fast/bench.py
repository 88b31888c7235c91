"""`vcr1 bench`: run the benches of a source tree; they are not part of an installed package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def bench_folder() -> Path:
    """benches/ beside this package, else in the working directory. ValueError without one."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "benches" / "harness.py").exists():
            return root / "benches"
    raise ValueError(
        "no benches/ here: only the source tree has them, not the package; run this in a clone"
    )


def main_bench(names: Sequence[str], arguments: Sequence[str] = ()) -> int:
    """Run the named benches ("all": every one) with `arguments`, one after the other; without
    names, list them. Returns 0, or the exit status of the first that fails."""
    folder = bench_folder()
    files = {file.stem.removeprefix("bench_"): file for file in sorted(folder.glob("bench_*.py"))}
    if not names:
        width = max(map(len, files))
        for name, file in files.items():
            said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            print(f"{name:{width}}  {said.splitlines()[0] if said else ''}")
        return 0
    chosen = list(files) if list(names) == ["all"] else list(names)
    if unknown := [name for name in chosen if name not in files]:
        raise ValueError(f"no bench {unknown[0]!r}; there are {', '.join(files)}, or all")
    paths = [str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name in chosen:
        done = subprocess.run(
            [sys.executable, str(files[name]), *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
        if done.returncode:
            return done.returncode
    return 0
