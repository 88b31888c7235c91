"""Model families: how one is found, that a second one needs one folder, and that nothing else in
the package knows the first one."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import fake_family
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_run import configure

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.model import checkpoint
from vcr1_fast.model.family import families, family_named, family_of, register_family
from vcr1_fast.model.forward import (
    cache_keyword,
    completion_hidden,
    embed,
    language_model_forward,
    lm_head,
    prompt_features,
)
from vcr1_fast.model.packing import Group
from vcr1_fast.model.prompt import next_position
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.vision import freeze_vision
from vcr1_fast.train.planner import Footprint
from vcr1_fast.train.setup import prepare_model

PACKAGE = Path(__file__).resolve().parents[1] / "vcr1_fast"
SIZES = {
    "hidden_size": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "vision_hidden": 16,
    "vocab_limit": 300,
    "initializer_range": 0.3,
}


@dataclass
class Clip:
    frames: np.ndarray
    fps: float | None


def _clip(*shape, fps=2.0, seed=0):
    frames = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Clip(frames, fps)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    with fake_family.installed(tmp_path_factory.mktemp("models")) as family:
        yield family


@pytest.fixture(scope="module")
def loaded(fake, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    fake_family.write_checkpoint(fake, path, ["When? 1.5 to 3.5"], **SIZES)
    return checkpoint.load(path, dtype=torch.float64)


OWN_WORDS = {
    "qwen2_5_vl": r"qwen_?-?2(?!\d)|(?<![\w.:])(?:14|28|1176|1_176)(?![\w.:])|0\.4814|0\.2686",
    "qwen3_vl": r"qwen_?-?3(?!\d)|(?<![\w.:])(?:1536|1_536)(?![\w.:])|deepstack_",
    "qwen3_5": r"qwen_?-?3[._]5|linear_attn|delta_?net|(?<![\w.:])248_?320(?![\w.:])",
}


@pytest.mark.parametrize("family", OWN_WORDS)
def test_nothing_outside_its_folder_knows_a_family(family):
    """Its names, sizes and normalisation. The ops compile two patch sizes, which they must name;
    the demo says which family it trains; another family's folder may compare itself with it, or
    name a class of transformers that both use, but not import it."""
    words = re.compile(OWN_WORDS[family], re.IGNORECASE)
    imported = re.compile(rf"vcr1_fast\.model(?:\.| import .*\b){family}\b")
    allowed = {"demo/settings.py": 'FAMILY = family_named("qwen2_5_vl")'}
    folders = tuple(f"model/{name}/" for name in OWN_WORDS)
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith((f"model/{family}/", "ops/")):
            continue
        forbidden = imported if name.startswith(folders) else words
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if forbidden.search(line) and line != allowed.get(name):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
    own = "\n".join(file.read_text() for file in (PACKAGE / "model" / family).glob("*.py"))
    assert words.search(own) and imported.search(own)  # the searches find what they are for


def test_families_are_found_by_their_folders(fake):
    assert {*OWN_WORDS, "fake_vl"} == set(families())
    assert family_named("fake_vl") is fake is not family_named("qwen2_5_vl")


def test_an_unknown_type_lists_the_known_ones(fake):
    with pytest.raises(
        ValueError, match="model_type is 'x', known are fake_vl, qwen2_5_vl, qwen3_5, qwen3_vl"
    ):
        family_named("x")
    with pytest.raises(ValueError, match="model_type is None"):
        family_named(None)


def test_a_model_type_belongs_to_one_family(fake):
    register_family(fake)  # again: the same one
    with pytest.raises(ValueError, match="'fake_vl' is registered by another family"):
        register_family(replace(fake, lora_targets=()))


def test_the_second_family_loads_by_its_model_type(loaded, fake):
    model, processor = loaded
    assert type(model).__name__ == "FakeModel" and family_of(model) is fake
    assert processor.video.layout == fake.layout
    prompt = processor.prompt("When?", [_clip(4, 64, 96)])
    assert prompt.pixel_values_videos.shape == (2 * 4 * 6, 3 * 2 * 16 * 16)
    assert int(prompt.is_vision.sum()) == 2 * 2 * 3


def test_its_patches_are_the_frames_normalised(loaded):
    _, processor = loaded
    clip = _clip(2, 32, 32)
    patches = processor.prompt("x", [clip]).pixel_values_videos
    layout = processor.video.layout
    mean, std = (torch.tensor(x)[:, None, None] for x in (layout.mean, layout.std))
    frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2) / 255  # (T, C, H, W)
    corner = ((frames - mean) / std)[:, :, :16, 16:]  # the second patch of the first row
    rows = patches[1].view(3, 2, 16, 16).transpose(0, 1)
    torch.testing.assert_close(rows, corner, rtol=0, atol=1e-5)


def test_rollout_and_policy_of_the_second_family(loaded, fake):
    """Rollout's log-probs and the policy's are those of transformers' own forward over each
    completion with its own prompt, and every trained parameter gets a gradient."""
    model, processor = loaded
    prompts = [
        processor.prompt("When?", [_clip(4, 64, 96), _clip(1, 32, 64, fps=None)]),
        processor.prompt("What?", [_clip(6, 32, 32, seed=1)]),
        processor.prompt("Text alone."),
    ]
    sampling = SamplingConfig(max_new_tokens=6)
    got = rollout(model, processor, prompts, 2, sampling, torch.Generator().manual_seed(0))
    assert got.vision[0].shape == (int(prompts[0].is_vision.sum()), 2 * 32)
    groups = [
        Group(prompt, completions) for prompt, completions in zip(prompts, got.tokens, strict=True)
    ]
    hidden, labels, _ = completion_hidden(model, groups)
    logps = F.linear(hidden, *lm_head(model)).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    sampled = torch.cat([one for group in got.full_logps for one in group])
    assert (logps - sampled).abs().max() < 1e-9
    logps.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    plain = torch.cat([_alone(model, g.prompt, c) for g in groups for c in g.completions])
    assert (logps - plain).abs().max() < 1e-9
    plain.sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        # transformers computes norms in float32, which is where the difference comes from.
        assert (gradients[name] - parameter.grad).abs().max() <= 1e-5 * scale, name
        assert scale > 0, name
    model.zero_grad()


def _alone(model, prompt, completion):
    """(C,) log-probs by the model's own forward; positions written out."""
    language_model = model.model.language_model
    prepared, language_model.config._attn_implementation = (
        language_model.config._attn_implementation,
        "sdpa",
    )
    more = next_position(prompt.positions) + torch.arange(len(completion))
    positions = torch.cat([prompt.positions, more.expand(3, -1)], dim=1)[:, None]
    inputs = {
        "pixel_values_videos": prompt.pixel_values_videos,
        "video_grid_thw": None if prompt.pixel_values_videos is None else prompt.video_grid_thw,
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": None if prompt.pixel_values is None else prompt.image_grid_thw,
    }
    tokens = torch.cat([prompt.input_ids, completion])[None]
    logits = model(
        input_ids=tokens,
        position_ids=positions,
        use_cache=False,
        **{name: value for name, value in inputs.items() if value is not None},
    ).logits[0, len(prompt) - 1 : -1]
    language_model.config._attn_implementation = prepared
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def test_features_of_another_width_are_refused(loaded):
    model, processor = loaded
    prompt = processor.prompt("When?", [_clip(4, 64, 96)])
    (features,) = prompt_features(model, [prompt])
    with pytest.raises(ValueError, match="vision features are 32 wide, expected 64"):
        embed(model, prompt.input_ids, prompt.is_vision, [features[:, :32]])
    with pytest.raises(ValueError, match="12 vision tokens but 11 vision features"):
        embed(model, prompt.input_ids, prompt.is_vision, [features[1:]])


