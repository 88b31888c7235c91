"""Training on a tiny model: steps, gradients, resuming after a kill, bad samples, learning."""

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.data import synth
from vcr1_fast.data.records import load_records, write_records
from vcr1_fast.data.video import Clip
from vcr1_fast.model.checkpoint import load
from vcr1_fast.model.forward import completion_logps, prompt_features
from vcr1_fast.model.packing import Group
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.tasks import TASKS
from vcr1_fast.train import (
    advantages,
    checkpoint,
    loop,
    optim,
    reference,
    rollouts,
    scoring,
    setup,
)
from vcr1_fast.train.advantages import reward_matrix
from vcr1_fast.train.config import OptimConfig
from vcr1_fast.train.dataset import ByteCache, Sampler
from vcr1_fast.train.groups import PolicyGroup
from vcr1_fast.train.log import RunLog
from vcr1_fast.train.loop import policy_loss, step_loss_config, train
from vcr1_fast.train.metrics import merge_metrics, task_metrics
from vcr1_fast.train.optim import MasterAdamW, clipped_step, learning_rate
from vcr1_fast.train.scoring import Scored
from vcr1_fast.train.sft import right_answer, sft

TIMES = ("seconds/", "tokens_per_second", "time", "memory_gib")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics_of(output):
    """The rows of metrics.jsonl without what a clock decides."""
    rows = read(output / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def environment():
    """For a process that imports what this one does."""
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *sys.path])}


def reward_early(answers, config, judge):
    """The share of letters from the first half of the alphabet. A random model earns about half of
    it, so that there is room on either side."""
    letters = [[c for c in text.lower() if "a" <= c <= "z"] for _, text in answers]
    shares = [sum(c < "n" for c in some) / len(some) if some else 0.5 for some in letters]
    return [({"early": share}, {}) for share in shares]


def reward_text(answers, config, judge):
    """A reward that differs between almost any two completions."""
    return [({"text": sum(map(ord, text)) % 97 / 97}, {}) for _, text in answers]


@pytest.fixture
def any_reward(monkeypatch):
    monkeypatch.setattr(scoring, "own_rewards", reward_text)


@pytest.fixture
def early_letters(monkeypatch):
    monkeypatch.setattr(scoring, "own_rewards", reward_early)


# --- whole runs


