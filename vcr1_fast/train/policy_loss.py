"""The policy's GRPO loss of one forward pass, from hidden states to `linear_grpo_loss`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vcr1_fast.model.forward import completion_hidden, lm_head
from vcr1_fast.model.prompt_state import PromptState
from vcr1_fast.ops import GRPOLossConfig, linear_grpo_loss
from vcr1_fast.train.groups import PolicyGroup


def policy_loss(
    model: nn.Module,
    groups: Sequence[PolicyGroup],
    loss_config: GRPOLossConfig,
    prompt: PromptState | None = None,
    *,
    temperature: float,
    on_policy: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of some groups in one packed forward pass, and `linear_grpo_loss`'s metrics.

    `prompt`: state of the one group's prompt, which ran before (`completion_hidden`).
    `on_policy`: no optimiser step since the completions were sampled. The policy is then its own
    old policy, and its gap to the sampler's log-probs, rounding alone, is measured. Afterwards the
    sampler's log-probs are the old policy's.
    """
    hidden, labels, cu_seqlens = completion_hidden(model, [one.group for one in groups], prompt)
    weight, bias = lm_head(model)
    sampled = torch.cat([one.rollout_logps for one in groups]).to(hidden.device)
    refs = [one.ref_logps for one in groups if one.ref_logps is not None]
    correction = loss_config.rollout_correction not in (None, "none")
    # Logits exist for a chunk of rows at a time; the gradient is computed in the forward pass.
    return linear_grpo_loss(
        hidden,
        weight,
        labels,
        torch.cat([one.advantages for one in groups]).to(hidden.device),
        None,
        old_logps=None if on_policy else sampled,
        ref_logps=torch.cat(refs).to(hidden.device) if refs else None,
        rollout_logps=sampled if on_policy or correction else None,
        bias=bias,
        cu_seqlens=cu_seqlens,
        temperature=temperature,
        entropy=True,
        config=loss_config,
    )
