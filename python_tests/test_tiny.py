"""The random checkpoint: its layout, its tokenizer, its sizes."""

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vcr1_fast.model import checkpoint
from vcr1_fast.model.qwen2_5_vl.tiny import (
    SPECIAL_TOKENS,
    TAGS,
    TinyConfig,
    train_tokenizer,
    write_tiny,
)

TEXTS = [
    "When is the red circle visible? Give the start and the end in seconds.",
    "<think>It moves.</think><answer>3.5 to 12.25</answer><glue>[(0.5, 7.0), (8.0, 9.5)]</glue>",
    *(f"<answer>{n / 4} to {n / 2}</answer>" for n in range(40)),
]
CONFIG = TinyConfig(hidden_size=32, heads=2, kv_heads=1, layers=1, vision_hidden=32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, texts=TEXTS, seed=3, config=CONFIG)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_layout_is_that_of_a_released_checkpoint(directory):
    assert {p.name for p in directory.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert AutoConfig.from_pretrained(directory).model_type == "qwen2_5_vl"
    assert isinstance(checkpoint.load(directory)[0], Qwen2_5_VLForConditionalGeneration)


@pytest.mark.parametrize("text", [*TEXTS[:2], "ünïcode 日本 <b> 1 < 2\n\n  x", "a <3 </ b>", ""])
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_and_tags_are_single_tokens(tokenizer):
    numbers = {n for text in TEXTS for n in re.findall(r"\d+(?:\.\d+)?", text)}
    assert len(numbers) > 40
    for piece in [*numbers, *TAGS]:
        assert len(tokenizer.encode(piece)) == 1, piece
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(TEXTS[1].split("</think>")[1])]
    assert pieces[:4] == ["<answer>", "3.5", " to ", "12.25"]


def test_a_number_is_the_same_token_wherever_it_stands(tokenizer):
    (number,) = tokenizer.encode("3.5")
    for text in ["<answer>3.5 to 7.0</answer>", "2.0 to 3.5", "[(0.5, 3.5)]", " 3.5", "x 3.5s"]:
        assert number in tokenizer.encode(text), text


def test_special_tokens_are_named_in_the_configuration(directory, tokenizer):
    config = AutoConfig.from_pretrained(directory)
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    assert sorted(ids.values()) == list(range(len(tokenizer) - 8, len(tokenizer)))
    assert config.video_token_id == ids["<|video_pad|>"]
    assert config.image_token_id == ids["<|image_pad|>"]
    assert config.vision_start_token_id == ids["<|vision_start|>"]
    assert config.vision_end_token_id == ids["<|vision_end|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert config.text_config.vocab_size >= len(tokenizer)


def test_same_seed_same_weights(directory, tmp_path):
    state = torch.get_rng_state()
    write_tiny(tmp_path / "a", texts=TEXTS, seed=3, config=CONFIG)
    write_tiny(tmp_path / "b", texts=TEXTS, seed=4, config=CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (directory / name).read_bytes()
    a, b = (tmp_path / n / "model.safetensors" for n in "ab")
    assert a.read_bytes() != b.read_bytes()


def test_sizes_reach_the_model(tmp_path):
    config = TinyConfig(
        hidden_size=48,
        layers=3,
        heads=3,
        kv_heads=1,
        mlp_ratio=2.0,
        mrope_section=(2, 3, 3),
        rope_theta=500.0,
        tie_embeddings=False,
        vision_depth=3,
        vision_hidden=16,
        vision_heads=1,
        vision_full_attention=(0, 2),
        window=56,
        tokens_per_second=5,
        initializer_range=0.2,
        system="You watch.",
    )
    write_tiny(tmp_path, texts=TEXTS, config=config)
    model, processor = checkpoint.load(tmp_path)
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (48, 3, 96)
    assert (text.num_attention_heads, text.num_key_value_heads) == (3, 1)
    assert list(text.rope_parameters["mrope_section"]) == [2, 3, 3]
    assert text.rope_parameters["rope_theta"] == 500.0
    assert (vision.depth, vision.hidden_size, vision.num_heads) == (3, 16, 1)
    assert list(vision.fullatt_block_indexes) == [0, 2]
    assert (vision.window_size, vision.tokens_per_second) == (56, 5)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert 0.19 < model.lm_head.weight.std() < 0.21
    assert processor.prompt("x").text.startswith("<|im_start|>system\nYou watch.<|im_end|>\n")


def test_default_size_suits_a_laptop(tmp_path):
    write_tiny(tmp_path, texts=TEXTS)
    count = sum(p.numel() for p in checkpoint.load(tmp_path)[0].parameters())
    assert 300_000 < count < 1_200_000


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 130}, "130 / 4"),
        ({"kv_heads": 3}, r"heads \(4\)"),
        ({"mrope_section": (4, 4, 4)}, "half of the head size 32"),
        ({"vision_hidden": 12}, "12 / 2"),
        ({"vision_full_attention": (2,)}, r"\[2\] outside 0..1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TinyConfig(**sizes)


def test_vocabulary_keeps_its_limit():
    tokenizer = train_tokenizer(TEXTS, 280)
    assert tokenizer.get_vocab_size() == 280 + len(SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="at least 256"):
        train_tokenizer(TEXTS, 255)
