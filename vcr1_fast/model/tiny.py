"""The family-free part of a random model for tests and demos: tokenizer, chat template, files.

A family adds sizes, configuration and settings files (`model/<family>/tiny.py`). The result is
loaded through exactly the code that loads a released checkpoint: what runs on it on a laptop is
what runs on 7B. Only sizes, vocabulary and weights differ.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Control tokens of the released checkpoints. As there, they follow the text vocabulary.
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
{%- if thinks -%}
{{- '<think>\\n' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def chat_template(*, system: str = "", thinks: bool = False) -> str:
    """A chat template in the form of the released ones.

    system: system turn of conversations without one; empty: none. thinks: the assistant's turn
    begins inside `<think>`, or, where `enable_thinking` is false, behind an empty block of it.
    """
    return (
        f"{{%- set system_default = {json.dumps(system)} -%}}\n"
        f"{{%- set thinks = {json.dumps(thinks)} -%}}\n" + _CHAT_TEMPLATE
    )


def train_tokenizer(texts: Iterable[str], vocab_limit: int) -> "Tokenizer":
    """Byte-level BPE over `texts`, at most `vocab_limit` text tokens, then the special tokens.

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


def write_random(
    path: str | Path,
    *,
    tokenizer: "Tokenizer",
    model_class: type[Any],
    model_config: Callable[[int, dict[str, int]], Any],
    settings: dict[str, dict[str, Any]],
    max_positions: int,
    seed: int = 0,
    template: str | None = None,
) -> None:
    """Write a random model and its tokenizer to the directory `path` (made if absent).

    Args:
        path: target directory; files of the same names are replaced.
        tokenizer: from `train_tokenizer`.
        model_class: of transformers.
        model_config: (rows of the embedding, ids of the special tokens) -> its configuration.
        settings: settings files of clips and images by name.
        max_positions: most tokens of a sequence.
        seed: seed of the weights. The caller's random state is left untouched.
        template: chat template; None: `chat_template()`.
    """
    from transformers import GenerationConfig

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ids = {token: number for token, number in found.items() if number is not None}
    config = model_config(-(-tokenizer.get_vocab_size() // 8) * 8, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
    )
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(chat_template() if template is None else template)
    for name, values in {
        "tokenizer_config.json": _tokenizer_config(max_positions),
        **settings,
    }.items():
        (path / name).write_text(json.dumps(values, indent=2) + "\n")


def _tokenizer_config(max_positions: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(SPECIAL_TOKENS),
    }
