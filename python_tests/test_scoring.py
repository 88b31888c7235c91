"""Rewards in the trainer: weights, terms, judges, shuffled frames, scales; alone and in a run."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.cli import main, parser
from vcr1_fast.config.loader import ConfigError, dump_config, load_config
from vcr1_fast.data.records import Record
from vcr1_fast.model.rollout import Rollout, rollout
from vcr1_fast.rewards import MatchingJudge, score
from vcr1_fast.rewards.format import scan
from vcr1_fast.rewards.judge import JudgeConfig, ModelJudge
from vcr1_fast.rewards.plugin import load_reward
from vcr1_fast.tasks import TASKS, FieldError, base
from vcr1_fast.train import loop, rollouts, setup
from vcr1_fast.train.advantages import TaskScales, advantages_of
from vcr1_fast.train.config import TrainConfig
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.loop import train
from vcr1_fast.train.metrics import task_metrics
from vcr1_fast.train.reward_config import RewardsConfig, TemporalConfig
from vcr1_fast.train.rollouts import another_order
from vcr1_fast.train.scoring import Scored, Scoring

NEEDED = ("model.path=m", "data.train=d.jsonl", "run.output=o", "rollout.max_new_tokens=100")
SPAN = Record("s", "temporal_grounding", "v.mp4", {"event": "x"}, [2.0, 6.0])
CAPTION = Record(
    "c", "caption", "v.mp4", {"instruction": "x"}, ["a man opens a door", "a dog jumps"]
)
LETTER = Record("l", "multiple_choice", "v.mp4", {"question": "x"}, "B", ("red", "blue"))
RIGHT, HALF, WRONG = (f"<answer>{text}</answer>" for text in ("2 to 6", "2 to 4", "8 to 9"))


def config(*overrides):
    return load_config(TrainConfig, None, [*NEEDED, *overrides])


def sampled(*texts, lengths=None):
    """A group's rollout: these texts, of these lengths."""
    lengths = lengths or [10] * len(texts)
    tokens = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    return Rollout([tokens], [[]], [[]], [list(texts)], [[True] * len(texts)], [None])


def scored(settings, groups, shuffled=None, judge=None):
    """Scored completions of (record, rollout) groups."""
    samples = [Sample(record, None, 10.0) for record, _ in groups]
    functions = [load_reward(spec) for spec in settings.rewards.functions]
    with Scoring(settings, functions, [record.task for record, _ in groups]) as scoring:
        if judge is not None:
            scoring.judge = judge
        scoring.submit(samples, [one for _, one in groups], shuffled or [None] * len(groups))
        return scoring.results()


# --- settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.weights.formt=1", r"^rewards\.weights\.formt: unknown reward 'formt'; known: "),
        ("rewards.weights.tracking.accuracy=1", r"tracking\.accuracy: unknown reward 'accuracy'"),
        ("rewards.weights.juggling.format=1", "unknown task 'juggling'"),
        ("rewards.weights.format=high", r"^rewards\.weights\.format: expected a finite number"),
        ("rewards.weights.format=.nan", "expected a finite number"),
        ("rewards.weights=3", "expected names and their values"),
        ("rewards.mode=lax", r"^rewards\.mode"),
        ("rewards.functions=[nothing]", r"^rewards\.functions: expected module:function"),
        ("rewards.functions=['a:iou']", "two rewards would have the name 'iou'"),
        ("rewards.functions=['a:x', 'b:x']", "two rewards would have the name 'x'"),
        ("rewards.overlong_buffer=-1", r"^rewards\.overlong_buffer"),
        ("rewards.overlong_buffer=101", r"^rewards\.overlong_buffer: must be at most 100, got 101"),
        ("rewards.overlong_limit=0", r"^rewards\.overlong_limit"),
        ("rewards.length_band=[9, 3]", r"^rewards\.length_band: must be a range, got \[9, 3\]"),
        ("rewards.repetition_ngram=-2", r"^rewards\.repetition_ngram"),
        ("rewards.temporal.rollouts=-1", r"^rewards\.temporal\.rollouts"),
        ("rewards.temporal.tasks=[juggling]", r"^rewards\.temporal\.tasks: unknown task"),
        ("rewards.judge.kind=http", r"^rewards\.judge: a judge of kind http needs a model"),
        ("advantage.ema_decay=1.5", r"^advantage\.ema_decay"),
        ("advantage.ema_guard=0", r"^advantage\.ema_guard"),
        ("advantage.ema_floor=0", r"^advantage\.ema_floor"),
    ],
)
def test_impossible_settings_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_gdpo_has_no_scale_of_a_task():
    with pytest.raises(ConfigError, match=r"^advantage\.scale: gdpo knows group and none"):
        config("advantage.estimator=gdpo", "advantage.scale=task_ema")


