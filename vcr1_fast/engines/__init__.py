"""What samples completions: one interface, and the engines behind it."""
