"""Launchers: a process is one of n ranks, or stops with a line that says why."""

import pytest
import torch

from vcr1_fast.train import ranks
from vcr1_fast.train.config import RunConfig


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 processes were started"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 processes were started"),
        ({"PMI_SIZE": "3", "SLURM_PROCID": "1"}, "PMI_SIZE=3 processes were started"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 tasks"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "--cpu starts one process"),
    ],
)
def test_processes_that_are_not_ranks_stop_with_a_line(environment, named):
    with pytest.raises(ValueError, match=named):
        ranks.check_launch(1, environment)


@pytest.mark.parametrize(
    ("processes", "environment"),
    [
        (1, {}),
        (1, {"WORLD_SIZE": "1", "RANK": "0"}),
        (2, {"WORLD_SIZE": "2", "RANK": "1", "ACCELERATE_USE_CPU": "true", "MASTER_PORT": "1"}),
        # torchrun in each of two tasks, four processes a node
        (8, {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}),
        (1, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}),  # a batch script, outside srun
        (1, {"ACCELERATE_USE_CPU": "True"}),
        (1, {"ACCELERATE_USE_CPU": "False", "MASTER_PORT": "29500"}),
    ],
)
def test_ranks_and_single_processes_start(processes, environment):
    ranks.check_launch(processes, environment)


def test_a_world_of_another_size_stops():
    with pytest.raises(ValueError, match=r"WORLD_SIZE=4 .* this one sees 2"):
        ranks.check_launch(2, {"WORLD_SIZE": "4"})


def test_deepspeed_and_missing_gpus_are_named(monkeypatch):
    with pytest.raises(ValueError, match="DeepSpeed, which is not supported"):
        ranks.open_ranks(RunConfig("run"), {"ACCELERATE_USE_DEEPSPEED": "true"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process 2 of this machine has no GPU: 2 are visible"):
        ranks.open_ranks(RunConfig("run"), {"LOCAL_RANK": "2"})
