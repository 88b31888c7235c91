"""GRPO in your own training loop: the ops alone, on a toy policy, in a few seconds.

    python examples/custom_loop.py

The policy is a table of logits for each prompt; the reward counts how often a completion says its
prompt's token. The reward rises from 1 / 8, that of random tokens, to almost 1.
"""

import torch

from vcr1_fast.ops import GRPOLossConfig, gather_logprobs, group_advantages, grpo_loss

PROMPTS, GROUP, LENGTH, VOCABULARY = 4, 16, 6, 8


def main(steps: int = 60, seed: int = 0) -> list[float]:
    """Mean reward of each step."""
    torch.manual_seed(seed)
    policy = torch.nn.Parameter(torch.zeros(PROMPTS, LENGTH, VOCABULARY))
    optimizer = torch.optim.Adam([policy], lr=0.1)
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)
    config = GRPOLossConfig(loss_type="dapo", eps_high=0.28)
    mask = torch.ones(len(prompts), LENGTH, dtype=torch.bool)
    history = []
    for _ in range(steps):
        # Rollout: a group of completions a prompt, with the log-probs they were sampled with.
        with torch.no_grad():
            logits = policy[prompts]
            tokens = torch.distributions.Categorical(logits=logits).sample()
            old = gather_logprobs(logits, tokens).logps
        rewards = (tokens == prompts[:, None]).float().mean(-1)
        advantages = group_advantages(rewards, GROUP)
        # Two updates on the same rollout: in the second one the ratio has moved away from 1.
        for _ in range(2):
            out = gather_logprobs(policy[prompts], tokens, entropy=True)
            loss, metrics = grpo_loss(
                out.logps, old, advantages, mask, entropy=out.entropy.detach(), config=config
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(float(rewards.mean()))
    print(f"reward {history[0]:.2f} -> {history[-1]:.2f}, entropy {float(metrics['entropy']):.2f}")
    return history


if __name__ == "__main__":
    main()
