"""The demo: a tiny Qwen2.5-VL learns from video by reinforcement, on a CPU."""
