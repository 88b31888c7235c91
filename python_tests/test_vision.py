"""The batched vision attention against transformers' loop over windows."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from vcr1_fast.model import checkpoint, vision
from vcr1_fast.model.qwen2_5_vl.tiny import TinyConfig, write_tiny
from vcr1_fast.model.vision import (
    PACKED_ATTENTION,
    PatchProjection,
    encode_videos,
    freeze_vision,
    packed_attention,
    prepare_vision,
    reorder_frames,
)

CONFIG = TinyConfig(hidden_size=32, heads=2, kv_heads=1, layers=1, vision_hidden=16, vision_depth=3)
GRIDS = {
    "one window": [(3, 4, 4)],
    "one size": [(2, 8, 16)],
    "ragged windows": [(2, 10, 14)],
    "single row": [(2, 2, 18)],
    "several clips": [(1, 4, 4), (2, 10, 6), (1, 12, 6), (1, 4, 4)],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, texts=["a"], config=CONFIG)
    return path


def _pair(directory, dtype):
    ours, _ = checkpoint.load(directory, dtype=dtype)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    assert theirs.model.visual.config._attn_implementation == "sdpa"
    return ours, theirs


def _patches(grid, dtype):
    size = int(grid.prod(dim=1).sum())
    return torch.randn(size, 1176, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_same_features_and_gradients(directory, grid, dtype, tolerance):
    ours, theirs = _pair(directory, dtype)
    grid = torch.tensor(grid)
    pixels = _patches(grid, dtype)
    parts = encode_videos(ours, pixels, grid)
    assert [len(part) for part in parts] == (grid.prod(dim=1) // 4).tolist()
    got = torch.cat(list(parts))
    expected = theirs.model.visual(pixels, grid_thw=grid).pooler_output
    assert got.dtype == dtype
    assert torch.allclose(got, expected, rtol=0, atol=tolerance)
    if dtype == torch.bfloat16:
        return
    weights = torch.linspace(-1, 1, got.numel(), dtype=dtype).view_as(got)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, a), b in zip(
        ours.model.visual.named_parameters(), theirs.model.visual.parameters(), strict=True
    ):
        scale = float(b.grad.abs().max())
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=tolerance * (1 + scale)), name


def test_a_token_does_not_see_other_windows():
    torch.manual_seed(0)
    boundaries = torch.tensor([0, 4, 6, 10, 13])
    q, k, v = torch.randn(3, 1, 2, 13, 8, dtype=torch.float64)
    out, _ = packed_attention(None, q, k, v, scaling=0.3, cu_seq_lens_q=boundaries)
    for start, end in zip(boundaries.tolist(), boundaries[1:].tolist(), strict=False):
        scores = q[0, :, start:end] @ k[0, :, start:end].mT * 0.3
        expected = scores.softmax(-1) @ v[0, :, start:end]
        assert torch.allclose(out[0, start:end], expected.transpose(0, 1))


def test_varlen_attention_hands_over_what_the_kernel_takes(monkeypatch):
    """torch's kernel runs on CUDA alone: in its place one that checks what it is given by the
    documented contract, and computes it."""

    def kernel(q, k, v, edges, key_edges, longest, longest_key, *, scale):
        assert q.shape == (13, 2, 8) and edges.dtype == torch.int32
        assert edges is key_edges and longest == longest_key == 4
        out = []
        for start, end in zip(edges.tolist(), edges[1:].tolist(), strict=False):
            one = (x[start:end].transpose(0, 1) for x in (q, k, v))
            a, b, c = one
            out.append(((a @ b.mT * scale).softmax(-1) @ c).transpose(0, 1))
        return torch.cat(out)

    boundaries = torch.tensor([0, 4, 6, 10, 13])
    leaves = torch.randn(3, 1, 2, 13, 8, dtype=torch.float64).requires_grad_()
    batched, _ = packed_attention(None, *leaves, scaling=0.3, cu_seq_lens_q=boundaries)
    monkeypatch.setattr(vision, "_varlen_kernel", lambda: kernel)
    assert not vision.takes_varlen(leaves[0])  # not on CUDA, nor half precision
    monkeypatch.setattr(vision, "takes_varlen", lambda query: True)
    packed, _ = packed_attention(None, *leaves, scaling=0.3, cu_seq_lens_q=boundaries)
    assert packed.shape == batched.shape
    torch.testing.assert_close(packed, batched, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(x.square().sum(), leaves)[0] for x in (packed, batched)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_the_varlen_kernel_is_looked_for():
    import inspect

    kernel = vision._varlen_kernel()
    if kernel is None:
        pytest.skip("this torch has no varlen attention that takes a scale")
    names = list(inspect.signature(kernel).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_a_clip_does_not_depend_on_the_others(directory):
    model, _ = checkpoint.load(directory, dtype=torch.float64)
    grid = torch.tensor(GRIDS["several clips"])
    pixels = _patches(grid, torch.float64)
    together = encode_videos(model, pixels, grid)
    alone = [
        encode_videos(model, part, size[None])[0]
        for part, size in zip(torch.split(pixels, grid.prod(dim=1).tolist()), grid, strict=True)
    ]
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)


def test_frozen_encoder_keeps_no_graph(directory):
    model, _ = checkpoint.load(directory)
    grid = torch.tensor([(1, 4, 4)])
    assert encode_videos(model, _patches(grid, torch.float32), grid)[0].requires_grad
    with torch.no_grad():
        assert not encode_videos(model, _patches(grid, torch.float32), grid)[0].requires_grad
    freeze_vision(model, merger=False)
    trained = {n for n, p in model.model.visual.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("merger.") for name in trained)
    freeze_vision(model)
    assert not encode_videos(model, _patches(grid, torch.float32), grid)[0].requires_grad
    assert all(p.requires_grad for p in model.model.language_model.parameters())


def test_patches_are_projected_by_a_product_with_the_same_parameter(directory):
    ours, theirs = _pair(directory, torch.float64)
    projection = ours.model.visual.patch_embed.proj
    assert isinstance(projection, PatchProjection)
    assert not isinstance(theirs.model.visual.patch_embed.proj, PatchProjection)
    patches = torch.randn(5, 3, 2, 14, 14, dtype=torch.float64)
    expected = theirs.model.visual.patch_embed.proj(patches)
    assert torch.allclose(projection(patches), expected, rtol=0, atol=1e-12)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_flash_attention_is_left_in_place(directory):
    model, _ = checkpoint.load(directory)
    config = model.model.visual.config
    config._attn_implementation = "flash_attention_2"
    prepare_vision(model)
    assert config._attn_implementation == "flash_attention_2"
    config._attn_implementation = "sdpa"
    prepare_vision(model)
    assert config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("grid", [[(5, 10, 14)], [(1, 4, 4), (3, 12, 6), (2, 8, 16)]])
def test_frames_in_another_order_are_features_in_another_order(directory, grid, dtype, tolerance):
    """The encoder on reordered patches against the reordered features of its pass on the clip; some
    of its blocks attend within windows, one within whole frames."""
    assert 0 < len(CONFIG.vision_full_attention) < CONFIG.vision_depth
    model, _ = checkpoint.load(directory, dtype=dtype)
    grid = torch.tensor(grid)
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(t, generator=generator).tolist() for t in grid[:, 0].tolist()]
    pixels = _patches(grid, dtype)
    clips = pixels.split(grid.prod(dim=1).tolist())
    mixed = [
        clip.unflatten(0, (len(order), -1))[order].flatten(0, 1)
        for clip, order in zip(clips, orders, strict=True)
    ]
    with torch.no_grad():
        plain = torch.cat(list(encode_videos(model, pixels, grid)))
        expected = torch.cat(list(encode_videos(model, torch.cat(mixed), grid)))
    got = reorder_frames(plain, grid, orders)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert (plain - expected).abs().max() > 0.1  # and the order makes a difference


def test_an_order_is_a_permutation():
    features, grid = torch.arange(12.0)[:, None], torch.tensor([[3, 4, 4]])
    got = reorder_frames(features, grid, [(2, 0, 1)])
    assert got.flatten().tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    for order in ((0, 1), (0, 1, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match="no order of 3 temporal patches"):
            reorder_frames(features, grid, [order])
