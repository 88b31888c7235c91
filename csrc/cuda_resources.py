"""What nvcc makes of each CUDA kernel, beside csrc/cuda/resources.json.

    python csrc/cuda_resources.py            write the table (minutes: every kernel, three GPUs)
    python csrc/cuda_resources.py --check    exit 1 when a kernel is not as the table says
    ... --only logits_grpo_loss              one source file

For each kernel and architecture: registers a thread, bytes of stack (local memory), of spills and
of static shared memory, as ptxas reports them, and the number of 16-byte accesses to global memory
in the PTX. Numbers of registers hold for one release of nvcc; with another only what is bad by
itself counts: stack or spills beyond the table's, and fewer 16-byte accesses.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "cuda"
TABLE = SOURCES / "resources.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# As CMakeLists.txt has it for this file.
FLAGS = {"iou": ("--fmad=false",)}
Kernels = dict[str, dict[str, int]]

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_PTX_ENTRY = re.compile(r"^(?:\.visible |\.weak )*\.entry (\w+)\(", re.MULTILINE)
_WIDE = re.compile(r"\b(?:ld|st)\.global\S*\.v4\.[bus]32|\bcp\.async\.cg\.shared\.global\b")


def short_name(demangled: str) -> str:
    """Name and template arguments of a kernel, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|vcr1::|cuda::|\(int\)|\(bool\)", "", demangled)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i].strip()
    return name.strip()


def parse_ptxas(text: str) -> Kernels:
    """Resources by mangled name, from what `ptxas -v` writes."""
    kernels: Kernels = {}
    for part in re.split(r"(?=Compiling entry function)", text)[1:]:
        entry, stack, used = _ENTRY.search(part), _STACK.search(part), _USED.search(part)
        if entry is None or stack is None or used is None:
            raise ValueError(f"ptxas: no resources of a kernel in {part[:200]!r}")
        shared = _SHARED.search(part)
        kernels[entry[1]] = {
            "registers": int(used[1]),
            "stack": int(stack[1]),
            "spills": int(stack[2]) + int(stack[3]),
            "shared": int(shared[1]) if shared else 0,
        }
    return kernels


def count_wide(ptx: str) -> dict[str, int]:
    """16-byte loads, stores and asynchronous copies of global memory, by mangled name."""
    starts = [*_PTX_ENTRY.finditer(ptx)]
    ends = [*(m.start() for m in starts[1:]), len(ptx)]
    return {
        m[1]: len(_WIDE.findall(ptx, m.start(), end)) for m, end in zip(starts, ends, strict=True)
    }


def demangle(names: Sequence[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    done.check_returncode()
    return done.stdout.splitlines()


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def release_of(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise SystemExit(f"{nvcc} --version names no release: {text!r}")
    return match[1]


def knows(nvcc: str, architecture: str) -> bool:
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    return architecture in done.stdout.split()


def compile_kernels(nvcc: str, source: Path, architecture: str) -> Kernels:
    """Resources of the kernels of one file, by `<file> <kernel>`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-DVCR1_CUDA", "-cubin", f"-arch={architecture}"]
        command += [*FLAGS.get(source.stem, ()), "--keep", "--keep-dir", folder, "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{source.name} for {architecture}: nvcc failed\n{done.stderr}")
        wide = count_wide(Path(folder, f"{source.stem}.ptx").read_text())
    kernels = parse_ptxas(done.stderr + done.stdout)
    names = demangle([*kernels])
    return {
        f"{source.stem} {short_name(name)}": {**resources, "wide": wide[mangled]}
        for name, (mangled, resources) in zip(names, kernels.items(), strict=True)
    }


def differences(stored: Kernels, found: Kernels, same_release: bool) -> list[str]:
    """One line for each kernel that is not as stored."""
    lines = [f"{name}: not in the table" for name in sorted(found.keys() - stored.keys())]
    lines += [f"{name}: is gone" for name in sorted(stored.keys() - found.keys())]
    for name in sorted(stored.keys() & found.keys()):
        was, now = stored[name], found[name]
        worse = [key for key in ("stack", "spills") if now[key] > was[key]]
        worse += ["wide"] if now["wide"] < was["wide"] else []
        changed = [key for key in was if now[key] != was[key]] if same_release else worse
        if changed:
            lines.append(f"{name}: " + ", ".join(f"{k} {was[k]} -> {now[k]}" for k in changed))
    return lines


def measure(nvcc: str, only: str | None) -> dict[str, Kernels]:
    sources = sorted(SOURCES.glob(f"{only or '*'}.cu"))
    jobs = [(a, s) for a in ARCHITECTURES if knows(nvcc, a) for s in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: compile_kernels(nvcc, job[1], job[0]), jobs)
        out: dict[str, Kernels] = {}
        for (architecture, _), kernels in zip(jobs, results, strict=True):
            out.setdefault(architecture, {}).update(kernels)
    return out


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", help="stem of one source file")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc: the kernels' resources are not checked")
        return 0
    release, found = release_of(nvcc), measure(nvcc, options.only)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": release, "kernels": {}}
    if not options.check:
        for architecture, kernels in found.items():
            kept = table["kernels"].get(architecture, {}) if options.only else {}
            kept = {n: r for n, r in kept.items() if n.partition(" ")[0] != options.only}
            table["kernels"][architecture] = dict(sorted({**kept, **kernels}.items()))
        table["nvcc"] = release
        TABLE.write_text(format_table(table))
        return 0
    lines = []
    for architecture, kernels in found.items():
        stored = table["kernels"].get(architecture, {})
        if options.only:
            stored = {n: r for n, r in stored.items() if n.partition(" ")[0] == options.only}
        lines += [
            f"{architecture} {line}"
            for line in differences(stored, kernels, release == table["nvcc"])
        ]
    print("\n".join(lines) or f"{sum(map(len, found.values()))} kernels as in {TABLE.name}")
    if lines:
        print(f"not as {TABLE} says (nvcc {table['nvcc']}, here {release}); if this is meant: "
              "python csrc/cuda_resources.py", file=sys.stderr)  # fmt: skip
    return 1 if lines else 0


def format_table(table: dict[str, object]) -> str:
    """JSON with one kernel a line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
