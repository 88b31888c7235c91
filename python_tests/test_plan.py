"""The plan of a run: its counts are the run's, its bytes those of the model and optimiser."""

import json
import re

import pytest
import torch
from tiny_run import configure, write_inputs

from vcr1_fast import cli
from vcr1_fast.config.section import ConfigError
from vcr1_fast.model.processor import Processor
from vcr1_fast.train import dry_run as module
from vcr1_fast.train.checkpoint import state_bytes
from vcr1_fast.train.dry_run import clip_tokens, dry_run, skeleton
from vcr1_fast.train.optim import MasterAdamW
from vcr1_fast.train.plan import Needs, size
from vcr1_fast.train.setup import open_run, prepare_model
from vcr1_fast.train.sft import sft


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    "settings",
    [
        ("model.dtype=float32",),
        ("model.dtype=bfloat16",),
        ("model.lora_rank=4", "model.dtype=bfloat16"),
        ("model.freeze_vision=true", "model.gradient_checkpointing=true"),
    ],
)
def test_needs_are_those_of_the_model_that_would_be_loaded(inputs, tmp_path, settings):
    config = configure(*inputs, tmp_path / "run", *settings)
    planned = Needs.of(skeleton(inputs[0], config.model), config)
    model, _ = prepare_model(config, torch.device("cpu"))
    assert planned == Needs.of(model, config)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert planned.parameters == sum(p.numel() for p in parameters)
    assert planned.trained == sum(p.numel() for p in trained)
    # What the optimiser holds after a step, and the gradients of the step.
    optimizer = MasterAdamW(model.parameters(), config.optim)
    for master in optimizer.masters:
        master.grad = torch.zeros_like(master)
    optimizer.adamw.step()
    held = state_bytes([list(s.values()) for s in optimizer.adamw.state.values()])
    held -= sum(4 for _ in optimizer.masters)  # the step counts
    held += sum(m.nbytes for m in optimizer.masters if not any(m is p for p in trained))
    assert planned.training == held + sum(4 * p.numel() for p in trained)
    optimizer.close()


def test_a_checkpoint_is_as_large_as_planned(inputs, tmp_path):
    config = configure(*inputs, tmp_path / "run", "model.dtype=bfloat16", "optim.steps=1")
    sft(config)
    state = next((tmp_path / "run" / "checkpoints").glob("step-*")) / "state.pt"
    planned = Needs.of(skeleton(inputs[0], config.model), config).checkpoint
    # The archive adds names and alignment, some hundred bytes a tensor.
    assert planned <= state.stat().st_size <= planned + 600_000


def test_an_adapter_to_start_from_is_planned(inputs, tmp_path):
    sft(configure(*inputs, tmp_path / "run", "model.lora_rank=4", "optim.steps=1"))
    adapter = tmp_path / "run" / "adapter"
    config = configure(*inputs, tmp_path / "next", f"model.adapter={adapter}")
    planned = Needs.of(skeleton(inputs[0], config.model), config)
    model, _ = prepare_model(config, torch.device("cpu"))
    assert planned == Needs.of(model, config)


def test_tokens_are_those_of_the_prompts_that_train(inputs, tmp_path):
    config = configure(*inputs, tmp_path / "run")
    with open_run(config, reference=False, kind="sft") as run:
        tokens, frames, faults = clip_tokens(run.source.records, run.processor, config)
        assert isinstance(run.processor, Processor)
        seen = {sample.record.id: sample for batch in run.batches() for sample in batch}
        records = run.source.records
    assert not faults and len(tokens) == len(frames) == 6  # three clips, and tracks' own frames
    lengths = {len(sample.prompt) for sample in seen.values()}
    assert seen and max(lengths) <= max(tokens) + 40 and len(records) == 18


def test_the_command_prints_the_plan_and_writes_nothing(inputs, tmp_path, capsys, monkeypatch):
    settings = ["model.dtype=float32", "run.device=cpu", "data.decode_workers=0"]
    settings += ["data.frames.num_frames=4", "data.frames.min_pixels=784", "optim.epochs=2.5"]
    settings += ["data.frames.max_pixels=3136", "rollout.group_size=4", "optim.prompts_per_step=4"]
    # Weights are not read: a checkpoint without them is planned too.
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in inputs[0].iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    bad = tmp_path / "records.jsonl"
    bad.write_text(inputs[1].read_text() + '{"id": "x"}\n')
    words = ["--model", str(bare), "--data", str(bad), "--output", str(tmp_path / "run")]
    words += [f"data.media_root={inputs[1].parent}", *settings]
    assert cli.main(["train", *words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "data: 18 records (temporal_grounding 3, " in told and "1 rows refused" in told
    # ceil(2.5 * 18 / 4) steps
    assert "steps: 12 of 4 prompts = 2.67 epochs; 4 completions each, 192 in all" in told
    assert re.search(r"prompts: \d+ tokens in the median, \d+ at most; ", told)
    assert "of 6 clips" in told and "with the reference model: fits" in told
    assert not (tmp_path / "run").exists()
    assert cli.main(["plan", *words]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == told.splitlines()[:2]
    assert cli.main(["sft", *words, "--dry-run"]) == 0
    assert "completions" not in capsys.readouterr().out
    # What cannot fit ends with 2.
    monkeypatch.setattr(module, "available_bytes", lambda device: 1000)
    assert cli.main(["plan", *words]) == 2
    assert capsys.readouterr().out.rstrip().endswith("too much")


def test_clips_that_cannot_be_shown_are_part_of_the_plan(inputs, tmp_path):
    rows = [json.loads(line) for line in inputs[1].read_text().splitlines()[:2]]
    path = inputs[1].with_name("partly.jsonl")
    rows.append({**rows[0], "id": "gone", "video": "nowhere.mp4"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, fits = dry_run(configure(inputs[0], path, tmp_path / "run"), grpo=True)
    assert fits and any(line.startswith("cannot be shown: gone: ") for line in lines)
    path.write_text(json.dumps(rows[-1]) + "\n")
    lines, fits = dry_run(configure(inputs[0], path, tmp_path / "run"), grpo=True)
    assert not fits and lines[-1] == "no clip can be shown"


def test_epochs_are_steps(inputs, tmp_path, capsys):
    settings = ("optim.epochs=0.5", "optim.prompts_per_step=4", "optim.steps=1000")
    run = tmp_path / "run"
    sft(configure(*inputs, run, *settings))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]  # ceil(0.5 * 18 / 4)
    # The schedule is that of these steps: linear from the highest rate to 0.
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    said = capsys.readouterr().err
    assert "steps: 3 of 4 prompts = 0.667 epochs" in said and "model: " in said
    assert "memory: weights " in said and "disk: 3 checkpoints of " in said
    with pytest.raises(ConfigError, match=r"warmup_steps: must be less than the 3 steps of 0\.5"):
        sft(configure(*inputs, tmp_path / "x", *settings, "optim.warmup_steps=3"))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (2048, "2 KiB"), (3 * 2**20, "3 MiB"), (1.5 * 2**30, "1.5 GiB"),
     (160 * 2**30, "160 GiB"), (1234 * 2**30, "1234 GiB")],
)  # fmt: skip
def test_sizes_in_words(count, text):
    assert size(count) == text