def test_the_planner_counts_the_familys_patches(loaded, fake):
    model, _ = loaded
    own = Footprint.of(model).per_patch
    sizes = fake.sizes(model.config)
    assert (sizes.text.depth, sizes.text.width, sizes.text.keys) == (2, 32, 16)
    assert (sizes.vision.width, sizes.vision.keys) == (16, 40.0)
    smaller = replace(fake, layout=replace(fake.layout, patch=8))
    assert smaller.layout.values == fake.layout.values // 4
    assert own > 8 * fake.layout.values  # float64 patches are part of it
    try:
        freeze_vision(model)
        assert Footprint.of(model).per_patch == 0
    finally:
        model.requires_grad_(True)


def test_the_settings_of_training_reach_the_processor(fake, tmp_path):
    fake_family.write_checkpoint(fake, tmp_path / "model", ["When?"], **SIZES)
    assert checkpoint.load_processor(tmp_path / "model", mrope="installed").mrope == "installed"
    config = configure(tmp_path / "model", tmp_path / "r.jsonl", tmp_path / "run")
    assert prepare_model(config, torch.device("cpu"))[1].mrope == "trained"
    changes = ["model.mrope=installed", "model.lora_rank=2", "model.freeze_vision=true"]
    config = configure(tmp_path / "model", tmp_path / "r.jsonl", tmp_path / "run", *changes)
    model, processor = prepare_model(config, torch.device("cpu"))
    assert processor.mrope == "installed"
    assert processor.frames == config.data.frames
    adapted = {name.split(".lora_A")[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * len(fake.lora_targets)  # two layers, none in the encoder
    assert {name.rpartition(".")[2] for name in adapted} == set(fake.lora_targets)


@pytest.mark.parametrize("mrope", ["trained", "installed"])
def test_mrope_is_set_when_a_checkpoint_is_loaded(loaded, mrope):
    _, processor = loaded
    clip = _clip(24, 32, 32)
    given = replace(processor, mrope=mrope).prompt("When?", [clip])
    assert given.positions.shape == (3, len(given))
    end = int(given.is_vision.nonzero().max())
    largest = int(given.positions[:, : end + 1].max())
    after = int(given.positions[0, end + 1])
    assert (after == largest + 1) is (mrope == "trained")
    with pytest.raises(ValueError, match=r"mrope must be one of .*'newest'"):
        replace(processor, mrope="newest")


def test_a_family_may_choose_frames_by_another_rule(loaded):
    class Odd(FrameConfig):
        def count(self, total, video_fps):
            return 3

    _, processor = loaded
    frames = Odd(num_frames=4, min_pixels=1024, max_pixels=1024)
    assert processor.with_frames(frames).frames.count(30, 10.0) == 3
    assert frames.indices(30, 3).tolist() == [0, 14, 29]


def test_the_cache_goes_by_the_name_that_the_text_model_takes():
    def new(self, input_ids=None, cache=None, inputs_embeds=None):
        """As transformers from 5.24 on."""

    def old(self, input_ids=None, past_key_values=None, inputs_embeds=None):
        """As transformers before."""

    assert (cache_keyword(new), cache_keyword(old)) == ("cache", "past_key_values")


def test_a_model_that_was_not_prepared_is_causal(loaded):
    """The dummy mask must never reach stock attention, which would show every token to all."""
    model, processor = loaded
    tokens = processor.prompt("When does it happen?").input_ids
    positions = torch.arange(len(tokens)).expand(3, 1, -1)
    embeddings = model.get_input_embeddings()(tokens)[None]
    expected = model.model.language_model(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False
    ).last_hidden_state
    model.model.language_model.config._attn_implementation = "sdpa"
    got = language_model_forward(model, embeddings, positions)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    seen = language_model_forward(model, embeddings[:, :5], positions[..., :5])
    torch.testing.assert_close(got[:, :5], seen, rtol=0, atol=1e-12)