def test_weights_by_task_go_before_weights_by_name(tmp_path):
    settings = config(
        "rewards.weights.format=0.5",
        "rewards.weights.tracking.format=0.1",
        "rewards.weights={temporal_grounding: {iou: 2}, tracking.format: 0.1, format: 0.5}",
        "rewards.functions=['my.module:style']",
        "rewards.weights.style=-1",
    )
    rewards = settings.rewards
    assert rewards.weights == {
        "temporal_grounding.iou": 2.0,
        "tracking.format": 0.1,
        "format": 0.5,
        "style": -1.0,
    }
    assert [rewards.weight("tracking", name) for name in ("format", "iou", "style")] == [0.1, 1, -1]
    assert [rewards.weight("temporal_grounding", n) for n in ("format", "iou")] == [0.5, 2.0]
    assert [rewards.weight("caption", name) for name in ("recall", "precision", "F1")] == [1, 0, 0]
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(settings))
    assert load_config(TrainConfig, path) == settings
    with pytest.raises(ConfigError, match=r"weights\.tracking\.format: is given twice"):
        config("rewards.weights={tracking.format: 1, tracking: {format: 1}}")


def test_the_command_line_takes_rewards():
    options = parser().parse_args(["train", "--reward", "a.py:x", "--reward", "m:y", "run.seed=1"])
    assert (options.reward, options.overrides) == (["a.py:x", "m:y"], ["run.seed=1"])


def test_the_page_on_rewards_has_every_setting_and_its_example_loads(tmp_path):
    page = (Path(__file__).parents[1] / "docs/rewards.md").read_text()
    for kind in (RewardsConfig, TemporalConfig, JudgeConfig):
        missing = [f.name for f in fields(kind) if not re.search(rf"\b{f.name}\b", page)]
        assert not missing
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(example)
    rewards = load_config(TrainConfig, path, NEEDED).rewards
    assert rewards.weight("temporal_grounding", "format") == 0.1
    for override in re.findall(r"`(rewards\.[\w.]+)[=:] ?([^`]+)`", page):
        config("=".join(override))


# --- sums


def test_default_is_the_plain_sum():
    (one, two) = scored(config(), [(SPAN, sampled(RIGHT, HALF))])
    assert one.rewards == {"format": 1.0, "iou": 1.0}
    assert (one.total, two.total) == (2.0, 1.5)


@pytest.mark.parametrize("think", [True, False])
def test_the_format_that_is_rewarded_is_the_one_that_was_asked_for(think):
    reasoned = f"<think>it moves</think>{RIGHT}"
    found = scored(config(f"data.think={str(think).lower()}"), [(SPAN, sampled(RIGHT, reasoned))])
    assert [one.rewards["format"] for one in found] == [float(not think), float(think)]
    assert [one.rewards["iou"] for one in found] == [1.0, 1.0]


def test_weights_are_in_the_sum_and_in_the_advantages():
    settings = config("rewards.weights={format: 0.5, multiple_choice: {accuracy: 3}}")
    groups = [(SPAN, sampled(RIGHT, "4 to 5")), (LETTER, sampled("<answer>B</answer>", "A"))]
    found = scored(settings, groups)
    assert [one.total for one in found] == [1.5, 0.0, 3.5, 0.0]
    assert found[0].rewards == {"format": 1.0, "iou": 1.0}  # shown as they are
    settings = config("advantage.scale=none", "rollout.group_size=2")
    advantages = advantages_of(found, settings.advantage, 2, TaskScales())
    assert advantages.tolist() == [0.75, -0.75, 1.75, -1.75]
    metrics = task_metrics(found)
    assert metrics["reward/multiple_choice"] == 1.75
    assert metrics["reward/multiple_choice/accuracy"] == 0.5


