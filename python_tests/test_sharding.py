"""Runs on 1, 2 and 3 processes draw the same completions and reach the same weights: whole copies
(DDP), shards (FSDP2), shards of a machine (HYBRID); and go on from each other's checkpoints.

What is compared is computed apart: a run on one process has no collective and no shard.
"""

import json
import math
import os
import signal
import time

import pytest
import torch
from parallel_runs import Ranks, rows, weights
from safetensors.torch import load_file
from tiny_run import configure, write_inputs

from vcr1_fast.data.records import load_records, write_records
from vcr1_fast.train.checkpoint import checkpoints
from vcr1_fast.train.dry_run import skeleton
from vcr1_fast.train.plan import Needs

# float64: what is left is the order of sums. Adam divides a gradient by its own size, so an error
# in a gradient of 1e-15 comes back as one of the weights about lr times as large as the gradient's.
FULL = ("optim.steps=5", "run.save_every=3", "loss.beta=0.04", "optim.tokens_per_microbatch=60")
OFFLOAD = (*FULL, "run.cpu_offload=true")
LORA = ("optim.steps=5", "loss.beta=0.04", "model.lora_rank=2", "model.freeze_vision=true")
# Two optimiser steps an epoch, two epochs; groups without advantages; a clip that cannot be read;
# five prompts, which neither 2 nor 3 divide.
PARTS = (
    "optim.steps=4",
    "loss.beta=0",
    "optim.inner_epochs=2",
    "optim.inner_steps=5",
    "optim.prompts_per_step=5",
    "model.gradient_checkpointing=true",
)
HALF = ("model.dtype=bfloat16", "optim.steps=2", "loss.beta=0.04", "optim.lr=1e-4")
MEMORY = ("optim.steps=2", "optim.tokens_per_microbatch=64", "run.save_every=0")
# Without run.device=cpu, as torchrun is started on a machine that happens to have no GPU.
SFT = ("optim.steps=5", "optim.prompts_per_step=5", "run.device=auto")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """(model, records) of a model whose head is its embedding."""
    return write_inputs(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def folder(tied, tmp_path_factory):
    """Folder of all runs, by "<processes>-<case>"."""
    root = tmp_path_factory.mktemp("parallel")
    untied = write_inputs(root / "untied", tie_embeddings=False)
    found = load_records(tied[1])
    broken = root / "broken.mp4"
    broken.write_bytes(b"no clip")
    object.__setattr__(found[4], "video", str(broken))
    write_records(root / "broken.jsonl", found)

    def job(name, kind, inputs, overrides, **more):
        model, records = inputs
        how = {"kind": kind, "model": model, "records": records, "output": root / name}
        return name, how | {"overrides": overrides} | more

    def jobs(n):
        return [
            job(f"{n}-full", "grpo", tied, FULL, double=True),
            job(f"{n}-parts", "grpo", (untied[0], root / "broken.jsonl"), PARTS, double=True),
        ]

    def more(n):
        return [
            job(f"{n}-lora", "grpo", untied, LORA),
            job(f"{n}-half", "grpo", tied, HALF),
            job(f"{n}-sft", "sft", untied, SFT),
        ]

    def resumed(n, source):
        return job(
            f"{n}-from-{source}", "grpo", tied, FULL, double=True, resumes=(3, root / source)
        )

    def plain(n, parallel):
        return job(
            f"{n}-{parallel}", "grpo", tied, (*FULL, f"run.parallel={parallel}"), double=True
        )

    large = write_inputs(root / "large", hidden_size=512, layers=6, heads=8)

    def measured(n):
        return job(f"{n}-memory", "sft", large, MEMORY, measured=True)

    Ranks(1, [*jobs(1), *more(1)]).wait()
    two = [*jobs(2), *more(2), plain(2, "ddp"), plain(2, "hybrid")]
    two.append(job("2-offload", "grpo", tied, OFFLOAD, double=True))
    larger = (*FULL, "optim.tokens_per_microbatch=130")
    two.append(job("2-oom", "grpo", tied, larger, double=True, out_of_memory=True))
    # LOCAL_WORLD_SIZE: two machines of one process each, for "hybrid".
    Ranks(2, [*two, resumed(2, "2-full"), resumed(2, "1-full")], LOCAL_WORLD_SIZE="1").wait()
    Ranks(3, [*jobs(3), resumed(3, "2-full")]).wait()
    # Other processes, whose heaps hold nothing yet; a first run imports what a run imports.
    for n in (2, 3):
        Ranks(n, [job(f"{n}-first", "sft", untied, MEMORY), measured(n)]).wait()
    Ranks(1, [resumed(1, "2-full")]).wait()
    return root


def assert_same(folder, name, expected, tolerance):
    """The same metrics and exported weights, to a relative (metrics) and absolute tolerance."""
    ours, theirs = rows(folder / name), rows(folder / expected)
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for metric, value in row.items():
            other_value = other[metric]
            if not metric.startswith("rollout_gap"):  # rounding itself
                close = math.isclose(value, other_value, rel_tol=tolerance, abs_tol=tolerance)
                assert close, (row["step"], metric, value, other_value)
    a, b = weights(folder / name), weights(folder / expected)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", ["2-full", "3-full", "2-ddp", "2-hybrid", "2-offload"])
def test_shards_and_copies_train_like_one_process(folder, name):
    assert_same(folder, name, "1-full", 1e-9)
    first, last = rows(folder / name)[0], rows(folder / name)[-1]
    assert last["kl"] > 0  # the weights have moved away from the reference
    assert first["grad_norm"] > 0


def test_a_rank_that_runs_out_of_memory_begins_its_passes_again(folder):
    """Alone: the other rank waits for it. Its second try is cut smaller, and the norms of a layer
    compute in float32, so that another cut rounds otherwise."""
    for name in ("2-oom", "1-full"):  # a prompt that is split by its completions runs again
        for row in (found := rows(folder / name)):
            del row["num_run_tokens"], row["saved_tokens"]
        if name == "2-oom":
            ours = found
    for row, other in zip(ours, found, strict=True):
        close = {k: v for k, v in other.items() if not k.startswith("rollout_gap")}
        assert {k: row[k] for k in close} == pytest.approx(close, rel=1e-6, abs=1e-7)
    a, b = weights(folder / "2-oom"), weights(folder / "1-full")
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("n", [2, 3])
def test_ranks_may_differ_in_groups_passes_and_bad_clips(folder, n):
    assert_same(folder, f"{n}-parts", "1-parts", 1e-9)
    found = rows(folder / f"{n}-parts")
    assert sum(row["quarantined"] for row in found) > 0
    assert sum(row["skipped_groups"] for row in found) > 0


@pytest.mark.parametrize(("case", "tolerance"), [("lora", 1e-5), ("sft", 1e-5)])
def test_adapters_and_fine_tuning_train_like_one_process(folder, case, tolerance):
    assert_same(folder, f"2-{case}", f"1-{case}", tolerance)


def test_bfloat16_passes_step_float32_masters(folder):
    """Weights move by the same small steps, although the passes' sums differ in order."""
    ours, theirs = rows(folder / "2-half"), rows(folder / "1-half")
    assert ours[0]["reward"] == theirs[0]["reward"]  # the same completions
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=2e-2)
    shards = checkpoints(folder / "2-half" / "checkpoints")[0][-1] / "shards"
    assert shards.is_dir()
    a, b = weights(folder / "2-half"), weights(folder / "1-half")
    moved = math.sqrt(sum(float((one - b[name]).square().sum()) for name, one in a.items()))
    size = math.sqrt(sum(float(one.square().sum()) for one in b.values()))
    assert moved < 2e-3 * size