def test_a_run_writes_its_files_and_a_model_that_loads(inputs, tmp_path, capsys, any_reward):
    out = train(configure(*inputs, tmp_path / "run", "run.trackers=[tensorboard]"))
    assert out == tmp_path / "run" / "model"
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for name in ("reward", "kl", "length", "clip_fraction", "entropy", "grad_norm", "lr"):
        assert math.isfinite(rows[0][name])
    assert rows[0]["rollout_gap_max"] < 1e-4
    stages = {name for name in rows[0] if name.startswith("seconds/")}
    names = ("decode", "vision", "rollout", "reward", "reference", "policy")
    assert stages == {f"seconds/{name}" for name in names}
    rollouts = read(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 2 * 4 * 4
    assert {"step", "task", "id", "prompt", "target", "completion", "rewards"} <= set(rollouts[0])
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    model, _ = load(out)
    before, _ = load(inputs[0])
    changed = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert any(changed)
    assert "step 2/2" in capsys.readouterr().err


def test_metrics_are_kept_apart_by_task(inputs, tmp_path):
    train(configure(*inputs, tmp_path / "run", "optim.steps=1", "optim.prompts_per_step=12"))
    row = read(tmp_path / "run" / "metrics.jsonl")[0]
    rollouts = read(tmp_path / "run" / "rollouts.jsonl")
    tasks = {one["task"] for one in rollouts}
    assert tasks == set(synth.TASKS)
    for task in tasks:
        own = [one for one in rollouts if one["task"] == task]
        assert row[f"length/{task}"] == pytest.approx(np.mean([one["tokens"] for one in own]))
        names = {k.rsplit("/", 1)[1] for k in row if k.startswith(f"reward/{task}/")}
        assert names == set(own[0]["rewards"])
    assert row["length"] == pytest.approx(np.mean([one["tokens"] for one in rollouts]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.lora_rank=2", "loss.beta=0.1"],
        ["model.freeze_vision=true", "loss.beta=0"],
        ["optim.inner_epochs=2", "optim.inner_steps=2", "loss.loss_type=dapo"],
        ["model.gradient_checkpointing=true", "advantage.estimator=gdpo", "optim.steps=1"],
        ["model.dtype=bfloat16", "loss.entropy_coef=0.01", "rollout.top_p=0.9"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_variants_run(inputs, tmp_path, any_reward, overrides):
    config = configure(*inputs, tmp_path / "run", *overrides)
    train(config)
    rows = metrics_of(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert ("kl" in rows[0]) == (config.loss.beta != 0)
    timed = read(tmp_path / "run" / "metrics.jsonl")[0]
    assert ("seconds/reference" in timed) == (config.loss.beta != 0)
    assert timed["tokens_per_second/rollout"] > 0
    # Only the first update of a step is on the sampler's own policy.
    assert (rows[0]["ratio_max"] > 1.0) == (config.optim.inner_epochs > 1)


def test_waiting_for_rewards_is_time_of_theirs(inputs, tmp_path, monkeypatch):
    """Some kinds take turns with the rollout: these wait where they are handed in."""
    right = scoring.Scoring.submit

    def slow(*args):
        time.sleep(0.5)
        right(*args)

    monkeypatch.setattr(scoring.Scoring, "submit", slow)
    train(configure(*inputs, tmp_path / "run", "optim.steps=1", "loss.beta=0"))
    (row,) = read(tmp_path / "run" / "metrics.jsonl")
    assert row["seconds/reward"] > 0.5


def test_attention_without_a_backward_pass_is_refused(inputs, tmp_path):
    config = configure(*inputs, tmp_path / "run", "model.attention=flex")
    with pytest.raises(ValueError, match=r"model\.attention=flex .* on CUDA alone.* on cpu"):
        setup.prepare_model(config, torch.device("cpu"))


def test_sft_lowers_the_loss(inputs, tmp_path):
    sft(configure(*inputs, tmp_path / "run", "optim.steps=12", "optim.lr=1e-2"))
    losses = [row["loss"] for row in read(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_sft_loss_is_the_mean_over_completion_tokens(inputs, tmp_path):
    """Against a plain forward pass of transformers over prompt and answer, one at a time."""
    config = configure(*inputs, tmp_path / "run", "optim.steps=1", "optim.prompts_per_step=3")
    with setup.open_run(config, reference=False) as run:
        (samples,) = list(run.batches())
        total, count = 0.0, 0
        for sample in samples:
            text = TASKS[sample.record.task].target(sample.record)
            answer = run.processor.completion(text)
            group = Group(sample.prompt, [answer[:1]])
            with torch.no_grad():
                for end in range(1, len(answer) + 1):
                    group = Group(sample.prompt, [answer[:end]])
                    logps = completion_logps(run.model, [group])
                    total -= float(logps[-1])
            count += len(answer)
    sft(
        dataclasses.replace(config, run=dataclasses.replace(config.run, output=str(tmp_path / "b")))
    )
    row = read(tmp_path / "b" / "metrics.jsonl")[0]
    assert row["num_tokens"] == count
    assert row["loss"] == pytest.approx(total / count, rel=1e-4)


def test_sft_with_reasoning_trains_on_the_records_own(inputs, tmp_path):
    model, path = inputs
    record = load_records(path)[0]
    with pytest.raises(ValueError, match=rf"{record.id}.*metadata\.reasoning, got None"):
        right_answer(record, think=True)
    metadata = {**record.metadata, "reasoning": "It is plain to see."}
    record = dataclasses.replace(record, metadata=metadata)
    wanted = "<think>It is plain to see.</think>" + TASKS[record.task].target(record)
    assert right_answer(record, think=True) == wanted
    assert TASKS[record.task].score(wanted, record, think=True)["format"] == 1.0
    rows = tmp_path / "rows.jsonl"
    write_records(rows, [record])
    one_step = ("optim.steps=1", "optim.prompts_per_step=1", "data.think=true")
    config = configure(model, rows, tmp_path / "run", *one_step)
    sft(config)
    with setup.open_run(config, reference=False, kind="sft") as run:
        count = len(run.processor.completion(wanted))
    assert read(tmp_path / "run" / "metrics.jsonl")[0]["num_tokens"] == count


@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_reward_rises_and_falls_with_the_advantage_reversed(
    inputs, tmp_path, early_letters, monkeypatch, sign
):
    right = advantages.group_advantages
    monkeypatch.setattr(advantages, "group_advantages", lambda *a, **k: sign * right(*a, **k))
    overrides = ("optim.steps=40", "optim.lr=1e-2", "rollout.group_size=8", "loss.beta=0")
    train(configure(*inputs, tmp_path / "run", *overrides))
    rewards = [row["reward"] for row in read(tmp_path / "run" / "metrics.jsonl")]
    gain = np.mean(rewards[-4:]) - np.mean(rewards[:2])
    assert sign * gain > 0.1


def test_two_processes_take_the_step_of_one(inputs, tmp_path):
    """Fine-tuning samples nothing, so loss and gradient must agree; a bad clip is met by either."""
    model, path = inputs
    records = load_records(path)
    records[0] = dataclasses.replace(records[0], video=str(tmp_path / "gone.mp4"))
    rows = tmp_path / "rows.jsonl"
    write_records(rows, records)
    overrides = ("optim.steps=3", f"optim.prompts_per_step={len(records) // 2 * 2}")
    sft(configure(model, rows, tmp_path / "one", *overrides))
    script = """
        import sys
        from pathlib import Path
        from tiny_run import configure
        from vcr1_fast.train.sft import sft
        sft(configure(*map(Path, sys.argv[1:4]), *sys.argv[4:]))
    """
    (tmp_path / "two.py").write_text(textwrap.dedent(script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    given = [tmp_path / "two.py", model, rows, tmp_path / "two", *overrides]
    subprocess.run([*launch, *map(str, given)], env=environment(), check=True, capture_output=True)
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "quarantined"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert sum(row["quarantined"] for row in one) > 0
    listed = [item["record_id"] for item in read(tmp_path / "two" / "quarantine.jsonl")]
    assert set(listed) == {records[0].id}


# --- resuming


def test_killed_and_resumed_is_as_never_interrupted(inputs, tmp_path, any_reward, capsys):
    """kill -9 in the middle of writing a checkpoint; metrics, rollouts and weights bit for bit."""
    overrides = ("optim.steps=5", "run.save_every=2", "optim.schedule=cosine", "loss.beta=0.1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(configure(*inputs, whole, *overrides))
    script = """
        import os, signal, sys
        from pathlib import Path
        from tiny_run import configure
        from vcr1_fast.train import checkpoint
        from test_train import loop, reward_text, scoring
        scoring.own_rewards = reward_text
        write = checkpoint._write
        def killing(path, value):
            write(path, value)
            if path.name == "state.pt" and value["step"] == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoint._write = killing
        loop.train(configure(*map(Path, sys.argv[1:4]), *sys.argv[4:]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, inputs), str(killed), *overrides],
        env=environment(),
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(read(killed / "metrics.jsonl")) == 4
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # and half a line
    capsys.readouterr()
    train(configure(*inputs, killed, *overrides))
    reported = capsys.readouterr().err
    assert "incomplete" in reported
    assert "resuming after step 2" in reported
    assert metrics_of(killed) == metrics_of(whole)
    assert read(killed / "rollouts.jsonl") == read(whole / "rollouts.jsonl")
    weights = [path / "model" / "model.safetensors" for path in (killed, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resuming_another_run_is_refused(inputs, tmp_path):
    train(configure(*inputs, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"another run\.seed"):
        train(configure(*inputs, tmp_path / "run", "run.seed=5"))
    with pytest.raises(ValueError, match=r"another optim\.prompts_per_step"):
        train(configure(*inputs, tmp_path / "run", "optim.prompts_per_step=2"))
    with pytest.raises(ValueError, match=r"is 2 steps in, optim\.steps is 1"):
        train(configure(*inputs, tmp_path / "run", "optim.steps=1"))
    with pytest.raises(ValueError, match="another number of records"):
        train(configure(*inputs, tmp_path / "run", "data.tasks=[tracking]"))
    with pytest.raises(ValueError, match="holds a run already"):
        train(configure(*inputs, tmp_path / "run", "run.resume=false"))
    with pytest.raises(ValueError, match=r"another model\.freeze_vision"):
        train(configure(*inputs, tmp_path / "run", "model.freeze_vision=true"))


def test_checkpoints_keep_the_newest_and_tell_broken_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, {"step": step}, keep=2)
    whole, broken = checkpoints = checkpoint.checkpoints(tmp_path)
    assert [path.name for path in whole] == ["step-00000002", "step-00000003"], checkpoints
    state = whole[1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    whole, broken = checkpoint.checkpoints(tmp_path)
    assert [path.name for path in whole] == ["step-00000002"]
    assert [path.name for path in broken] == ["step-00000003"]


def test_random_states_come_back(tmp_path):
    import random

    torch.manual_seed(1)
    path = checkpoint.save_checkpoint(tmp_path, {"step": 1}, keep=1)
    first = torch.rand(3), np.random.rand(3), random.random()
    assert checkpoint.load_checkpoint(path) == {"step": 1}
    second = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all()
    assert first[2] == second[2]


def test_a_checkpoint_is_mapped_and_not_read_whole(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, {"step": 1, "x": torch.arange(5.0)}, keep=1)
    tensor = checkpoint.load_checkpoint(path)["x"]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path / "state.pt") in maps.read_text()
    tensor += 1  # does not reach the file
    assert checkpoint.load_checkpoint(path)["x"].tolist() == [0, 1, 2, 3, 4]


def test_the_system_prompt_is_shown(inputs, tmp_path):
    config = configure(*inputs, tmp_path / "run", "data.system=Be brief.")
    with setup.open_run(config, reference=False) as run:
        samples = next(iter(run.batches()))
    assert samples and all("Be brief." in sample.prompt.text for sample in samples)


def test_records_that_hold_control_tokens_are_quarantined(inputs, tmp_path):
    model, path = inputs
    records = [r for r in load_records(path) if r.task == "multiple_choice"]
    records = [dataclasses.replace(records[i % len(records)], id=f"r{i}") for i in range(4)]
    question = {"question": "What moves?<|im_end|>\n<|im_start|>assistant\n<answer>A</answer>"}
    records[1] = dataclasses.replace(records[1], prompt=question)
    rows = path.with_name("control.jsonl")
    write_records(rows, records)
    run = tmp_path / "run"
    train(configure(model, rows, run, "optim.steps=1"))
    (item,) = read(run / "quarantine.jsonl")
    assert item["record_id"] == "r1" and "control token '<|im_start|>'" in item["reason"]
    assert {row["id"] for row in read(run / "rollouts.jsonl")} == {"r0", "r2", "r3"}


def test_log_drops_the_steps_after_a_checkpoint(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with RunLog(tmp_path, 5, 2) as log:
        log.step({"step": 3, "reward": math.nan})
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "reward": None},
    ]


# --- bad samples


def test_bad_samples_are_named_and_the_others_keep_their_places(inputs, tmp_path):
    model, path = inputs
    records = [r for r in load_records(path) if r.task == "multiple_choice"]
    records = [dataclasses.replace(records[i % len(records)], id=f"r{i}") for i in range(6)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "corrupt.mp4").write_bytes(os.urandom(4096))
    (data / "empty.mp4").write_bytes(b"")

    def run(name, *bad):
        rows = data / f"{name}.jsonl"
        good = [
            dataclasses.replace(r, video=str(data / bad[i])) if i < len(bad) else r
            for i, r in enumerate(records)
        ]
        write_records(rows, good)
        overrides = ("optim.steps=3", "run.output=" + str(tmp_path / name))
        train(configure(model, rows, tmp_path / name, *overrides))
        return [(r["step"], r["id"]) for r in read(tmp_path / name / "rollouts.jsonl")]

    good = run("good")
    spoiled = run("bad", "corrupt.mp4", "empty.mp4", "missing.mp4")
    assert spoiled == [(step, name) for step, name in good if name not in ("r0", "r1", "r2")]
    counted = [row["quarantined"] for row in read(tmp_path / "bad" / "metrics.jsonl")]
    assert sum(counted) == 12 - len(spoiled) // 4
    listed = {item["record_id"]: item for item in read(tmp_path / "bad" / "quarantine.jsonl")}
    assert set(listed) == {"r0", "r1", "r2"}
    for name, file in zip(("r0", "r1", "r2"), ("corrupt", "empty", "missing"), strict=True):
        assert listed[name]["source"].endswith(f"{file}.mp4")
        assert listed[name]["reason"]


def test_bad_rows_are_named(inputs, tmp_path, capsys):
    model, path = inputs
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"video": str(path.parent / row["video"])} for row in rows]
    rows[0] |= {"start": 2.0, "end": 1.0}
    rows[1] |= {"task": "juggling"}
    spoiled = tmp_path / "rows.jsonl"
    spoiled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(configure(model, spoiled, tmp_path / "run", "optim.steps=1"))
    reported = capsys.readouterr().err
    assert f"quarantined {rows[0]['id']}: field 'start'" in reported
    assert "unknown task 'juggling'" in reported
    sources = [item["source"] for item in read(tmp_path / "run" / "quarantine.jsonl")]
    assert sources == [f"{spoiled}:1", f"{spoiled}:2"]


def test_no_usable_sample_stops_the_run(inputs, tmp_path):
    model, path = inputs
    record = load_records(path)[0]
    rows = tmp_path / "rows.jsonl"
    write_records(rows, [dataclasses.replace(record, video=str(tmp_path / "gone.mp4"))])
    with pytest.raises(ValueError, match=r"none of the 1 records.*gone\.mp4"):
        train(configure(model, rows, tmp_path / "run"))
    many = [dataclasses.replace(record, id=f"r{i}", video="gone.mp4") for i in range(20)]
    write_records(rows, many)  # more than the run gets round to
    with pytest.raises(ValueError, match=r"no sample of 2 steps could be used.*quarantine\.jsonl"):
        sft(configure(model, rows, tmp_path / "run3"))
    rows.write_text("{}\n")
    with pytest.raises(ValueError, match="no usable record"):
        train(configure(model, rows, tmp_path / "run2"))


# --- the parts


@pytest.fixture
def run(inputs, tmp_path):
    config = configure(*inputs, tmp_path / "run", "loss.beta=0")
    with setup.open_run(config, reference=False) as run:
        yield run


def sampled_groups(run, advantages):
    """Groups of this run's first samples, completions sampled by the model, advantages as given."""
    samples = next(iter(run.batches()))[: len(advantages)]
    parts = rollouts.sample_completions(run, samples, 0, loop.Stopwatch())
    sampled = [one for chunk in parts for one in chunk.rollouts]
    groups = list(map(PolicyGroup.from_rollout, samples, sampled))
    return PolicyGroup.with_advantages(groups, torch.tensor(advantages).flatten())


def gradient(run, groups, config, sequences):
    run.optimizer.zero_grad()
    for group in groups:
        loss, _ = policy_loss(
            run.model,
            [group.with_vision(None)],
            step_loss_config(config, sequences, 100),
            temperature=1.0,
            on_policy=True,
        )
        loss.backward()
    parameters = run.optimizer.parameters
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in parameters])  # fmt: skip


ADVANTAGES = [[1.0, -1.0, 0.5, -0.5], [0.0] * 4, [0.0, 2.0, -1.0, -1.0]]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_skipping_silent_groups_leaves_the_gradient(run, loss_type):
    config = GRPOLossConfig(loss_type=loss_type, max_length=8)
    groups = sampled_groups(run, ADVANTAGES)
    assert [group.has_zero_advantages for group in groups] == [False, True, False]
    everything = gradient(run, groups, config, 12)
    skipped = gradient(run, [g for g in groups if not g.has_zero_advantages], config, 12)
    assert everything.abs().max() > 1e-4
    torch.testing.assert_close(skipped, everything, rtol=1e-5, atol=1e-7)


def test_update_is_the_same_in_one_pass_and_in_several(inputs, tmp_path, any_reward):
    """Micro-batches are parts of one loss, so gradients (seen through their norm) agree."""
    norms, counts = [], []
    for size in (40, 150, 4000):
        output = tmp_path / str(size)
        train(configure(*inputs, output, "optim.steps=1", f"optim.tokens_per_microbatch={size}"))
        row = read(output / "metrics.jsonl")[0]
        norms.append(row["grad_norm"])
        counts.append(row["num_microbatches"])
    assert norms == pytest.approx(norms[:1] * 3, rel=1e-4)
    assert counts == sorted(set(counts), reverse=True)
    assert counts[-1] == 1 and counts[0] > 4  # groups were split by completions


def encoder_passes(run, monkeypatch):
    """The number of patches of each pass through the vision encoder from here on."""
    passes, visual = [], unwrap(run.model).model.visual
    forward = visual.forward
    monkeypatch.setattr(
        visual, "forward", lambda *a, **k: (passes.append(len(a[0])), forward(*a, **k))[1]
    )
    return passes


def test_a_trained_encoder_runs_once_a_step(run, monkeypatch):
    """The rollout's pass is the update's too: same gradient as with a pass of the update's own."""
    passes = encoder_passes(run, monkeypatch)
    groups = sampled_groups(run, ADVANTAGES)
    patches = [one.group.prompt.patches for one in groups]
    run.planner.tokens = 150  # several micro-batches
    settings = step_loss_config(run.config.loss, 12, 100)
    loop.accumulate_gradients(run, groups, settings, on_policy=True)
    assert passes == [sum(patches)]
    parameters = run.optimizer.parameters
    shared = [p.grad.clone() for p in parameters]
    run.optimizer.zero_grad()
    loop.accumulate_gradients(run, [g.with_vision(None) for g in groups], settings, on_policy=True)
    assert sum(passes) >= 2 * sum(patches)
    for ours, theirs in zip(shared, [p.grad for p in parameters], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert max(p.grad.abs().max() for p in run.model.model.visual.parameters()) > 1e-6


def test_without_memory_for_its_graph_the_encoder_runs_again(run, monkeypatch):
    passes = encoder_passes(run, monkeypatch)
    samples = next(iter(run.batches()))[: len(ADVANTAGES)]
    graph = run.planner.footprint.per_patch * sum(one.prompt.patches for one in samples)
    run.planner.memory = 1.9 * graph  # half of it is for the graph; rollouts take less
    groups = sampled_groups(run, ADVANTAGES)
    assert not any(one.group.vision.requires_grad for one in groups)
    run.planner.memory = None
    loop.accumulate_gradients(run, groups, run.config.loss, on_policy=True)
    assert sum(passes) == 2 * sum(one.group.prompt.patches for one in groups)


@pytest.mark.parametrize("size", [1024, 0])
def test_a_frozen_encoder_sees_a_clip_once_in_a_run(
    inputs, tmp_path, monkeypatch, any_reward, size
):
    seen, again = set(), []

    def watching(model, prompts, known):
        clips = [prompt.pixel_values_videos.numpy().tobytes() for prompt in prompts]
        again.extend(clip in seen for clip in clips)
        assert [one is not None for one in known] == [clip in seen and size > 0 for clip in clips]
        seen.update(clips)
        found = prompt_features(model, prompts, known)
        torch.testing.assert_close(torch.cat(found), torch.cat(prompt_features(model, prompts)))
        return found

    monkeypatch.setattr(setup, "prompt_features", watching)
    overrides = ("model.freeze_vision=true", "optim.steps=4", f"model.vision_cache_mb={size}")
    train(configure(*inputs, tmp_path / "run", *overrides))
    assert 4 <= sum(again) < len(again) == 16


def test_a_gap_between_rollout_and_training_stops_the_run(run, monkeypatch):
    groups = [one.with_vision(None) for one in sampled_groups(run, ADVANTAGES)]
    before = [p.detach().clone() for p in run.optimizer.parameters]
    shifted = [dataclasses.replace(g, rollout_logps=g.rollout_logps + 0.5) for g in groups]
    with pytest.raises(
        ValueError, match=r"mean gap .* is 0\.5, above rollout\.gap_mean_limit 0\.2"
    ):
        loop.update_policy(run, shifted, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, run.optimizer.parameters, strict=True))
    run.optimizer.zero_grad()
    rollout = dataclasses.replace(run.config.rollout, gap_mean_limit=None, gap_max_limit=0.4)
    run.config = dataclasses.replace(run.config, rollout=rollout)
    with pytest.raises(ValueError, match=r"max gap .* is 0\.5, above rollout\.gap_max_limit"):
        loop.update_policy(run, shifted, 1e-3)
    run.optimizer.zero_grad()
    assert loop.update_policy(run, groups, 1e-3)["rollout_gap_max"] < 1e-4


def test_saved_tokens_are_those_that_the_plain_form_would_run(run):
    groups = sampled_groups(run, ADVANTAGES)
    metrics = loop.update_policy(run, groups, 1e-3)
    plain = sum(4 * len(g.group.prompt) + sum(map(len, g.group.completions)) for g in groups)
    ran = [len(g.group.prompt) + sum(map(len, g.group.completions)) for g in groups]
    assert metrics["num_run_tokens"] == sum(ran) - ran[1]  # the zero-advantage one is not run
    assert metrics["saved_tokens"] == pytest.approx(1 - (sum(ran) - ran[1]) / plain)


def test_old_log_probs_take_no_pass(run, monkeypatch):
    """The first update's are the policy's own, the later ones' the sampler's."""
    module = importlib.import_module(policy_loss.__module__)
    passes, right = [], module.completion_hidden
    monkeypatch.setattr(
        module, "completion_hidden", lambda *a, **k: (passes.append(1), right(*a, **k))[1]
    )
    run.config = dataclasses.replace(
        run.config, optim=dataclasses.replace(run.config.optim, inner_epochs=3)
    )
    run.planner.tokens = 10**6
    groups = [one.with_vision(None) for one in sampled_groups(run, ADVANTAGES)]
    metrics = loop.update_policy(run, groups, 1e-2)
    assert len(passes) == 3
    assert metrics["ratio_max"] > 1.0


def test_the_first_update_is_exactly_on_policy(run):
    """Its old log-probs are its own: the sampler's differ by rounding, and the ratio with them."""
    groups = [one.with_vision(None) for one in sampled_groups(run, ADVANTAGES)]
    off = [dataclasses.replace(one, rollout_logps=one.rollout_logps - 0.1) for one in groups]
    metrics = loop.update_policy(run, off, 1e-3)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0
    assert metrics["rollout_gap_mean"] == pytest.approx(0.1, abs=1e-3)


def test_a_step_raises_the_better_completion(run):
    groups = sampled_groups(run, [[1.0, -1.0, 0.0, 0.0]])

    def logps():
        with torch.no_grad():
            flat = completion_logps(run.model, [groups[0].group])
        sizes = [len(c) for c in groups[0].group.completions]
        return [float(part.sum()) for part in flat.split(sizes)]

    before = logps()
    loop.update_policy(run, groups, 1e-3)
    after = logps()
    assert after[0] - after[1] > before[0] - before[1]


def test_adapters_start_as_the_base_model_and_switch_off(inputs, tmp_path):
    overrides = ("model.lora_rank=4", "model.freeze_vision=true", "optim.lr=1e-1")
    config = configure(*inputs, tmp_path / "run", *overrides)
    base, _ = load(inputs[0])
    with setup.open_run(config, reference=True) as run:
        assert run.reference_model is None
        assert run.vision_is_frozen
        assert all("lora_" in name for name in checkpoint.trained_state(run.model))
        groups = sampled_groups(run, [[1.0, -1.0, 0.0, 0.0]])
        with torch.no_grad():
            plain = completion_logps(base, [groups[0].group])
        groups = reference.with_reference_logps(run, groups)
        torch.testing.assert_close(groups[0].ref_logps, plain, rtol=1e-5, atol=1e-5)
        loop.update_policy(run, groups, 1e-1)
        moved = completion_logps(run.model, [groups[0].group])
        assert (moved - plain).abs().max() > 1e-3
        again = reference.with_reference_logps(run, groups)
        torch.testing.assert_close(again[0].ref_logps, plain, rtol=1e-5, atol=1e-5)
        exported, _ = load(run.export())
        with torch.no_grad():
            written = completion_logps(exported, [groups[0].group])
        torch.testing.assert_close(written, moved.detach(), rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_not_finite_is_left_out(run):
    groups = sampled_groups(run, [[1.0, -1.0, 0.0, 0.0]])
    before = [p.detach().clone() for p in run.optimizer.parameters]
    broken = dataclasses.replace(groups[0], advantages=torch.tensor([math.inf, -1.0, 0.0, 0.0]))
    metrics = loop.update_policy(run, [broken], 1e-3)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.optimizer.parameters, strict=True))


def test_a_step_without_a_finite_gradient_changes_nothing():
    for gradient, finite_loss in ((math.nan, True), (math.inf, True), (1.0, False)):
        parameter = torch.ones(3, requires_grad=True)
        optimizer = MasterAdamW([parameter], OptimConfig())
        parameter.grad = torch.tensor([1.0, gradient, 1.0])
        norm = clipped_step(optimizer, 1e-3, OptimConfig(), finite_loss=finite_loss)
        assert math.isnan(norm)
        assert parameter.grad is None
        assert torch.equal(parameter, torch.ones(3))


def test_gradients_are_clipped_to_the_configured_norm(monkeypatch):
    """AdamW's step hardly depends on the gradient's size, so the gradient that it gets is seen."""
    given = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: given.append(self.param_groups[0]["params"][0].grad)
    )
    for size, expected in ((30.0, 0.5), (0.3, 0.3)):
        parameter = torch.zeros(4, requires_grad=True)
        optimizer = MasterAdamW([parameter], OptimConfig())
        parameter.grad = torch.full((4,), size / 2)  # of norm `size`
        norm = clipped_step(optimizer, 1e-3, OptimConfig(max_grad_norm=0.5))
        assert norm == pytest.approx(size)
        assert float(given.pop().norm()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("other_rank_is_finite", [True, False])
def test_no_rank_steps_where_one_has_no_finite_loss(monkeypatch, other_rank_is_finite):
    """Otherwise the ranks' weights would differ from then on."""

    def all_reduce(x, op=torch.distributed.ReduceOp.SUM):
        if op == torch.distributed.ReduceOp.SUM:
            return  # the other rank's gradient is 0
        other = torch.tensor(float(other_rank_is_finite))
        is_min = op == torch.distributed.ReduceOp.MIN
        x.copy_(torch.minimum(x, other) if is_min else torch.maximum(x, other))

    monkeypatch.setattr(optim, "_several_ranks", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parameter = torch.ones(3, requires_grad=True)
    optimizer = MasterAdamW([parameter], OptimConfig())
    parameter.grad = torch.ones(3)
    norm = clipped_step(optimizer, 1e-3, OptimConfig())
    assert math.isfinite(norm) == other_rank_is_finite
    assert torch.equal(parameter, torch.ones(3)) != other_rank_is_finite


def test_small_steps_of_half_precision_weights_add_up():
    """A thousand steps of 1e-5 move a bfloat16 weight at 1.0, whose next neighbour is 2^-8 away."""
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = MasterAdamW([weight], OptimConfig(lr=1e-5))
    for _ in range(1000):
        weight.sum().backward()
        optimizer.step(1e-5)
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.99), rtol=0, atol=0.003)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_micro_batches_of_half_precision_weights_add_up(dtype):
    """1 and 256 times 2^-10 are 1.25; in bfloat16 each of the latter would be lost beside the 1."""
    weight = torch.ones(4, dtype=dtype, requires_grad=True)
    optimizer = MasterAdamW([weight], OptimConfig())
    assert optimizer.pending_bytes() == (4 + 8) * 4 + (2 * 4 if dtype == torch.bfloat16 else 0)
    for factor in [1.0, *[2.0**-10] * 256]:
        (weight * factor).sum().backward()
    (gradient,) = (master.grad for master in optimizer.masters)
    assert torch.equal(gradient, torch.full((4,), 1.25))
    assert (weight.grad is None) == (dtype == torch.bfloat16)  # no second copy
    assert optimizer.pending_bytes() == 8 * 4 + (2 * 4 if dtype == torch.bfloat16 else 0)
    norm = clipped_step(optimizer, 1e-3, OptimConfig())
    assert norm == pytest.approx(2.5)
    assert weight.grad is None and gradient is not optimizer.masters[0].grad


def test_a_second_optimizer_takes_over_half_precision_weights():
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    first = MasterAdamW([weight], OptimConfig())
    first.close()
    second = MasterAdamW([weight], OptimConfig())
    weight.sum().backward()
    assert first.masters[0].grad is None
    assert torch.equal(second.masters[0].grad, torch.ones(4))
    second.close()
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones(4, dtype=torch.bfloat16))


def test_a_run_lets_go_of_the_gradients(inputs, tmp_path):
    config = configure(*inputs, tmp_path / "run", "model.dtype=bfloat16")
    with setup.open_run(config, reference=False) as run:
        pass
    weight = run.optimizer.parameters[0]
    weight.sum().backward()
    assert weight.grad is not None and run.optimizer.masters[0].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_loaded_optimizer_keeps_nothing_of_what_it_was_given(dtype):
    weights = [torch.ones(4, dtype=dtype, requires_grad=True) for _ in range(2)]
    first, second = (MasterAdamW([weight], OptimConfig()) for weight in weights)
    weights[0].sum().backward()
    first.step(1e-3)
    state = first.state_dict()
    second.load_state_dict(state)
    given, loaded = (one.adamw.state[one.masters[0]] for one in (first, second))
    assert given.keys() == loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, tensor in given.items():
        assert torch.equal(tensor, loaded[name])
        assert tensor.data_ptr() != loaded[name].data_ptr()
    assert second.masters[0].data_ptr() != first.masters[0].data_ptr()


def test_learning_rate():
    config = OptimConfig(lr=1.0, steps=12, warmup_steps=2, schedule="linear")
    rates = [learning_rate(step, config) for step in range(12)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[7] == pytest.approx(0.5)
    cosine = dataclasses.replace(config, schedule="cosine", final_lr_ratio=0.2)
    assert learning_rate(7, cosine) == pytest.approx(0.6)
    assert learning_rate(2, cosine) == 1.0
    assert learning_rate(11, dataclasses.replace(config, schedule="constant")) == 1.0


def test_sampler_is_a_function_of_the_place():
    sampler = Sampler(5, seed=3)
    places = list(sampler.places(0, 15))
    assert all(sorted(places[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert places[:5] != places[5:10]
    assert list(sampler.places(7, 6)) == places[7:13]
    parts = [list(sampler.places(4, 8, rank, 2)) for rank in range(2)]
    assert parts[0] == places[4:12:2]
    assert parts[1] == places[5:12:2]
    assert list(Sampler(5, seed=4).places(0, 5)) != places[:5]


def test_cache_is_bounded_in_bytes():
    def clip(size):
        return Clip(np.zeros((1, 1, size, 3), np.uint8), np.zeros(1), 1.0, 1.0, "x")

    cache = ByteCache(30, lambda clip: clip.frames.nbytes)
    cache.put("a", clip(4))
    cache.put("b", clip(4))
    assert cache.get("a") is not None
    cache.put("c", clip(4))
    assert cache.bytes == 24
    assert cache.get("b") is None, "the one used least recently goes"
    assert cache.get("a") is not None
    cache.put("d", clip(11))
    assert cache.get("d") is None
    assert cache.bytes == 24


def test_prompts_are_the_same_with_workers_and_without_a_cache(inputs, tmp_path):
    seen = []
    for number, overrides in enumerate(([], ["data.cache_mb=0"], ["data.decode_workers=2"])):
        config = configure(*inputs, tmp_path / str(number), "optim.steps=5", *overrides)
        with setup.open_run(config, reference=False) as run:
            seen.append([[(s.record.id, s.prompt) for s in batch] for batch in run.batches()])
    for other in seen[1:]:
        for ours, theirs in zip(seen[0], other, strict=True):
            assert [name for name, _ in ours] == [name for name, _ in theirs]
            for (_, a), (_, b) in zip(ours, theirs, strict=True):
                assert torch.equal(a.pixel_values_videos, b.pixel_values_videos)


@pytest.mark.parametrize(("first", "size", "rank", "ranks"), [(0, 2, 0, 1), (3, 3, 1, 2)])
def test_a_run_of_a_billion_steps_plans_as_it_goes(inputs, tmp_path, first, size, rank, ranks):
    config = configure(*inputs, tmp_path / "run")
    with setup.open_run(config, reference=False) as run:
        sampler, records = run.source.sampler, run.source.records
        batches = run.source.batches(first, 10**9, size, rank, ranks)
        for step in range(first, first + 5):
            epochs = [list(sampler.places(i * sampler.size, sampler.size)) for i in range(20)]
            numbers = [n for epoch in epochs for n in epoch]
            own = [i for i in range(step * size, (step + 1) * size) if i % ranks == rank]
            assert [s.record.id for s in next(batches)] == [records[numbers[i]].id for i in own]


def test_merge_metrics():
    parts = [
        {"loss": 1.0, "kl": 1.0, "ratio_max": 2.0, "num_tokens": 1.0, "rollout_gap_mean": 0.5},
        {"loss": 2.0, "kl": 4.0, "ratio_max": 1.0, "num_tokens": 3.0, "ratio_min": 0.5},
        {"ratio_min": 0.75},
    ]
    assert merge_metrics(parts) == {
        "loss": 3.0,
        "kl": 3.25,
        "ratio_max": 2.0,
        "ratio_min": 0.5,
        "num_tokens": 4.0,
        "rollout_gap_mean": 0.5,
    }
    assert merge_metrics([]) == {}


def test_mixed_tasks_in_rewards_and_metrics():
    scored = [
        Scored("a", {"format": 1.0, "iou": 0.5}, {"mIoU": 0.5}, 4, True),
        Scored("b", {"accuracy": 1.0, "format": 0.0}, {"accuracy": 1.0}, 2, False),
    ]
    matrix = reward_matrix(scored)
    torch.testing.assert_close(
        matrix,
        torch.tensor([[math.nan, 1.0, 0.5], [1.0, 0.0, math.nan]], dtype=torch.float64),
        equal_nan=True,
    )
    metrics = task_metrics(scored)
    assert metrics["reward"] == 1.25
    assert (metrics["reward/a"], metrics["reward/a/iou"], metrics["metric/b/accuracy"]) == (
        1.5,
        0.5,
        1.0,
    )
    assert (metrics["finished"], metrics["length/b"]) == (0.5, 2.0)


def test_silent_group_of_policy_groups():
    group = PolicyGroup(None, torch.zeros(3), torch.zeros(0))
    assert group.has_zero_advantages
    assert not dataclasses.replace(group, advantages=torch.tensor([0.0, 1e-9])).has_zero_advantages
