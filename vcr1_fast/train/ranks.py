"""The processes of a run: how a launcher starts them, and what each does when another ends.

A run on n processes is started by torchrun, `accelerate launch`, mpirun or srun with their
variables; every process is one of n ranks, or stops with a line that says why not.
"""

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers give the number of processes. srun's is separate: in a batch script
outside srun the variables of Slurm are there too, and the script is one process."""


def open_ranks(device: str, environment: Mapping[str, str] = os.environ) -> Accelerator:
    """This process's place among the processes of its launcher.

    device: "auto", or "cpu" for training without a GPU. ValueError where a launcher started several
    processes that would not be ranks of one run, and for engines that are not ours.
    """
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "accelerate is set to use DeepSpeed, which is not supported: launch with --multi_gpu "
            "or torchrun"
        )
    local = int(environment.get("LOCAL_RANK", "0"))
    if not on_cpu and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are visible; "
            "start as many processes as there are GPUs"
        )
    # No `prepare`: the model is wrapped or sharded here. Without `cpu`, accelerate takes a process
    # of several on a machine without a GPU for a run of one.
    accelerator = Accelerator(cpu=on_cpu)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError("accelerate is set to use Megatron-LM: launch with --multi_gpu")
    check_launch(accelerator.num_processes, environment)
    return accelerator


def check_launch(processes: int, environment: Mapping[str, str]) -> None:
    """ValueError where a launcher started other than `processes` processes: each of them would be
    a whole run, all in one folder."""
    for name in _SIZES:
        started = int(environment.get(name, "0"))
        if started > 1:
            if started != processes:
                raise ValueError(
                    f"{name}={started} processes were started, but this one sees {processes}: "
                    "launch with torchrun or accelerate launch --multi_gpu"
                )
            return
    if processes > 1:
        return
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "SLURM_PROCID" in environment:
        raise ValueError(
            f"srun started {tasks} tasks, but none knows of the others: start one task a node, "
            "which runs torchrun"
        )
    # `accelerate launch --cpu` starts one process whatever --num_processes says, and sets the
    # address of a rendezvous that nobody else comes to.
    if environment.get("ACCELERATE_USE_CPU", "false").lower() == "true" and (
        "MASTER_PORT" in environment and "WORLD_SIZE" not in environment
    ):
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever its --num_processes: use "
            "torchrun --nproc_per_node N, or leave --num_processes out"
        )
