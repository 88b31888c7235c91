"""The demo's parts: imprecise answers stay valid, the warm start ships whole."""

import dataclasses
import json

import numpy as np
import pytest
from test_pictures import data_of

from vcr1_fast.data.records import Record, load_records, write_records
from vcr1_fast.data.scenes import DIRECTIONS, SceneConfig, questions, sample_scene
from vcr1_fast.data.synth import TASKS, SynthConfig, write_dataset
from vcr1_fast.demo.blur import BlurConfig, blur_records
from vcr1_fast.demo.reasoning import direction, with_reasoning
from vcr1_fast.demo.run import grpo_config, main_demo
from vcr1_fast.demo.settings import QUICK, WARM_START
from vcr1_fast.rewards.caption import MatchingJudge
from vcr1_fast.train.dataset import Sample
from vcr1_fast.train.scoring import own_rewards


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    config = SynthConfig(train=6, val=0, test=0, seed=3, workers=0)
    return load_records(write_dataset(folder, config)["train"])


def test_blurred_answers_are_valid_records(records, tmp_path):
    blurred = blur_records(records, 0, BlurConfig())
    write_records(tmp_path / "blurred.jsonl", blurred)
    assert [r.answer for r in load_records(tmp_path / "blurred.jsonl")] == [
        r.answer for r in blurred
    ]
    assert blurred == blur_records(records, 0, BlurConfig())
    assert [r.answer for r in blurred] != [r.answer for r in blur_records(records, 1, BlurConfig())]


def test_blur_widens_spans_and_keeps_what_the_prompt_gives(records):
    for exact, blurred in zip(records, blur_records(records, 0, BlurConfig()), strict=True):
        if exact.task == "temporal_grounding":
            (start, end), (early, late) = exact.answer, blurred.answer
            assert 0 <= early <= start and end <= late <= exact.metadata["duration"]
            assert start - early <= 3.0 and late - end <= 3.0
        if exact.task == "tracking":
            assert np.allclose(exact.answer[0], blurred.answer[0], atol=0.025)
            moved = np.abs(np.array(exact.answer[1:]) - np.array(blurred.answer[1:]))
            assert 0.025 < moved.max() <= 0.125 + 1e-9


def test_letters_are_drawn_at_the_given_rate(records):
    one = next(r for r in records if r.task == "multiple_choice")
    right = {
        rate: np.mean(
            [
                r.answer == one.answer
                for r in blur_records([one] * 2000, 0, BlurConfig(wrong_letter=rate))
            ]
        )
        for rate in (0.0, 0.4, 1.0)
    }
    assert right[0.0] == 1.0
    assert right[0.4] == pytest.approx(0.7, abs=0.04)
    assert right[1.0] == pytest.approx(0.25, abs=0.04)


def test_captions_lose_events_and_labels_turn_at_the_given_rates(records):
    config = BlurConfig(wrong_letter=0.4, missed_event=0.25)
    caption = next(r for r in records if r.task == "caption")
    label = next(r for r in records if r.task == "classification")
    captions = [r.answer for r in blur_records([caption] * 2000, 0, config)]
    moves, *comings = caption.answer
    assert np.mean([answer[0] == moves for answer in captions]) == pytest.approx(0.7, abs=0.04)
    kept = np.mean([len(answer) - 1 for answer in captions]) / len(comings)
    assert kept == pytest.approx(0.75, abs=0.04)
    labels = [r.answer for r in blur_records([label] * 2000, 0, config)]
    right = 0.6 + 0.4 / len(label.options)
    assert np.mean([answer == label.answer for answer in labels]) == pytest.approx(right, abs=0.04)
    assert set(labels) == set(label.options)


def test_reasoning_says_what_the_blurred_answer_says(records):
    said = {}
    for record in with_reasoning(blur_records(records, 0, BlurConfig())):
        said[record.task] = record, record.metadata["reasoning"]
    assert set(said) == set(TASKS)
    record, text = said["temporal_grounding"]
    start, end = record.answer
    assert text == f"It is there at <timestep>{start:.1f} to {end:.1f}</timestep>."
    record, text = said["grounded_qa"]
    (start, end), letter = record.answer["glue"][0], record.answer["answer"]
    way = record.options["ABCD".index(letter)]
    assert text == f"At <timestep>{start:.1f} to {end:.1f}</timestep> it moves {way}."
    record, text = said["multiple_choice"]
    assert text == f"It moves {record.options['ABCD'.index(record.answer)]}."
    record, text = said["classification"]
    assert text == f"The shape that moves is {record.answer}."
    record, text = said["caption"]
    assert text == f"There are {len(record.answer)} events."


