"""Write a small random Qwen2.5-VL, tokenizer included, in the standard Hugging Face layout.

The result is loaded through exactly the code that loads a released checkpoint: what runs on it on a
laptop is what runs on 7B. Only sizes, vocabulary and weights differ.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen2.5-VL's control tokens. As there, they follow the text vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<answer>", "</answer>", "<glue>", "</glue>", "<think>", "</think>")

# One piece each: an XML-like tag; a number with its decimals; a word with the space before it; a
# run of punctuation; white space. A space between a word or punctuation and a number goes to the
# former, so that "3.5" is the same token wherever it stands.
_PIECES = (
    r"</?\p{L}+>"
    r"|\p{N}+(?:\.\p{N}+)?"
    r"| ?\p{L}+(?: (?=\p{N}))?"
    r"| ?(?:[^\s\p{L}\p{N}<]|<(?!/?\p{L}+>))+(?: (?=\p{N}))?"
    r"|\s+"
)

# Same turns and same expansion of content parts as the released checkpoints, without their default
# system turn unless one is configured.
_CHAT_TEMPLATE = """\
{%- if system_default and messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\n' + system_default + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the random model; `window` (of the vision encoder's attention) is in pixels.

    `mrope_section` splits half a head over (time, height, width); None uses Qwen's 2:3:3.
    `vocab_limit` bounds the text vocabulary before the special tokens are added.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp_ratio: float = 3.0
    vocab_limit: int = 4096
    mrope_section: tuple[int, int, int] | None = None
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    vision_depth: int = 2
    vision_hidden: int = 64
    vision_heads: int = 2
    vision_mlp_ratio: float = 3.0
    vision_full_attention: tuple[int, ...] = (1,)
    window: int = 112
    patch: int = 14
    tokens_per_second: int = 2
    initializer_range: float = 0.05
    max_positions: int = 32_768
    min_pixels: int = 28 * 28
    max_pixels: int = 768 * 28 * 28
    system: str = ""

    def __post_init__(self) -> None:
        for width, heads, what, multiple in (
            (self.hidden_size, self.heads, "hidden_size / heads", 2),
            (self.vision_hidden, self.vision_heads, "vision_hidden / vision_heads", 4),
        ):
            if width % heads or (width // heads) % multiple:
                raise ValueError(f"{what} must be a multiple of {multiple}, got {width} / {heads}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if sum(self.sections) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section {self.sections} must sum to half of the head size {self.head_dim}"
            )
        outside = [i for i in self.vision_full_attention if not 0 <= i < self.vision_depth]
        if outside:
            raise ValueError(f"vision_full_attention {outside} outside 0..{self.vision_depth - 1}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def sections(self) -> tuple[int, int, int]:
        if self.mrope_section is not None:
            time, height, width = self.mrope_section
            return time, height, width
        half = self.head_dim // 2
        time = max(half // 4, 1)
        height = (half - time) // 2
        return (time, height, half - time - height)


def train_tokenizer(texts: Iterable[str], vocab_limit: int) -> "Tokenizer":
    """Byte-level BPE over `texts`, at most `vocab_limit` text tokens, then Qwen's special tokens.

    A number that occurs in `texts` is one token as long as the limit allows its merges.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_limit < len(alphabet):
        raise ValueError(
            f"vocab_limit must be at least {len(alphabet)} (all bytes), got {vocab_limit}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_limit,
        min_frequency=1,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # Control tokens never go through the merges; leaving them in would spend vocabulary on them.
    control = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    lines = [part for text in texts for part in control.split(text) if part]
    tokenizer.train_from_iterator([*lines, *TAGS, "system", "user", "assistant", "\n"], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def write_tiny(
    path: str | Path, *, texts: Iterable[str], seed: int = 0, config: TinyConfig | None = None
) -> None:
    """Write a random Qwen2.5-VL to the directory `path` (made if absent).

    Args:
        path: target directory; files of the same names are replaced.
        texts: what the tokenizer is trained on: prompts and answers.
        seed: seed of the weights. The caller's random state is left untouched.
        config: sizes; the default has about one million parameters.

    Raises:
        ValueError: when the sizes do not fit together (see `TinyConfig`).
    """
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    config = config or TinyConfig()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, config.vocab_limit)
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ids = {token: number for token, number in found.items() if number is not None}
    model_config = _model_config(config, -(-tokenizer.get_vocab_size() // 8) * 8, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(model_config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
    )
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    default = json.dumps(config.system)
    (path / "chat_template.jinja").write_text(
        "{%- set system_default = " + default + " -%}\n" + _CHAT_TEMPLATE
    )
    _write_json(path / "tokenizer_config.json", _tokenizer_config(config, ids))
    _write_json(path / "preprocessor_config.json", _preprocessor_config(config))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _model_config(config: TinyConfig, vocab_size: int, ids: dict[str, int]) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": round(config.hidden_size * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": 1e-6,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.sections),
        },
    }
    vision = {
        "depth": config.vision_depth,
        "hidden_size": config.vision_hidden,
        "intermediate_size": round(config.vision_hidden * config.vision_mlp_ratio),
        "num_heads": config.vision_heads,
        "out_hidden_size": config.hidden_size,
        "fullatt_block_indexes": list(config.vision_full_attention),
        "window_size": config.window,
        "patch_size": config.patch,
        "tokens_per_second": config.tokens_per_second,
        "initializer_range": config.initializer_range,
    }
    # A parent's keyword, which the class's own annotations do not list.
    shared: dict[str, Any] = {"initializer_range": config.initializer_range}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=config.tie_embeddings,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **shared,
    )


def _tokenizer_config(config: TinyConfig, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t in ids],
    }


def _preprocessor_config(config: TinyConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "patch_size": config.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
