"""Video GRPO inside TRL: losses and gradients equal our step's and the unshared baseline's."""

import subprocess
import sys
from dataclasses import replace
from types import MethodType

import pytest
import torch
from datasets import Dataset
from test_forward import _plain_log_probs
from tiny_run import write_inputs
from trl_run import Norms, trl

from vcr1_fast.data import requests
from vcr1_fast.data.records import load_records
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import VideoError
from vcr1_fast.integrations import trl_video
from vcr1_fast.integrations.trl import patch_trl
from vcr1_fast.integrations.trl_video import (
    VideoGRPOConfig,
    VideoGRPOTrainer,
    task_rewards,
    video_dataset,
)
from vcr1_fast.integrations.trl_video import data as data_module
from vcr1_fast.integrations.trl_video.data import read_record
from vcr1_fast.model.checkpoint import load
from vcr1_fast.model.packing import Group
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.tasks import TASKS
from vcr1_fast.train.groups import PolicyGroup
from vcr1_fast.train.loop import policy_loss

G = 4
FRAMES = {"num_frames": 4, "min_pixels": 784, "max_pixels": 3136}
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(checkpoint, records)"""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def spread(completion_ids, **_):
    """A reward that differs within a group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def make_trainer(inputs, output, *, rewards=spread, data=None, dtype=torch.float32, **settings):
    names = ("peft_config", "tools", "eval_dataset")
    keywords = {name: settings.pop(name) for name in names if name in settings}
    args = VideoGRPOConfig(
        **{
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 2 * G,
            "num_generations": G,
            "max_completion_length": 6,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            "frame_kwargs": FRAMES,
            "decode_workers": 0,
            "model_init_kwargs": {"dtype": dtype},
            **settings,
        }
    )
    data = video_dataset(inputs[1]) if data is None else data
    norms = Norms()
    trainer = VideoGRPOTrainer(str(inputs[0]), rewards, args, data, callbacks=[norms], **keywords)
    trainer.norms = norms.norms
    return trainer


def micro_batch(trainer):
    """The first one of a run, rows in TRL's order."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i] for i in (0, 3) for _ in range(G)]
    return trainer._prepare_inputs(rows)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # Rotations are float32 in transformers, and positions are not split the same way.
        assert (ours[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def groups_of(trainer, batch):
    """The micro-batch's groups with their advantages, as our own trainer has them."""
    mask, groups = batch["completion_mask"].bool(), []
    for i, shown in enumerate(trainer._shown[True]):
        rows = [j for j, number in enumerate(batch["shown"].tolist()) if number == i]
        completions = [batch["completion_ids"][j][mask[j]] for j in rows]
        refs = torch.cat([batch["ref_per_token_logps"][j][mask[j]] for j in rows])
        advantages = batch["advantages"][rows]
        groups.append(PolicyGroup(Group(shown.prompt, completions), advantages, refs, refs))
    return groups


@pytest.mark.parametrize("freeze", [False, True])
def test_loss_and_gradients_equal_ours_and_the_plain_form(freeze, inputs, tmp_path):
    trainer = make_trainer(
        inputs, tmp_path, dtype=torch.float64, beta=0.1, loss_type="grpo", freeze_vision=freeze
    )
    with torch.no_grad():  # else policy and reference are one
        trainer.model.model.language_model.norm.weight.mul_(1.1)
    batch = micro_batch(trainer)
    assert batch["advantages"].abs().min() > 0
    loss = trainer.compute_loss(trainer.model, batch)
    own = gradients(trainer.model, loss)
    visual = [name for name in own if "visual" in name]
    assert bool(visual) is not freeze and len(own) > 10

    groups = groups_of(trainer, batch)
    config = GRPOLossConfig(
        loss_type="grpo", beta=0.1, kl_input_clamp=None, kl_bias_correction=True
    )
    step, _ = policy_loss(trainer.model, groups, config, temperature=1.0, on_policy=True)
    torch.testing.assert_close(loss, step, check_dtype=False)
    assert_same(own, gradients(trainer.model, step))

    plain, _ = load(inputs[0], dtype=torch.float64)
    plain.load_state_dict(trainer.model.state_dict())
    for parameter, other in zip(plain.parameters(), trainer.model.parameters(), strict=True):
        parameter.requires_grad_(other.requires_grad)
    mask = batch["completion_mask"].bool()

    def repeated(self, *_, **__):
        """A copy of prompt and clip for each completion, by the model's own forward."""
        logps = _plain_log_probs(plain, [one.group for one in groups])
        whole = torch.zeros(mask.shape, dtype=logps.dtype).masked_scatter(mask, logps)
        return whole, torch.zeros_like(whole), None

    trainer._get_per_token_logps_and_entropies = MethodType(repeated, trainer)
    other = trainer.compute_loss(None, batch)
    torch.testing.assert_close(loss, other, check_dtype=False)
    assert_same(own, gradients(plain, other))


