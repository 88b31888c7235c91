"""Runs on several processes of this machine, joined by gloo; `Ranks` starts them.

Torch and the package are imported once, in a server process that the ranks are forked from.
"""

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from tiny_run import configure

_PRELOAD = ["tiny_run", "vcr1_fast.train.loop", "vcr1_fast.train.sft", "transformers", "peft"]


def lengths_as_rewards(answers, *rest):
    """Text lengths as rewards, none for the records "equal": their groups have no advantages."""
    return [
        ({"r": 0.0 if sample.record.task == "tracking" else float(len(text))}, {})
        for sample, text in answers
    ]


def copy_until(step, source, output):
    """A run's folder as it was after the checkpoint of `step`."""
    shutil.copytree(source, output)
    shutil.rmtree(output / "model")
    for path in (output / "checkpoints").iterdir():
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)


@contextmanager
def counted(output, rank):
    """Write to wire.json what FSDP2's collectives of this process put on the wire."""
    import torch.distributed as dist

    calls = []
    names = ("all_gather_single", "reduce_scatter_single", "all_reduce")
    kept = {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(*args, **kwargs):
            tensors = [one for one in [*args, *kwargs.values()] if hasattr(one, "nbytes")]
            # Small ones carry counts and decisions.
            if max(one.nbytes for one in tensors) > 64:
                calls.append((name, max(one.nbytes for one in tensors)))
            return kept[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
        if rank == 0:
            (Path(output) / "wire.json").write_text(json.dumps(calls))


def failing(model, processor):
    """The model, whose second backward pass runs out of memory when all later layers are done."""
    passes = iter(range(10**6))

    def fail(*given):
        if next(passes) == 1:
            raise MemoryError("no more")

    model.model.language_model.layers[0].register_full_backward_pre_hook(fail)
    return model, processor


def resident(key):
    """Bytes of VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) << 10


def reset_peak():
    """Resident bytes now, from which VmHWM starts again."""
    libc = ctypes.CDLL(None)
    # Freed tensors go back to the system: the heap would keep them.
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def run_here(
    kind,
    model,
    records,
    output,
    overrides,
    *,
    double=False,
    resumes=None,
    pause=0.0,
    measured=False,
    out_of_memory=False,
):
    """Train in this process. resumes: (step, folder of the run to go on from); pause: seconds that
    each step takes longer; measured: write the peak of resident memory to peak-<rank>.json;
    out_of_memory: the last rank's second backward pass fails in its first layer, once."""
    import torch
    import torch.distributed as dist

    from vcr1_fast.train import loop, scoring, setup, sft

    torch.set_num_threads(1)
    rank, several = int(os.environ["RANK"]), dist.is_initialized()
    if resumes is not None:
        if rank == 0:
            copy_until(*resumes, output)
        if several:
            dist.barrier()
    scoring.own_rewards = lambda *given: (time.sleep(pause), lengths_as_rewards(*given))[1]
    load = setup.load
    if double:
        setup.load = lambda *args, **kwargs: load(*args, **{**kwargs, "dtype": torch.float64})
    prepare = setup.prepare_model
    if out_of_memory and rank == int(os.environ["WORLD_SIZE"]) - 1:
        setup.prepare_model = lambda *given: failing(*prepare(*given))
    try:
        work = sft.sft if kind == "sft" else loop.train
        before = reset_peak() if measured else 0
        with counted(output, rank):
            work(configure(model, records, output, *overrides))
        if measured:
            (Path(output) / f"peak-{rank}.json").write_text(json.dumps(resident("VmHWM") - before))
    finally:
        setup.load, setup.prepare_model = load, prepare


def _rank(environment, jobs, answers):
    os.environ |= environment
    rank = int(environment["RANK"])
    # Noise of progress and libraries; a test may ask for what a rank said.
    path = f"{environment['SAID']}-{rank}" if "SAID" in environment else os.devnull
    sys.stderr = open(path, "w")  # noqa: SIM115
    for name, job in jobs:
        try:
            run_here(**job)
            answers.put((name, rank, None))
        except BaseException:
            answers.put((name, rank, traceback.format_exc()))
            break
    answers.put((None, rank, None))


class Ranks:
    """`world` processes that run the same jobs, one after another, in one process group."""

    def __init__(self, world, jobs, **environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.answers = context.Queue()
        self.processes = [
            context.Process(
                target=_rank,
                args=(shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, jobs, self.answers),
                daemon=False,
            )
            for i in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=600):
        """Until all are done; AssertionError with the first traceback."""
        left = len(self.processes)
        try:
            while left:
                name, rank, error = self.answers.get(timeout=timeout)
                left -= name is None
                assert error is None, f"{name}, rank {rank}:\n{error}"
        finally:
            for process in self.processes:
                process.kill()
                process.join()


def rows(output):
    """metrics.jsonl without times, traffic, and what counts micro-batches."""
    found = []
    for line in (Path(output) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.append(
            {
                name: value
                for name, value in row.items()
                if not name.startswith(("seconds", "tokens_per_second", "sent_", "collectives"))
                and name != "num_microbatches"
            }
        )
    return found


def weights(output):
    """The exported weights by name, float64."""
    from safetensors.torch import load_file

    (path,) = (Path(output) / "model").glob("*.safetensors")
    return {name: one.double() for name, one in load_file(path).items()}
