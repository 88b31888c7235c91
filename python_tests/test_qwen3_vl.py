"""Qwen3-VL against transformers: what it sees, its positions, its model, its rollout."""

import dataclasses
import importlib
import json
import math
import random
import re
from dataclasses import dataclass
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_run import configure, write_inputs
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen3_vl import modeling_qwen3_vl, processing_qwen3_vl

from vcr1_fast.data.records import load_records
from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import ClipReader
from vcr1_fast.doctor import models as doctor_rows
from vcr1_fast.evaluate.chat import Conversation
from vcr1_fast.model import attention, checkpoint, packing
from vcr1_fast.model.family import family_named, family_of
from vcr1_fast.model.files import CheckpointError
from vcr1_fast.model.forward import completion_hidden, completion_logps, lm_head, prompt_features
from vcr1_fast.model.packing import Group
from vcr1_fast.model.prompt import next_position
from vcr1_fast.model.qwen3_vl.processor import Processor, VideoProcessorConfig
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.timed_text.frames import ClipFrames
from vcr1_fast.model.timed_text.positions import mrope_positions
from vcr1_fast.model.timed_text.preprocessor import LAYOUT, clip_size
from vcr1_fast.model.timed_text.processor import END, PAD, START
from vcr1_fast.model.vision import encode_videos, freeze_vision, reorder_frames, vision_is_frozen
from vcr1_fast.model.wrapping import checkpoint_activations
from vcr1_fast.train import scoring
from vcr1_fast.train.loop import train
from vcr1_fast.train.planner import Footprint
from vcr1_fast.train.setup import prepare_model
from vcr1_fast.train.sft import sft

# By its full name: the package hides it where torchvision is missing, but parts run without.
theirs = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")

FAMILY = family_named("qwen3_vl")
CONFIG = FAMILY.tiny_config(
    hidden_size=32,
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=16,
    vision_hidden=16,
    vision_heads=1,
    vocab_limit=400,
    position_grid=5,
    # Norms and softmax that matter: at 0.05 nearly everything is a copy of its input.
    initializer_range=0.3,
)


@dataclass
class Clip:
    frames: np.ndarray
    fps: float | None
    times: np.ndarray | None = None


def _clip(frames, height=64, width=64, fps=2.0, seed=0, times=None):
    shape = (frames, height, width, 3)
    return Clip(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), fps, times)


def _image(height=64, width=64, seed=0):
    return _clip(1, height, width, None, seed)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3_vl")
    FAMILY.write_tiny(path, texts=["When is it visible? From 1.5 to 3.5 seconds."], config=CONFIG)
    return path


@pytest.fixture(scope="module")
def processor(directory):
    return checkpoint.load_processor(directory)


