"""Every family against transformers' own model: the shared step, the vision encoder, the rollout,
and what a user does with it."""

import dataclasses
import json
import pickle
import runpy
from pathlib import Path

import family_case as case
import pytest
import torch
import torch.nn.functional as F
from tiny_run import configure, write_inputs
from transformers import GenerationConfig

from vcr1_fast.evaluate.chat import Conversation
from vcr1_fast.model import attention, checkpoint, packing
from vcr1_fast.model.family import family_named, family_of
from vcr1_fast.model.forward import completion_logps, prompt_features
from vcr1_fast.model.packing import Group
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.vision import encode_videos, freeze_vision, reorder_frames, vision_is_frozen
from vcr1_fast.model.wrapping import checkpoint_activations
from vcr1_fast.train import scoring
from vcr1_fast.train.loop import train
from vcr1_fast.train.planner import Footprint
from vcr1_fast.train.setup import prepare_model
from vcr1_fast.train.sft import sft


@pytest.fixture(scope="module", params=case.FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory):
    return case.write(tmp_path_factory.mktemp(name), name)


@pytest.fixture
def loaded(name, directory, monkeypatch):
    return case.load_exact(monkeypatch, directory, name)


# --- the shared step ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        ("one group", "fused"),
        ("ragged pack", "fused"),
        ("images", "fused"),
        ("ragged pack", "merged"),
        ("ragged pack", "varlen"),
        ("ragged pack", "masked"),
    ],
)
def test_the_shared_step_equals_each_completion_alone(loaded, name, shape, backend):
    model, processor = loaded
    attention.prepare_attention(model, backend)
    groups, stock = case.groups(processor, case.shapes(name)[shape]), case.stock(model)
    ours, expected = case.shared(model, groups), case.alone(stock, groups)
    assert (ours - expected).abs().max() < 1e-9
    mine, other = case.gradients(model, ours), case.gradients(stock, expected)
    case.assert_same(mine, other, 1e-7)
    assert len(mine) == len(list(model.parameters()))
    moved = {key: float(gradient.abs().max()) > 0 for key, gradient in mine.items()}
    # A key's bias shifts all scores of a query alike.
    assert all(moved[key] for key in moved if not key.endswith("k_proj.bias"))


@pytest.mark.parametrize(("frozen", "recomputed"), [(False, True), (True, True), ("merger", False)])
def test_frozen_vision_and_recomputed_activations(loaded, name, frozen, recomputed):
    model, processor = loaded
    if frozen:
        freeze_vision(model, merger=frozen != "merger")
    groups = case.groups(processor, case.shapes(name)["ragged pack"])
    stock = case.stock(model)
    assert vision_is_frozen(model) is (frozen is True)
    if recomputed:
        checkpoint_activations(model)
        model.train()
    runs = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    mine = case.gradients(model, case.shared(model, groups))
    assert len(runs) == 1 + recomputed
    case.assert_same(mine, case.gradients(stock, case.alone(stock, groups)), 1e-7)
    if frozen == "merger":
        kept = {f"{key.split('.')[2]}." for key in mine if ".visual." in key}
        assert kept == set(family_named(name).projection_prefixes)


def test_with_transformers_own_casts_the_difference_is_rounding(name, directory):
    model, processor = checkpoint.load(directory, dtype=torch.float64, mrope="installed")
    groups = case.groups(processor, case.shapes(name)["ragged pack"])
    stock = case.stock(model)
    ours, expected = case.shared(model, groups), case.alone(stock, groups)
    # Norms and vision rotations are float32 in transformers, and the delta rule, whose rounding
    # grows from layer to layer with weights as large as these.
    values, slopes = (2e-2, 1e-1) if name == "qwen3_5" else (1e-6, 1e-5)
    assert (ours - expected).abs().max() < values
    case.assert_same(case.gradients(model, ours), case.gradients(stock, expected), slopes)