def test_legacy_is_the_released_code():
    texts = ["<think>x</think><answer>2 to 6</answer>", RIGHT, "<answer>2s to 6s</answer>"]
    found = scored(config("rewards.mode=legacy"), [(SPAN, sampled(*texts))])
    columns = score("temporal_grounding", texts, [SPAN.answer] * 3, mode="legacy")
    for name, values in columns.items():
        assert [one.rewards[name] for one in found] == values
    with pytest.raises(ConfigError, match=r"rewards\.mode: legacy has no rewards for ocr"):
        Scoring(config("rewards.mode=legacy"), tasks=["tracking", "ocr"])


def test_terms_are_columns_of_their_own():
    settings = config(
        "rewards.overlong_buffer=20",
        "rewards.repetition_ngram=1",
        "rewards.length_bonus=0.2",
        "rewards.length_band=[5, 90]",
        "rewards.weights.overlong=0.5",
    )
    one, two, three = scored(
        settings, [(SPAN, sampled(RIGHT, f"so so so {HALF}", WRONG, lengths=[4, 90, 100]))]
    )
    assert one.rewards == {
        "format": 1.0, "iou": 1.0, "overlong": 0.0, "repetition": 0.0, "length": 0.0,
    }  # fmt: skip
    assert two.rewards["overlong"] == -0.5  # half-way from 80 to 100
    assert two.rewards["repetition"] == pytest.approx(4 / 6 - 1)  # so, <answer>2, to, 4</answer>
    assert two.rewards["length"] == 0.2
    assert (three.rewards["overlong"], three.rewards["length"]) == (-1.0, 0.0)
    assert two.total == pytest.approx(0.5 - 0.25 - 1 / 3 + 0.2)
    short = config("rewards.overlong_buffer=2", "rewards.overlong_limit=6")
    assert scored(short, [(SPAN, sampled(RIGHT, lengths=[5]))])[0].rewards["overlong"] == -0.5


def test_the_order_term_compares_a_group_with_its_shuffled_one():
    settings = config("rewards.temporal.rollouts=2")
    group = (SPAN, sampled(RIGHT, HALF, WRONG, WRONG))  # mean IoU 0.375
    helped = scored(settings, [group], [sampled(HALF, WRONG)])  # 0.25
    assert [one.rewards["temporal"] for one in helped] == [0.3, 0.3, 0.0, 0.0]
    not_helped = scored(settings, [group], [sampled(HALF, HALF)])  # 0.5 > 0.375 / 0.8
    assert [one.rewards["temporal"] for one in not_helped] == [0.0] * 4
    both = scored(settings, [group, group], [None, sampled(HALF, WRONG)])
    assert ["temporal" in one.rewards for one in both] == [False] * 4 + [True] * 4


def test_each_completion_is_parsed_once(monkeypatch):
    """Format, rewards and metrics of a chunk, shuffled completions included, share one parse."""
    scanned, read = [], []
    monkeypatch.setattr(
        base, "scan", lambda text, tags: (scanned.append(text), scan(text, tags))[1]
    )
    for record in (SPAN, LETTER, CAPTION):
        task = TASKS[record.task]

        def counted(blocks, record, read_blocks=task.read):
            read.append(record.task)
            return read_blocks(blocks, record)

        monkeypatch.setitem(TASKS, record.task, replace(task, read=counted))
    groups = [(one, sampled("<answer>B</answer>", RIGHT, "no")) for one in (SPAN, LETTER, CAPTION)]
    shuffled = [sampled(HALF, WRONG), None, None]
    found = scored(config("rewards.temporal.rollouts=2"), groups, shuffled)
    assert len(found) == 9 and len(scanned) == len(read) == 11
    assert Counter(read) == {"temporal_grounding": 5, "multiple_choice": 3, "caption": 3}
    assert all("format" in one.rewards and one.metrics for one in found)


# --- the user's own


def test_user_rewards_are_columns(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def brevity(completion, record, duration):\n"
        "    return None if record.id == 'l' else len(completion) * duration\n"
        "def agreement(completions, records, durations):\n"
        "    return [len(completions)] * len(completions)\n"
    )
    settings = config(
        f"rewards.functions=['{path}:brevity', '{path}:agreement']", "rewards.weights.brevity=0.01"
    )
    found = scored(settings, [(SPAN, sampled(RIGHT, WRONG)), (LETTER, sampled("A", "B"))])
    assert found[0].rewards["brevity"] == len(RIGHT) * 10.0
    assert found[0].total == pytest.approx(2.0 + 0.1 * len(RIGHT) + 4)
    assert "brevity" not in found[2].rewards and found[2].rewards["agreement"] == 4.0
    assert task_metrics(found)["reward/temporal_grounding/brevity"] == len(RIGHT) * 10.0


