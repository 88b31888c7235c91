"""vcr1_fast: fast GRPO reinforcement fine-tuning of video language models."""

__version__ = "0.1.0"