def test_the_comparison_notices_what_is_left_out(loaded, name, monkeypatch):
    model, processor = loaded
    groups = case.groups(processor, case.shapes(name)["one group"])
    assert case.difference(model, groups) < 1e-9
    flat = [
        dataclasses.replace(
            group,
            prompt=dataclasses.replace(
                group.prompt, positions=torch.arange(len(group.prompt)).expand(3, -1)
            ),
        )
        for group in groups
    ]
    assert case.difference(model, flat) > 1e-3
    with monkeypatch.context() as patch:
        one = packing.Span
        # Completions that see the ones before them.
        patch.setattr(
            packing,
            "Span",
            lambda start, prompt, lengths, device: one(start, prompt, (sum(lengths),), device),
        )
        assert case.difference(model, groups) > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(packing, "next_position", lambda positions: 0)
        assert case.difference(model, groups) > 1e-3


def test_features_may_be_given(loaded, name):
    model, processor = loaded
    groups = case.groups(processor, case.shapes(name)["ragged pack"])
    levels = family_named(name).feature_levels(model.config)
    features = prompt_features(model, [group.prompt for group in groups])
    count = int(groups[0].prompt.is_vision.sum())
    assert features[1] is None and features[0].shape == (count, 32 * levels)
    given = [
        dataclasses.replace(group, vision=None if found is None else found.detach())
        for group, found in zip(groups, features, strict=True)
    ]
    with torch.no_grad():
        assert (completion_logps(model, given) - completion_logps(model, groups)).abs().max() < 1e-6
    leaf = features[0].detach().requires_grad_()
    case.shared(model, [dataclasses.replace(groups[0], vision=leaf)]).sum().backward()
    assert all(float(level.abs().max()) > 0 for level in leaf.grad.split(32, dim=1))


def test_a_prepared_model_can_be_copied(loaded, name):
    model, processor = loaded
    groups = case.groups(processor, case.shapes(name)["one group"])
    with torch.no_grad():
        expected = case.shared(model, groups)
        assert torch.equal(case.shared(pickle.loads(pickle.dumps(model)), groups), expected)


