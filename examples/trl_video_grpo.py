"""GRPO on video with TRL: our tasks as its reward functions, one forward pass a group.

    vcr1 data synth clips                 # or records of your own
    python examples/trl_video_grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --records clips/train/records.jsonl
    python examples/trl_video_grpo.py --tiny      # the demo's model and clips, on a CPU
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from vcr1_fast.data.synth import SynthConfig, write_dataset
from vcr1_fast.demo.settings import FRAMES, WARM_START
from vcr1_fast.integrations.trl import patch_trl
from vcr1_fast.integrations.trl_video import (
    VideoGRPOConfig,
    VideoGRPOTrainer,
    task_rewards,
    video_dataset,
)

patch_trl()


def main(arguments: list[str] | None = None) -> VideoGRPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--records", help="JSONL, see `vcr1 data`")
    parser.add_argument("--output", default="runs/trl_video_grpo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="the demo's model and clips, on a CPU")
    options = parser.parse_args(arguments)
    if not (options.tiny or options.records):
        parser.error("--records is needed (or --tiny)")
    with tempfile.TemporaryDirectory() as folder:
        records, model = options.records, options.model
        if options.tiny:
            clips = SynthConfig(train=8, val=0, test=0, tasks=("temporal_grounding",), workers=0)
            records, model = write_dataset(Path(folder), clips)["train"], WARM_START
        data = video_dataset(records)
        trainer = VideoGRPOTrainer(
            model,
            task_rewards(data),
            VideoGRPOConfig(
                options.output,
                use_cpu=options.tiny,
                bf16=not options.tiny,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=32 if options.tiny else 256,
                logging_steps=1,
                report_to=[],
                decode_workers=0 if options.tiny else 4,
                frame_kwargs=dataclasses.asdict(FRAMES) if options.tiny else None,
            ),
            data,
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
