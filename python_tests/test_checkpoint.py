"""Loading and saving: real ids and vocabulary, shards, damage, adapters."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vcr1_fast.model import checkpoint
from vcr1_fast.model.checkpoint import CheckpointError
from vcr1_fast.model.qwen2_5_vl.positions import SpecialIds
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.model.vision import PACKED_ATTENTION

CONFIG = TinyConfig(hidden_size=32, heads=2, kv_heads=1, layers=1, vision_hidden=32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, texts=["From 1.5 to 3.5."], config=CONFIG)
    return path


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def _logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None]).logits


def _split(path):
    """Turn the one weight file into three shards with an index."""
    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[i::3]}
        save_file(part, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_loaded_model_is_what_transformers_loads(directory):
    model, processor = checkpoint.load(directory)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)
    assert torch.equal(_logits(model), _logits(plain))
    assert not model.training
    assert model.model.visual.config._attn_implementation == PACKED_ATTENTION
    assert processor.stop_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_shards(directory, copy):
    _split(copy)
    expected = _logits(checkpoint.load(directory)[0])
    assert torch.equal(_logits(checkpoint.load(copy)[0]), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float64])
def test_dtype(directory, dtype):
    model, _ = checkpoint.load(directory, dtype=dtype)
    expected = checkpoint.DTYPES.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}


def test_unknown_dtype_is_refused(directory):
    with pytest.raises(ValueError, match="'int8'"):
        checkpoint.load(directory, dtype="int8")


def test_saved_checkpoint_loads_in_transformers_and_here(directory, tmp_path):
    model, processor = checkpoint.load(directory)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.5)
    checkpoint.save(model, processor, tmp_path / "new")
    names = {p.name for p in directory.iterdir()}
    assert names <= {p.name for p in (tmp_path / "new").iterdir()}
    assert torch.equal(_logits(checkpoint.load(tmp_path / "new")[0]), _logits(model))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert torch.equal(_logits(plain), _logits(model))
    text = (tmp_path / "new" / "config.json").read_text()
    assert PACKED_ATTENTION not in text
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_saving_replaces_an_older_checkpoint_whole(directory, tmp_path):
    model, processor = checkpoint.load(directory)
    target = tmp_path / "run" / "last"
    checkpoint.save(model, processor, target)
    (target / "stale.txt").write_text("old")
    checkpoint.save(model, processor, target)
    assert not (target / "stale.txt").exists()
    assert [p.name for p in target.parent.iterdir()] == ["last"]


def test_failed_save_leaves_the_older_checkpoint(directory, tmp_path, monkeypatch):
    model, processor = checkpoint.load(directory)
    target = tmp_path / "last"
    checkpoint.save(model, processor, target)

    def fail(self, directory):
        raise OSError("disk full")

    monkeypatch.setattr(type(processor), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(model, processor, target)
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    assert torch.equal(_logits(checkpoint.load(target)[0]), _logits(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
def test_adapters_are_merged_into_what_is_saved(directory, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = checkpoint.load(directory)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "qkv"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    checkpoint.save(adapted, processor, tmp_path / "merged")
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters())
    saved = _logits(checkpoint.load(tmp_path / "merged")[0])
    assert torch.allclose(saved, _logits(adapted), atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(saved, _logits(adapted), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", "remove", "missing"),
        ("config.json", "garbage", "not JSON"),
        ("model.safetensors", "remove", "missing"),
        ("model.safetensors", "truncate", "truncated: "),
        ("model.safetensors", "empty", r"truncated or not safetensors \(0 bytes\)"),
        ("model.safetensors", "garbage", "truncated or not safetensors"),
        ("model.safetensors", "header", "damaged safetensors header"),
        ("model.safetensors", "append", "damaged: "),
        ("tokenizer.json", "remove", "missing"),
        ("tokenizer_config.json", "remove", "missing"),
        ("preprocessor_config.json", "remove", "missing"),
        ("chat_template.jinja", "remove", "missing"),
    ],
)
def test_damaged_files_are_named(copy, name, damage, message):
    _damage(copy / name, damage)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(copy)
    assert error.value.path == copy / name
    assert str(copy / name) in str(error.value)


@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_damaged_shards_are_named(copy, damage):
    _split(copy)
    shard = copy / "model-00002-of-00003.safetensors"
    _damage(shard, damage)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(copy)
    assert error.value.path == shard


def _damage(path, kind):
    data = path.read_bytes()
    if kind == "remove":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(b"\xff" * 64)
    elif kind == "header":
        path.write_bytes(data[:8] + b"x" + data[9:])
    elif kind == "append":
        path.write_bytes(data + b"\0")


def test_the_file_that_would_be_loaded_is_the_one_checked(copy):
    """Where both a single file and an index lie, transformers reads the single file."""
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    checkpoint.load(copy)
    _damage(copy / "model.safetensors", "truncate")
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.load(copy)


def test_index_without_a_map_is_named(copy):
    _split(copy)
    index = copy / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map") as error:
        checkpoint.load(copy)
    assert error.value.path == index


def test_lacking_tensors_are_an_error_not_random_numbers(copy):
    with safe_open(copy / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    dropped = [name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight")]
    del tensors[dropped[0]]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing keys: .*up_proj"):
        checkpoint.load(copy)


def test_another_architecture_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(CheckpointError, match=r"'llava', known are .*qwen2_5_vl"):
        checkpoint.load(copy)


@pytest.mark.parametrize("name", ["no-such-directory", "/no/such/directory", "./a/b", "a/b/c"])
def test_missing_directory_is_an_error_without_a_download(name):
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.load(name)


def test_released_vocabulary_and_ids(copy):
    """Qwen's ids and vocabulary, flat text settings and old tensor names, as the hub has them."""
    vocabulary = {"endoftext": 151643, "im_start": 151644, "im_end": 151645}
    vision = {"vision_start": 151652, "vision_end": 151653, "vision_pad": 151654}
    ids = {**vocabulary, **vision, "image_pad": 151655, "video_pad": 151656}
    config = Qwen2_5_VLConfig.from_pretrained(copy)
    config.text_config.vocab_size = 152064
    config.text_config.hidden_size = 16
    config.text_config.intermediate_size = 16
    config.text_config.rope_parameters["mrope_section"] = [1, 1, 2]
    config.vision_config.out_hidden_size = 16
    config.text_config.eos_token_id = ids["im_end"]
    config.text_config.bos_token_id = ids["endoftext"]
    for key in ("vision_start", "vision_end"):
        setattr(config, f"{key}_token_id", ids[key])
    config.image_token_id, config.video_token_id = ids["image_pad"], ids["video_pad"]
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(copy)
    with safe_open(copy / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "visual.patch_embed.proj.weight" in names  # the hub's names, not those in memory
    _flatten_text_settings(copy / "config.json")
    _move_ids(copy / "tokenizer.json", ids)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))

    model, processor = checkpoint.load(copy)
    assert model.get_input_embeddings().weight.shape == (152064, 16)
    special = SpecialIds.from_config(model.config)
    assert (special.image, special.video) == (processor.image_id, processor.video_id)
    assert (special.vision_start, special.vision_end) == (151652, 151653)
    assert (processor.image_id, processor.video_id, processor.stop_id) == (151655, 151656, 151645)
    banned = set(processor.banned_ids(152064).tolist())
    assert set(ids.values()) - {151645} <= banned
    assert set(range(len(processor.tokenizer), 152064)) <= banned
    text = "<answer>1.5 to 3.5</answer>"
    tokens = processor.completion(text)
    assert tokens[-1] == 151645 and processor.decode(tokens) == text
    frames = np.zeros((4, 56, 56, 3), dtype=np.uint8)
    prompt = processor.prompt(text, [SimpleNamespace(frames=frames, fps=2.0)])
    assert int((prompt.input_ids == 151656).sum()) == 2 * 2 * 2
    got = rollout(model, processor, [prompt], 2, SamplingConfig(max_new_tokens=3))
    assert all(len(c) <= 3 and not set(c.tolist()) & banned for c in got.tokens[0])


def _flatten_text_settings(path):
    """Released files keep the language model's settings at the top, with its old rope names."""
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    path.write_text(json.dumps({**text, **config}))


def _move_ids(path, ids):
    """Give the control tokens Qwen's ids, with fillers so that the vocabulary has no holes."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    control = [t for t in tokenizer["added_tokens"] if t["content"].strip("<|>") in ids]
    for token in control:
        vocabulary.pop(token["content"], None)
        token["id"] = ids[token["content"].strip("<|>")]
    size = len(vocabulary)
    vocabulary |= {f"filler{i}": i for i in range(size, min(ids.values()))}
    gap = range(ids["im_end"] + 1, ids["vision_start"])
    fillers = [{**control[0], "content": f"<|filler{i}|>", "id": i} for i in gap]
    tokenizer["added_tokens"] = sorted(control + fillers, key=lambda t: t["id"])
    path.write_text(json.dumps(tokenizer))
