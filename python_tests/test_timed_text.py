"""Families that write the times of a clip as text, against transformers: text, sizes, frames,
positions."""

import dataclasses
import importlib
import json
import math
import re
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_case import TIMED, Clip, write
from family_case import clip as make_clip
from family_case import image as make_image
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_run import write_inputs
from transformers import Qwen3_5Model, Qwen3VLModel
from transformers.models.qwen3_vl import processing_qwen3_vl

from vcr1_fast.data.records import load_records
from vcr1_fast.data.requests import clip_request
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import ClipReader
from vcr1_fast.model import checkpoint
from vcr1_fast.model.family import family_named
from vcr1_fast.model.files import CheckpointError
from vcr1_fast.model.prompt import next_position
from vcr1_fast.model.timed_text.frames import ClipFrames
from vcr1_fast.model.timed_text.positions import mrope_positions
from vcr1_fast.model.timed_text.preprocessor import VideoProcessorConfig, clip_size
from vcr1_fast.model.timed_text.processor import END, PAD, START

# By its full name: the package hides it where torchvision is missing, but parts run without.
theirs = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")

MODELS = {"qwen3_vl": Qwen3VLModel, "qwen3_5": Qwen3_5Model}


@pytest.fixture(scope="module", params=TIMED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory):
    return write(tmp_path_factory.mktemp(name), name)


@pytest.fixture(scope="module")
def processor(directory):
    return checkpoint.load_processor(directory)


# --- text, patches, sizes, frames -----------------------------------------------------------------

CASES = {
    "none": ("When?", []),
    "clip": ("When is it < 3?", [make_clip(6, 64, 96)]),
    "odd frames": ("When?", [make_clip(5, 60, 90, fps=3.0)]),
    "stamps": ("When?", [make_clip(4, times=np.array([0.04, 1.25, 7.85, 121.96]))]),
    "clips": ("Which?", [make_clip(2, 32, 64, fps=0.37), make_clip(7, 100, 50)]),
    "image": ("Where?", [make_image(70, 90)]),
    "all": (
        "What?",
        [make_image(40, 64), make_clip(3, 64, 32), make_image(64, 96), make_clip(4, 32, 32)],
    ),
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
    clip = make_clip(5)
    trained, installed = (
        dataclasses.replace(processor, video_text=form).prompt("x", [clip])
        for form in ("trained", "installed")
    )
    assert len(installed) == len(trained) + 2
    decoded = processor.tokenizer.decode(trained.input_ids)
    assert re.findall(r"<([\d.]+) seconds>", decoded) == ["0.2", "1.2", "2.0"]
    start, _, end = decoded.partition("<0.2 seconds>")
    assert START not in start and f"{END}<|im_end|>\n<|im_start|>assistant\n" in end
    with pytest.raises(ValueError, match=r"video_text must be one of .*'newest'"):
        dataclasses.replace(processor, video_text="newest")


def test_a_template_that_writes_the_pad_alone(processor):
    """The form in which vLLM takes prompts."""
    bare = dataclasses.replace(processor, chat_template=f"{{{{ 'a{PAD}b' }}}}")
    prompt = bare.prompt("x", [make_clip(2)])
    expected = f"a<0.2 seconds>{START}{PAD * 4}{END}b"
    assert torch.equal(prompt.input_ids, bare.encode(expected))


def test_times_must_be_as_many_as_frames(processor):
    with pytest.raises(ValueError, match="a clip of 4 frames has 3 times"):
        processor.prompt("x", [make_clip(4, times=np.zeros(3))])


def test_vision_tokens_in_the_text_are_refused(processor):
    with pytest.raises(ValueError, match="2 video tokens for 0 images and 1 clips"):
        processor.prompt(f"look {PAD}", [make_clip(4)])


@pytest.mark.parametrize("shape", [(6, 64, 96), (5, 100, 50), (3, 200, 333), (2, 20, 70)])
def test_pixel_values_follow_transformers(processor, shape):
    """torch's resize, transformers' own size rule, order of patches and normalisation."""
    frames = make_clip(*shape).frames
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


def test_the_cap_of_transformers_is_read(name, directory, tmp_path):
    checkpoint.load_processor(directory).save_pretrained(tmp_path)
    file = tmp_path / "video_preprocessor_config.json"
    values = json.loads(file.read_text()) | {
        "size": {"shortest_edge": 4096, "longest_edge": 25_165_824},
        "cap_pixels_per_frame": True,
    }
    file.write_text(json.dumps(values))
    video = family_named(name).load_processor(tmp_path).video
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


def _their_positions(model_class, prompt):
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = MethodType(model_class.get_vision_position_ids, model)
    positions, delta = model_class.get_rope_index(
        model,
        prompt.input_ids[None],
        mm_token_type_ids=prompt.mm_token_type_ids[None],
        image_grid_thw=prompt.image_grid_thw,
        video_grid_thw=prompt.video_grid_thw,
    )
    return positions[:, 0], int(delta)


@pytest.mark.parametrize("video_text", ["trained", "installed"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_positions_are_those_of_transformers(name, processor, case, video_text):
    for mrope in ("trained", "installed"):
        ours = dataclasses.replace(processor, video_text=video_text, mrope=mrope)
        prompt = ours.prompt(*case)
        expected, delta = _their_positions(MODELS[name], prompt)
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


# --- settings files and runs ----------------------------------------------------------------------


def test_a_checkpoint_of_another_patch_size_is_refused(name, directory, tmp_path):
    checkpoint.load_processor(directory).save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(CheckpointError, match="patch_size 14 is not supported, only 16"):
        family_named(name).load_processor(tmp_path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), TIMED[0], layers=4, head_dim=16)


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
