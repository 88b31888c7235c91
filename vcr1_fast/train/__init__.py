"""Training: supervised fine-tuning and GRPO."""