# --- the vision encoder ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [[(3, 4, 4)], [(2, 8, 10), (1, 4, 8), (5, 2, 2)]])
def test_the_vision_encoder_equals_transformers(loaded, name, grid):
    model, _ = loaded
    grids = torch.tensor(grid)
    size = int(grids.prod(dim=1).sum())
    pixels = torch.randn(size, family_named(name).layout.values, dtype=torch.float64)
    out = case.stock(model).model.visual(pixels, grid_thw=grids, return_dict=True)
    parts = encode_videos(model, pixels, grids)
    assert [len(part) for part in parts] == (grids.prod(dim=1) // 4).tolist()
    levels = torch.cat(list(parts)).split(32, dim=1)
    expected = [out.pooler_output, *getattr(out, "deepstack_features", [])]
    assert len(levels) == len(expected) == family_named(name).feature_levels(model.config)
    for mine, other in zip(levels, expected, strict=True):
        assert (mine - other).abs().max() < 1e-9


def test_shuffled_frames_need_no_second_pass(loaded):
    """Temporal patches in another order: features, all levels, as if the frames were shuffled."""
    model, processor = loaded
    clips = [case.clip(6, 64, 96), case.clip(4, 32, 64, seed=2)]
    orders = [(2, 0, 1), (1, 0)]
    prompt = processor.prompt("x", clips)
    shuffled = [
        dataclasses.replace(
            clip,
            frames=clip.frames.reshape(-1, 2, *clip.frames.shape[1:])[list(order)].reshape(
                clip.frames.shape
            ),
        )
        for clip, order in zip(clips, orders, strict=True)
    ]
    with torch.no_grad():
        (plain,) = prompt_features(model, [prompt])
        (expected,) = prompt_features(model, [processor.prompt("x", shuffled)])
    got = reorder_frames(plain, prompt.video_grid_thw, orders)
    assert (got - expected).abs().max() < 1e-12
    assert (plain - expected).abs().max() > 1e-3


# --- rollout --------------------------------------------------------------------------------------


def _prompts(processor, name, *cases):
    shape = [group for one in cases for group in case.shapes(name)[one]]
    return [group.prompt for group in case.groups(processor, shape)]


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_greedy_rollout_equals_generate(loaded, name, decoding):
    model, processor = loaded
    prompts = _prompts(processor, name, "ragged pack", "images")
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12, decoding=decoding)
    got = rollout(model, processor, prompts, 2, sampling)
    stock = case.stock(model)
    banned = processor.banned_ids(len(model.lm_head.weight)).tolist()
    stock.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=processor.stop_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=banned,
    )
    for prompt, (first, second) in zip(prompts, got.tokens, strict=True):
        tokens = stock.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            **case.rope(stock, prompt),
            **case.media(prompt),
        )[0, len(prompt) :]
        assert torch.equal(first, tokens) and torch.equal(second, tokens)
    assert len({tuple(tokens[0].tolist()) for tokens in got.tokens}) > 2  # not the same answer


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_rollout_and_policy_agree(loaded, name, decoding):
    """Completions of unlike lengths: rows leave while others go on."""
    model, processor = loaded
    with torch.no_grad():  # about one token in five ends a completion
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)).double())
        model.lm_head.bias[processor.stop_id] = 4.0
    prompts = _prompts(processor, name, "ragged pack")
    sampling = SamplingConfig(max_new_tokens=10, decoding=decoding)
    got = rollout(model, processor, prompts, 4, sampling, torch.Generator().manual_seed(0))
    groups = [Group(p, tokens) for p, tokens in zip(prompts, got.tokens, strict=True)]
    sampled = torch.cat([one for group in got.full_logps for one in group])
    with torch.no_grad():
        assert (case.shared(model, groups) - sampled).abs().max() < 1e-9


def test_a_conversation_is_one_pass_over_all_that_was_said(loaded, name):
    model, processor = loaded
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    clips = [case.clip(6, 64, 96), case.image()]
    questions = ("When does it appear?", "And then?")
    talk = Conversation(model, processor, clips, sampling)
    answers = ["".join(talk.ask(question)) for question in questions]
    prompt = processor.prompt(questions[0], clips)
    result = rollout(model, processor, [prompt], 1, sampling)
    first = result.tokens[0][0]
    assert answers[0] == processor.decode(first) != ""
    # The second answer by transformers, without a cache; turns written out as in the template.
    cut = first if first[-1] == processor.stop_id else F.pad(first, (0, 1), value=processor.stop_id)
    begun = prompt.text.rpartition("<|im_start|>assistant\n")[2]
    turn = f"\n<|im_start|>user\n{questions[1]}<|im_end|>\n<|im_start|>assistant\n{begun}"
    tokens = torch.cat([prompt.input_ids, cut, processor.encode(turn)])
    stock, answer = case.stock(model), []
    while len(answer) < sampling.max_new_tokens:
        types = F.pad(prompt.mm_token_type_ids, (0, len(tokens) - len(prompt)))
        with torch.no_grad():
            logits = stock(
                input_ids=tokens[None],
                mm_token_type_ids=types[None],
                **case.rope(stock, prompt),
                **case.media(prompt),
            ).logits[0, -1]
        logits[processor.banned_ids(len(logits))] = -torch.inf
        if int(logits.argmax()) == processor.stop_id:
            break
        answer.append(int(logits.argmax()))
        tokens = F.pad(tokens, (0, 1), value=answer[-1])
    assert answers[1] == processor.decode(answer) != ""


# --- the page of models ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Qwen3-VL 2B", "Qwen3.5 0.8B"])
def test_the_table_of_memory_is_what_the_planner_counts(model):
    """One model of a family: all take half a minute (`make docs`)."""
    docs = Path(__file__).resolve().parents[1] / "docs"
    written = runpy.run_path(str(docs / "write_models.py"))
    line = written["row"](model, written["MODELS"][model])
    assert line in (docs / "models.md").read_text().splitlines()


