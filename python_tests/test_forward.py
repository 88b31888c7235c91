"""The group forward against the unshared baseline: each completion with its own prompt."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu_backend import needs_gpu

from vcr1_fast.model import attention, checkpoint, packing, partial_attention
from vcr1_fast.model.forward import completion_hidden, lm_head
from vcr1_fast.model.packing import Group
from vcr1_fast.model.qwen2_5_vl.positions import SpecialIds, mrope_positions
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.vision import encode_videos, freeze_vision
from vcr1_fast.model.wrapping import checkpoint_activations

CONFIG = TinyConfig(
    hidden_size=32, layers=2, heads=4, kv_heads=2, vision_hidden=16, vision_depth=2, vocab_limit=300
)


@dataclass
class Clip:
    frames: np.ndarray
    fps: float | None


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, texts=["When is it visible? From 1.5 to 3.5 seconds."], config=CONFIG)
    return path


@pytest.fixture
def loaded(directory):
    return checkpoint.load(directory, dtype=torch.float64)


def _groups(processor, seed, sizes):
    """sizes: (media, completion lengths) of each group; media: a number of clips, or a string of
    v and i for clips and images in their order."""
    rng = random.Random(seed)
    groups = []
    for i, (clips, lengths) in enumerate(sizes):
        media = [
            Clip(
                np.random.default_rng(seed + 10 * i + k).integers(
                    0,
                    256,
                    (rng.randint(2, 6) if kind == "v" else 1, 56, 28 * rng.randint(1, 3), 3),
                    dtype=np.uint8,
                ),
                2.0 if kind == "v" else None,
            )
            for k, kind in enumerate("v" * clips if isinstance(clips, int) else clips)
        ]
        prompt = processor.prompt("x" * rng.randint(1, 9), media)
        completions = [torch.tensor([rng.randrange(256) for _ in range(n)]) for n in lengths]
        groups.append(Group(prompt, completions))
    return groups


def _plain_logits(model, groups):
    """(C, V) of each completion: one sequence at a time through the model's own forward, positions
    written out, attention by transformers."""
    model.model.language_model.config._attn_implementation = "sdpa"
    ids = SpecialIds.from_config(model.config)
    out = []
    for group in groups:
        prompt = group.prompt
        start = mrope_positions(
            prompt.input_ids,
            prompt.video_grid_thw,
            prompt.second_per_grid_ts,
            prompt.image_grid_thw,
            ids,
        )
        for completion in group.completions:
            tokens = torch.cat([prompt.input_ids, completion])[None]
            more = start[0, -1] + 1 + torch.arange(len(completion))
            positions = torch.cat([start, more.expand(3, -1)], dim=1)[:, None]
            inputs = {}
            if prompt.pixel_values_videos is not None:
                inputs["pixel_values_videos"] = prompt.pixel_values_videos
                inputs["video_grid_thw"] = prompt.video_grid_thw
            if prompt.pixel_values is not None:
                inputs["pixel_values"] = prompt.pixel_values
                inputs["image_grid_thw"] = prompt.image_grid_thw
            logits = model(
                input_ids=tokens, position_ids=positions, use_cache=False, **inputs
            ).logits
            out.append(logits[0, len(prompt) - 1 : -1])
    return out


def _plain_log_probs(model, groups):
    rows = torch.cat(_plain_logits(model, groups)).log_softmax(-1)
    labels = torch.cat([completion for group in groups for completion in group.completions])
    return rows.gather(1, labels[:, None])[:, 0]


def _group_log_probs(model, groups, **options):
    hidden, labels, _ = completion_hidden(model, groups, **options)
    weight, bias = lm_head(model)
    rows = F.log_softmax(F.linear(hidden, weight, bias), dim=-1)
    return rows.gather(1, labels[:, None])[:, 0]


def _gradients(model, log_probs):
    """Of a loss that weighs every token differently."""
    weights = torch.linspace(-1.0, 1.0, len(log_probs), dtype=log_probs.dtype)
    model.zero_grad(set_to_none=True)
    (log_probs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        assert torch.allclose(ours[name], gradient, rtol=0, atol=float(1e-7 * (1 + scale))), name


SHAPES = {
    "one group": [(1, [5, 3, 8])],
    "ragged groups": [(1, [4, 1, 7, 2]), (0, [1, 1]), (2, [3, 6])],
    "equal lengths": [(1, [4, 4, 4]), (1, [4, 4])],
    "single tokens": [(1, [1, 1, 1])],
    "image": [("i", [4, 2, 6])],
    "images and clips in a pack": [("i", [4, 3]), (1, [2, 5]), ("ii", [1, 2]), (0, [3])],
    "images and clips in a prompt": [("ivi", [4, 2]), ("vi", [3, 3])],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_log_probs_and_gradients_equal_the_plain_form(loaded, shape):
    model, processor = loaded
    groups = _groups(processor, 1, shape)
    plain = _plain_log_probs(model, groups)
    theirs = _gradients(model, plain)
    packed = _group_log_probs(model, groups)
    ours = _gradients(model, packed)
    assert torch.allclose(packed, plain, rtol=0, atol=1e-7)
    _assert_same(ours, theirs)
    assert any(name.startswith("model.visual.blocks") for name in ours)


def test_random_shapes_equal_the_plain_form(loaded):
    model, processor = loaded
    rng = random.Random(5)
    for seed in range(6):
        shape = [
            (
                "".join(rng.choices("vi", k=rng.randint(0, 2))),
                [rng.randint(1, 9) for _ in range(rng.randint(1, 5))],
            )
            for _ in range(rng.randint(1, 4))
        ]
        groups = _groups(processor, seed, shape)
        with torch.no_grad():
            packed, plain = _group_log_probs(model, groups), _plain_log_probs(model, groups)
        assert torch.allclose(packed, plain, rtol=0, atol=1e-7), shape


@pytest.mark.parametrize("backend", ("merged", "varlen", "masked"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_other_backends_equal_the_plain_form(loaded, monkeypatch, shape, backend):
    """Those that "auto" does not take here."""
    model, processor = loaded
    groups = _groups(processor, 1, shape)
    run, calls = attention._BACKENDS[backend], []
    monkeypatch.setitem(
        attention._BACKENDS, backend, lambda *args: (calls.append(1), run(*args))[1]
    )
    attention.prepare_attention(model, backend)
    packed = _group_log_probs(model, groups)
    assert len(calls) == CONFIG.layers
    ours = _gradients(model, packed)
    plain = _plain_log_probs(model, groups)
    assert torch.allclose(packed, plain, rtol=0, atol=1e-7)
    _assert_same(ours, _gradients(model, plain))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_equals_the_plain_form(loaded):
    """Values alone: torch has no backward pass of it on the CPU."""
    model, processor = loaded
    attention.prepare_attention(model, "flex")
    for shape in SHAPES.values():
        groups = _groups(processor, 1, shape)
        with torch.no_grad():
            packed = _group_log_probs(model, groups)
            assert torch.allclose(packed, _plain_log_probs(model, groups), rtol=0, atol=1e-7)
        # Plain attention was set for the comparison; the choice stays.
        assert model.model.language_model.layers[0].self_attn.vcr1_backend == "flex"


def test_backends_that_cannot_run_are_refused(loaded):
    model, _ = loaded
    for backend in ("auto", "fused", "merged", "varlen", "masked", "flex"):
        attention.prepare_attention(model, backend)
    with pytest.raises(ValueError, match="got 'quick'"):
        attention.prepare_attention(model, "quick")


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a torch release without the private kernels."""
    monkeypatch.setattr(partial_attention, "_SIGNATURES", {"_no_such_kernel": ()})
    partial_attention.missing_kernels.cache_clear()
    yield
    partial_attention.missing_kernels.cache_clear()