def test_a_function_that_is_not_there_is_reported_before_anything_is_loaded(tmp_path, capsys):
    given = ["--model", "gone", "--data", "gone", "--output", str(tmp_path / "run")]
    assert main(["train", *given, "--reward", "gone.py:f"]) == 2
    assert "reward gone.py:f: FileNotFoundError: no file gone.py" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_released_nan_counts_as_not_given():
    track = Record("t", "tracking", "v.mp4", {"object": "x"}, [[0.25, 0.25, 0.75, 0.75]] * 8)
    boxes = str([[0, 1e999, 0, 1]] * 8).replace("inf", "1e999")
    text = f"<think>x</think><answer>{boxes}</answer>"
    assert math.isnan(score("tracking", [text], [track.answer], mode="legacy")["iou"][0])
    settings = config(
        "rewards.mode=legacy", "rewards.length_bonus=1", "rewards.length_band=[0, 99]"
    )
    (one,) = scored(settings, [(track, sampled(text))])
    assert one.rewards == {"format": 1.0, "length": 0.0}


# --- judges


def test_a_judges_scores_are_metrics_and_rewards():
    """Recall by default; precision and F1 once they have a weight."""
    caption = "<answer>A man opens a door. It rains.</answer>"
    (plain,) = scored(config(), [(CAPTION, sampled(caption))])
    assert plain.rewards == {"format": 1.0, "recall": 0.5}
    assert plain.metrics == {"recall": 0.5, "precision": 0.5, "F1": 0.5}
    settings = config("rewards.weights={caption: {F1: 2, recall: 0}}")
    (weighted,) = scored(settings, [(CAPTION, sampled(caption))])
    assert weighted.rewards == {"format": 1.0, "recall": 0.5, "F1": 0.5}
    assert weighted.total == 2.0


def test_a_judge_is_asked_about_a_whole_part_at_once():
    asked = []

    def ask(prompts):
        asked.append(len(prompts))
        return ["yes" if "Event" in prompt else "one\ntwo" for prompt in prompts]

    group = (CAPTION, sampled("<answer>a</answer>", "<answer>b</answer>"))
    judge = ModelJudge(ask)
    found = scored(config(), [group, group], judge=judge)
    assert [one.rewards["recall"] for one in found] == [1.0] * 4
    assert asked == [4, 4 * (2 + 2)]


def test_scoring_does_not_wait_for_the_judge():
    answered = threading.Event()

    class Slow(MatchingJudge):
        def entails(self, pairs):
            assert answered.wait(30)
            return super().entails(pairs)

    sample = Sample(CAPTION, None, 10.0)
    with Scoring(config(), tasks=["caption"]) as scoring:
        scoring.judge = Slow()
        for text in ("A man opens a door.", "A dog jumps. A man opens a door."):
            scoring.submit([sample], [sampled(f"<answer>{text}</answer>")], [None])
        answered.set()
        assert [one.rewards["recall"] for one in scoring.results()] == [0.5, 1.0]
        assert scoring.results() == []


@pytest.mark.parametrize(
    "overrides",
    [("rewards.judge.kind=local", "rewards.judge.model=m"), ("rewards.mode=legacy",)],
    ids=["local judge", "released rewards"],
)
def test_what_cannot_run_beside_the_rollout_takes_its_turn(overrides):
    done = []

    class Slow(MatchingJudge):
        def entails(self, pairs):
            time.sleep(0.05)
            done.append(len(pairs))
            return super().entails(pairs)

    with Scoring(config(*overrides), tasks=["caption"]) as scoring:
        scoring.judge = Slow()
        for count in (1, 2):
            scoring.submit(
                [Sample(CAPTION, None, 10.0)], [sampled("<answer>A dog</answer>")], [None]
            )
            assert len(done) == count
        assert len(scoring.results()) == 2


