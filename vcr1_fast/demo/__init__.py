"""The demo: a tiny video language model learns from video by reinforcement, on a CPU."""
