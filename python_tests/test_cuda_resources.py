"""csrc/cuda_resources.py: what it reads of nvcc's output, and what it takes for a fault."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "csrc/cuda_resources.py")
cuda_resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_resources)

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aILb1EEvPf' for 'sm_90'
ptxas info    : Function properties for _Z1aILb1EEvPf
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size, 112 bytes smem
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
PTX = """
.visible .entry _Z1aILb1EEvPf(
{
  ld.global.cs.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];
  ld.global.nc.f32 %f1, [%rd2];
  cp.async.cg.shared.global [%r9], [%rd3], 16;
  ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r9];
  st.global.cs.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
}
.entry _Z1bv(
{
  ld.global.v2.f32 {%f1, %f2}, [%rd1];
}
"""


def test_reads_ptxas_and_ptx():
    assert cuda_resources.parse_ptxas(PTXAS) == {
        "_Z1aILb1EEvPf": {"registers": 64, "stack": 8, "spills": 16, "shared": 112},
        "_Z1bv": {"registers": 32, "stack": 0, "spills": 0, "shared": 0},
    }
    assert cuda_resources.count_wide(PTX) == {"_Z1aILb1EEvPf": 3, "_Z1bv": 0}
    with pytest.raises(ValueError, match="no resources of a kernel"):
        cuda_resources.parse_ptxas("Compiling entry function '_Z1a' for 'sm_90'")


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void vcr1::cuda::(anonymous namespace)::loss_kernel<true, false, float>"
            "(vcr1::LogitsGrpoLossArgs, long, int)",
            "loss_kernel<true, false, float>",
        ),
        (
            "void vcr1::cuda::matrix_kernel<2, 0, vcr1::cuda::(anonymous namespace)::FrameSink<"
            "unsigned char> >(vcr1::cuda::ResizeArgs, vcr1::cuda::Source)",
            "matrix_kernel<2, 0, FrameSink<unsigned char> >",
        ),
        ("vcr1::cuda::(anonymous namespace)::track_kernel(int)", "track_kernel"),
    ],
)
def test_names_are_short(demangled, short):
    assert cuda_resources.short_name(demangled) == short


def test_what_counts_as_a_difference():
    stored = {"a": {"registers": 64, "stack": 0, "spills": 0, "wide": 4}}

    def found(**changes):
        return {"a": {**stored["a"], **changes}}

    def lines(kernels, same):
        return cuda_resources.differences(stored, kernels, same)

    assert lines(found(), True) == lines(found(registers=70), False) == []
    assert lines(found(registers=70), True) == ["a: registers 64 -> 70"]
    for changes in ({"spills": 8}, {"stack": 8}, {"wide": 3}):
        assert len(lines(found(**changes), False)) == 1, changes
    assert lines(found(wide=5), False) == [] != lines(found(wide=5), True)
    assert lines({}, False) == ["a: is gone"]
    assert lines({**found(), "b": {}}, False) == ["b: not in the table"]


def test_every_source_is_in_the_table_and_no_kernel_uses_local_memory_but_the_known():
    table = json.loads(cuda_resources.TABLE.read_text())
    kernels = table["kernels"]
    assert {"sm_80", "sm_90"} <= kernels.keys()
    for architecture, entries in kernels.items():
        files = {name.partition(" ")[0] for name in entries}
        assert files == {path.stem for path in cuda_resources.SOURCES.glob("*.cu")}, architecture
        spilling = {name for name, r in entries.items() if r["spills"] or r["stack"]}
        # Eight bytes of the one matrix kernel whose weights fill the registers, on sm_90.
        known = (" scalar_kernel<", " matrix_kernel<2, 3, PatchSink<PatchShape<14, 2, 2>")
        assert all(any(k in name for k in known) for name in spilling), (architecture, spilling)