@pytest.mark.parametrize(
    "name", ["2-from-2-full", "3-from-2-full", "1-from-2-full", "2-from-1-full"]
)
def test_a_run_goes_on_with_any_number_of_processes(folder, name):
    assert_same(folder, name, "1-full", 1e-9)


def test_the_same_number_of_processes_goes_on_bit_for_bit(folder):
    ours, theirs = weights(folder / "2-from-2-full"), weights(folder / "2-full")
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())
    assert rows(folder / "2-from-2-full") == rows(folder / "2-full")


def test_adapters_of_shards_are_exported_as_peft_reads_them(folder):
    ours = load_file(folder / "2-lora" / "adapter" / "adapter_model.safetensors")
    theirs = load_file(folder / "1-lora" / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name], rtol=0, atol=1e-5)
        assert one.abs().sum() > 0


def wire(folder, name):
    return [tuple(call) for call in json.loads((folder / name / "wire.json").read_text())]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_bytes_reported_are_those_of_the_collectives(folder):
    """All-gathers of policy and reference, one reduce-scatter a unit, each step: however many
    micro-batches there are."""
    found = read(folder / "2-full" / "metrics.jsonl")
    assert min(row["num_microbatches"] for row in found) > 2
    assert len({row["collectives"] for row in found}) == 1
    calls = wire(folder, "2-full")
    gathered = sum(size for name, size in calls if name == "all_gather_single") / 2
    reduced = sum(size for name, size in calls if name == "reduce_scatter_single") / 2
    reported = sum(row["sent_bytes"] for row in found)
    # Beside the steps: one gather of the root each for policy and reference, which makes it the
    # root of its units, and one of the policy for the export. Uneven rows are padded.
    steps = len(found)
    assert gathered + reduced == pytest.approx(reported * (1 + 1 / steps / 3), rel=0.08)
    number = sum(row["collectives"] for row in found)
    units = sum(name == "reduce_scatter_single" for name, _ in calls) / steps
    assert number == steps * 3 * units
    assert len(calls) == number + units + 2