def run(trainer):
    trainer.train()
    return trainer.norms, [row for row in trainer.state.log_history if "loss" in row]


def test_micro_batches_change_nothing_patched_or_not(inputs, tmp_path):
    """Parts of groups, several groups; TRL's loss and ours; activations kept or recomputed."""
    settings = {"max_steps": 1, "beta": 0.05}
    (whole,), (row,) = run(make_trainer(inputs, tmp_path, **settings))
    with patch_trl():
        part = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        (parts,), (other,) = run(
            make_trainer(inputs, tmp_path, gradient_checkpointing=False, **part, **settings)
        )
    assert whole > 1e-3
    assert parts == pytest.approx(whole, rel=1e-4)
    assert other["loss"] == pytest.approx(row["loss"], abs=1e-6)
    assert other["entropy"] == pytest.approx(row["entropy"], rel=0.05)  # a mean of means


def test_old_log_probs_evaluation_and_cut_completions(inputs, tmp_path):
    """Batches that outlive an update and an evaluation; completions without a token."""
    trainer = make_trainer(
        inputs,
        tmp_path,
        num_iterations=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=G,
        mask_truncated_completions=True,
        eval_dataset=video_dataset(inputs[1]).select([1]),
    )
    norms, rows = run(trainer)
    assert len(norms) == 2 and all(torch.tensor(norms).isfinite())
    assert rows[1]["clip_ratio/region_mean"] >= 0 and "num_tokens" not in rows[1]
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 2


def test_nothing_but_cut_completions_is_a_zero_that_can_go_backward(inputs, tmp_path):
    trainer = make_trainer(inputs, tmp_path)
    batch = micro_batch(trainer)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss.detach()) == 0
    assert not any(g.any() for g in gradients(trainer.model, loss).values())


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_adapters_with_the_model_below_them_as_reference(inputs, tmp_path):
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    trainer = make_trainer(inputs, tmp_path, peft_config=adapters, beta=0.1, bf16=True)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and not any("visual" in name for name in trained)  # up_proj is there as well
    norms, rows = run(trainer)
    assert norms[0] > 0 and rows[0]["kl"] > 0


def test_rewards_are_those_of_our_trainer(inputs):
    data = video_dataset(load_records(inputs[1]), think=True)
    functions = task_rewards(data)
    assert {f.__name__.split("/")[0] for f in functions} <= set(TASKS)
    columns = {name: data[name][:] for name in ("record", "think")}
    durations = [2.0] * len(data)
    answers = [TASKS[read_record(r).task].target(read_record(r)) for r in data["record"]]
    turns = [[{"role": "assistant", "content": text}] for text in answers]
    table = {f.__name__: f(completions=turns, duration=durations, **columns) for f in functions}
    for i, text in enumerate(answers):
        record = read_record(data["record"][i])
        own = TASKS[record.task].score(text, record, 2.0, think=True)
        given = {name: row[i] for name, row in table.items() if row[i] is not None}
        assert given == {f"{record.task}/{name}": value for name, value in own.items()}
        assert max(own.values()) > 0.9
    # The functions of a task share the parse of one batch, and of that batch alone.
    silent = [[{"role": "assistant", "content": "no"}]] * len(data)
    for function in functions:
        after = function(completions=silent, duration=durations, **columns)
        assert [v for v in after if v] == [] != table[function.__name__]
        assert (
            function(completions=turns, duration=durations, **columns) == (table[function.__name__])
        )


def test_records_become_rows(inputs):
    records = load_records(inputs[1])
    data = video_dataset(inputs[1])
    assert [read_record(r) for r in data["record"]] == records
    assert data[0]["prompt"][0]["content"] == TASKS[records[0].task].prompt(records[0], False)
    frames = FrameConfig(**FRAMES)
    rated = [replace(one, metadata={**one.metadata, "fps": 3.0}) for one in records]
    for one, row in zip(rated, video_dataset(rated), strict=True):
        ours, theirs = requests.clip_request(one, frames), data_module.clip_request(row, frames)
        assert (theirs.path, theirs.folder_fps) == (ours.path, 3.0)
        assert (theirs.start, theirs.end, theirs.is_image) == (ours.start, ours.end, ours.is_image)
        assert (theirs.times and theirs.times(2.0)) == (ours.times and ours.times(2.0))
        moved = data_module.clip_request({**row, "video": "/moved.mp4", "start": 0.5}, frames)
        assert (moved.path, moved.start) == ("/moved.mp4", 0.5)
    with pytest.raises(ValueError, match="no records"):
        video_dataset([])
    with pytest.raises(ValueError, match=r"unknown tasks \['chess'\]"):
        task_rewards("chess")


