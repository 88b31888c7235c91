"""A model family: all that the package must know of an architecture, and its registry.

One folder `model/<name>/` holds all of a family. Its `__init__.py` offers `FAMILY`, a `Family`;
nothing else in the package names the architecture. `family_of(model)` chooses by the `model_type`
of the model's configuration. A family outside the package calls `register_family` when imported.

The folder fills in:

    processor        text, clips and images -> `Prompt`: sizes, patches, placeholder tokens, M-RoPE
                     positions (`mrope` and `video_text` are set once, when the checkpoint is
                     loaded)
    vision           how the vision encoder is prepared and called, and the width of its features
    language model   which layers keep keys and values, what else is patched, how features enter
    training         LoRA targets, parameters to freeze, layer sizes for the memory planner
    tiny             a random model of the family, for tests and demos

Features of clips are always one tensor (vision tokens, levels * H). A family whose vision encoder
feeds several layers (DeepStack) stores all levels side by side; they are split where they enter the
language model (`vision_inputs`). Caches, packing and frame shuffling see nothing but the width.

What families have in common is in this folder, and each uses what it needs: `processor.py` (chat
template, tokens, patches), `preprocessor.py` (settings files), `last_layer.py` (unused rows),
`vision.py` (packed attention, patch projection), `tiny.py` (tokenizer and files of a random model),
and `timed_text/` for families that write the times of a clip as text.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vcr1_fast import model as package
from vcr1_fast.model.last_layer import skip_unused_rows
from vcr1_fast.model.processor import Processor
from vcr1_fast.model.wrapping import unwrap
from vcr1_fast.ops.video_patches import PatchLayout


@dataclass(frozen=True)
class LayerSizes:
    """Equal transformer layers, for estimates of memory.

    depth: layers; width: H; queries, keys: width of all query heads, and of all key heads,
    together; mlp: width inside the MLP. A family whose layers keep other tensors than the estimate
    counts (`train/planner.py`) says so by other widths.
    """

    depth: int
    width: int
    queries: float
    keys: float
    mlp: int


@dataclass(frozen=True)
class ModelSizes:
    """Sizes from which the planner computes bytes; vocabulary: rows of the head.

    state_bytes: of one completion in decoding, of all layers that keep a state instead of keys.
    layer_bytes: of a token in one layer, on top of the estimate by widths: what a layer computes
    a second time in its backward pass.
    """

    text: LayerSizes
    vision: LayerSizes
    vocabulary: int
    state_bytes: float = 0.0
    layer_bytes: float = 0.0


LANGUAGE_MODEL_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""Names of the linear layers of attention and MLP, the same in most language models."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Every field is data or a function without state. Defaults are what most
    models of transformers have.

    In the functions below `config` is the model's transformers configuration, and `model` the bare
    transformers model, without a peft, DDP or compile wrapper.
    """

    model_types: tuple[str, ...]
    """Values of `model_type` in config.json that this family serves."""
    model_class: Callable[[], type[Any]]
    """The class in transformers; a function, so that transformers is imported late."""
    layout: PatchLayout
    """How frames are cut into the rows of pixel values; a checkpoint may bring its own mean and
    std."""
    load_processor: Callable[..., Processor]
    """(directory, *, mrope, video_text) -> the checkpoint's processor; CheckpointError for unusable
    files."""

    vision_encoder: Callable[[Any], nn.Module] = lambda model: model.model.visual
    """(model) -> the module that encodes clips."""
    prepare_vision: Callable[[nn.Module], None]
    """(vision encoder): put faster modules and attention in place; parameters keep their names."""
    encode: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]]
    """(vision encoder, pixel values (N, patch values), grids (n, 3)) -> for each clip its features
    (vision tokens, levels * H)."""
    feature_levels: Callable[[Any], int] = lambda config: 1
    """(config) -> levels of features side by side: 1, or 1 + the layers of DeepStack."""
    vision_inputs: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, dict[str, Any]]] = (
        lambda levels, slots: (levels[0], {})
    )
    """(levels of features, each (V, H); slots (N,) bool: which tokens are vision tokens) ->
    embeddings of these tokens (V, H), and keyword arguments for the language model in the pass that
    reads them."""

    language_model: Callable[[Any], nn.Module] = lambda model: model.model.language_model
    """(model) -> the module that turns embeddings into final hidden states."""
    kv_layers: Callable[[Any], Sequence[int]] = lambda config: range(config.num_hidden_layers)
    """(config of the language model) -> layers with keys and values. ValueError for layers that
    cannot share prompts."""
    prepare_language_model: Callable[[Any], None] = lambda model: skip_unused_rows(model.layers[-1])
    """(language model): what a pass over packed groups needs besides the attention function. Called
    again for a model that is prepared already."""

    lora_targets: tuple[str, ...] = LANGUAGE_MODEL_TARGETS
    """Names of the linear layers that adapters are added to where the run names none."""
    vision_pattern: str = r".*\bvisual\b.*"
    """Regular expression of module names inside the vision encoder: adapters leave them out when
    it is frozen."""
    projection_prefixes: tuple[str, ...] = ("merger.",)
    """Parameters of the vision encoder whose names start with one of these project features to the
    language model; `freeze_vision(merger=False)` keeps them trainable."""
    sizes: Callable[[Any], ModelSizes]
    """(config) -> sizes for the memory planner."""

    tiny_config: Callable[..., Any]
    """(**sizes) -> settings of a random model; all have defaults."""
    write_tiny: Callable[..., None]
    """(path, *, texts, seed=0, config=None): write a random checkpoint, tokenizer included."""

    report: Callable[[], Sequence[tuple[str, str]]] = tuple
    """() -> (name, value) rows for `vcr1 doctor`: where the installed transformers differs from
    what the checkpoints were trained with."""


_REGISTERED: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make `family` known under its model types. ValueError for a type that another family has."""
    for model_type in family.model_types:
        if _REGISTERED.setdefault(model_type, family) != family:
            raise ValueError(f"model_type {model_type!r} is registered by another family")


def families() -> Mapping[str, Family]:
    """All families by model type: the registered ones and every folder of `model/` that has one."""
    for info in pkgutil.iter_modules(package.__path__):
        if info.ispkg:
            found = importlib.import_module(f"{package.__name__}.{info.name}")
            if isinstance(getattr(found, "FAMILY", None), Family):
                register_family(found.FAMILY)
    return dict(_REGISTERED)


def family_named(model_type: str | None) -> Family:
    """The family that serves `model_type`; ValueError, listing the known types, if none does."""
    # The folders are listed only for a type that is not known yet: `family_of` is called in every
    # pass, and listing reads the disk.
    known: Mapping[str, Family] = _REGISTERED
    if model_type not in known:
        known = families()
    if model_type is None or model_type not in known:
        raise ValueError(f"model_type is {model_type!r}, known are {', '.join(sorted(known))}")
    return known[model_type]


def family_of(model: nn.Module) -> Family:
    """The family of a model, wrapped or not, by `config.model_type`."""
    return family_named(unwrap(model).config.model_type)
