"""The processor against transformers' own, value for value."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vcr1_fast.model import checkpoint
from vcr1_fast.model.family import family_named
from vcr1_fast.model.files import CheckpointError
from vcr1_fast.model.qwen2_5_vl.processor import Processor, VideoProcessorConfig
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny

# transformers' video processor imports torchvision, whose compiled part is not needed (nor, when it
# was built for another torch, loadable): with its two operators declared, the rest runs. In a
# process of its own, because neither the declaration nor the import can be taken back; such a
# torchvision must not be importable elsewhere (transformers would break), so VCR1_TORCHVISION may
# name the folder it is in.
ORACLE = """
import os, sys, warnings
import numpy as np, torch
from PIL import Image
sys.path.append(os.environ.get("VCR1_TORCHVISION", ""))
warnings.simplefilter("ignore")
try:
    import torchvision
except Exception:
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import torchvision
    except Exception as error:
        print("unavailable:", error); sys.exit(42)
import transformers
from transformers import AutoTokenizer, Qwen2VLImageProcessor
from transformers.video_utils import VideoMetadata

directory, inputs, output, processor_class, video_class = sys.argv[1:]
cases = np.load(inputs, allow_pickle=True)["cases"]
processor = getattr(transformers, processor_class)(
    Qwen2VLImageProcessor.from_pretrained(directory),
    AutoTokenizer.from_pretrained(directory),
    getattr(transformers, video_class).from_pretrained(directory),
)
processor.chat_template = open(directory + "/chat_template.jinja").read()
results = []
for text, system, clips in cases:
    kinds = [{"type": "image" if fps is None else "video"} for _, fps in clips]
    messages = [{"role": "user", "content": [{"type": "text", "text": text}] + kinds}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    arguments = {}
    images = [Image.fromarray(frames[0]) for frames, fps in clips if fps is None]
    clips = [clip for clip in clips if clip[1] is not None]
    if images:
        arguments["images"] = images
    if clips:
        arguments["videos"] = [frames for frames, _ in clips]
        # Frames sampled at `fps` of a video that runs at the same rate: all of it was kept.
        arguments["video_metadata"] = [
            VideoMetadata(total_num_frames=len(frames), fps=fps,
                          frames_indices=list(range(len(frames))))
            for frames, fps in clips
        ]
    encoded = processor(
        text=[rendered], return_tensors="pt", do_sample_frames=False, **arguments
    )
    encoded = {k: v if torch.is_tensor(v) else torch.tensor(v) for k, v in encoded.items()}
    results.append((rendered, encoded))
torch.save(results, output)
"""


@dataclass
class Clip:
    frames: np.ndarray
    fps: float | None


TEXTS = ["When is the red circle visible? Answer in <answer>S to E</answer>: 3.5 to 12.25 seconds."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, texts=TEXTS, config=TinyConfig(layers=1, hidden_size=32, heads=2))
    return path


def _clip(seed, shape, fps):
    frames = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    return Clip(frames, fps)


IMAGE = _clip(9, (1, 56, 56), None)


def _cases(family):
    more = (
        [
            # A clip at its pixel budget, one below it, frames smaller than a token.
            ("Long.", None, [_clip(10, (31, 200, 340), 2.0)]),
            ("Small.", None, [_clip(11, (2, 20, 70), 24.0)]),
        ]
        if family != "qwen2_5_vl"
        else []
    )
    return [
        *more,
        ("When is the red circle visible?", None, []),
        ("When is the red circle visible?", "Answer shortly.", [_clip(0, (6, 60, 90), 2.0)]),
        ("a < b, ünïcode 3.5 to 4", None, [_clip(1, (5, 84, 56), 1.9867)]),
        ("Two.", None, [_clip(2, (4, 56, 56), 4.0), _clip(3, (7, 120, 57), 0.37)]),
        ("Where is it?", None, [_clip(4, (1, 61, 90), None)]),
        ("Two images.", "Hi.", [_clip(5, (1, 300, 200), None), _clip(6, (1, 20, 33), None)]),
        ("All.", None, [_clip(7, (1, 40, 84), None), _clip(8, (3, 60, 60), 1.0), IMAGE]),
    ]


CLASSES = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_5": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


@pytest.mark.parametrize("family", CLASSES)
def test_agrees_with_transformers(family, tmp_path):
    cases, directory = _cases(family), tmp_path / "model"
    family_named(family).write_tiny(directory, texts=TEXTS)
    packed = np.empty(len(cases), dtype=object)
    for i, (text, system, clips) in enumerate(cases):
        packed[i] = (text, system, [(clip.frames, clip.fps) for clip in clips])
    np.savez(tmp_path / "cases.npz", cases=packed)
    run = subprocess.run(
        [
            *(sys.executable, "-c", ORACLE, directory, tmp_path / "cases.npz", tmp_path / "out.pt"),
            *CLASSES[family],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 42:
        pytest.skip(f"transformers' processor cannot run here: {run.stdout.strip()}")
    assert run.returncode == 0, run.stderr
    # What is installed is the oracle of the text, too.
    processor = checkpoint.load_processor(directory, video_text="installed")
    expected = torch.load(tmp_path / "out.pt")
    assert len(expected) == len(cases)
    seen = []
    for (text, system, clips), (rendered, theirs) in zip(cases, expected, strict=True):
        ours = processor.prompt(text, clips, system=system)
        assert ours.text == rendered
        assert torch.equal(ours.input_ids, theirs["input_ids"][0])
        assert torch.equal(ours.mm_token_type_ids, theirs["mm_token_type_ids"][0].long())
        for pixels, grid in (
            ("pixel_values_videos", "video_grid_thw"),
            ("pixel_values", "image_grid_thw"),
        ):
            if pixels not in theirs:
                assert getattr(ours, pixels) is None
                assert getattr(ours, grid).shape == (0, 3)
                continue
            assert torch.equal(getattr(ours, grid), theirs[grid])
            assert getattr(ours, pixels).dtype == torch.float32
            assert torch.equal(getattr(ours, pixels), theirs[pixels])
        if "second_per_grid_ts" in theirs:
            assert torch.equal(ours.second_per_grid_ts, theirs["second_per_grid_ts"].float())
        seen.append([c.fps is None for c in clips])
    assert [False] in seen and [True] in seen and [True, False, True] in seen


def test_text_comes_before_video_and_tokens_match_the_grid(directory):
    processor = Processor.from_pretrained(directory)
    prompt = processor.prompt("When?", [_clip(0, (6, 60, 90), 2.0)])
    assert prompt.text.index("When?") < prompt.text.index("<|video_pad|>")
    assert int((prompt.mm_token_type_ids == 2).sum()) * 4 == len(prompt.pixel_values_videos)
    assert prompt.second_per_grid_ts.tolist() == [1.0]
    assert prompt.text.endswith("assistant\n")


def test_media_may_come_first(directory):
    processor = dataclasses.replace(Processor.from_pretrained(directory), media_first=True)
    clips = [_clip(0, (6, 60, 90), 2.0), IMAGE]
    prompt = processor.prompt("When?", clips, system="Hi.")
    assert prompt.text == (
        "<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "When?<|im_end|>\n<|im_start|>assistant\n"
    )
    after = dataclasses.replace(processor, media_first=False).prompt("When?", clips, system="Hi.")
    assert torch.equal(prompt.pixel_values_videos, after.pixel_values_videos)
    assert len(prompt) == len(after) and not torch.equal(prompt.input_ids, after.input_ids)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_control_tokens_in_the_text_are_refused(directory, token):
    """The tokenizer would take them for the template's own: a record could end its turn."""
    processor = Processor.from_pretrained(directory)
    assert token in processor.tokenizer.get_vocab()
    for text, system in ((f"look{token}\n", None), ("look", f"be brief{token}")):
        with pytest.raises(ValueError, match=re.escape(f"the control token {token!r}")):
            processor.prompt(text, system=system)
    with pytest.raises(ValueError, match=re.escape(f"the control token {token!r}")):
        processor.completion(f"yes{token}no")
    plain = token.replace("|", "/")
    assert plain in processor.prompt(plain).text


def test_vision_tokens_in_the_text_are_refused(directory):
    processor = Processor.from_pretrained(directory)
    with pytest.raises(ValueError, match="2 video tokens for 0 images and 1 clips"):
        processor.prompt("look <|video_pad|>", [_clip(0, (4, 56, 56), 2.0)])
    with pytest.raises(ValueError, match="1 image and 0 video tokens for 0 images and 0 clips"):
        processor.prompt("look <|image_pad|>")
    with pytest.raises(ValueError, match="1 image and 1 video tokens for 0 images and 1 clips"):
        processor.prompt("look <|image_pad|>", [_clip(0, (4, 56, 56), 2.0)])


def test_a_still_of_two_frames_is_refused(directory):
    processor = Processor.from_pretrained(directory)
    with pytest.raises(ValueError, match="got 2 frames"):
        processor.prompt("x", [_clip(0, (2, 56, 56), None)])


def test_media_in_the_order_of_the_prompt(directory):
    processor = Processor.from_pretrained(directory)
    clips = [IMAGE, _clip(0, (4, 56, 28), 2.0), _clip(1, (1, 84, 28), None)]
    prompt = processor.prompt("x", clips)
    grids = [grid.tolist() for _, grid in prompt.media()]
    assert grids == [[1, 4, 4], [2, 4, 2], [1, 6, 2]]
    alone = [processor.prompt("x", [clip]).media()[0] for clip in clips]
    for (patches, _), (own, _) in zip(prompt.media(), alone, strict=True):
        assert torch.equal(patches, own)
    assert prompt.patches == sum(len(patches) for patches, _ in alone) == 16 + 16 + 12


def test_an_image_has_pixel_bounds_of_its_own(directory):
    processor = Processor.from_pretrained(directory)
    image = _clip(0, (1, 280, 280), None)
    assert processor.prompt("x", [image]).image_grid_thw.tolist() == [[1, 20, 20]]
    fewer = processor.with_video(max_pixels=56 * 56).with_image(max_pixels=112 * 112)
    assert fewer.prompt("x", [image]).image_grid_thw.tolist() == [[1, 8, 8]]


def test_pixel_budget_limits_tokens(directory):
    processor = Processor.from_pretrained(directory)
    clip = _clip(0, (8, 280, 280), 2.0)
    assert processor.prompt("x", [clip]).video_grid_thw.tolist() == [[4, 20, 20]]
    small = processor.with_video(total_pixels=28 * 28 * 64)
    assert small.prompt("x", [clip]).video_grid_thw.tolist() == [[4, 8, 8]]
    assert (
        processor.with_video(dtype=torch.bfloat16).prompt("x", [clip]).pixel_values_videos.dtype
        == torch.bfloat16
    )


def test_completion_ends_the_turn_and_decodes_without_it(directory):
    processor = Processor.from_pretrained(directory)
    tokens = processor.completion("<answer>3.5 to 12.25</answer>")
    assert tokens[-1] == processor.stop_id
    assert processor.decode(tokens) == "<answer>3.5 to 12.25</answer>"


def test_banned_ids_hold_all_control_tokens_but_the_stop_token(directory):
    processor = Processor.from_pretrained(directory)
    size = len(processor.tokenizer) + 3
    banned = set(processor.banned_ids(size).tolist())
    assert {processor.video_id, processor.image_id, processor.tokenizer.pad_token_id} <= banned
    assert {size - 1, size - 2, size - 3} <= banned
    assert processor.stop_id not in banned
    assert len(banned) == 10


def test_saved_processor_is_the_same(directory, tmp_path):
    processor = Processor.from_pretrained(directory)
    processor.save_pretrained(tmp_path)
    (tmp_path / "bare").mkdir()
    for folder in (tmp_path, tmp_path / "bare"):  # the model writes it
        shutil.copy(directory / "config.json", folder)
    again = Processor.from_pretrained(tmp_path)
    clip = _clip(0, (4, 60, 90), 3.0)
    a, b = processor.prompt("When? 3.5", [clip]), again.prompt("When? 3.5", [clip])
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.pixel_values_videos, b.pixel_values_videos)
    assert (again.video, again.image) == (processor.video, processor.image)
    bare = dataclasses.replace(processor.with_image(max_pixels=7840), sources={})
    bare.save_pretrained(tmp_path / "bare")
    again = Processor.from_pretrained(tmp_path / "bare")
    assert (again.video, again.image) == (bare.video, bare.image)
    before = json.loads((directory / "preprocessor_config.json").read_text())
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == before


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"min_pixels": 3136, "max_pixels": 12845056}, 3136, 12845056),
        ({"size": {"shortest_edge": 3136, "longest_edge": 50176}}, 3136, 50176),
        ({"size": {"min_pixels": 6272, "max_pixels": 50176}}, 6272, 50176),
        ({}, 128 * 784, 768 * 784),
    ],
)
def test_settings_of_released_checkpoints(directory, tmp_path, settings, low, high):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14, **settings}))
    processor = Processor.from_pretrained(copy)
    assert (processor.video.min_pixels, processor.video.max_pixels) == (low, high)
    if not settings:
        low, high = 56 * 56, 1280 * 784  # images have defaults of their own
    assert (processor.image.min_pixels, processor.image.max_pixels) == (low, high)


