"""The processes of a run: how a launcher starts them, and what each does when another ends.

A run on n processes is started by torchrun, `accelerate launch`, mpirun or srun with their
variables; every process is one of n ranks, or stops with a line that says why not.
"""

import json
import os
import secrets
import select
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vcr1_fast.train.config import RunConfig
from vcr1_fast.train.stopping import RunStopped

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers give the number of processes. srun's is separate: in a batch script
outside srun the variables of Slurm are there too, and the script is one process."""

_JOIN_SECONDS = 120.0
"""Time in which the ranks of a run must have joined: they may have started minutes apart."""
_NOTICE_SECONDS = 5.0
"""Time in which a lost rank is known after a collective has failed for it."""


def open_ranks(settings: RunConfig, environment: Mapping[str, str] = os.environ) -> Accelerator:
    """This process's place among the processes of its launcher.

    ValueError where a launcher started several processes that would not be ranks of one run, and
    for engines that are not ours.
    """
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "accelerate is set to use DeepSpeed, which is not supported: FSDP2 shards weights, "
            "gradients and optimiser over the processes (run.parallel=fsdp, the default), and "
            "run.cpu_offload=true keeps them in main memory; launch with --multi_gpu or torchrun"
        )
    local = int(environment.get("LOCAL_RANK", "0"))
    if not on_cpu and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are visible; "
            "start as many processes as there are GPUs"
        )
    # No `prepare`: the model is wrapped or sharded here. Without `cpu`, accelerate takes a process
    # of several on a machine without a GPU for a run of one.
    handlers: list[Any] = []
    if settings.cpu_offload and not on_cpu and int(environment.get("WORLD_SIZE", "1")) > 1:
        # The norm of gradients in main memory is summed there.
        handlers.append(InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl"))
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=handlers)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError("accelerate is set to use Megatron-LM: use FSDP2 (run.parallel=fsdp)")
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


def as_launched(settings: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The settings with what `accelerate launch --use_fsdp` asks for. ValueError for what of that
    is not FSDP2."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return settings
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("accelerate is set to use FSDP1: launch with --fsdp_version 2")
    if settings.parallel == "ddp":
        raise ValueError("run.parallel=ddp, but accelerate is set to use FSDP2")
    offload = settings.cpu_offload or bool(plugin.cpu_offload.offload_params)
    return replace(
        settings,
        parallel="fsdp" if settings.parallel == "auto" else settings.parallel,
        cpu_offload=offload,
    )


def shards_model(settings: RunConfig, processes: int) -> bool:
    """Whether the model is sharded. ValueError for settings that one process cannot have."""
    if processes > 1:
        return settings.parallel != "ddp"
    if settings.cpu_offload:
        raise ValueError("run.cpu_offload keeps shards in main memory: start several processes")
    return False


def open_mesh(
    settings: RunConfig, accelerator: Accelerator, environment: Mapping[str, str] = os.environ
) -> DeviceMesh:
    """The processes that a model is sharded over: all of them, or for "hybrid" those of a machine,
    whose shards are the same on every machine. ValueError where machines differ in size."""
    ranks, device = accelerator.num_processes, accelerator.device.type
    if settings.parallel != "hybrid":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    local = int(environment.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % local:
        raise ValueError(f"run.parallel=hybrid: {ranks} processes are not machines of {local} each")
    shape = (ranks // local, local)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


class PeerLost(Exception):
    """Another process of the run ended before its time; names it."""


class Peers:
    """Ends this process where another process of the run has ended, and says which one.

    Torch notices by a broken connection at best; with NCCL the others wait for its time-out. Here
    every rank keeps a TCP connection to rank 0, which the system closes when a process dies, by
    whatever signal, and which a dead machine fails to keep alive. Rank 0 passes on who is lost. A
    process that then waits in a collective cannot be reached but by ending it: after `grace`
    seconds it is ended from the watching thread. Use it in a `with` statement on all ranks.
    """

    def __init__(self, rank: int, ranks: int, *, grace: float = 10.0) -> None:
        self.rank, self.ranks, self.grace = rank, ranks, grace
        self.lost: str | None = None
        self._found, self._left = threading.Event(), threading.Event()
        self._listener: socket.socket | None = None
        self._peers: dict[socket.socket, str] = {}
        """Connections, and how the process at the other end is named."""

    def __enter__(self) -> "Peers":
        if self.ranks == 1:
            return self
        me = f"process {os.getpid()} on {socket.gethostname()}"
        offer: list[Any] = [None]
        if self.rank == 0:
            self._listener = socket.create_server(("", 0), backlog=self.ranks)
            self._listener.settimeout(_JOIN_SECONDS)
            offer = [(self._listener.getsockname()[1], secrets.token_hex(16), me)]
        port, token, first = broadcast_object_list(offer)[0]
        if self.rank == 0:
            self._accept(token)
        else:
            address = os.environ.get("MASTER_ADDR") or "127.0.0.1"
            connection = socket.create_connection((address, port), timeout=_JOIN_SECONDS)
            _keep_alive(connection)
            _send(connection, token=token, rank=self.rank, name=me)
            self._peers[connection] = f"rank 0 ({first})"
        threading.Thread(target=self._watch, name="vcr1-peers", daemon=True).start()
        return self

    def _accept(self, token: str) -> None:
        assert self._listener is not None
        while len(self._peers) < self.ranks - 1:
            connection, _ = self._listener.accept()
            connection.settimeout(_JOIN_SECONDS)
            hello = json.loads(connection.makefile().readline() or "{}")
            if hello.get("token") != token:
                connection.close()
                continue
            _keep_alive(connection)
            self._peers[connection] = f"rank {hello['rank']} ({hello['name']})"

    def _watch(self) -> None:
        waiting = dict(self._peers)
        while waiting and self.lost is None and not self._left.is_set():
            ready, _, _ = select.select(list(waiting), [], [], 1.0)
            for connection in ready:
                name = waiting.pop(connection)
                try:
                    line = connection.makefile().readline()
                except OSError:  # reset, or not kept alive
                    line = ""
                message = json.loads(line) if line.endswith("\n") else {}
                if message.get("done"):
                    continue
                self.lost = message.get("lost") or (
                    f"{name} failed: {message['failed']}"
                    if "failed" in message
                    else f"{name} ended without a word (killed, or out of memory?)"
                )
                break
        if self.lost is not None:
            for connection in self._peers:
                _send(connection, lost=self.lost)
            self._found.set()
            # A collective may fail first, or the run be about to end by itself.
            if not self._left.wait(self.grace):
                print(f"vcr1: {self.lost}; rank {self.rank} ends too", file=sys.stderr, flush=True)
                os._exit(1)
        self._left.wait()
        for connection in [*self._peers, *([self._listener] if self._listener else [])]:
            connection.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What torch raises for a broken connection names an address at best.
        broken = isinstance(error, RuntimeError | OSError)
        if broken and self._peers:
            self._found.wait(_NOTICE_SECONDS)
        stopped = error is None or isinstance(error, RunStopped)
        for connection in self._peers:
            if stopped:
                _send(connection, done=True)
            elif self.lost is None:
                line = str(error).partition("\n")[0] or type(error).__name__
                _send(connection, failed=line)
        self._left.set()
        if self.lost is not None and broken:
            raise PeerLost(f"{self.lost}; rank {self.rank} ends too") from error


def _send(connection: socket.socket, **message: Any) -> None:
    # The other end may be gone, which its own watch reports.
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    """Notice within half a minute a machine that is gone; no message is due before the end."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
