"""Image records through the whole of training and evaluation, side by side with videos."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast.data.records import Record, load_records, write_records
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import read_clip, read_image
from vcr1_fast.evaluate.check import check
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.run import evaluate_checkpoint
from vcr1_fast.model import checkpoint
from vcr1_fast.tasks import TASKS
from vcr1_fast.train import setup
from vcr1_fast.train.loop import train
from vcr1_fast.train.sft import sft

Image = pytest.importorskip("PIL.Image")
FRAMES = FrameConfig(num_frames=4, min_pixels=784, max_pixels=3136)


def image_records(folder):
    """Two tasks on five images of various sizes, the last one cut off."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(5):
        path = folder / f"{i}.jpg"
        pixels = rng.integers(0, 256, (40 + 9 * i, 70 - 5 * i, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        box = Record(
            id=f"box {i}",
            task="spatial_grounding",
            video=None,
            image=str(path),
            prompt={"question": "Where is the dog?"},
            answer=[0.1, 0.2, 0.5, 0.6 + 0.05 * i],
        )
        letter = Record(
            id=f"letter {i}",
            task="multiple_choice",
            video=None,
            image=str(path),
            prompt={"question": "Which animal is it?"},
            options=("cat", "dog"),
            answer="AB"[i % 2],
        )
        records += [box, letter]
    path.write_bytes(path.read_bytes()[:-300])
    return records


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(checkpoint, records of images and videos, in turn)."""
    folder = tmp_path_factory.mktemp("inputs")
    model, videos = write_inputs(folder)
    images = image_records(folder)
    mixed = [one for pair in zip(load_records(videos), images, strict=False) for one in pair]
    write_records(folder / "mixed.jsonl", mixed + images[len(mixed) // 2 :])
    write_records(folder / "images.jsonl", images)
    return model, folder / "mixed.jsonl"


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("frozen", ["false", "true"])
def test_grpo_on_images_and_videos(inputs, tmp_path, frozen):
    # A random model earns nothing; the entropy term still gives the step a gradient.
    settings = ("optim.prompts_per_step=8", "optim.steps=4", "loss.entropy_coef=0.1")
    frozen = f"model.freeze_vision={frozen}"
    train(configure(*inputs, tmp_path / "run", *settings, frozen))
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert max(row["rollout_gap_max"] for row in rows) < 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)
    tasks = {row["task"] for row in read(tmp_path / "run" / "rollouts.jsonl")}
    assert {"spatial_grounding", "multiple_choice", "temporal_grounding"} <= tasks
    bad = read(tmp_path / "run" / "quarantine.jsonl")
    assert {row["record_id"] for row in bad} == {"box 4", "letter 4"}
    assert all("4.jpg: not a picture: " in row["reason"] for row in bad)


def test_a_prompt_holds_the_image_by_the_settings_of_the_checkpoint(inputs, tmp_path):
    overrides = ('data.tasks=["spatial_grounding"]', "data.media_first=true")
    config = configure(*inputs, tmp_path / "run", *overrides)
    with setup.open_run(config, reference=False) as run:
        samples = next(run.batches())
        assert samples and run.processor.video.max_pixels == 3136
    _, processor = checkpoint.load(inputs[0])
    processor = dataclasses.replace(processor, media_first=True)
    for sample in samples:
        assert sample.duration is None
        image = read_image(sample.record.image)
        expected = processor.prompt(
            TASKS["spatial_grounding"].prompt(sample.record, False), [image]
        )
        assert torch.equal(sample.prompt.pixel_values, expected.pixel_values)
        assert torch.equal(sample.prompt.input_ids, expected.input_ids)
        assert sample.prompt.pixel_values_videos is None


def test_sft_learns_what_stands_in_an_image(inputs, tmp_path):
    settings = ('data.tasks=["spatial_grounding"]', "optim.steps=30", "optim.lr=5e-3")
    sft(configure(inputs[0], inputs[1], tmp_path / "run", *settings))
    losses = [row["loss"] for row in read(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_greedy_answers_are_those_of_transformers(inputs, tmp_path):
    model, processor = checkpoint.load(inputs[0])
    config = EvalConfig(
        frames=FRAMES, mrope="installed", max_new_tokens=10, batch_size=4, decode_workers=0
    )
    evaluation = evaluate_checkpoint(inputs[0], inputs[1], tmp_path / "out", config)
    assert {item.record_id for item in evaluation.quarantined} == {"box 4", "letter 4"}
    processor = processor.with_video(min_pixels=784, max_pixels=3136, total_pixels=3584 * 784)
    images = 0
    for item in evaluation.predictions:
        record, task = item.record, TASKS[item.record.task]
        if task.times is not None:
            continue
        images += record.image is not None
        clip = read_clip(record.video, FRAMES) if record.video else read_image(record.image)
        prompt = processor.prompt(task.prompt(record, False), [clip])
        media = (
            {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
            if record.image
            else {
                "pixel_values_videos": prompt.pixel_values_videos,
                "video_grid_thw": prompt.video_grid_thw,
                "second_per_grid_ts": prompt.second_per_grid_ts,
            }
        )
        tokens = model.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            do_sample=False,
            max_new_tokens=10,
            suppress_tokens=processor.banned_ids(model.config.text_config.vocab_size).tolist(),
            eos_token_id=processor.stop_id,
            pad_token_id=0,
            **media,
        )[0, len(prompt) :]
        assert item.completion.text == processor.decode(tokens)
    assert images == 8


def test_the_doctor_opens_images(inputs):
    report = check(inputs[1].with_name("images.jsonl"))
    assert {(fault.kind, fault.record) for fault in report.faults} == {
        ("unreadable image", "box 4")
    }
    assert (report.records, report.videos) == (10, 5)
