"""The GRPO losses as a loop over completions, in autograd: what the ops are compared with.

Written from the papers' formulae, one completion at a time on its valid tokens only, so that it
shares neither layout nor derivative with the package.
"""

import math

import torch

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def loop_loss(config, sequences):
    """Loss of a list of dicts with 1-D float64 tensors of valid tokens (see the keys used here)."""
    counts = [len(sequence["logps"]) for sequence in sequences]
    total = sum(counts)
    nonempty = sum(count > 0 for count in counts)
    batch = config.num_sequences or (nonempty if config.exclude_empty else len(sequences))
    aggregation = config.resolved_aggregation
    loss = torch.zeros((), dtype=torch.float64)
    entropy_sum, entropy_weight = 0.0, 0.0
    for sequence, count in zip(sequences, counts, strict=True):
        if count == 0:
            continue
        weight = {
            "sequence_mean": 1 / (count * max(batch, 1)),
            "token_mean": 1 / max(total, 1),
            "sequence_sum": 1 / max(batch, 1),
            "max_length": 1 / (max(batch, 1) * (config.max_length or 1)),
            "num_items": 1 / max(config.num_items or total, 1),
        }[aggregation]
        loss = loss + weight * _completion(config, sequence).sum()
        if config.entropy_coef:
            each = sequence["entropy"] * sequence["token_weights"]
            scale = weight if config.entropy_aggregation == "loss" else 1.0
            entropy_sum = entropy_sum + scale * each.sum()
            entropy_weight += float(sequence["token_weights"].sum())
    if config.entropy_coef and total:
        divisor = 1.0 if config.entropy_aggregation == "loss" else entropy_weight
        loss = loss - config.entropy_coef * entropy_sum / divisor
    return loss


def _completion(config, sequence):
    """Loss of each token of one completion."""
    logps, advantages = sequence["logps"], sequence["advantages"]
    old = logps.detach() if sequence["old"] is None else sequence["old"]
    log_ratio = logps - old
    if config.log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    ratio = {
        "token": lambda: log_ratio.exp(),
        "sequence": lambda: log_ratio.mean().exp().expand_as(log_ratio),
        "sequence_token": lambda: (log_ratio.mean().detach() + logps - logps.detach()).exp(),
    }[config.level]()

    sampler = old
    if sequence["rollout"] is not None:
        sampler = torch.where(sequence["rollout"].isnan(), old, sequence["rollout"])
    correction, log_correction = _rollout_weight(config, (old - sampler).detach())

    if config.loss_type in CLIPPED:
        first = ratio if config.delta is None else ratio.clamp(max=config.delta)
        second = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        policy = -torch.min(first * advantages, second * advantages)
    elif config.loss_type == "cispo":
        if config.cispo_bounds == "absolute":
            weight = ratio.clamp(max=config.eps_high)
        else:
            weight = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        policy = -weight.detach() * advantages * logps
    elif config.loss_type == "sapo":
        policy = torch.stack(
            [
                -a * 4 / tau * torch.sigmoid(tau * (r - 1))
                for a, r in zip(advantages, ratio, strict=True)
                for tau in [config.sapo_tau_pos if a > 0 else config.sapo_tau_neg]
            ]
        )
    else:
        log_w = log_ratio.detach().clamp(-20, 20).sum() + log_correction
        log_w = float(log_w.clamp(math.log(1e-8), 20.0))
        phi = []
        for a in advantages:
            k = config.vespo_k_pos if a >= 0 else config.vespo_k_neg
            lam = config.vespo_lambda_pos if a >= 0 else config.vespo_lambda_neg
            phi.append(math.exp(lam + k * log_w - lam * math.exp(log_w)))
        policy = -torch.tensor(phi, dtype=torch.float64) * advantages * logps

    if config.off_policy_threshold is not None:
        drift = (sampler - logps.detach()).mean()
        policy = policy * ((advantages >= 0) | (drift <= config.off_policy_threshold))
    policy = policy * sequence["token_weights"]
    kl = _kl(config, sequence["ref"] - logps) if config.beta else torch.zeros_like(logps)
    if config.kl_bias_correction:
        kl = kl * ratio
    if config.loss_type == "vespo":
        return policy + config.beta * kl
    if config.rollout_after_kl:
        return correction * (policy + config.beta * kl)
    return correction * policy + config.beta * kl


def _kl(config, difference):
    if config.kl_input_clamp is not None:
        difference = difference.clamp(-config.kl_input_clamp, config.kl_input_clamp)
    value = {
        "k1": lambda d: -d,
        "k2": lambda d: d**2 / 2,
        "k3": lambda d: torch.expm1(d) - d,
        "abs": lambda d: d.abs(),
    }[config.kl](difference)
    if config.kl_output_clamp is not None:
        value = value.clamp(-config.kl_output_clamp, config.kl_output_clamp)
    if config.kl_straight_through:
        square = difference**2 / 2
        value = square - square.detach() + value.detach()
    return value


def _rollout_weight(config, gap):
    """(weight of each token, log weight of the completion)."""
    kind = config.rollout_correction
    if kind is None:
        return torch.ones_like(gap), torch.zeros(())
    low = -math.inf if config.rollout_min is None else config.rollout_min
    high = math.inf if config.rollout_max is None else config.rollout_max
    if kind == "sequence_icepop":
        inside = low <= gap.mean().exp() <= high
        weight = gap.exp() * inside
    elif kind.startswith("token"):
        ratio = gap.exp()
        kept = ratio * ((ratio >= low) & (ratio <= high))
        weight = ratio.clamp(low, high) if kind == "token_truncate" else kept
    else:
        ratio = gap.sum().exp()
        kept = ratio * ((ratio >= low) & (ratio <= high))
        one = ratio.clamp(low, high) if kind == "sequence_truncate" else kept
        return one.expand_as(gap), one.log().clamp(math.log(1e-8), 20.0)
    return weight, weight.log().clamp(math.log(1e-8), 20.0).sum()