def test_copies_are_summed_by_few_collectives(folder):
    found = read(folder / "2-ddp" / "metrics.jsonl")
    calls = [size for name, size in wire(folder, "2-ddp") if name == "all_reduce"]
    assert sum(row["sent_bytes"] for row in found) == sum(calls)  # 2 * (n - 1) / n = 1
    assert len(calls) == len(found)  # one bucket


@pytest.mark.parametrize("killed", [0, 1])
def test_the_ranks_that_are_left_name_the_one_that_was_killed(tied, folder, killed):
    """And end within a minute; the run goes on bit for bit afterwards."""
    output = folder / f"killed-{killed}"
    how = {"kind": "grpo", "model": tied[0], "records": tied[1], "output": output, "double": True}
    how["overrides"] = (*FULL[:1], "run.save_every=1", *FULL[2:])
    ranks = Ranks(2, [("killed", how | {"pause": 1.0})], SAID=str(folder / f"said-{killed}"))
    first = output / "checkpoints" / "step-00000001"
    try:
        deadline = time.monotonic() + 300
        while not first.is_dir():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process = ranks.processes[killed]
        os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        left = ranks.processes[1 - killed]
        left.join(60)
        assert not left.is_alive()
        assert time.monotonic() - began < 60
    finally:
        for process in ranks.processes:
            process.kill()
    said = (folder / f"said-{killed}-{1 - killed}").read_text()
    while not ranks.answers.empty():
        said += str(ranks.answers.get())
    named = f"rank {killed} (process {ranks.processes[killed].pid} on"
    assert named in said and "ended without a word" in said
    Ranks(2, [("again", how)]).wait()
    ours, theirs = weights(output), weights(folder / "2-full")
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())
    assert rows(output) == rows(folder / "2-full")


def test_an_error_of_one_rank_ends_the_others(tied, tmp_path):
    """Rank 0 alone refuses the folder of another run; rank 1 would wait for it."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text("")
    how = {"kind": "grpo", "model": tied[0], "records": tied[1], "output": output}
    ranks = Ranks(2, [("refused", how | {"overrides": ("run.resume=false",)})])
    with pytest.raises(AssertionError, match="holds a run already"):
        ranks.wait(60)


def test_peak_memory_is_that_of_the_plan(folder):
    """And falls with the number of processes as planned."""
    config = configure(folder / "large" / "model", "records.jsonl", "run", *MEMORY)
    planned = {}
    for n in (2, 3):
        needs = Needs.of(skeleton(folder / "large" / "model", config.model), config, n)
        planned[n] = needs.peak(reference=False)
        for path in (folder / f"{n}-memory").glob("peak-*.json"):
            assert json.loads(path.read_text()) == pytest.approx(planned[n], rel=0.15), path
    assert planned[3] < 0.9 * planned[2]
