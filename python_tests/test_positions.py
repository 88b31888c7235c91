"""Positions against the rule written out token by token, and against transformers."""

import math
import random

import pytest
import torch

from vcr1_fast.model.prompt import next_position
from vcr1_fast.model.qwen2_5_vl.positions import SpecialIds, mrope_positions, token_types

IDS = SpecialIds(image=1001, video=1002, vision_start=1003, vision_end=1004, tokens_per_second=2)


def _prompt(items, ids=IDS):
    """items: an int is that many text tokens, ("video", t, h, w, seconds) or ("image", h, w)."""
    tokens, videos, seconds, images = [], [], [], []
    for item in items:
        if isinstance(item, int):
            tokens += list(range(item))
            continue
        kind, *grid = item
        if kind == "video":
            *grid, interval = grid
            videos.append(grid)
            seconds.append(interval)
        else:
            grid = [1, *grid]
            images.append(grid)
        pad = ids.video if kind == "video" else ids.image
        count = math.prod(grid) // ids.merge_size**2
        tokens += [ids.vision_start, *[pad] * count, ids.vision_end]
    return (
        torch.tensor(tokens),
        torch.tensor(videos) if videos else None,
        torch.tensor(seconds, dtype=torch.float32) if videos else None,
        torch.tensor(images) if images else None,
    )


def _spec(items, ids=IDS):
    """The trained convention, one token at a time."""
    out = []

    def text(count):
        for _ in range(count):
            resume = max(max(p) for p in out) + 1 if out else 0
            out.append((resume, resume, resume))

    for item in items:
        if isinstance(item, int):
            text(item)
            continue
        text(1)
        start = max(out[-1]) + 1
        kind, *grid = item
        t, h, w, seconds = grid if kind == "video" else (1, *grid, 0.0)
        for i in range(t):
            for y in range(h // ids.merge_size):
                for x in range(w // ids.merge_size):
                    time = math.floor(i * seconds * ids.tokens_per_second)
                    out.append((start + time, start + y, start + x))
        text(1)
    return torch.tensor(out).T


CASES = {
    "text only": [7],
    "short wide clip": [5, ("video", 2, 4, 20, 1.0), 6],
    "long clip": [5, ("video", 30, 4, 6, 1.0), 6],
    "half seconds": [3, ("video", 9, 4, 4, 0.25), 4],
    "slow sampling": [3, ("video", 6, 4, 4, 3.7), 4],
    "two clips": [2, ("video", 12, 4, 4, 1.0), 3, ("video", 3, 8, 2, 0.5), 2],
    "clips side by side": [("video", 12, 4, 4, 1.0), ("video", 3, 8, 2, 0.5)],
    "image": [4, ("image", 6, 10), 3],
    "image and clip": [4, ("image", 6, 10), 3, ("video", 5, 4, 4, 1.0), ("image", 2, 2), 1],
}


@pytest.mark.parametrize("items", CASES.values(), ids=CASES)
def test_trained_convention_follows_the_spec(items):
    got = mrope_positions(*_prompt(items), IDS)
    assert got.dtype == torch.int64
    assert torch.equal(got, _spec(items))


def test_trained_convention_follows_the_spec_on_random_prompts():
    rng = random.Random(0)
    for _ in range(60):
        items = []
        for _ in range(rng.randint(1, 4)):
            h, w = 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)
            # Eighths are exact in binary: the spec's doubles and the floats agree on every floor.
            clip = ("video", rng.randint(1, 20), h, w, rng.randint(1, 40) / 8)
            items.append(rng.choice([rng.randint(1, 9), ("image", h, w), clip]))
        assert torch.equal(mrope_positions(*_prompt(items), IDS), _spec(items)), items


def test_text_after_a_long_clip_lies_after_all_its_times():
    items = [5, ("video", 30, 4, 6, 1.0), 6]
    got = mrope_positions(*_prompt(items), IDS)
    clip, after = got[:, 6 : 6 + 30 * 6], got[:, 6 + 30 * 6 :]
    assert int(clip.max()) == 6 + 29 * 2
    assert int(after.min()) == int(clip.max()) + 1
    assert next_position(got) == int(got[0, -1]) + 1


def test_grid_times_use_float32_products():
    # 0.7 as float32 is a little less than 0.7; 5 * 0.7 * 2 rounds to 7, as in training.
    got = mrope_positions(*_prompt([("video", 6, 2, 2, 0.7)]), IDS)
    assert (got[0, 1:7] - got[0, 1]).tolist() == [0, 1, 2, 4, 5, 7]


@pytest.mark.parametrize("items", CASES.values(), ids=CASES)
def test_installed_convention_follows_transformers(items):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 8,
            "hidden_size": 8,
            "num_hidden_layers": 0,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 8,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 0,
            "hidden_size": 8,
            "num_heads": 1,
            "out_hidden_size": 8,
            "intermediate_size": 8,
            "tokens_per_second": 2,
        },
    )
    model = Qwen2_5_VLForConditionalGeneration(config).model
    tokens, videos, seconds, images = _prompt(items)
    got = mrope_positions(tokens, videos, seconds, images, IDS, mrope="installed")
    expected, delta = model.get_rope_index(
        tokens[None],
        mm_token_type_ids=token_types(tokens, IDS)[None],
        video_grid_thw=videos,
        second_per_grid_ts=seconds,
        image_grid_thw=images,
    )
    assert torch.equal(got, expected[:, 0])
    # Where `generate` goes on from.
    assert next_position(got) == len(tokens) + int(delta)


def test_conventions_differ_on_a_long_clip():
    prompt = _prompt(CASES["long clip"])
    trained = mrope_positions(*prompt, IDS)
    installed = mrope_positions(*prompt, IDS, mrope="installed")
    assert torch.equal(trained[:, :186], installed[:, :186])
    assert not torch.equal(trained[:, 186:], installed[:, 186:])


def test_ids_come_from_the_configuration():
    from transformers import Qwen2_5_VLConfig

    ids = SpecialIds.from_config(Qwen2_5_VLConfig())
    assert (ids.vision_start, ids.vision_end) == (151652, 151653)
    assert (ids.image, ids.video, ids.merge_size) == (151655, 151656, 2)


def test_grids_that_do_not_fit_are_refused():
    tokens, videos, seconds, _ = _prompt([2, ("video", 3, 4, 4, 1.0), 2])
    with pytest.raises(ValueError, match="12 vision tokens at index 3"):
        mrope_positions(tokens, torch.tensor([[3, 4, 6]]), seconds, None, IDS)
    with pytest.raises(ValueError, match="0 images and 1 videos"):
        mrope_positions(tokens, None, None, None, IDS)
    with pytest.raises(ValueError, match="1 video grids but 2"):
        mrope_positions(tokens, videos, torch.ones(2), None, IDS)
    with pytest.raises(ValueError, match="'newest'"):
        mrope_positions(tokens, videos, seconds, None, IDS, mrope="newest")
    with pytest.raises(ValueError, match=r"\(1, 18\)"):
        mrope_positions(tokens[None], videos, seconds, None, IDS)