def test_own_claims_are_held_against_the_annotated_description():
    record = replace(CAPTION, metadata={"description": "It rains."})
    caption = "<answer>A man opens a door. It rains. A cat sleeps.</answer>"
    (one,) = scored(config(), [(record, sampled(caption))])
    assert (one.metrics["recall"], one.metrics["precision"]) == (0.5, 1 / 3)


def test_a_description_that_is_no_text_is_refused_with_its_record():
    TASKS["caption"].check(replace(CAPTION, metadata={"description": "It rains."}))
    with pytest.raises(FieldError, match=r"metadata\.description.*expected a text, got int 3"):
        TASKS["caption"].check(replace(CAPTION, metadata={"description": 3}))


def test_a_failing_judge_stops_the_step_and_unreadable_replies_are_counted():
    def ask(prompts):
        raise OSError("the judge is gone")

    group = (CAPTION, sampled("<answer>a</answer>"))
    with pytest.raises(OSError, match="the judge is gone"):
        scored(config(), [group], judge=ModelJudge(ask))
    with Scoring(config(), tasks=["caption"]) as scoring:
        assert scoring.take_metrics() == {}
        scoring.judge = ModelJudge(lambda prompts: ["perhaps"] * len(prompts))
        scoring.submit([Sample(CAPTION, None, 10.0)], [group[1]], [None])
        scoring.results()
        assert scoring.take_metrics() == {"judge_unreadable": 3.0}  # 2 events, 1 claim
        assert scoring.take_metrics() == {"judge_unreadable": 0.0}


# --- EMA-GRPO


def test_scales_are_onethinkers():
    """Moments by numpy over three steps; the first sets them, and a step counts in its own."""
    generator = np.random.default_rng(0)
    scales = TaskScales(decay=0.9, floor=1e-3)
    steps = generator.normal(2.0, 0.5, size=(3, 8))
    first, second = steps[0].mean(), (steps[0] ** 2).mean()
    for number, rewards in enumerate(steps):
        scales.update(("a", float(value)) for value in rewards)
        scales.update([("b", 1.0), ("b", 1.0)])
        if number:
            first = 0.9 * first + 0.1 * rewards.mean()
            second = 0.9 * second + 0.1 * (rewards**2).mean()
        assert scales.std("a") == pytest.approx(math.sqrt(second - first**2), rel=1e-12)
    assert scales.std("b") == 1e-3
    again = TaskScales(decay=0.9)
    again.load(json.loads(json.dumps(scales.moments)))
    assert again.moments == scales.moments
    with pytest.raises(KeyError):
        scales.std("c")


def test_tasks_weigh_alike_by_their_own_spread():
    """One task's rewards are a tenth of the other's; their advantages are not."""
    settings = config("advantage.scale=task_ema", "rollout.group_size=4", "advantage.eps=1e-9")
    scales = TaskScales()
    values = [0.0, 1.0, 1.0, 2.0, 0.0, 2.0, 1.0, 1.0]
    everyone = [Scored("a", {"r": value}, {}, 5, True) for value in values]
    everyone += [Scored("b", {"r": value / 10}, {}, 5, True) for value in values]
    got = advantages_of(everyone, settings.advantage, 4, scales)
    expected = (np.array(values) - 1.0) / np.std(values)
    np.testing.assert_allclose(got, np.tile(expected, 2), rtol=1e-5)
    assert scales.std("b") == pytest.approx(scales.std("a") / 10)
    # One far apart from what its task was so far takes its group's own spread, under the guard.
    far = [Scored("b", {"r": value}, {}, 5, True) for value in (-5.0, 5.0, -5.0, 5.0)]
    calm = [Scored("b", {"r": 0.1}, {}, 5, True)] * 2000
    got = advantages_of([*far, *calm], settings.advantage, 4, scales)
    np.testing.assert_allclose(got[:4], [-1, 1, -1, 1], rtol=1e-5)