@pytest.fixture
def exact(monkeypatch):
    """transformers' model without its casts to float32, whose rounding would hide differences."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    def rotate(q, k, cos, sin):
        half = modeling_qwen3_vl.rotate_half
        cos, sin = cos[..., None, :].double(), sin[..., None, :].double()
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    monkeypatch.setattr(modeling_qwen3_vl.Qwen3VLTextRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen3_vl, "apply_rotary_pos_emb_vision", rotate)


@pytest.fixture
def loaded(directory, exact):
    model, processor = checkpoint.load(directory, dtype=torch.float64)
    with torch.no_grad():  # biases and norms that are not 0 and 1
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.1 * noise
    return model, processor


# --- text, patches, sizes, frames -----------------------------------------------------------------

CASES = {
    "none": ("When?", []),
    "clip": ("When is it < 3?", [_clip(6, 64, 96)]),
    "odd frames": ("When?", [_clip(5, 60, 90, fps=3.0)]),
    "stamps": ("When?", [_clip(4, times=np.array([0.04, 1.25, 7.85, 121.96]))]),
    "clips": ("Which?", [_clip(2, 32, 64, fps=0.37), _clip(7, 100, 50)]),
    "image": ("Where?", [_image(70, 90)]),
    "all": ("What?", [_image(40, 64), _clip(3, 64, 32), _image(64, 96), _clip(4, 32, 32)]),
}


def _their_line(clip, grid):
    """A clip's line of text by transformers' own processor."""
    their = processing_qwen3_vl.Qwen3VLProcessor.__new__(processing_qwen3_vl.Qwen3VLProcessor)
    their.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    their.video_token, their.vision_start_token, their.vision_end_token = PAD, START, END
    times = np.arange(len(clip.frames)) / clip.fps if clip.times is None else clip.times
    # Frame i of a video at 1 frame a second is shown at second i.
    metadata = SimpleNamespace(fps=1.0, frames_indices=times.tolist())
    return their.replace_video_token(
        {"video_grid_thw": grid[None], "video_metadata": [metadata]}, 0
    )


@pytest.mark.parametrize("media_first", [False, True])
@pytest.mark.parametrize("video_text", ["trained", "installed"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tokens_are_those_of_transformers(processor, case, video_text, media_first):
    text, clips = case
    ours = dataclasses.replace(processor, video_text=video_text, media_first=media_first)
    prompt = ours.prompt(text, clips)
    expected = prompt.text
    assert expected.count(PAD) == sum(clip.fps is not None for clip in clips)
    grids = iter(prompt.video_grid_thw)
    for clip in clips:
        if clip.fps is None:
            continue
        line = _their_line(clip, next(grids))
        # 4.57 replaces the pad with its start and end, 5.x the pad alone.
        replaced = START + PAD + END if video_text == "trained" else PAD
        expected = expected.replace(replaced, line.replace(PAD, "<video>"), 1)
    for _, height, width in prompt.image_grid_thw.tolist():
        expected = expected.replace("<|image_pad|>", "<image>" * (height * width // 4), 1)
    expected = expected.replace("<video>", PAD).replace("<image>", "<|image_pad|>")
    ids = torch.tensor(ours.tokenizer.encode(expected, add_special_tokens=False))
    assert torch.equal(prompt.input_ids, ids)
    types = (ids == ours.image_id).long() + 2 * (ids == ours.video_id).long()
    assert torch.equal(prompt.mm_token_type_ids, types)
    assert int(prompt.is_vision.sum()) * 4 == prompt.patches


def test_the_outer_pair_is_two_tokens(processor):
    clip = _clip(5)
    trained, installed = (
        dataclasses.replace(processor, video_text=form).prompt("x", [clip])
        for form in ("trained", "installed")
    )
    assert len(installed) == len(trained) + 2
    decoded = processor.tokenizer.decode(trained.input_ids)
    assert re.findall(r"<([\d.]+) seconds>", decoded) == ["0.2", "1.2", "2.0"]
    start, _, end = decoded.partition("<0.2 seconds>")
    assert START not in start and end.endswith(f"{END}<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match=r"video_text must be one of .*'newest'"):
        dataclasses.replace(processor, video_text="newest")


def test_a_template_that_writes_the_pad_alone(processor):
    """The form in which vLLM takes prompts."""
    bare = dataclasses.replace(processor, chat_template=f"{{{{ 'a{PAD}b' }}}}")
    prompt = bare.prompt("x", [_clip(2)])
    expected = f"a<0.2 seconds>{START}{PAD * 4}{END}b"
    assert torch.equal(prompt.input_ids, bare.encode(expected))


def test_times_must_be_as_many_as_frames(processor):
    with pytest.raises(ValueError, match="a clip of 4 frames has 3 times"):
        processor.prompt("x", [_clip(4, times=np.zeros(3))])


def test_vision_tokens_in_the_text_are_refused(processor):
    with pytest.raises(ValueError, match="2 video tokens for 0 images and 1 clips"):
        processor.prompt(f"look {PAD}", [_clip(4)])


@pytest.mark.parametrize("shape", [(6, 64, 96), (5, 100, 50), (3, 200, 333), (2, 20, 70)])
def test_pixel_values_follow_transformers(processor, shape):
    """torch's resize, transformers' own size rule, order of patches and normalisation."""
    frames = _clip(*shape).frames
    prompt = processor.prompt("x", [Clip(frames, 2.0)])
    video = processor.video
    size = theirs.smart_resize(
        *shape, factor=32, min_pixels=video.min_pixels, max_pixels=video.max_pixels
    )
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if size != shape[1:]:
        planes = F.interpolate(planes, size, mode="bicubic", antialias=True)
    normal = ((planes.float() - 0.5 * 255) / (0.5 * 255))[None]
    patches, *grid = theirs.Qwen3VLVideoProcessor.patchify(None, normal, 16, 2, 2)
    assert prompt.video_grid_thw.tolist() == [grid]
    assert prompt.pixel_values_videos.shape == (math.prod(grid), 1536)
    # Rounding of the resize to uint8: a pixel in a thousand may be off by one.
    error = (prompt.pixel_values_videos - patches[0]).abs()
    assert error.max() <= 1.01 / 127.5 and (error > 1e-6).float().mean() < 2e-3


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 900),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 4000),
    st.integers(0, 40_000),
)
@example(5, 64, 64, 1, 17)  # counted as 4 frames: within the budget
@example(7, 64, 64, 1, 29)  # counted as 8: above it
def test_sizes_are_those_of_transformers(frames, height, width, low, more):
    bounds = {"min_pixels": low * 1024, "max_pixels": (low + more) * 1024}
    try:
        expected = theirs.smart_resize(frames, height, width, factor=32, **bounds)
    except ValueError:
        with pytest.raises(ValueError, match=r"at least 2 frames|above 200"):
            clip_size(frames, height, width, **bounds)
    else:
        # One check of ours sees the frame before its small side is enlarged.
        if max(height, width) <= 200 * min(height, width):
            assert clip_size(frames, height, width, **bounds) == expected


@pytest.mark.parametrize("frames", [2, 5, 31, 400])
def test_a_runs_bounds_hold_for_frames_and_for_the_clip(processor, frames):
    bounds = FrameConfig(min_pixels=4 * 1024, max_pixels=300 * 1024, total_pixels=2000 * 1024)
    config = processor.with_frames(bounds).video
    height, width = config.size(frames, 720, 1280)
    tokens = height * width // 1024
    assert 4 <= tokens <= 300
    assert math.ceil(frames / 2) * tokens <= max(2000, 4.2 * math.ceil(frames / 2)) * 1.1
    if frames == 31:
        assert tokens > 100  # the budget is used
    alone = dataclasses.replace(bounds, total_pixels=None)
    assert math.prod(processor.with_frames(alone).video.size(frames, 720, 1280)) >= height * width


def test_the_cap_of_transformers_is_read(directory, tmp_path):
    checkpoint.load_processor(directory).save_pretrained(tmp_path)
    file = tmp_path / "video_preprocessor_config.json"
    values = json.loads(file.read_text()) | {
        "size": {"shortest_edge": 4096, "longest_edge": 25_165_824},
        "cap_pixels_per_frame": True,
    }
    file.write_text(json.dumps(values))
    video = Processor.from_pretrained(tmp_path).video
    # As in Qwen3VLVideoProcessor.resize: 768 tokens a frame, or its share of the budget.
    for frames, cap in ((4, 768 * 1024), (100, 25_165_824 // 100)):
        expected = theirs.smart_resize(
            frames, 2000, 3000, factor=32, min_pixels=4096, max_pixels=cap * frames
        )
        assert video.size(frames, 2000, 3000) == expected
    assert video.as_json()["cap_pixels_per_frame"] is True
    assert VideoProcessorConfig().size(4, 2000, 3000) != video.size(4, 2000, 3000)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.sampled_from([1.0, 23.976, 25.0, 29.97, 60.0]), st.floats(0.2, 8))
def test_frames_are_those_of_transformers(total, video_fps, fps):
    their = SimpleNamespace(fps=2, num_frames=None, min_frames=4, max_frames=768)
    metadata = SimpleNamespace(total_num_frames=total, fps=video_fps)
    expected = theirs.Qwen3VLVideoProcessor.sample_frames(their, metadata, fps=fps)
    frames = ClipFrames(fps=fps)
    if total < 2:
        with pytest.raises(ValueError, match="too short to sample"):
            frames.count(total, video_fps)
        return
    count = frames.count(total, video_fps)
    assert frames.indices(total, count).tolist() == expected.tolist()


def test_a_number_of_frames_may_be_odd():
    frames = ClipFrames.of(FrameConfig(num_frames=7))
    assert frames.count(100, 25.0) == 7
    with pytest.raises(ValueError, match="cannot take 7 frames of 6"):
        frames.count(6, 25.0)
    with pytest.raises(ValueError, match="0 at 25"):
        frames.count(0, 25.0)
    whole = ClipFrames(rule="hf")
    assert whole.indices(10, 5).tolist() == [0, 2, 4, 6, 8]


# --- positions ------------------------------------------------------------------------------------


def _their_positions(prompt):
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = MethodType(Qwen3VLModel.get_vision_position_ids, model)
    positions, delta = Qwen3VLModel.get_rope_index(
        model,
        prompt.input_ids[None],
        mm_token_type_ids=prompt.mm_token_type_ids[None],
        image_grid_thw=prompt.image_grid_thw,
        video_grid_thw=prompt.video_grid_thw,
    )
    return positions[:, 0], int(delta)


@pytest.mark.parametrize("video_text", ["trained", "installed"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_positions_are_those_of_transformers(processor, case, video_text):
    for mrope in ("trained", "installed"):
        ours = dataclasses.replace(processor, video_text=video_text, mrope=mrope)
        prompt = ours.prompt(*case)
        expected, delta = _their_positions(prompt)
        assert torch.equal(prompt.positions, expected)
        assert next_position(prompt.positions) == len(prompt) + delta


def test_positions_refuse_grids_that_do_not_match():
    types = torch.tensor([0, 2, 2, 2, 2, 0, 2, 2, 2, 2, 0])
    clip, none = torch.tensor([[2, 4, 4]]), torch.zeros(0, 3, dtype=torch.int64)
    assert mrope_positions(types, clip, none).shape == (3, 11)
    with pytest.raises(ValueError, match="no vision tokens for 1 temporal patches"):
        mrope_positions(types[:5], clip, none)
    with pytest.raises(ValueError, match="more runs of vision tokens"):
        mrope_positions(types, none, none)
    with pytest.raises(ValueError, match=r"a run of 4 vision tokens, but its grid .* 2 x 3"):
        mrope_positions(types, torch.tensor([[2, 4, 6]]), none)


# --- the model ------------------------------------------------------------------------------------

SHAPES = {
    "one group": [([_clip(5, 64, 96)], [5, 3, 8])],
    "ragged pack": [
        ([_clip(4)], [4, 1, 7, 2]),
        ([], [1, 1]),
        ([_clip(3, 64, 32), _clip(2, 32, 64, seed=3)], [3, 6]),
    ],
    "images": [([_image(64, 96)], [4, 2]), ([_image(), _clip(3), _image(32, 64)], [3, 3])],
}


def _groups(processor, shape, seed=0):
    rng = random.Random(seed)
    return [
        Group(
            processor.prompt("x" * rng.randint(1, 9), clips),
            [torch.tensor([rng.randrange(256) for _ in range(n)]) for n in lengths],
        )
        for clips, lengths in shape
    ]


def _media(prompt):
    """Keyword arguments of transformers' model."""
    given = {}
    if prompt.pixel_values_videos is not None:
        given["pixel_values_videos"] = prompt.pixel_values_videos
        given["video_grid_thw"] = prompt.video_grid_thw
    if prompt.pixel_values is not None:
        given["pixel_values"] = prompt.pixel_values
        given["image_grid_thw"] = prompt.image_grid_thw
    return given


