"""Keys and values of shared prompts, for models of which only some layers have them."""

import pytest
import torch

from vcr1_fast.model.decode import SharedPrefix, shared_prefix_attention
from vcr1_fast.model.partial_attention import partial_product

LENGTHS, GROUP, HEADS, DIM = [5, 3], 2, 2, 4
LAYERS = (1, 3)


def _step(generator, tokens):
    """Keys and values (1, heads, tokens, D) of a layer."""
    shape = (1, HEADS, tokens, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("static", [False, True])
def test_layers_without_keys_leave_no_gap(static):
    """Attention of each row over its prompt and its tokens so far, in both layers with keys, for
    more tokens than the first buffer holds."""
    generator = torch.Generator().manual_seed(0)
    memory = SharedPrefix(LENGTHS, static=static)
    prompts = {layer: _step(generator, sum(LENGTHS)) for layer in LAYERS}
    for layer in LAYERS:
        memory.update(*prompts[layer], layer)
    assert memory.prompts == len(LENGTHS)
    memory.start_decoding(rows := GROUP * len(LENGTHS))
    own = {layer: [] for layer in LAYERS}
    for token in range(34):
        memory.make_room()
        for layer in LAYERS:
            step = [x.transpose(0, 2) for x in _step(generator, rows)]  # (rows, heads, 1, D)
            own[layer].append(step)
            keys, values = memory.update(*step, layer)
            query = torch.randn(rows, 2 * HEADS, 1, DIM, generator=generator, dtype=torch.float64)
            got = shared_prefix_attention(
                (query, keys, values), memory.prefix[layer], memory, 0.5, partial_product
            )
            if token % 11:
                continue
            for row in range(rows):
                begin = sum(LENGTHS[: row // GROUP])
                part = slice(begin, begin + LENGTHS[row // GROUP])
                k, v = (
                    torch.cat([x[0][:, part], *(s[i][row] for s in own[layer])], dim=1)
                    for i, x in enumerate(prompts[layer])
                )
                k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))
                expected = torch.softmax(0.5 * query[row] @ k.mT, dim=-1) @ v
                torch.testing.assert_close(got[row, 0], expected[:, 0], rtol=0, atol=1e-12)


def test_prompts_and_rows_that_are_kept():
    generator = torch.Generator().manual_seed(1)
    memory = SharedPrefix(LENGTHS)
    first = {layer: _step(generator, sum(LENGTHS)) for layer in LAYERS}
    for layer in LAYERS:
        memory.update(*first[layer], layer)
    memory.start_decoding(4)
    memory.make_room()
    for layer in LAYERS:
        memory.update(*(x.transpose(0, 2) for x in _step(generator, 4)), layer)
    version = memory.version
    memory.select(torch.tensor([1]), torch.tensor([3]))
    assert memory.prompts == 1 and memory.version == version + 1
    for layer in LAYERS:
        keys, _ = memory.prefix[layer]
        assert torch.equal(keys[0, :, :3], first[layer][0][0][:, 5:])