def test_private_kernels_that_are_missing_are_replaced_and_reported(loaded, without_kernels):
    model, processor = loaded
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    attention.prepare_attention(model, "masked")  # needs no private kernels: says nothing
    for backend in ("auto", "fused", "merged"):
        with pytest.warns(RuntimeWarning, match="has no aten::_no_such_kernel: attention on the"):
            attention.prepare_attention(model, backend)
    with pytest.warns(RuntimeWarning, match="plain operators"):
        shared = _group_log_probs(model, groups)
    ours = _gradients(model, shared)
    plain = _plain_log_probs(model, groups)
    assert (shared - plain).abs().max() < 1e-9
    _assert_same(ours, _gradients(model, plain))


def test_private_kernels_with_other_parameters_are_not_called(monkeypatch):
    name = partial_attention._FORWARD
    monkeypatch.setitem(partial_attention._SIGNATURES, name, ("query", "value", "key"))
    partial_attention.missing_kernels.cache_clear()
    try:
        assert "changed the parameters of aten::_scaled" in partial_attention.missing_kernels()
    finally:
        partial_attention.missing_kernels.cache_clear()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.1)])
def test_lower_precision_stays_close_to_the_plain_form(directory, dtype, tolerance):
    model, processor = checkpoint.load(directory, dtype=dtype)
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    packed = _group_log_probs(model, groups)
    ours = _gradients(model, packed)
    plain = _plain_log_probs(model, groups)
    theirs = _gradients(model, plain)
    assert (packed - plain).abs().max() < tolerance
    for name in theirs:
        error = (ours[name] - theirs[name]).norm() / (1e-3 + theirs[name].norm())
        assert error < tolerance, name


