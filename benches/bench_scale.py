"""An optimiser step on several processes: whole copies (DDP) beside shards (FSDP2).

Each process runs the same micro-batches of the 20 M model, then gradients are summed, clipped and
stepped. "tensor by tensor" sums one gradient a collective, as before buckets; "copies" is
`run.parallel=ddp`, "shards" `run.parallel=fsdp`. The sides take turns in one process group (gloo),
and their gradient norms are compared first. Times are medians on rank 0 after a barrier; bytes are
those that a process sends in a step, counted by the trainer.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from harness import RESULTS
from machine import OtherLoad, commit, cpu_name
from step_case import MODELS, NUMBERS, Case, shared_step
from torch.distributed.device_mesh import init_device_mesh

from vcr1_fast.model import checkpoint
from vcr1_fast.model.qwen2_5_vl.tiny import write_tiny
from vcr1_fast.train.config import OptimConfig
from vcr1_fast.train.optim import MasterAdamW, clipped_step
from vcr1_fast.train.sharding import Sharding, Traffic

SIDES = ("tensor by tensor", "copies", "shards")


class OneByOne(MasterAdamW):
    """The reduction before buckets: a collective for each tensor."""

    def sum_gradients(self) -> None:
        ranks = dist.get_world_size()
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            dist.all_reduce(master.grad)
            self.traffic.add(2 * master.grad.nbytes * (ranks - 1) / ranks, 1)


def side(name: str, folder: Path, micro_batches: int) -> tuple[Callable[[], float], Traffic]:
    """(one optimiser step, which returns the gradient norm; its traffic)."""
    model, processor = checkpoint.load(folder)
    case = Case.random(model, processor, 256, 32, 4)
    model.train()
    traffic, config = Traffic(), OptimConfig(lr=1e-6)
    sharding = None
    if name == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
        sharding = Sharding(model, mesh, traffic)
    kind = OneByOne if name == "tensor by tensor" else MasterAdamW
    optimizer = kind(model.parameters(), config, sharding=sharding, traffic=traffic)

    def step() -> float:
        if sharding is not None:
            sharding.gather()
        for _ in range(micro_batches):
            shared_step(model, case)
        return clipped_step(optimizer, 1e-6, config)

    return step, traffic


def work(folder: Path, rounds: int, micro_batches: int) -> list[dict[str, object]]:
    """Rows of this process group, one a side."""
    sides = {name: side(name, folder, micro_batches) for name in SIDES}
    norms = {name: step() for name, (step, _) in sides.items()}
    for name, norm in norms.items():
        assert abs(norm / norms["copies"] - 1) < 1e-4, f"{name}: gradient norm {norm}, {norms}"
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    sent: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, (step, traffic) in sides.items():
            traffic.take()
            dist.barrier()
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
            sent[name] = traffic.take()
    return [
        {
            "processes": dist.get_world_size(),
            "side": name,
            "micro-batches": micro_batches,
            "step, ms": round(statistics.median(seconds[name]) * 1e3, 1),
            "sent, MiB": round(sent[name].get("sent_bytes", 0.0) / 2**20, 1),
            "collectives": int(sent[name].get("collectives", 0)),
        }
        for name in SIDES
    ]


def launch(folder: Path, processes: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """`work` on so many processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "VCR1_BENCH_FOLDER": str(folder)}
    command = [sys.executable, __file__, "--rounds", str(options.rounds)]
    command += ["--micro-batches", str(options.micro_batches)]
    started = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process of the bench failed")
    rows: list[dict[str, object]] = json.loads(said[0].decode().splitlines()[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=2)
    # As the other benches; a process has one thread, and a GPU of each would need NCCL.
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--quick", action="store_true", help="the 0.7 M model, one round, no file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rows = work(Path(os.environ["VCR1_BENCH_FOLDER"]), options.rounds, options.micro_batches)
        if dist.get_rank() == 0:
            print(json.dumps(rows))
        dist.destroy_process_group()
        return
    options.rounds = 1 if options.quick else options.rounds
    rows = []
    load = OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        model = "0.7M" if options.quick else "20M"
        write_tiny(folder, texts=[NUMBERS], config=MODELS[model])
        for processes in options.processes:
            rows += launch(Path(folder), processes, options)
    print(*(" | ".join(f"{name} {value}" for name, value in row.items()) for row in rows), sep="\n")
    if not options.quick:
        content = {"commit": commit(), "cpu": cpu_name(), "model": model, "rows": rows}
        content["background load, CPUs"] = load.mean()
        (RESULTS / "scale_cpu.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
