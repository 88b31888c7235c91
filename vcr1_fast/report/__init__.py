"""Tables, curves and a rollout viewer, made from files and plain values."""
