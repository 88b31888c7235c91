"""The GRPO loss: on log-probs (`loss`), on logits, on an LM head's input, and token by token."""