def test_a_trained_model_is_saved_whole(inputs, tmp_path):
    trainer = make_trainer(inputs, tmp_path, max_steps=1)
    run(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    model, processor = load(tmp_path / "saved")
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter), name
    assert processor.chat_template == trainer.processor.chat_template


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 0.1}, "does not take min_p=0.1"),
        ({"repetition_penalty": 1.2}, "does not take repetition_penalty=1.2"),
        ({"tools": [print]}, "does not take tools="),
        ({"frame_kwargs": {"fps": -1}}, "fps must be a positive number, got -1"),
        ({"decode_workers": -1}, "-1"),
        ({"mrope": "other"}, "mrope must be"),
    ],
)
def test_what_does_not_work_here_is_refused(settings, message, inputs, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(inputs, tmp_path, **settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"video": "/nowhere.mp4"}, VideoError, "/nowhere.mp4"),
        ({"prompt": "When?"}, ValueError, "prompt must be a user turn of text"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, ValueError, "user turn"),
    ],
)
def test_a_row_that_cannot_be_shown_stops_the_run(change, error, message, inputs, tmp_path):
    data = video_dataset(inputs[1])
    rows = [{k: v for k, v in row.items() if k != "record"} | change for row in data]
    trainer = make_trainer(inputs, tmp_path, data=Dataset.from_list(rows))
    with pytest.raises(error, match=message):
        trainer.train()


def test_a_loaded_model_comes_with_its_processor(inputs, tmp_path):
    model, processor = load(inputs[0])
    args = VideoGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    data = video_dataset(inputs[1])
    with pytest.raises(ValueError, match="needs its processor"):
        VideoGRPOTrainer(model, spread, args, data)
    trainer = VideoGRPOTrainer(model, spread, args, data, processor=processor)
    assert trainer.model is model and isinstance(trainer, trl.GRPOTrainer)


def test_pictures_and_clips_have_bounds_of_their_own(inputs, tmp_path):
    bounds = {"image_min_pixels": 1568, "image_max_pixels": 6272}
    processor = make_trainer(inputs, tmp_path, frame_kwargs=FRAMES | bounds).processor
    assert (processor.video.min_pixels, processor.video.max_pixels) == (784, 3136)
    assert (processor.image.min_pixels, processor.image.max_pixels) == (1568, 6272)


def test_importing_the_package_imports_no_trl():
    code = "import sys, vcr1_fast.integrations.trl_video as v; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        trl_video.Trainer  # noqa: B018


def test_pictures_beside_clips(inputs, tmp_path):
    from PIL import Image

    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    turn = [{"role": "user", "content": "What is it?"}]
    clip = video_dataset(inputs[1])[0]["video"]
    rows = [
        {"prompt": turn, "image": str(tmp_path / "red.png"), "video": None},
        {"prompt": turn, "image": None, "video": clip},
    ]
    trainer = make_trainer(inputs, tmp_path, data=Dataset.from_list(rows), max_steps=1)
    norms, _ = run(trainer)
    assert norms[0] > 0
    grids = [one.prompt.image_grid_thw for one in trainer._shown[True]]
    assert sorted(len(grid) for grid in grids) == [0, 1]
    neither = Dataset.from_list([{"prompt": turn, "video": None}] * 2)
    with pytest.raises(ValueError, match="a row needs a video or an image"):
        make_trainer(inputs, tmp_path, data=neither).train()


@pytest.mark.parametrize(("family", "opened"), [("qwen3_vl", ""), ("qwen3_5", "<think>\n")])
def test_other_families(family, opened, tmp_path):
    """The loss is that of our step, and rewards know what the chat template opened."""
    inputs = write_inputs(tmp_path / "inputs", family, layers=4, head_dim=16)
    seen = []

    def spread_and_note(completion_ids, **columns):
        seen.extend(columns["opened"])
        return spread(completion_ids)

    trainer = make_trainer(
        inputs,
        tmp_path / "out",
        rewards=spread_and_note,
        data=video_dataset(inputs[1], think=True),
        dtype=torch.float64,
        max_steps=1,
        loss_type="grpo",
        frame_kwargs={"num_frames": 5, "min_pixels": 1024, "max_pixels": 4096},
    )
    batch = micro_batch(trainer)
    assert set(seen) == {opened}
    loss = trainer.compute_loss(trainer.model, batch)
    own = gradients(trainer.model, loss)
    batch["ref_per_token_logps"] = torch.zeros(batch["completion_ids"].shape)
    config = GRPOLossConfig(loss_type="grpo", beta=0.0)
    step, _ = policy_loss(
        trainer.model, groups_of(trainer, batch), config, temperature=1.0, on_policy=True
    )
    torch.testing.assert_close(loss, step, check_dtype=False)
    assert_same(own, gradients(trainer.model, step))
    norms, rows = run(trainer)
    assert len(rows) == 1 and norms[0] > 0
