"""GRPO in OpenRLHF with this package's ops: OpenRLHF's own command line, patched in every worker.

pip install openrlhf vcr1_fast
python examples/openrlhf_grpo.py <arguments of openrlhf.cli.train_ppo_ray>
"""

import runpy
import sys

# Ray calls it in each worker process as it starts, before the worker imports its trainer.
HOOK = "vcr1_fast.integrations.openrlhf.patch_openrlhf"
ENTRY = "openrlhf.cli.train_ppo_ray"


def main(arguments: list[str]) -> None:
    import ray

    ray.init(runtime_env={"worker_process_setup_hook": HOOK})
    sys.argv = [ENTRY, *arguments]
    runpy.run_module(ENTRY, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