# --- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_scales_survive_a_stop(inputs, tmp_path):
    """Four steps in one go, and two and two: the same advantages and the same weights."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def text(completion, record, duration):\n"
        "    return sum(map(ord, completion)) % 97 / (97 if record.task == 'tracking' else 9)\n"
    )
    options = (
        "advantage.scale=task_ema", "advantage.ema_decay=0.7", "optim.schedule=constant",
        f"rewards.functions=['{path}:text']", "loss.beta=0",
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configure(*inputs, whole, *options, "optim.steps=4"))
    train(configure(*inputs, parts, *options, "optim.steps=2"))
    train(configure(*inputs, parts, *options, "optim.steps=4"))
    assert read(parts / "rollouts.jsonl") == read(whole / "rollouts.jsonl")
    weights = [folder / "model" / "model.safetensors" for folder in (whole, parts)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert any(abs(row["advantage"]) > 0.1 for row in read(whole / "rollouts.jsonl"))


def test_shuffled_frames_cost_no_vision_pass_and_leave_the_rest_alone(
    inputs, tmp_path, monkeypatch
):
    passes = []
    forward = loop.Run.clip_features
    monkeypatch.setattr(
        loop.Run, "clip_features", lambda *a, **k: (passes.append(1), forward(*a, **k))[1]
    )
    options = ("optim.steps=1", "optim.prompts_per_step=12", "loss.beta=0")
    train(configure(*inputs, tmp_path / "plain", *options))
    count = len(passes)
    train(configure(*inputs, tmp_path / "mixed", *options, "rewards.temporal.rollouts=2"))
    assert len(passes) == 2 * count
    plain, mixed = (read(tmp_path / name / "rollouts.jsonl") for name in ("plain", "mixed"))
    assert [row["completion"] for row in plain] == [row["completion"] for row in mixed]
    assert all(row["rewards"]["temporal"] == 0.0 for row in mixed)  # a random model is never right
    row = read(tmp_path / "mixed" / "metrics.jsonl")[0]
    assert row["seconds/shuffled"] > 0


def test_shuffled_completions_are_those_of_the_reordered_clip(inputs, tmp_path):
    """Against a rollout whose encoder sees patches in the other order."""
    settings = configure(*inputs, tmp_path / "run", "rewards.temporal.rollouts=3", "loss.beta=0")
    with setup.open_run(settings, reference=False) as run:
        samples = next(iter(run.batches()))
        (chunk,) = rollouts.sample_completions(run, samples, 0, loop.Stopwatch())
        seeds = [rollouts.prompt_seed(0, 0, sample, "shuffled") for sample in samples]
        assert len(set(seeds)) == len(samples)
        prompts = []
        for sample, seed in zip(samples, seeds, strict=True):
            (grid,) = sample.prompt.video_grid_thw.tolist()
            order = another_order(grid[0], torch.Generator().manual_seed(seed))
            patches = sample.prompt.pixel_values_videos.unflatten(0, (grid[0], -1))
            mixed = patches[order].flatten(0, 1)
            prompts.append(
                type(sample.prompt)(**vars(sample.prompt) | {"pixel_values_videos": mixed})
            )
        sampling = rollouts.SamplingConfig(max_new_tokens=8)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        expected = rollout(run.model, run.processor, prompts, 3, sampling, generators)
    assert [one.texts[0] for one in chunk.shuffled] == expected.texts
    assert len({text for group in expected.texts for text in group}) > 3


def test_orders_are_never_the_clips_own():
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 8):
        for _ in range(50):
            order = another_order(count, generator)
            assert sorted(order) == list(range(count)) != order
    assert another_order(1, generator) == [0]


def test_an_interrupt_does_not_wait_for_a_reward_that_hangs(tmp_path):
    """rewards.timeout bounds nothing here (null); the exit must not join the thread that hangs."""
    (tmp_path / "hangs.py").write_text(
        "import threading\n"
        "called = threading.Event()\n"
        "def forever(completions, records, durations):\n"
        "    print('called', flush=True)\n"
        "    called.set()\n"
        "    threading.Event().wait()\n"
    )
    (tmp_path / "run.py").write_text(
        "import torch\n"
        "from test_scoring import SPAN, Sample, Scoring, config, load_reward, sampled\n"
        f"functions = [load_reward({str(tmp_path / 'hangs.py') + ':forever'!r})]\n"
        "with Scoring(config('rewards.timeout=null'), functions) as scoring:\n"
        "    for _ in range(2):\n"
        "        scoring.submit([Sample(SPAN, None, 10.0)], [sampled('x')], [None])\n"
        "    functions[0].function.__globals__['called'].wait()\n"
        "    raise KeyboardInterrupt\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "called\n"  # the second part, still queued, never runs
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
