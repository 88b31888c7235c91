"""Signals that end a run, the lock of its folder, and a kill at every file operation."""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_run import SETTINGS, configure, write_inputs

from vcr1_fast.cli import main
from vcr1_fast.engines import sampler
from vcr1_fast.train import advantages, checkpoint, loop, rollouts, scoring, setup, stopping
from vcr1_fast.train.loop import train
from vcr1_fast.train.sft import sft

TIMES = ("seconds/", "tokens_per_second", "time", "memory_gib")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def reward_text(answers, config, judge):
    """A reward that differs between almost any two completions: a random model earns no other."""
    return [({"text": sum(map(ord, text)) % 97 / 97}, {}) for _, text in answers]


@pytest.fixture(scope="module", autouse=True)
def any_reward():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "own_rewards", reward_text)
        yield


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(output):
    """All that must not depend on interruptions."""
    rows = read(output / "metrics.jsonl")
    metrics = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
    weights = (output / "model" / "model.safetensors").read_bytes()
    return metrics, read(output / "rollouts.jsonl"), weights


def signalled(monkeypatch, module, name, number, at=1):
    """Send the signal during the `at`-th call of a function."""
    right, calls = getattr(module, name), []

    def sending(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return right(*args, **kwargs)

    monkeypatch.setattr(module, name, sending)


def saved(output):
    return [path.name for path in checkpoint.checkpoints(output / "checkpoints")[0]]


OPTIONS = ("optim.steps=4", "run.save_every=0", "loss.beta=0.1", "advantage.scale=task_ema")


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(configure(*inputs, folder, *OPTIONS))
    return outcome(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_resumes_as_if_nothing_had_been(
    inputs, tmp_path, monkeypatch, uninterrupted, number
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signalled(patch, loop, "update_policy", number, at=2)
        with pytest.raises(stopping.RunStopped, match=r"after step 2; the same command") as caught:
            train(configure(*inputs, run, *OPTIONS))
    assert caught.value.code == 128 + number
    assert saved(run) == ["step-00000002"]
    assert signal.getsignal(number) is not stopping.StopRequest  # the former handler is back
    train(configure(*inputs, run, *OPTIONS))
    assert outcome(run) == uninterrupted


@pytest.mark.parametrize("where", ["rollout", "policy_loss"])
def test_a_step_that_outlasts_the_grace_is_given_up(
    inputs, tmp_path, monkeypatch, uninterrupted, where
):
    """The checkpoint is of the step before, and the given-up step is taken again to the bit."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    # 4 rollouts and 16 micro-batches a step.
    options = (*OPTIONS, "rollout.batch_prompts=1", "optim.tokens_per_microbatch=1")
    with monkeypatch.context() as patch:
        module, calls = (sampler, 6) if where == "rollout" else (loop, 20)
        signalled(patch, module, where, signal.SIGTERM, at=calls)
        with pytest.raises(stopping.RunStopped, match="after step 1;"):
            train(configure(*inputs, run, *options, "run.stop_grace=0"))
    assert saved(run) == ["step-00000001"]
    assert len(read(run / "metrics.jsonl")) == 1
    train(configure(*inputs, run, *options))
    train(configure(*inputs, whole, *options))
    assert outcome(run) == outcome(whole)


def test_later_updates_of_a_step_are_not_given_up(inputs, tmp_path, monkeypatch):
    """Half of the step's updates are in the weights: it is finished, whatever the grace."""
    run = tmp_path / "run"
    signalled(monkeypatch, loop, "policy_loss", signal.SIGTERM, at=2)
    options = ("optim.inner_steps=2", "optim.tokens_per_microbatch=10000", "run.stop_grace=0")
    with pytest.raises(stopping.RunStopped, match="after step 1"):
        train(configure(*inputs, run, *OPTIONS[:1], "loss.beta=0.1", *options))
    assert saved(run) == ["step-00000001"]


def test_fine_tuning_stops_likewise(inputs, tmp_path, monkeypatch):
    from vcr1_fast.train import sft as module

    signalled(monkeypatch, module, "update", signal.SIGTERM, at=3)
    with pytest.raises(stopping.RunStopped, match="SIGTERM after step 3"):
        sft(configure(*inputs, tmp_path / "run", "optim.steps=9"))
    assert saved(tmp_path / "run") == ["step-00000003"]


def test_the_command_says_so_and_exits_143(inputs, tmp_path, monkeypatch, capsys):
    signalled(monkeypatch, loop, "update_policy", signal.SIGTERM)
    model, records = map(str, inputs)
    arguments = ["--model", model, "--data", records, "--output", str(tmp_path / "run")]
    settings = [s for s in SETTINGS if not s.startswith("optim.steps")]
    assert main(["train", *arguments, *settings, "optim.steps=3"]) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vcr1 train: stopped by SIGTERM after step 1; the same command resumes")


def test_a_second_ctrl_c_does_not_wait():
    with stopping.StopRequest(60.0) as request, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT and not request.is_overdue
        os.kill(os.getpid(), signal.SIGINT)


def test_the_last_step_is_exported_whatever_the_signal(inputs, tmp_path, monkeypatch):
    signalled(monkeypatch, loop, "update_policy", signal.SIGTERM, at=2)
    assert (train(configure(*inputs, tmp_path / "run")) / "model.safetensors").exists()


# --- the lock


def test_two_runs_in_one_folder_are_refused(inputs, tmp_path):
    config = configure(*inputs, tmp_path / "run")
    with (
        setup.open_run(config, reference=False),
        pytest.raises(ValueError, match=rf"another run \(process {os.getpid()}\) writes here"),
    ):
        train(config)
    train(config)  # free again


def test_a_killed_run_leaves_no_lock(inputs, tmp_path):
    script = "import os, sys; from pathlib import Path; from vcr1_fast.train.stopping import locked"
    script += "\nwith locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    here = Path(__file__).parent.parent
    path = os.pathsep.join([str(here), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    with stopping.locked(tmp_path):
        pass


# --- what is sampled, and by whom


def test_completions_depend_on_seed_step_and_record_alone(inputs, tmp_path):
    """Not on the rank, the number of ranks, or what is sampled beside them; two occurrences of a
    record in a step, two steps and two seeds differ."""
    found = {}
    for name, *options in (
        ("one",),
        ("alone", "rollout.batch_prompts=1"),
        ("short", "rollout.max_new_tokens=5", "rollout.group_size=2"),
        ("seeded", "run.seed=1"),
    ):
        settings = configure(*inputs, tmp_path / name, "optim.prompts_per_step=12", *options)
        with setup.open_run(settings, reference=False) as run:
            if name == "seeded":  # the same records, other numbers
                object.__setattr__(run.source.sampler, "seed", 0)

            def texts(step, rank, ranks, run=run):
                batches = run.source.batches(step, step + 1, 12, rank, ranks)
                samples = next(batches)
                chunks = rollouts.sample_completions(run, samples, step, loop.Stopwatch())
                drawn = [one.tokens[0] for chunk in chunks for one in chunk.rollouts]
                keys = [(sample.record.id, sample.occurrence) for sample in samples]
                return {
                    key: [tuple(one.tolist()) for one in group]
                    for key, group in zip(keys, drawn, strict=True)
                }

            found[name] = texts(1, 0, 1)
            if name == "one":
                parts = [texts(1, rank, 3) for rank in range(3)]
                assert {key: group for part in parts for key, group in part.items()} == found["one"]
                other = texts(4, 0, 1)
    assert len(found["one"]) == 12
    assert max(occurrence for _, occurrence in found["one"]) > 0
    groups = [str(group) for group in found["one"].values()]
    assert len(set(groups)) == 12
    assert found["alone"] == found["one"]
    for key, group in found["short"].items():
        assert group == [one[:5] for one in found["one"][key][:2]]
    for changed in (found["seeded"], other):
        same = found["one"].keys() & changed.keys()
        assert same
        assert all(changed[key] != found["one"][key] for key in same)


def test_each_rank_keeps_the_advantages_of_its_own_completions(inputs, tmp_path, monkeypatch):
    """As rank 1 of 2: the other rank's completions come first, and are not as many."""
    one = scoring.Scored("other", {"r": 0.0}, {}, length=1, finished=True)
    others = [one] * 3 + [dataclasses.replace(one, rewards={"r": 9.0})]
    monkeypatch.setattr(
        loop,
        "gather_object",
        lambda own: [*others, *own] if isinstance(own[0], scoring.Scored) else own,
    )
    monkeypatch.setattr(advantages, "gather_object", lambda own: [len(others), *own])
    monkeypatch.setattr(
        scoring,
        "own_rewards",
        lambda answers, *rest: [({"r": float(len(text))}, {}) for _, text in answers],
    )
    monkeypatch.setattr(setup.Run, "rank", 1)
    monkeypatch.setattr(setup.Run, "ranks", 2)
    monkeypatch.setattr(setup.Run, "finish_step", lambda run, step: None)  # rank 0 would save
    train(configure(*inputs, tmp_path / "run", "optim.steps=1", "loss.beta=0"))
    rows = read(tmp_path / "run" / "rollouts.jsonl")
    assert len(rows) == 8  # two of the four prompts
    for group in (rows[:4], rows[4:]):
        rewards = [float(len(row["completion"])) for row in group]
        spread = statistics.stdev(rewards) + 1e-4
        expected = [(reward - statistics.mean(rewards)) / spread for reward in rewards]
        assert [row["advantage"] for row in group] == pytest.approx(expected, abs=1e-5)
    assert any(row["advantage"] for row in rows)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_the_loss_is_normalised_over_the_whole_step(inputs, tmp_path, monkeypatch, loss_type):
    """Completions of unlike lengths in micro-batches of one: the gradient of one pass over all."""
    norms = []
    monkeypatch.setattr(
        scoring,
        "own_rewards",
        lambda answers, *rest: [({"r": float(len(text))}, {}) for _, text in answers],
    )
    for size in (1, 10**6):
        output = tmp_path / str(size)
        options = (f"loss.loss_type={loss_type}", "loss.beta=0", "optim.steps=1")
        options += ("loss.max_length=8", "rollout.stop=[e, a, o]")  # some end early
        train(configure(*inputs, output, *options, f"optim.tokens_per_microbatch={size}"))
        (row,) = read(output / "metrics.jsonl")
        lengths = {one["tokens"] for one in read(output / "rollouts.jsonl")}
        assert len(lengths) > 2, "token means of parts would equal that of the whole"
        norms.append(row["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# --- a kill at every file operation


CRASH = """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from tiny_run import configure
    from test_stopping import reward_text
    from vcr1_fast.model import checkpoint
    from vcr1_fast.train import scoring
    from vcr1_fast.train.loop import train

    scoring.own_rewards = reward_text
    model, records, output = map(Path, sys.argv[1:4])
    OPTIONS = (
        "optim.steps=2", "run.save_every=1", "run.keep_checkpoints=1", "loss.beta=0",
        "optim.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=3",
    )
    checkpoint.load(model)  # what this imports late would be imported again in every fork
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    counted, last = 0, None

    def operation():
        global counted
        counted += 1
        if counted == last:
            os.kill(os.getpid(), signal.SIGKILL)

    CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    watched = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

    def audit(event, arguments):
        if event == "open" and str(arguments[0]).startswith(str(output)):
            if isinstance(arguments[2], int) and arguments[2] & CHANGES:
                operation()
        elif event in watched and str(arguments[0]).startswith(str(output)):
            operation()

    sync = os.fsync
    os.fsync = lambda descriptor: (operation(), sync(descriptor))[1]
    sys.addaudithook(audit)

    def forked(folder, kill_at=None):
        global output, counted, last
        child = os.fork()
        if child == 0:
            output, counted, last = folder, 0, kill_at
            try:
                train(configure(model, records, folder, *OPTIONS))
                (folder.parent / "count").write_text(str(counted))
                os._exit(0)
            except BaseException as error:
                print(f"{kill_at}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert forked(output / "whole") == 0
    total = int((output / "count").read_text())

    def lane(first):
        # Every second crash point, so that two cores have work.
        child = os.fork()
        if child == 0:
            for n in range(first, total + 1, 2):
                codes = forked(output / str(n), n), forked(output / str(n))
                (output / str(n) / "codes").write_text(json.dumps(codes))
            os._exit(0)
        return child

    for child in [lane(1), lane(2)]:
        os.waitpid(child, 0)
    print(json.dumps([
        json.loads((output / str(n) / "codes").read_text()) for n in range(1, total + 1)
    ]))
"""


def test_a_kill_at_any_file_operation_loses_nothing(inputs, tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CRASH), *map(str, inputs), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert len(codes) > 30
    assert codes == [[-signal.SIGKILL, 0]] * len(codes), done.stderr[-2000:]
    expected = outcome(tmp_path / "whole")
    for number in range(1, len(codes) + 1):
        folder = tmp_path / str(number)
        assert outcome(folder) == expected, number
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == [".lock"], number
        assert saved(folder) == ["step-00000002"], number