@needs_gpu
def test_flash_kernels_on_a_gpu_stay_as_close_as_masks(directory):
    """In bfloat16, against float32 on the same GPU; "auto" takes the kernels."""
    device = torch.device("cuda")
    model, processor = checkpoint.load(directory, dtype="bfloat16", device=device)
    exact, _ = checkpoint.load(directory, dtype="bfloat16", device=device)
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    heads = (CONFIG.heads, CONFIG.kv_heads, CONFIG.hidden_size // CONFIG.heads)
    assert attention.resolve_backend("auto", device, torch.bfloat16, heads) == "varlen"
    attention.prepare_attention(exact.float(), "masked")
    truth = _gradients(exact, _group_log_probs(exact, groups))
    errors = []
    for backend in ("auto", "masked"):
        attention.prepare_attention(model, backend)
        ours = _gradients(model, _group_log_probs(model, groups))
        errors.append(sum(float((ours[n].float() - g).norm()) for n, g in truth.items()))
    assert errors[0] < 1.5 * errors[1]


def _difference(model, groups):
    with torch.no_grad():
        ours = _group_log_probs(model, groups)
        return float((ours - _plain_log_probs(model, groups)).abs().max())


def test_the_comparison_notices_a_completion_that_sees_another(loaded, monkeypatch):
    model, processor = loaded
    groups = _groups(processor, 1, SHAPES["one group"])
    one = packing.Span
    monkeypatch.setattr(
        packing,
        "Span",
        lambda start, prompt, lengths, device: one(start, prompt, (sum(lengths),), device),
    )
    assert _difference(model, groups) > 1e-4


def from_the_packs_start(parts):
    """`Span.parts` with every group before it in its prefix."""
    return lambda span, is_last: [
        (row, end, 0, max(prefix_end, span.start))
        for row, end, _, prefix_end in parts(span, is_last)
    ]


def test_the_comparison_notices_a_group_that_sees_another(loaded, monkeypatch):
    model, processor = loaded
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    monkeypatch.setattr(packing.Span, "parts", from_the_packs_start(packing.Span.parts))
    assert _difference(model, groups) > 1e-4


def test_the_comparison_notices_positions_that_restart(loaded, monkeypatch):
    model, processor = loaded
    groups = _groups(processor, 1, SHAPES["one group"])
    monkeypatch.setattr(packing, "next_position", lambda positions: 0)
    assert _difference(model, groups) > 1e-4


def test_labels_and_boundaries(loaded):
    model, processor = loaded
    groups = _groups(processor, 3, [(0, [2, 1]), (1, [4])])
    hidden, labels, boundaries = completion_hidden(model, groups)
    assert hidden.shape == (7, CONFIG.hidden_size)
    assert boundaries.tolist() == [0, 2, 3, 7]
    assert boundaries.dtype == torch.int32
    expected = [c for group in groups for c in group.completions]
    assert torch.equal(labels, torch.cat(expected))


def test_given_features_are_used_and_receive_gradient(loaded):
    model, processor = loaded
    (group,) = _groups(processor, 1, [(2, [3, 2])])
    prompt = group.prompt
    features = torch.cat(
        list(encode_videos(model, prompt.pixel_values_videos, prompt.video_grid_thw))
    ).detach()
    features.requires_grad_()
    given = Group(prompt, group.completions, features)
    log_probs = _group_log_probs(model, [given])
    assert torch.equal(log_probs, _group_log_probs(model, [group]))
    log_probs.sum().backward()
    assert features.grad.abs().min() > 0
    assert model.model.visual.patch_embed.proj.weight.grad is None


def test_vision_runs_once_for_all_groups(loaded, monkeypatch):
    model, processor = loaded
    calls = []
    visual = model.model.visual
    original = visual.forward
    monkeypatch.setattr(
        visual, "forward", lambda *a, **k: (calls.append(len(a[0])), original(*a, **k))[1]
    )
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    completion_hidden(model, groups)
    patches = [g.prompt.pixel_values_videos for g in groups]
    assert calls == [sum(len(p) for p in patches if p is not None)]


def test_recomputed_activations_change_nothing(loaded):
    model, processor = loaded
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    plain = _gradients(model, _group_log_probs(model, groups))
    model.train()
    checkpoint_activations(model)
    assert model.model.language_model.layers[0].gradient_checkpointing
    assert model.model.visual.blocks[0].gradient_checkpointing
    _assert_same(_gradients(model, _group_log_probs(model, groups)), plain)


def test_the_last_layer_leaves_out_what_nobody_reads(loaded):
    """Its MLP sees each prompt's last token and the completions; other passes of it are whole."""
    model, processor = loaded
    sizes = {0: [], CONFIG.layers - 1: []}
    layers = model.model.language_model.layers
    for number, seen in sizes.items():
        layers[number].mlp.gate_proj.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].shape[1])
        )
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    fed = [sum(n - 1 for n in group.lengths) for group in groups]
    completion_hidden(model, groups)
    whole = sum(len(group.prompt) for group in groups) + sum(fed)
    assert list(sizes.values()) == [[whole], [len(groups) + sum(fed)]]
    with torch.no_grad():
        model(input_ids=groups[1].prompt.input_ids[None])
    assert sizes[CONFIG.layers - 1][-1] == len(groups[1].prompt)


