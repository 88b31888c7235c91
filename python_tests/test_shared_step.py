"""The policy step's loss and every gradient, shared, against each completion run alone with its
prompt: full and by adapters, trained and frozen encoder, kept and recomputed activations."""

import random

import pytest
import torch
from test_forward import CONFIG, _groups, _plain_logits, from_the_packs_start

from vcr1_fast.model import checkpoint, packing
from vcr1_fast.model.qwen2_5_vl.tiny import write_tiny
from vcr1_fast.model.vision import freeze_vision
from vcr1_fast.model.wrapping import checkpoint_activations, unwrap
from vcr1_fast.ops import GRPOLossConfig
from vcr1_fast.train.groups import PolicyGroup, step_loss_config
from vcr1_fast.train.loop import policy_loss

LOSS = GRPOLossConfig(loss_type="grpo", beta=0.05, entropy_coef=0.01)
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, texts=["When is it visible? From 1.5 to 3.5 seconds."], config=CONFIG)
    return path


def _with_adapters(model):
    from peft import LoraConfig, get_peft_model

    dtype = model.dtype
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets)).to(dtype)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def _policy_groups(processor, seed):
    """Ragged prompts of up to two clips and images, completions and group sizes, several groups in
    a pack; one of them has two clips and a picture between them."""
    rng = random.Random(seed)
    shape = [
        (
            "".join(rng.choice("vi") for _ in range(rng.randint(0, 2))),
            [rng.randint(1, 9) for _ in range(rng.randint(2, 5))],
        )
        for _ in range(rng.randint(1, 3))
    ]
    shape.append(("viv", [rng.randint(1, 9) for _ in range(3)]))
    out = []
    for group in _groups(processor, seed, shape):
        sizes = [len(c) for c in group.completions]
        advantages = torch.tensor([rng.uniform(-2, 2) for _ in sizes])
        refs = torch.tensor([rng.uniform(-7, -4) for _ in range(sum(sizes))])
        out.append(PolicyGroup(group, advantages, torch.zeros(sum(sizes)), refs))
    return out


def _plain_loss(model, groups):
    """The formula of `grpo` with k3 and an entropy bonus, one completion after another, from the
    model's own forward over prompt and completion."""
    total, count = 0.0, sum(len(one.lengths) for one in groups)
    for one in groups:
        refs = one.ref_logps.split(one.lengths)
        for advantage, ref, completion in zip(
            one.advantages, refs, one.group.completions, strict=True
        ):
            alone = packing.Group(one.group.prompt, [completion])
            rows = (_plain_logits(unwrap(model), [alone])[0] / TEMPERATURE).log_softmax(-1)
            logps = rows.gather(1, completion[:, None])[:, 0]
            ratio = torch.exp(logps - logps.detach())
            kl = torch.exp(ref - logps) - (ref - logps) - 1
            entropy = -(rows.exp() * rows).sum(-1)
            terms = -ratio * advantage + LOSS.beta * kl - LOSS.entropy_coef * entropy
            total = total + terms.mean() / count
    return total


def _shared_loss(model, groups):
    sequences = sum(len(one.lengths) for one in groups)
    tokens = sum(sum(one.lengths) for one in groups)
    loss, metrics = policy_loss(
        model,
        groups,
        step_loss_config(LOSS, sequences, tokens),
        temperature=TEMPERATURE,
        on_policy=True,
    )
    assert metrics["ratio_max"] == 1.0
    return loss


def _gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def _both(directory, dtype, seed, *, adapters=False, frozen=False, recomputed=False):
    """(loss, gradients) of the shared form and of the plain one."""
    model, processor = checkpoint.load(directory, dtype=dtype)
    if adapters:
        model = _with_adapters(model)
    if frozen:
        freeze_vision(model)
    if recomputed:
        checkpoint_activations(model)
    model.train()
    groups = _policy_groups(processor, seed)
    loss = _shared_loss(model, groups)
    ours = loss.detach().double(), _gradients(model, loss)
    loss = _plain_loss(model, groups)
    theirs = loss.detach().double(), _gradients(model, loss)
    assert ours[1].keys() == theirs[1].keys()
    assert any("visual" in name for name in ours[1]) == (not frozen)
    assert all("lora_" in name for name in ours[1]) == adapters
    return ours, theirs


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("frozen", [False, True], ids=["encoder", "frozen"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_loss_and_gradients_in_float64(directory, adapters, frozen, recomputed):
    """To 1e-7, the norms being float32 in the model itself."""
    for seed in range(2):
        options = {"adapters": adapters, "frozen": frozen, "recomputed": recomputed}
        ours, theirs = _both(directory, torch.float64, seed, **options)
        assert abs(ours[0] - theirs[0]) < 1e-7
        for name, gradient in theirs[1].items():
            tolerance = 1e-7 * (1 + float(gradient.abs().max()))
            assert torch.allclose(ours[1][name], gradient, rtol=0, atol=tolerance), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.*:FutureWarning")  # peft asks it
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_loss_and_gradients_in_lower_precision(directory, dtype, tolerance, adapters):
    """Relative, over all parameters together: one of them may hold little but rounding."""
    ours, theirs = _both(directory, dtype, 3, adapters=adapters)
    assert abs(ours[0] - theirs[0]) < tolerance * (1 + abs(theirs[0]))
    flat = [torch.cat([g.flatten() for g in one[1].values()]) for one in (ours, theirs)]
    assert (flat[0] - flat[1]).norm() < tolerance * flat[1].norm()


def test_the_comparison_notices_what_must_not_be(directory, monkeypatch):
    """A completion that sees another, a group that sees another, positions that restart."""

    def difference():
        ours, theirs = _both(directory, torch.float64, 1)
        gap = max(float((ours[1][n] - g).abs().max()) for n, g in theirs[1].items())
        return min(float(abs(ours[0] - theirs[0])), gap)

    assert difference() < 1e-7
    one = packing.Span
    with monkeypatch.context() as patch:
        patch.setattr(packing, "Span", lambda a, p, lengths, d: one(a, p, (sum(lengths),), d))
        assert difference() > 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(packing.Span, "parts", from_the_packs_start(one.parts))
        assert difference() > 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(packing, "next_position", lambda positions: 0)
        assert difference() > 1e-5
