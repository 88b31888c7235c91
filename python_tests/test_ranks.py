"""Launchers: a process is one of n ranks, or stops with a line that says why."""

import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

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
        ranks.open_ranks(RunConfig(output="run"), {"ACCELERATE_USE_DEEPSPEED": "true"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"process 2 of this machine has no GPU: 2 are visible"):
        ranks.open_ranks(RunConfig(output="run"), {"LOCAL_RANK": "2"})


class Launched:
    """What `open_ranks` returns, as far as settings are read from it."""

    def __init__(self, version=None, offload=False, processes=4):
        self.distributed_type = DistributedType.MULTI_GPU
        self.num_processes, self.device = processes, torch.device("cpu")
        if version is not None:
            self.distributed_type = DistributedType.FSDP
            cpu_offload = SimpleNamespace(offload_params=offload)
            plugin = SimpleNamespace(fsdp_version=version, cpu_offload=cpu_offload)
            self.state = SimpleNamespace(fsdp_plugin=plugin)


def test_what_accelerate_launch_asks_for_is_taken_or_refused():
    settings = RunConfig(output="run")
    assert ranks.as_launched(settings, Launched()) is settings
    sharded = ranks.as_launched(settings, Launched(2, offload=True))
    assert (sharded.parallel, sharded.cpu_offload) == ("fsdp", True)
    hybrid = ranks.as_launched(RunConfig(output="run", parallel="hybrid"), Launched(2))
    assert (hybrid.parallel, hybrid.cpu_offload) == ("hybrid", False)
    with pytest.raises(ValueError, match="FSDP1: launch with --fsdp_version 2"):
        ranks.as_launched(settings, Launched(1))
    with pytest.raises(ValueError, match=r"run\.parallel=ddp, but accelerate is set to use FSDP2"):
        ranks.as_launched(RunConfig(output="run", parallel="ddp"), Launched(2))


def test_several_processes_shard_unless_told_otherwise():
    assert ranks.shards_model(RunConfig(output="run"), 2)
    assert ranks.shards_model(RunConfig(output="run", parallel="hybrid"), 2)
    assert not ranks.shards_model(RunConfig(output="run", parallel="ddp"), 2)
    assert not ranks.shards_model(RunConfig(output="run"), 1)
    with pytest.raises(ValueError, match="start several processes"):
        ranks.shards_model(RunConfig(output="run", cpu_offload=True), 1)
    with pytest.raises(ValueError, match="cpu_offload: needs shards"):
        RunConfig(output="run", cpu_offload=True, parallel="ddp")


def test_hybrid_shards_within_machines(monkeypatch):
    made = []
    monkeypatch.setattr(ranks, "init_device_mesh", lambda *args, **kwargs: made.append(args[1]))
    for parallel, machine in (("fsdp", "2"), ("hybrid", "2"), ("hybrid", "4")):
        settings = RunConfig(output="run", parallel=parallel)
        ranks.open_mesh(settings, Launched(), {"LOCAL_WORLD_SIZE": machine})
    assert made == [(4,), (2, 2), (1, 4)]
    with pytest.raises(ValueError, match="4 processes are not machines of 3 each"):
        ranks.open_mesh(
            RunConfig(output="run", parallel="hybrid"), Launched(), {"LOCAL_WORLD_SIZE": "3"}
        )


def test_a_joint_of_ranks_is_refused_without_the_token():
    """A stranger that connects to rank 0 is no rank."""
    peers = ranks.Peers(0, 2)
    peers._listener = socket.create_server(("127.0.0.1", 0))
    peers._listener.settimeout(5)
    address = peers._listener.getsockname()
    stranger, friend = (socket.create_connection(address) for _ in range(2))
    ranks._send(stranger, token="guessed", rank=1, name="x")
    ranks._send(friend, token="right", rank=1, name="process 5 on a")
    peers._accept("right")
    assert list(peers._peers.values()) == ["rank 1 (process 5 on a)"]
    assert stranger.recv(1) == b""  # closed
    for one in (stranger, friend, peers._listener, *peers._peers):
        one.close()