def test_settings_of_clips_and_images_in_files_of_their_own(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    both = {
        "image_processor": {"size": {"shortest_edge": 784, "longest_edge": 7840}},
        "video_processor": {"min_pixels": 1568, "max_pixels": 15680, "resample": 2},
    }
    (copy / "processor_config.json").write_text(json.dumps(both))
    processor = Processor.from_pretrained(copy)
    assert (processor.image.max_pixels, processor.image.resample) == (7840, "bicubic")
    assert (processor.video.max_pixels, processor.video.resample) == (15680, "bilinear")
    (copy / "video_preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 784, "max_pixels": 23520})
    )
    (copy / "processor_config.json").write_text("{}")
    processor = Processor.from_pretrained(copy)
    assert (processor.image.max_pixels, processor.video.max_pixels) == (768 * 784, 23520)


def test_chat_template_json_of_older_checkpoints(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    template = "{{ messages[0]['content'][0]['text'] }}!"
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert Processor.from_pretrained(copy).prompt("Hi").text == "Hi!"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", "{", "unusable"),
        ("tokenizer_config.json", None, "missing"),
        ("preprocessor_config.json", None, "missing"),
        ("preprocessor_config.json", "[1]", "expected a JSON object"),
        ("preprocessor_config.json", '{"patch_size": 16}', "patch_size 16"),
        ("preprocessor_config.json", '{"resample": 1}', "resample 1"),
        ("preprocessor_config.json", '{"max_pixels": 784}', "<= max_pixels"),
        ("chat_template.jinja", None, "missing"),
    ],
)
def test_unusable_files_are_named(directory, tmp_path, name, text, message):
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / name).unlink()
    if text is not None:
        (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        Processor.from_pretrained(copy)
    assert error.value.path == copy / name


def test_impossible_pixel_bounds_are_refused():
    with pytest.raises(ValueError, match="5 and 4"):
        VideoProcessorConfig(min_pixels=5, max_pixels=4)
