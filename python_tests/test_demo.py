"""The demo's own parts: blurred answers stay valid and imprecise, the warm start ships whole."""

import dataclasses

import numpy as np
import pytest

from vcr1_fast.data.records import load_records, write_records
from vcr1_fast.data.scenes import SceneConfig, questions, sample_scene
from vcr1_fast.data.synth import TASKS, SynthConfig, write_dataset
from vcr1_fast.demo.blur import BlurConfig, blur_records
from vcr1_fast.demo.run import main_demo
from vcr1_fast.demo.settings import QUICK, WARM_START


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


def test_questions_agree_with_what_is_drawn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng, SceneConfig())
        for question in questions(scene, rng):
            if question["task"] == "temporal_grounding":
                start, end = question["answer"]
                assert 0 <= start < end <= scene.duration
            if question["task"] == "tracking":
                x = [(box[0] + box[2]) / 2 for box in question["answer"]]
                y = [(box[1] + box[3]) / 2 for box in question["answer"]]
                along = {"left": -x[-1] + x[0], "right": x[-1] - x[0]}
                along |= {"up": -y[-1] + y[0], "down": y[-1] - y[0]}
                assert along[scene.direction] > 0.3


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
