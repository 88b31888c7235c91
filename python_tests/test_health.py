"""Numbers that are not finite, and spikes: caught before the weights, written down, counted."""

import json
import math

import pytest
from tiny_run import configure, write_inputs

from vcr1_fast.train import loop, scoring
from vcr1_fast.train.health import Health
from vcr1_fast.train.loop import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewarded(monkeypatch, reward):
    """Rewards of each completion by its number in the run."""
    count = iter(range(10**6))
    monkeypatch.setattr(
        scoring,
        "own_rewards",
        lambda answers, *rest: [({"r": reward(next(count))}, {}) for _ in answers],
    )


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_written_down(
    inputs, tmp_path, monkeypatch, where, bad
):
    rewarded(monkeypatch, lambda i: float(i % 3))
    right, calls = loop.policy_loss, []

    def spoiled(model, *args, **kwargs):
        loss, metrics = right(model, *args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            if where == "loss":
                loss = loss + (bad - loss).detach()  # the gradient stays finite
            else:
                loss.register_hook(lambda gradient: gradient * bad)
        return loss, metrics

    monkeypatch.setattr(loop, "policy_loss", spoiled)
    overrides = ("loss.beta=0", "optim.steps=2", "optim.tokens_per_microbatch=10000")
    train(configure(*inputs, tmp_path / "run", *overrides))
    one, two = read(tmp_path / "run" / "metrics.jsonl")
    assert (one["skipped_updates"], two["skipped_updates"]) == (1, 0)
    assert one["grad_norm"] == 0.0 and two["grad_norm"] > 0
    rows = read(tmp_path / "run" / "skipped.jsonl")
    assert {row["step"] for row in rows} == {1} and len(rows) == 16
    assert {"completion", "rewards", "advantage"} <= set(rows[0])
    assert {row["step"] for row in read(tmp_path / "run" / "rollouts.jsonl")} == {2}


def test_completions_of_a_skipped_update_are_written_where_no_others_are(
    inputs, tmp_path, monkeypatch
):
    rewarded(monkeypatch, lambda i: float(i % 3))
    right = loop.policy_loss

    def spoiled(model, *args, **kwargs):
        loss, metrics = right(model, *args, **kwargs)
        return loss * math.nan, metrics

    monkeypatch.setattr(loop, "policy_loss", spoiled)
    overrides = ("loss.beta=0", "optim.steps=1", "run.log_rollouts_every=0")
    train(configure(*inputs, tmp_path / "run", *overrides))
    assert len(read(tmp_path / "run" / "skipped.jsonl")) == 16


def test_a_run_of_skipped_updates_stops(inputs, tmp_path, monkeypatch):
    rewarded(monkeypatch, lambda i: float(i % 3))
    right = loop.policy_loss

    def spoiled(model, *args, **kwargs):
        loss, metrics = right(model, *args, **kwargs)
        return loss * math.nan, metrics

    monkeypatch.setattr(loop, "policy_loss", spoiled)
    config = configure(
        *inputs, tmp_path / "run", "loss.beta=0", "optim.steps=9", "optim.max_skipped_updates=2"
    )
    with pytest.raises(ValueError, match=r"3 updates in a row .*optim\.max_skipped_updates 2"):
        train(config)
    assert {row["step"] for row in read(tmp_path / "run" / "skipped.jsonl")} == {1, 2, 3}


def test_skipped_updates_are_counted_in_a_row():
    said = []
    health = Health(2, said.append)
    for step in range(1, 20):
        health.check(step, {"skipped_updates": float(step % 3 > 0)})
    assert len(said) == 13
    health.check(20, {"skipped_updates": 1.0})
    with pytest.raises(ValueError, match="3 updates in a row"):
        health.check(21, {"skipped_updates": 1.0})


def test_spikes_are_named_against_the_median():
    said = []
    health = Health(0, said.append)
    steady = [1.0 + 0.01 * i for i in range(20)]
    for step, value in enumerate(steady, 1):
        assert health.check(step, {"grad_norm": value, "kl": 0.1}) == {"spikes": 0.0}
    assert health.check(21, {"grad_norm": 50.0, "kl": 0.1}) == {"spikes": 1.0}
    assert said == [
        "step 21: grad_norm 50 is 45.7 times the median of the last 20 steps"
    ]  # median of 1.00 .. 1.19 is 1.095
    assert health.check(22, {"grad_norm": 50.0, "kl": 9.0}) == {"spikes": 2.0}
    assert health.check(23, {"grad_norm": 10.0, "kl": math.nan}) == {"spikes": 0.0}


def test_a_few_first_steps_are_no_measure():
    health = Health(0, lambda text: pytest.fail(text))
    for step, value in enumerate([1e-3, 1.0, 1e-3, 5.0], 1):
        assert health.check(step, {"grad_norm": value}) == {"spikes": 0.0}


@pytest.mark.parametrize(("level", "word"), [(0.1, "fell to 0.1"), (4.0, "rose to 4")])
def test_an_entropy_that_jumps_and_stays_is_reported_once(level, word):
    said = []
    health = Health(0, said.append)
    for step in range(1, 13):
        health.check(step, {"entropy": 1.0 + 0.01 * step})
    health.check(13, {"entropy": level})  # one step alone is noise
    health.check(14, {"entropy": 1.0})
    assert said == []
    for step in range(15, 30):
        health.check(step, {"entropy": level})
    assert len(said) == 1 and said[0].startswith("step 17: warning") and word in said[0]
    assert "from a median of 1.0" in said[0]


def test_an_entropy_that_falls_slowly_is_training():
    health = Health(0, lambda text: pytest.fail(text))
    for step in range(100):
        health.check(step, {"entropy": 2.0 * 0.97**step})


def test_a_resumed_run_judges_as_one_that_never_stopped():
    rows = [{"step": i, "grad_norm": 1.0, "kl": 0.1, "entropy": 2.0} for i in range(1, 30)]
    rows[14] |= {"grad_norm": 30.0}  # 30 times the median of the 14 steps before
    rows[20] |= {"kl": None, "skipped_updates": 2}
    rows[21] |= {"skipped_updates": 1}
    rows[24:] = [row | {"entropy": 0.1} for row in rows[24:]]

    def judged(health, part):
        numbers = [{k: math.nan if v is None else v for k, v in row.items()} for row in part]
        return [health.check(row["step"], row) for row in numbers]

    said = []
    expected = judged(Health(3, said.append), rows)
    assert sum(one["spikes"] for one in expected) == 1 and expected[14]["spikes"] == 1
    assert any("entropy fell" in line for line in said)
    for done in (1, 14, 15, 21, 22, 26):
        again = []
        health = Health(3, again.append)
        health.replay(rows[:done])
        assert not again and judged(health, rows[done:]) == expected[done:], done
        assert again == [one for one in said if int(one.split()[1][:-1]) > done], done
    health = Health(2, said.append)
    health.replay(rows[:21])
    with pytest.raises(ValueError, match="3 updates in a row"):
        judged(health, rows[21:22])


def test_a_resume_replays_the_rows_of_the_steps_before(inputs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(configure(*inputs, run, "optim.steps=2"))
    replayed, right = [], Health.replay

    def watched(self, rows):
        rows = list(rows)
        replayed.extend(row["step"] for row in rows)
        right(self, rows)

    monkeypatch.setattr(Health, "replay", watched)
    train(configure(*inputs, run, "optim.steps=3"))
    assert replayed == [1, 2]
    train(configure(*inputs, tmp_path / "other", "optim.steps=1"))
    assert replayed == [1, 2]