def test_frozen_vision_keeps_the_other_gradients(loaded):
    model, processor = loaded
    groups = _groups(processor, 1, SHAPES["one group"])
    everything = _gradients(model, _group_log_probs(model, groups))
    freeze_vision(model)
    rest = _gradients(model, _group_log_probs(model, groups))
    assert not any("visual" in name for name in rest)
    _assert_same(rest, {k: v for k, v in everything.items() if "visual" not in k})


def test_untied_head(tmp_path):
    import dataclasses

    write_tiny(tmp_path, texts=["a"], config=dataclasses.replace(CONFIG, tie_embeddings=False))
    model, processor = checkpoint.load(tmp_path, dtype=torch.float64)
    groups = _groups(processor, 1, SHAPES["one group"])
    assert lm_head(model)[0] is not model.get_input_embeddings().weight
    with torch.no_grad():
        packed, plain = _group_log_probs(model, groups), _plain_log_probs(model, groups)
    assert torch.allclose(packed, plain, rtol=0, atol=1e-7)


def test_tied_head_is_the_embedding(loaded):
    model, _ = loaded
    assert lm_head(model)[0] is model.get_input_embeddings().weight


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
def test_lora(loaded):
    from peft import LoraConfig, get_peft_model

    model, processor = loaded
    groups = _groups(processor, 1, SHAPES["ragged groups"])
    with torch.no_grad():
        before = _group_log_probs(model, groups)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "gate_proj"])
    adapted = get_peft_model(model, config).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    packed = _group_log_probs(adapted, groups)
    ours = _gradients(adapted, packed)
    plain = _plain_log_probs(adapted.get_base_model(), groups)
    assert torch.allclose(packed, plain, rtol=0, atol=1e-7)
    _assert_same(ours, _gradients(adapted, plain))
    assert ours and all("lora_" in name for name in ours)
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(_group_log_probs(adapted, groups), before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_adapter_on_the_head_is_refused(loaded):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(loaded[0], LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave lm_head out"):
        lm_head(adapted)


def test_bad_input_is_refused(loaded, directory):
    model, processor = loaded
    prompt = processor.prompt("x")
    with pytest.raises(ValueError, match=r"lengths \[2, 0\]"):
        completion_hidden(model, [Group(prompt, [torch.tensor([1, 2]), torch.tensor([])])])
    with pytest.raises(ValueError, match="no groups"):
        completion_hidden(model, [])
    eager, _ = checkpoint.load(directory, attention="eager")
    with pytest.raises(ValueError, match="'eager'"):
        completion_hidden(eager, [Group(prompt, [torch.tensor([1])])])
