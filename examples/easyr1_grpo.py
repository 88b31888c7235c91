"""GRPO in EasyR1 with this package's ops: EasyR1's own entry point, patched in every worker.

pip install -e EasyR1 && pip install vcr1_fast
python examples/easyr1_grpo.py config=examples/config.yaml <other arguments of verl.trainer.main>
"""

import runpy
import sys

# Ray calls it in each worker process as it starts, before the worker imports its actor.
HOOK = "vcr1_fast.integrations.easyr1.patch_easyr1"
ENTRY = "verl.trainer.main"
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "WARN", "VLLM_LOGGING_LEVEL": "WARN"}


def main(arguments: list[str]) -> None:
    import ray

    ray.init(runtime_env={"env_vars": ENVIRONMENT, "worker_process_setup_hook": HOOK})
    sys.argv = [ENTRY, *arguments]
    runpy.run_module(ENTRY, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
