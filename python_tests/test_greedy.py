"""Checkpoint and clips to predictions: a random small model, real mp4 files, one corrupt."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vcr1_fast.data.records import Record, write_records
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import read_clip
from vcr1_fast.evaluate.config import EvalConfig
from vcr1_fast.evaluate.run import evaluate, evaluate_checkpoint
from vcr1_fast.model import checkpoint
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.rollout import rollout
from vcr1_fast.model.sampling import SamplingConfig
from vcr1_fast.tasks import TASKS

av = pytest.importorskip("av")
pytest.importorskip("decord")

FRAMES = FrameConfig(num_frames=8, min_pixels=28 * 28, max_pixels=56 * 56, total_pixels=None)
CONFIG = EvalConfig(frames=FRAMES, max_new_tokens=12, batch_size=3, decode_workers=1)


def write_video(path, seed):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (7, 7, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 56, 56, "yuv420p"
        for i in range(32):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 2 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("greedy")
    records = []
    for i, colour in enumerate(("red", "blue", "green", "white", "black", "grey", "pink")):
        write_video(path / f"{i}.mp4", i)
        common = {"id": f"r{i}", "video": str(path / f"{i}.mp4")}
        if i % 3 == 2:
            boxes = [[0.1, 0.1, 0.4, 0.4]] * 8
            task = {"task": "tracking", "prompt": {"object": f"{colour} square"}, "answer": boxes}
        else:
            event = {"event": f"the {colour} circle is visible"}
            task = {"task": "temporal_grounding", "prompt": event, "answer": [1.0, 2.5]}
        records.append(Record(**common, **task, start=1.0 if i == 4 else None))
    (path / "4.mp4").write_bytes((path / "4.mp4").read_bytes()[:700])
    write_records(path / "test.jsonl", records)
    texts = [TASKS[r.task].prompt(r, False) for r in records]
    texts += [TASKS[r.task].target(r) for r in records]
    sizes = TinyConfig(hidden_size=64, layers=2, vision_hidden=32, initializer_range=0.3)
    write_tiny(path / "model", texts=texts, seed=0, config=sizes)
    return path, records


@pytest.fixture(scope="module")
def finished(folder):
    path, _ = folder
    result = evaluate_checkpoint(path / "model", path / "test.jsonl", path / "one", CONFIG)
    return result, (path / "one" / "predictions.jsonl").read_bytes()


def test_each_record_gets_the_answer_that_its_own_clip_and_prompt_lead_to(folder, finished):
    path, _ = folder
    model, processor = checkpoint.load(path / "model", dtype="float32")
    processor = processor.with_video(
        min_pixels=FRAMES.min_pixels, max_pixels=FRAMES.max_pixels, total_pixels=None
    )
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    texts = set()
    for item in finished[0].predictions:
        task = TASKS[item.record.task]
        clip = read_clip(item.record.video, FRAMES)
        if task.times is not None:
            clip = read_clip(
                item.record.video, FRAMES, times=task.times(item.record, clip.duration)
            )
        prompt = processor.prompt(task.prompt(item.record, False), [clip])
        alone = rollout(model, processor, [prompt], 1, greedy)
        assert item.completion.text == alone.texts[0][0]
        assert item.completion.tokens == len(alone.tokens[0][0]) > 0
        assert item.completion.finished == alone.finished[0][0]
        texts.add(item.completion.text)
    assert len(texts) >= 4  # else a mix-up of records could go unnoticed


def test_the_corrupt_clip_is_named_and_in_no_score(folder, finished):
    path, _ = folder
    result, lines = finished
    assert [item.record_id for item in result.quarantined] == ["r4"]
    assert str(path / "4.mp4") in result.quarantined[0].reason
    assert {task.task: task.n for task in result.tasks} == {"temporal_grounding": 4, "tracking": 2}
    assert b'"r4"' not in lines
    summary = json.loads((path / "one" / "summary.json").read_text())
    assert summary["quarantined"][0]["record_id"] == "r4"
    assert summary["run"]["dtype"] == "torch.float32"


def test_two_shards_of_a_real_model_give_the_bytes_of_one(folder, finished):
    path, _ = folder
    for index in (1, 0):
        config = replace(CONFIG, decode_workers=0, shard_index=index, shard_count=2)
        evaluate_checkpoint(path / "model", path / "test.jsonl", path / "two", config)
    assert (path / "two" / "predictions.jsonl").read_bytes() == finished[1]


def test_evaluating_inside_a_training_run_leaves_the_model_as_it_was(folder, finished):
    path, records = folder
    model, processor = checkpoint.load(path / "model", dtype="float32")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    result = evaluate(model, processor, records[:3], replace(CONFIG, decode_workers=0))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = [item.completion.text for item in finished[0].predictions[:3]]
    assert [item.completion.text for item in result.predictions] == expected
