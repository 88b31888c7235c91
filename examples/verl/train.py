"""GRPO in verl with this package's ops: verl's own entry point on the config beside this file.

    pip install verl vllm vcr1_fast
    python examples/verl/train.py data.train_files=train.parquet data.val_files=test.parquet

What changes against a plain verl run is in grpo.yaml: `external_lib`, `loss_mode`, and verl's
switch for fused heads.
"""

import sys
from pathlib import Path

CONFIG = Path(__file__).with_name("grpo.yaml")


def main(arguments: list[str]) -> None:
    from verl.trainer.main_ppo import main as train

    config = [f"--config-path={CONFIG.parent.resolve()}", f"--config-name={CONFIG.stem}"]
    sys.argv = [sys.argv[0], *config, *arguments]
    train()


if __name__ == "__main__":
    main(sys.argv[1:])