def test_direction_is_that_of_the_longer_way():
    assert direction([[0.0, 0.0, 0.2, 0.2], [0.5, 0.1, 0.7, 0.3]]) == "right"
    assert direction([[0.5, 0.1, 0.7, 0.3], [0.0, 0.0, 0.2, 0.2]]) == "left"
    assert direction([[0.1, 0.5, 0.3, 0.7], [0.2, 0.1, 0.4, 0.3]]) == "up"
    assert direction([[0.1, 0.1, 0.3, 0.3], [0.2, 0.5, 0.4, 0.7]]) == "down"


def test_questions_agree_with_what_is_drawn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng, SceneConfig())
        for question in questions(scene, rng):
            if question["task"] == "temporal_grounding":
                start, end = question["answer"]
                assert 0 <= start < end <= scene.duration
            if question["task"] == "classification":
                assert question["answer"] == scene.things[0].color
                assert question["answer"] in question["options"]
            if question["task"] == "caption":
                moves, *comings = question["answer"]
                assert moves == f"{scene.things[0].color} {scene.direction}wards."
                order = sorted(scene.things[1:], key=lambda thing: thing.start)
                assert comings == [f"{thing.color} comes." for thing in order]
            if question["task"] == "tracking":
                assert direction(question["answer"]) == scene.direction
                x = [(box[0] + box[2]) / 2 for box in question["answer"]]
                y = [(box[1] + box[3]) / 2 for box in question["answer"]]
                along = {"left": -x[-1] + x[0], "right": x[-1] - x[0]}
                along |= {"up": -y[-1] + y[0], "down": y[-1] - y[0]}
                assert along[scene.direction] > 0.3


def test_the_caption_reward_does_not_pay_for_telling_everything(tmp_path):
    record = Record(
        "c", "caption", "v.mp4", {"instruction": "x"}, ["red leftwards.", "blue comes."]
    )
    reported = {
        "right": "red leftwards. blue comes.",  # recall 1, precision 1
        "all": " ".join(f"red {way}wards." for way in DIRECTIONS) + " blue comes.",  # 1, 2/5
        "half": "red leftwards.",  # 1/2, 1
    }
    answers = [
        (Sample(record, None, 10.0), f"<think>x</think><answer>{text}</answer>")
        for text in reported.values()
    ]
    config = grpo_config(QUICK, tmp_path, tmp_path)
    totals = [
        sum(value * config.rewards.weight("caption", name) for name, value in rewards.items())
        for rewards, _ in own_rewards(answers, config, MatchingJudge())
    ]
    assert totals == pytest.approx([1 + 1, 1 + 4 / 7, 1 + 2 / 3])


def test_every_stage_of_the_demo_runs_and_a_second_one_replaces_it(tmp_path, capsys):
    assert (WARM_START / "model.safetensors").stat().st_size < 3 * 2**20
    config = dataclasses.replace(
        QUICK,
        output=str(tmp_path / "demo"),
        clips=SynthConfig(train=4, val=0, test=2, workers=0),
        sft_steps=2,
        sft_prompts=4,
        grpo_steps=2,
        grpo_prompts=4,
    )
    for _ in range(2):
        assert main_demo(config) == 0
        shown = capsys.readouterr().out
        assert all(task in shown for task in TASKS)
        for name in ("summary.json", "rollouts.html", "grpo/model/model.safetensors"):
            assert (tmp_path / "demo" / name).exists()
        assert list((tmp_path / "demo").glob("*.png"))
    groups = data_of(tmp_path / "demo" / "rollouts.html")["groups"]
    assert groups and all(group["clip"] is not None for group in groups)
    rows = map(json.loads, (tmp_path / "demo/grpo/rollouts.jsonl").read_text().splitlines())
    assert {name for r in rows if r["task"] == "caption" for name in r["rewards"]} == {
        "format",
        "recall",
        "F1",
    }
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for stage in ("SFT", "GRPO"):
        caption = summary["stages"][stage]["tasks"]["caption"]
        assert list(caption["metrics"]) == ["recall", "precision", "F1"]
