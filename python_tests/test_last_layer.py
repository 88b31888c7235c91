"""The last layer's rows when passes over other packs come between a pass and its gradients."""

import copy

import pytest
import torch
from test_forward import _assert_same, _gradients, _group_log_probs, _groups, directory, loaded

from vcr1_fast.model.forward import completion_hidden
from vcr1_fast.model.wrapping import checkpoint_activations

assert directory and loaded  # fixtures


@pytest.fixture
def packs(loaded):
    """Of as many rows that are read, in other places."""
    _, processor = loaded
    return [_groups(processor, seed, [(1, [5, 3]), (1, [4])]) for seed in (1, 2)]


def _with_adapters(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj", "down_proj"])
    adapted = get_peft_model(model, config).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def test_the_packs_are_read_in_other_places(packs):
    first, second = ([len(group.prompt) for group in groups] for groups in packs)
    assert first[0] != second[0]


def test_recomputation_after_another_pass(loaded, packs):
    model, _ = loaded
    expected = _gradients(model, _group_log_probs(model, packs[0]))
    model.train()
    checkpoint_activations(model)
    log_probs = _group_log_probs(model, packs[0])
    with torch.no_grad():
        _group_log_probs(model, packs[1])
    _assert_same(_gradients(model, log_probs), expected)


def test_recomputation_of_two_packs_in_one_loss(loaded, packs):
    model, _ = loaded

    def gradients():
        return _gradients(model, torch.cat([_group_log_probs(model, one) for one in packs]))

    expected = gradients()
    model.train()
    checkpoint_activations(model)
    _assert_same(gradients(), expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
def test_recomputation_after_the_reference_without_adapters(loaded, packs):
    model, _ = loaded
    adapted = _with_adapters(model)
    expected = _gradients(adapted, _group_log_probs(adapted, packs[0]))
    adapted.train()
    checkpoint_activations(adapted)
    log_probs = _group_log_probs(adapted, packs[0])
    with torch.no_grad(), adapted.disable_adapter():
        _group_log_probs(adapted, packs[1])
    _assert_same(_gradients(adapted, log_probs), expected)


def test_recomputation_after_a_pass_over_no_pack(loaded, packs):
    model, _ = loaded
    expected = _gradients(model, _group_log_probs(model, packs[0]))
    model.train()
    checkpoint_activations(model)
    log_probs = _group_log_probs(model, packs[0])
    with torch.no_grad():
        model(input_ids=torch.arange(7)[None])
    _assert_same(_gradients(model, log_probs), expected)


def test_a_copy_of_the_model_has_rows_of_its_own(loaded, packs):
    model, _ = loaded
    with torch.no_grad():
        expected = _group_log_probs(model, packs[1])
        twin = copy.deepcopy(model)
        last, other = (m.model.language_model.layers[-1] for m in (model, twin))
        assert other.self_attn.vcr1_used_rows is other.mlp.vcr1_used_rows
        assert other.mlp.vcr1_used_rows is not last.mlp.vcr1_used_rows
        before = last.mlp.vcr1_used_rows.rows
        seen = []
        other.mlp.gate_proj.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].shape[1])
        )
        assert torch.equal(_group_log_probs(twin, packs[1]), expected)
        assert last.mlp.vcr1_used_rows.rows is before
        assert seen == [len(other.mlp.vcr1_used_rows.rows)]
        completion_hidden(twin, packs[0])
        assert not torch.equal(last.mlp.vcr1_used_rows.rows, other.mlp.vcr1_used_rows.rows)