def _stock(model):
    """The same weights in transformers' model as it comes: SDPA, its own vision attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "sdpa"
    stock = Qwen3VLForConditionalGeneration(config).to(model.dtype).eval()
    stock.load_state_dict(model.state_dict())
    for mine, other in zip(model.parameters(), stock.parameters(), strict=True):
        other.requires_grad_(mine.requires_grad)
    return stock


def _alone(stock, groups):
    """(N,) log-probs of each completion with its own prompt, positions by transformers."""
    found = []
    for group in groups:
        prompt = group.prompt
        for completion in group.completions:
            types = [prompt.mm_token_type_ids, torch.zeros_like(completion)]
            stock.model.rope_deltas = None
            logits = stock(
                input_ids=torch.cat([prompt.input_ids, completion])[None],
                mm_token_type_ids=torch.cat(types)[None],
                use_cache=False,
                **_media(prompt),
            ).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(found)


def _shared(model, groups):
    hidden, labels, _ = completion_hidden(model, groups)
    rows = F.linear(hidden, *lm_head(model)).log_softmax(-1)
    return rows.gather(1, labels[:, None])[:, 0]


def _gradients(model, logps):
    model.zero_grad(set_to_none=True)
    (logps * torch.linspace(-1.0, 1.0, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).abs().max())
        assert error <= tolerance * float(gradient.abs().max()), (name, error)


@pytest.mark.parametrize("backend", ["fused", "merged", "masked"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_shared_step_equals_each_completion_alone(loaded, shape, backend):
    model, processor = loaded
    attention.prepare_attention(model, backend)
    groups, stock = _groups(processor, shape), _stock(model)
    ours, expected = _shared(model, groups), _alone(stock, groups)
    assert (ours - expected).abs().max() < 1e-9
    mine, other = _gradients(model, ours), _gradients(stock, expected)
    _assert_same(mine, other, 1e-7)
    assert len(mine) == len(list(model.parameters()))
    assert all(float(gradient.abs().max()) > 0 for gradient in mine.values())


@pytest.mark.parametrize(
    ("frozen", "recomputed"), [(False, True), (True, False), (True, True), ("merger", False)]
)
def test_frozen_vision_and_recomputed_activations(loaded, frozen, recomputed):
    model, processor = loaded
    if frozen:
        freeze_vision(model, merger=frozen != "merger")
    groups, stock = _groups(processor, SHAPES["ragged pack"]), _stock(model)
    assert vision_is_frozen(model) is (frozen is True)
    if recomputed:
        checkpoint_activations(model)
        model.train()
    runs = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    mine = _gradients(model, _shared(model, groups))
    assert len(runs) == 1 + recomputed
    _assert_same(mine, _gradients(stock, _alone(stock, groups)), 1e-7)
    if frozen == "merger":
        kept = {name.split(".")[2] for name in mine if ".visual." in name}
        assert kept == {"merger", "deepstack_merger_list"}


def test_without_the_exact_norms_the_difference_is_rounding(directory):
    model, processor = checkpoint.load(directory, dtype=torch.float64)
    groups, stock = _groups(processor, SHAPES["ragged pack"]), _stock(model)
    ours, expected = _shared(model, groups), _alone(stock, groups)
    assert (ours - expected).abs().max() < 1e-6
    # Norms and vision rotations are float32 in transformers.
    _assert_same(_gradients(model, ours), _gradients(stock, expected), 1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_language_model_not_deeper_than_deepstack(layers, tmp_path, exact):
    FAMILY.write_tiny(tmp_path, texts=["a"], config=dataclasses.replace(CONFIG, layers=layers))
    model, processor = checkpoint.load(tmp_path, dtype=torch.float64)
    groups, stock = _groups(processor, SHAPES["one group"]), _stock(model)
    ours, expected = _shared(model, groups), _alone(stock, groups)
    assert (ours - expected).abs().max() < 1e-9
    mine, other = _gradients(model, ours), _gradients(stock, expected)
    # A level that no row can reach has no gradient there, and zeros here.
    unread = {name: mine.pop(name) for name in set(mine) - set(other)}
    assert all("deepstack_merger_list" in n and not g.any() for n, g in unread.items())
    for name in [n for n in other if not other[n].any()]:
        assert not mine.pop(name).any()
        other.pop(name)
    _assert_same(mine, other, 1e-7)


def _difference(model, groups):
    with torch.no_grad():
        return float((_shared(model, groups) - _alone(_stock(model), groups)).abs().max())


def test_the_comparison_notices_what_is_left_out(loaded, monkeypatch):
    model, processor = loaded
    groups = _groups(processor, SHAPES["one group"])
    assert _difference(model, groups) < 1e-9

    def without_deepstack(levels, slots):
        return levels[0], {}

    def swapped(levels, slots):
        return levels[0], {
            "visual_pos_masks": slots[None],
            "deepstack_visual_embeds": levels[:0:-1],
        }

    for inputs in (without_deepstack, swapped):
        with monkeypatch.context() as patch:
            changed = dataclasses.replace(FAMILY, vision_inputs=inputs)
            patch.setattr("vcr1_fast.model.forward.family_of", lambda _, f=changed: f)
            assert _difference(model, groups) > 1e-3
    flat = [
        dataclasses.replace(
            group,
            prompt=dataclasses.replace(
                group.prompt, positions=torch.arange(len(group.prompt)).expand(3, -1)
            ),
        )
        for group in groups
    ]
    assert _difference(model, flat) > 1e-3
    with monkeypatch.context() as patch:
        one = packing.Span
        patch.setattr(
            packing,
            "Span",
            lambda start, prompt, lengths, device: one(start, prompt, (sum(lengths),), device),
        )
        assert _difference(model, groups) > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(packing, "next_position", lambda positions: 0)
        assert _difference(model, groups) > 1e-3


def test_features_are_wide_and_may_be_given(loaded):
    model, processor = loaded
    groups = _groups(processor, SHAPES["ragged pack"])
    width = CONFIG.hidden_size * 3
    features = prompt_features(model, [group.prompt for group in groups])
    assert features[1] is None and features[0].shape == (2 * 4, width)
    given = [
        dataclasses.replace(group, vision=None if found is None else found.detach())
        for group, found in zip(groups, features, strict=True)
    ]
    with torch.no_grad():
        assert (completion_logps(model, given) - completion_logps(model, groups)).abs().max() < 1e-6
    leaf = features[0].detach().requires_grad_()
    _shared(model, [dataclasses.replace(groups[0], vision=leaf)]).sum().backward()
    levels = leaf.grad.split(CONFIG.hidden_size, dim=1)
    assert all(float(level.abs().max()) > 0 for level in levels)


def test_shuffled_frames_need_no_second_pass(loaded):
    """Temporal patches in another order: features, all levels, as if the frames were shuffled."""
    model, processor = loaded
    clips = [_clip(6, 64, 96), _clip(4, 32, 64, seed=2)]
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


@pytest.mark.parametrize(
    "grid", [[(3, 4, 4)], [(2, 6, 10), (1, 4, 6), (5, 2, 2)]], ids=["one", "ragged"]
)
def test_the_vision_encoder_equals_transformers(loaded, grid):
    model, _ = loaded
    grids = torch.tensor(grid)
    size = int(grids.prod(dim=1).sum())
    pixels = torch.randn(size, LAYOUT.values, dtype=torch.float64)
    out = _stock(model).model.visual(pixels, grid_thw=grids, return_dict=True)
    parts = encode_videos(model, pixels, grids)
    assert [len(part) for part in parts] == (grids.prod(dim=1) // 4).tolist()
    levels = torch.cat(list(parts)).split(CONFIG.hidden_size, dim=1)
    expected = [out.pooler_output, *out.deepstack_features]
    assert len(levels) == len(expected) == 3
    for mine, other in zip(levels, expected, strict=True):
        assert (mine - other).abs().max() < 1e-9


# --- rollout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_greedy_rollout_equals_generate(loaded, decoding):
    model, processor = loaded
    prompts = [
        group.prompt for group in _groups(processor, SHAPES["ragged pack"] + SHAPES["images"])
    ]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=12, decoding=decoding)
    got = rollout(model, processor, prompts, 2, sampling)
    stock = _stock(model)
    banned = processor.banned_ids(len(model.lm_head.weight)).tolist()
    stock.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=processor.stop_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=banned,
    )
    for prompt, (first, second) in zip(prompts, got.tokens, strict=True):
        stock.model.rope_deltas = None
        tokens = stock.generate(
            input_ids=prompt.input_ids[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            **_media(prompt),
        )[0, len(prompt) :]
        assert torch.equal(first, tokens) and torch.equal(second, tokens)
    assert len({tuple(tokens[0].tolist()) for tokens in got.tokens}) > 2  # not the same answer


def test_rollout_and_policy_agree(loaded):
    model, processor = loaded
    prompts = [group.prompt for group in _groups(processor, SHAPES["ragged pack"])]
    sampling = SamplingConfig(max_new_tokens=8)
    got = rollout(model, processor, prompts, 3, sampling, torch.Generator().manual_seed(0))
    groups = [Group(p, tokens) for p, tokens in zip(prompts, got.tokens, strict=True)]
    sampled = torch.cat([one for group in got.full_logps for one in group])
    with torch.no_grad():
        assert (_shared(model, groups) - sampled).abs().max() < 1e-9
    again = rollout(
        model,
        processor,
        prompts,
        3,
        sampling,
        torch.Generator().manual_seed(0),
        vision=got.vision,
    )
    assert all(
        torch.equal(a, b)
        for x, y in zip(got.tokens, again.tokens, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_conversation_is_one_pass_over_all_that_was_said(loaded):
    model, processor = loaded
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    clips, questions = [_clip(5, 64, 96), _image()], ("When does it appear?", "And then?")
    talk = Conversation(model, processor, clips, sampling)
    answers = ["".join(talk.ask(question)) for question in questions]
    prompt = processor.prompt(questions[0], clips)
    result = rollout(model, processor, [prompt], 1, sampling)
    assert answers[0] == result.texts[0][0] != ""
    # The second answer by transformers, without a cache; turns written out as in the template.
    first = result.tokens[0][0]
    cut = first if first[-1] == processor.stop_id else F.pad(first, (0, 1), value=processor.stop_id)
    turn = f"\n<|im_start|>user\n{questions[1]}<|im_end|>\n<|im_start|>assistant\n"
    tokens = torch.cat([prompt.input_ids, cut, processor.encode(turn)])
    stock, answer = _stock(model), []
    while len(answer) < sampling.max_new_tokens:
        types = F.pad(prompt.mm_token_type_ids, (0, len(tokens) - len(prompt)))
        stock.model.rope_deltas = None
        with torch.no_grad():
            logits = stock(
                input_ids=tokens[None], mm_token_type_ids=types[None], **_media(prompt)
            ).logits[0, -1]
        logits[processor.banned_ids(len(logits))] = -torch.inf
        if int(logits.argmax()) == processor.stop_id:
            break
        answer.append(int(logits.argmax()))
        tokens = F.pad(tokens, (0, 1), value=answer[-1])
    assert answers[1] == processor.decode(answer) != ""


# --- what a user does -----------------------------------------------------------------------------


def test_a_checkpoint_saves_and_loads(directory, tmp_path):
    model, processor = checkpoint.load(directory, video_text="installed")
    assert type(model) is Qwen3VLForConditionalGeneration and family_of(model) is FAMILY
    assert processor.video_text == "installed" and isinstance(processor.frames, ClipFrames)
    checkpoint.save(model, processor, tmp_path / "out")
    again, other = checkpoint.load(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert (other.video, other.image) == (processor.video, processor.image)
    assert other.video_text == "trained"  # set by a run, not by a checkpoint
    bare = dataclasses.replace(
        processor.with_image(max_pixels=90 * 1024).with_video(cap_pixels_per_frame=True), sources={}
    )
    bare.save_pretrained(tmp_path / "out")
    other = checkpoint.load_processor(tmp_path / "out")
    assert (other.video, other.image) == (bare.video, bare.image)


def test_a_checkpoint_of_another_patch_size_is_refused(directory, tmp_path):
    checkpoint.load_processor(directory).save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(CheckpointError, match="patch_size 14 is not supported, only 16"):
        Processor.from_pretrained(tmp_path)


def test_an_unknown_family_lists_the_known_ones(directory, tmp_path):
    settings = json.loads((directory / "config.json").read_text()) | {"model_type": "qwen3_vl_moe"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"'qwen3_vl_moe', known are .*qwen3_vl"):
        checkpoint.load(tmp_path)


def test_doctor_says_how_clips_are_written():
    (row,) = [value for name, value in doctor_rows() if "clips as text" in name]
    assert "trained (default) writes no start/end pair" in row
    outer = hasattr(processing_qwen3_vl.Qwen3VLProcessor, "replace_video_token")
    assert ("writes them with one" in row) is outer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), "qwen3_vl", head_dim=16)


@pytest.mark.parametrize("freeze", [True, False])
def test_adapters_leave_vision_alone_on_request(inputs, tmp_path, freeze):
    changes = [
        "model.lora_rank=2",
        f"model.freeze_vision={str(freeze).lower()}",
        "model.video_text=installed",
    ]
    config = configure(*inputs, tmp_path / "run", *changes)
    model, processor = prepare_model(config, torch.device("cpu"))
    assert processor.video_text == "installed"
    adapted = [name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name]
    assert {name.rpartition(".")[2] for name in adapted if "language_model" in name} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert any(".visual." in name for name in adapted) is not freeze
    assert vision_is_frozen(model) is freeze
    assert (Footprint.of(model).per_patch == 0) is freeze


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reward_text(answers, config, judge):
    """A reward that differs between almost any two completions."""
    return [({"text": sum(map(ord, text)) % 97 / 97}, {}) for _, text in answers]


def test_a_run_of_grpo_and_one_of_sft(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "own_rewards", reward_text)
    sizes = ("data.frames.num_frames=5", "data.frames.max_pixels=4096")
    train(configure(*inputs, tmp_path / "grpo", "loss.beta=0.04", *sizes))
    metrics = _lines(tmp_path / "grpo/metrics.jsonl")
    assert len(metrics) == 2
    assert all(line["rollout_gap_max"] < 1e-4 for line in metrics)
    assert any(line["grad_norm"] > 0 for line in metrics)
    trained, _ = checkpoint.load(tmp_path / "grpo/model")
    before, _ = checkpoint.load(inputs[0])
    changed = [
        name
        for name, weight in trained.state_dict().items()
        if not torch.equal(weight, before.state_dict()[name])
    ]
    assert any("deepstack_merger_list" in name for name in changed)
    sft(configure(*inputs, tmp_path / "sft", *sizes, "optim.steps=6", "optim.lr=1e-2"))
    losses = [line["loss"] for line in _lines(tmp_path / "sft/metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_frames_are_resized_where_they_are_decoded(inputs):
    """An odd number of frames, sizes by the clip's budget, and the true times in the prompt."""
    record = load_records(inputs[1])[0]
    frames = FrameConfig(
        num_frames=5, min_pixels=1024, max_pixels=64 * 1024, total_pixels=20 * 1024
    )
    ours = checkpoint.load_processor(inputs[0]).with_frames(frames)
    prompts = []
    for fit in (None, ours.fit()):
        with ClipReader(workers=0, fit=fit) as reader:
            (clip,) = reader.read([clip_request(record, ours.frames)])
        assert clip.fitted is (fit is not None) and len(clip.frames) == 5
        prompts.append(ours.prompt("When?", [clip]))
    plain, fitted = prompts
    assert torch.equal(plain.pixel_values_videos, fitted.pixel_values_videos)
    assert torch.equal(plain.input_ids, fitted.input_ids)
    shown = re.findall(r"<([\d.]+) seconds>", ours.tokenizer.decode(plain.input_ids))
    times = clip.times
    expected = [(times[0] + times[1]) / 2, (times[2] + times[3]) / 2, times[4]]
    assert shown == [f"{time:.1f}" for time in expected]
    assert times[4] == pytest.approx(clip.duration, abs=0.2)
