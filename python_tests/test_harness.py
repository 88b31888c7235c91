"""The benches' harness: what is compared, what is stored, how memory and errors are measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benches"))
import harness
import machine
import peers
from machine import peak_extra

MIB = 1 << 20


def nothing():
    """An entry whose time is given by the test."""


def out_of_memory():
    raise torch.OutOfMemoryError("no")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A bench whose clock says 1, 2, 3, … ms for the entries in turn, and whose limit is 8 GB/s."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness.Bench, "_limit", lambda self, kind: 8e9)
    monkeypatch.setattr(
        harness.Timer,
        "medians",
        lambda self, fns, seconds, cold, rounds: {n: (i + 1) / 1e3 for i, n in enumerate(fns)},
    )
    return harness.Bench("thing", threads=torch.get_num_threads())


def stored(tmp_path):
    (path,) = tmp_path.iterdir()
    return json.loads(path.read_text())


def test_rows_compare_each_entry_with_ours(bench, tmp_path, capsys):
    entries = {"a": nothing, "ours": nothing, "b": nothing, "c": "not installed"}
    errors = {"ours": 1e-7, "b": 2e-7}
    with bench:
        bench.run(
            "op", "8", "float32", entries, 4e6, limit="read", errors=errors, notes={"tokens": 9}
        )
    content = stored(tmp_path)
    a, b, c = content["rows"]
    assert (a["baseline_ms"], a["ours_ms"], a["speedup"], b["speedup"]) == (1.0, 2.0, 0.5, 1.5)
    assert (a["GBps"], a["percent_of_limit"]) == (2.0, 25.0)  # 4 MB in 2 ms, of 8 GB/s
    assert (b["baseline_error"], b["ours_error"]) == (2e-7, 1e-7)
    assert "baseline_error" not in a and a["ours_error"] == 1e-7
    assert a["tokens"] == b["tokens"] == 9
    assert c["skipped"] == "not installed" and not {"speedup", "baseline_ms"} & c.keys()
    assert content["geometric_mean"] == pytest.approx((0.5 * 1.5) ** 0.5, abs=1e-3)
    assert content["header"]["stem"] == "thing"
    assert "op | 8 | float32 | c: not installed" in capsys.readouterr().out


def test_an_entry_may_be_the_limit_and_may_run_out_of_memory(bench, tmp_path):
    entries = {"products": nothing, "large": out_of_memory, "plain": nothing, "ours": nothing}
    with bench:
        bench.run("op", "8", "float32", entries, 0, limit="products")
    plain, large = stored(tmp_path)["rows"]
    assert plain["percent_of_limit"] == pytest.approx(100 / 3, abs=0.1)
    assert large["baseline"] == "large" and large["skipped"] == "out of memory"


def test_another_form_of_ours_is_a_column(bench):
    entries = {name: lambda: None for name in ("theirs", "ours, slower", "ours")}
    medians = bench.run("op", "8", "float32", entries, 1.0)
    assert [row["baseline"] for row in bench._rows] == ["theirs"]
    assert bench._rows[0]["ours, slower, ms"] == round(medians["ours, slower"] * 1e3, 4)


def test_a_bench_without_ours_or_without_anything_to_compare_is_refused(bench):
    for entries in ({"a": nothing}, {"ours": nothing, "a": "not installed"}, {"ours": "no"}):
        with pytest.raises(ValueError, match="at least one baseline"):
            bench.run("op", "8", "float32", entries, 1)
    with pytest.raises(ValueError, match="errors of"):
        bench.run("op", "8", "float32", {"a": nothing, "ours": nothing}, 1, errors={"b": 0.0})


def test_the_error_is_scaled_by_the_largest_exact_value():
    exact = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    assert harness.scaled_error(torch.tensor([1.0, -4.0, 2.5]), exact) == 0.125


def test_the_peak_counts_what_is_freed_again_and_not_what_was_there(bench):
    held = []

    def call():
        scratch = torch.ones(24 * MIB // 4)
        result = scratch[: 2 * MIB] * 2  # 8 MiB beside the scratch memory's 24
        held.append(result)
        return result

    peak = peak_extra(call, torch.device("cpu"), held.clear)
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 31 * MIB <= peak <= 40 * MIB
    assert peak_extra(nothing, torch.device("cpu")) < 4 * MIB
    again = peak_extra(call, torch.device("cpu"), held.clear)
    assert 31 * MIB <= again <= 40 * MIB  # released before, or its result would hide 8 MiB


def test_the_load_of_others_is_the_systems_less_ours(monkeypatch):
    """5 s of processor time in 4 s, of which 3 were ours and 1 a neighbour's on the same host."""
    states = iter(
        [
            ("cpu  100 0 100 1000 9 0 0 0 0 0\n", (1.0, 1.0, 0.0, 0.0, 0.0), 0.0),
            ("cpu  400 0 200 1900 9 0 0 100 0 0\n", (3.0, 1.0, 1.0, 0.0, 0.0), 4.0),
        ]
    )
    state = []
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(machine.os, "times", lambda: state[1])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: state[2])

    def read(path, *args):
        state[:] = next(states)
        return state[0]

    monkeypatch.setattr(machine.Path, "read_text", read)
    assert machine.OtherLoad().mean() == pytest.approx(0.5)


def test_a_peer_that_cannot_run_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("import missing_half\n")
    (tmp_path / "old_peer.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers.load("no_such_peer", "loss") == "not installed"
    assert peers.load("broken_peer", "loss").startswith("does not import: No module named")
    assert peers.load("old_peer", "loss") == "has no loss"
    assert peers.cut_cross_entropy("cpu") == "needs CUDA"
    assert peers.load("math", "tau") == pytest.approx(6.283185307)
