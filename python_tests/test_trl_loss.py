"""grpo_loss against the maths of TRL's own trainer, where TRL is installed (it need not be)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from vcr1_fast.ops import GRPOLossConfig, grpo_loss
from vcr1_fast.ops.grpo.config import LOSS_TYPES

B, T, MAX_LENGTH = 6, 23, 31
ACCUMULATION, ITEMS = 1, 200.0


@pytest.fixture(scope="module")
def trainer():
    module = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
    return module.GRPOTrainer


def make_batch(token_advantages):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logps = -normal(B, T).abs() - 0.1
    names = ("old", "ref", "rollout")
    batch = {"logps": logps, **{n: logps + 0.5 * normal(B, T) for n in names}}
    batch["entropy"] = normal(B, T).abs()
    batch["advantages"] = normal(B, T) if token_advantages else normal(B)
    batch["mask"] = (torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)).long()
    return batch


def trl_loss(trainer, batch, config, correction, compute_loss=None):
    """(loss, its gradients in logps and entropy, what is logged) by `compute_loss`, TRL's own
    unless another one is given."""
    logps, entropy = (batch[n].clone().requires_grad_() for n in ("logps", "entropy"))
    stub = SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=config.kl_bias_correction,
            delta=config.delta,
            steps_per_generation=ACCUMULATION,
            sapo_temperature_pos=config.sapo_tau_pos,
            sapo_temperature_neg=config.sapo_tau_neg,
            vespo_k_pos=config.vespo_k_pos,
            vespo_lambda_pos=config.vespo_lambda_pos,
            vespo_k_neg=config.vespo_k_neg,
            vespo_lambda_neg=config.vespo_lambda_neg,
        ),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=config.off_policy_threshold,
        use_vllm=correction is not None,
        vllm_importance_sampling_correction=correction is not None,
        vllm_importance_sampling_mode=config.rollout_correction,
        vllm_importance_sampling_clip_min=config.rollout_min,
        vllm_importance_sampling_clip_max=config.rollout_max,
        current_gradient_accumulation_steps=ACCUMULATION,
        _entropy_bonus_enabled=config.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=config.entropy_coef,
        beta=config.beta,
        loss_type=config.loss_type,
        importance_sampling_level=config.level,
        epsilon_low=config.eps_low,
        epsilon_high=config.eps_high,
        max_completion_length=MAX_LENGTH,
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
    )
    mask, none = batch["mask"], batch["mask"][:, :0]
    inputs = {
        **{"prompt_ids": none, "prompt_mask": none, "completion_ids": mask},
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["ref"],
        "num_items_in_batch": torch.tensor(ITEMS),
    }
    if correction is not None:
        inputs["importance_sampling_ratio"] = correction
        inputs["sampling_per_token_logps"] = batch["rollout"]
    loss = (compute_loss or trainer._compute_loss)(stub, None, inputs)
    loss.backward()
    return loss.detach(), logps.grad, entropy.grad, dict(stub._metrics["train"])


def correction_of(batch, config):
    """The trainer's importance ratio, made where it generates: a mask of ratios above the bound."""
    if config.rollout_correction is None:
        return None
    gap = (batch["old"] - batch["rollout"]) * batch["mask"]
    ratio = gap.exp()
    if config.rollout_correction.startswith("sequence"):
        ratio = gap.sum(-1, keepdim=True).exp()
    if config.rollout_correction.endswith("truncate"):
        return ratio.clamp(max=config.rollout_max)
    return ratio.masked_fill(ratio > config.rollout_max, 0.0)


CONFIGS = [
    *(
        GRPOLossConfig(
            loss_type=name, level=level, beta=beta, max_length=MAX_LENGTH, num_items=ITEMS,
            sapo_tau_neg=1.0625,  # exact in float32, which TRL's choice between two numbers is in
            eps_high=0.28, log_ratio_clamp=None, kl_input_clamp=None, kl_bias_correction=beta > 0.3,
        )
        for name in LOSS_TYPES
        for level in ("token", "sequence")
        for beta in (0.0, 0.1, 0.5)
        if name != "vespo" or level == "token"
    ),
    GRPOLossConfig(delta=1.5),
    GRPOLossConfig(off_policy_threshold=0.05),
    GRPOLossConfig(entropy_coef=0.1, entropy_aggregation="token_mean"),
    *(
        GRPOLossConfig(loss_type=name, rollout_correction=kind, rollout_max=1.5, num_items=ITEMS)
        for name in ("grpo", "dapo")
        for kind in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.level}-{c.beta}")
@pytest.mark.parametrize("token_advantages", (False, True))
def test_same_loss_and_gradients(config, token_advantages, trainer):
    batch = make_batch(token_advantages)
    correction = correction_of(batch, config)
    expected = trl_loss(trainer, batch, config, correction)
    logps, entropy = (batch[n].clone().requires_grad_() for n in ("logps", "entropy"))
    loss, _ = grpo_loss(
        logps, batch["old"], batch["advantages"], batch["mask"], ref_logps=batch["ref"],
        entropy=entropy, rollout_logps=None if correction is None else batch["rollout"],
        config=config,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logps.grad, expected[1], rtol=1e-10, atol=1e-12)
    if config.entropy_coef:
        torch.testing.assert_close(entropy.grad, expected[2], rtol=1e-10, atol=1e-12)
