"""One token further in every completion: as it comes, or as a CUDA graph.

A pass over one token a row is a thousand small kernels; issued one by one from Python they take
longer to launch than to run. With static shapes (`decode.SharedPrefix`) they can be recorded once
and replayed. Recording is all that `GraphedStep` adds: what is recorded is `TokenStep`, on inputs
that are copied into place.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vcr1_fast.model.decode import SharedPrefix
from vcr1_fast.model.forward import lm_head
from vcr1_fast.model.sampling import Drawn, SamplingConfig, draw

Step = Callable[[Tensor, Tensor, Tensor], Drawn]


class TokenStep:
    """Feed a token to every row and draw the next. `memory` must have room (`make_room`)."""

    def __init__(
        self, model: nn.Module, memory: SharedPrefix, banned: Tensor, sampling: SamplingConfig
    ) -> None:
        self.memory, self.banned, self.sampling = memory, banned, sampling
        self.embedding, self.model = model.get_input_embeddings(), model.model.language_model
        self.weight, self.bias = lm_head(model)

    def __call__(self, tokens: Tensor, positions: Tensor, uniforms: Tensor) -> Drawn:
        """tokens (R,) int64, drawn last; positions (R,) of these, the same on all three axes;
        uniforms (R,) float64 for `draw`."""
        hidden = self.model(
            inputs_embeds=self.embedding(tokens[:, None]),
            position_ids=positions[None, :, None].expand(3, -1, -1),
            attention_mask={"full_attention": None},
            past_key_values=self.memory,
            use_cache=True,
            shared_prefix=self.memory,
        ).last_hidden_state[:, 0]
        return self.draw(hidden, uniforms)

    def draw(self, hidden: Tensor, uniforms: Tensor) -> Drawn:
        """From hidden states (R, H)."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return draw(logits, uniforms, self.banned, self.sampling)


class GraphedStep:
    """`step` recorded as a CUDA graph, again whenever the memory's buffers have been replaced.

    Recording runs the step twice, which writes the same keys to the same place both times. What
    it returns is overwritten by the next call.
    """

    def __init__(self, step: TokenStep) -> None:
        self.step, self.version = step, -1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.drawn: Drawn | None = None

    def __call__(self, *inputs: Tensor) -> Drawn:
        """As `TokenStep`."""
        if self.version != self.step.memory.version:
            self._record(inputs)
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.drawn

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        # The old graph's memory first, so that the new one can have it.
        self.graph = self.drawn = None
        self.inputs = tuple(x.clone() for x in inputs)
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.step(*self.inputs)  # libraries make their workspaces in a first run
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.drawn = self.step(*self.inputs)
        self.version = self.step.memory.version


def token_step(step: TokenStep, decoding: str, device: torch.device) -> Step:
    """`step`, or it as a graph. ValueError for graphs where there is no CUDA device."""
    if decoding != "graphs":
        return step
    if device.type != "cuda":
        raise ValueError(f"decoding 'graphs' needs a CUDA device, the model is on {device}")
    return GraphedStep(step)


def resolve_decoding(decoding: str, device: torch.device) -> str:
    """What "auto" stands for: graphs on CUDA, elsewhere the shapes that are least work."""
    if decoding != "auto":
        return decoding
    return "graphs" if device.type == "cuda" else "dynamic"
