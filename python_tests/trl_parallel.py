"""TRL's fused head with the patch in DDP, and with a head that FSDP2 shards, in one process: run by
test_trl_patch.py in a separate process, as `python trl_parallel.py MODEL STORE`."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from trl.trainer import utils

from vcr1_fast.integrations.trl import patch_trl


def gradients(path: str, wrap) -> dict[str, torch.Tensor]:
    model = LlamaForCausalLM.from_pretrained(path)
    utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    model = wrap(model)
    ids = torch.arange(20).reshape(2, 10) % 90
    labels = ids.masked_fill(torch.arange(10) < 4, -100)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    whole = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in whole.items()}


def main(path: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    expected = gradients(path, lambda model: model)
    with patch_trl():
        for wrap in (
            DistributedDataParallel,
            lambda model: fully_shard(model, mesh=mesh),
        ):
            for name, gradient in gradients(path, wrap).items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()


main(*sys.argv[1:])
