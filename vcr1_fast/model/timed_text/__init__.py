"""What families have in common that write the times of a clip's frames as text.

Frames, sizes, text and positions of their prompts, the vision encoder without windows, and the
random model for tests. A family adds the names of transformers' classes and its language model.
"""
