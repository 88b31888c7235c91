"""TRL's GRPO on text, made faster by two lines.

python examples/trl_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct
python examples/trl_grpo.py --tiny          # a random model, on a CPU, no download
"""

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

from vcr1_fast.integrations.trl import patch_trl

patch_trl()

QUESTIONS = ("Name a colour.", "Name a fruit.", "Name a river.", "Name a month.")


def brevity(completion_ids, **_):
    """1 for the shortest answer, 0 for one of 32 tokens."""
    return [1 - len(ids) / 32 for ids in completion_ids]


def tiny_model(folder: Path) -> str:
    """A random Qwen2 whose tokenizer knows single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--output", default="runs/trl_grpo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a random model on the CPU")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        name = tiny_model(Path(folder)) if options.tiny else options.model
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(name),
            processing_class=AutoTokenizer.from_pretrained(name, padding_side="left"),
            reward_funcs=brevity,
            args=GRPOConfig(
                options.output,
                use_cpu=options.tiny,
                bf16=not options.tiny,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=32,
                logging_steps=1,
                report_to=[],
            ),
            train_dataset=Dataset.from_dict({"prompt": list(QUESTIONS)}),
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