# --- what a user does -----------------------------------------------------------------------------


def test_a_checkpoint_saves_and_loads(name, directory, tmp_path):
    family = family_named(name)
    model, processor = checkpoint.load(directory, video_text="installed")
    assert type(model) is family.model_class() and family_of(model) is family
    assert processor.video_text == "installed"
    checkpoint.save(model, processor, tmp_path / "out")
    again, other = checkpoint.load(tmp_path / "out")
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight)
    assert (other.video, other.image) == (processor.video, processor.image)
    assert other.video_text == "trained"  # set by a run, not by a checkpoint
    bare = dataclasses.replace(processor.with_image(max_pixels=90 * 1024), sources={})
    bare.save_pretrained(tmp_path / "out")
    other = checkpoint.load_processor(tmp_path / "out")
    assert (other.video, other.image) == (bare.video, bare.image)


RUN_SIZES = {
    name: {k: v for k, v in sizes.items() if k != "position_grid"}
    for name, sizes in case.CONFIGS.items()
}


@pytest.fixture(scope="module")
def inputs(name, tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), name, **RUN_SIZES[name])


@pytest.mark.parametrize("freeze", [True, False])
def test_adapters_leave_vision_alone_on_request(name, inputs, tmp_path, freeze):
    changes = [
        "model.lora_rank=2",
        f"model.freeze_vision={str(freeze).lower()}",
        "model.video_text=installed",
    ]
    config = configure(*inputs, tmp_path / "run", *changes)
    model, processor = prepare_model(config, torch.device("cpu"))
    assert processor.video_text == "installed"
    adapted = [key.split(".lora_A")[0] for key, _ in model.named_parameters() if "lora_A" in key]
    # Every linear layer of the language model but projections to one number a head.
    linear = {
        key.removeprefix("base_model.model.")
        for key, module in model.named_modules()
        if "language_model.layers" in key and hasattr(module, "lora_A")
    }
    plain = {
        key
        for key, module in checkpoint.load(inputs[0])[0].named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in key
    }
    assert {key.rpartition(".")[2] for key in plain - linear} <= {"in_proj_a", "in_proj_b"}
    assert any(".visual." in key for key in adapted) is not freeze
    assert vision_is_frozen(model) is freeze
    assert (Footprint.of(model).per_patch == 0) is freeze


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reward_text(answers, config, judge):
    """A reward that differs between almost any two completions."""
    return [({"text": sum(map(ord, text)) % 97 / 97}, {}) for _, text in answers]


def test_a_run_of_grpo_and_one_of_sft(name, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "own_rewards", reward_text)
    frames = 5 if name in case.TIMED else 4
    sizes = (f"data.frames.num_frames={frames}", "data.frames.max_pixels=4096")
    train(configure(*inputs, tmp_path / "grpo", "loss.beta=0.04", *sizes))
    metrics = _lines(tmp_path / "grpo/metrics.jsonl")
    assert len(metrics) == 2
    assert all(line["rollout_gap_max"] < 1e-4 for line in metrics)
    assert any(line["grad_norm"] > 0 for line in metrics)
    trained, _ = checkpoint.load(tmp_path / "grpo/model")
    before, _ = checkpoint.load(inputs[0])
    changed = {
        key
        for key, weight in trained.state_dict().items()
        if not torch.equal(weight, before.state_dict()[key])
    }
    assert any(".visual.merger" in key for key in changed)
    for prefix in family_named(name).projection_prefixes:
        assert any(f".visual.{prefix}" in key for key in changed)
    sft(configure(*inputs, tmp_path / "sft", *sizes, "optim.steps=6", "optim.lr=1e-2"))
    losses = [line["loss"] for line in _lines(tmp_path / "sft/metrics.jsonl")]
    assert losses[-1] < losses[0]
