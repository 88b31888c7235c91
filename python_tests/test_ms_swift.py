"""ms-swift's log-probs and entropy on our ops, and where the patch puts them."""

import pytest
import torch
from peer_stubs import everything, install, stub

from vcr1_fast.integrations.ms_swift import (
    entropy_from_logits,
    patch_ms_swift,
    selective_log_softmax,
)
from vcr1_fast.integrations.patching import UnknownContract

V = 27


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("several", (False, True))
def test_logprobs_and_entropy_in_the_logits_dtype(several, dtype):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 6, V, generator=generator).to(dtype)
    index = torch.randint(0, V, (2, 6, 3) if several else (2, 6), generator=generator)
    exact = logits.double().requires_grad_()
    logp = exact.log_softmax(-1)
    wanted = logp.gather(-1, index if several else index[..., None])
    wanted = wanted if several else wanted[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    (wanted.sum() + entropy.sum()).backward()
    given = logits.clone().requires_grad_()
    got, got_entropy = selective_log_softmax(given, index), entropy_from_logits(given, chunk_size=1)
    (got.sum() + got_entropy.sum()).backward()
    coarse = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for x, y in ((got, wanted), (got_entropy, entropy), (given.grad, exact.grad)):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=coarse, atol=coarse)


def modules():
    softmax = stub("f", "logits", "index")
    return {
        "swift.rlhf_trainers.grpo_trainer": {
            "selective_log_softmax": softmax,
            "entropy_from_logits": stub("f", "logits", "chunk_size"),
        },
        "swift.rlhf_trainers.rlhf_mixin": {"selective_log_softmax": softmax},
    }


@pytest.mark.parametrize("version", ("4.5.3", "4.6.0"))
def test_the_patch_reaches_both_trainers_and_is_undone(monkeypatch, version):
    made = install(monkeypatch, "ms-swift", version, modules())
    before = everything(made)
    with patch_ms_swift():
        for module in ("grpo_trainer", "rlhf_mixin"):
            part = made[f"swift.rlhf_trainers.{module}"]
            assert part.selective_log_softmax is selective_log_softmax
        with patch_ms_swift("entropy"):
            pass
        assert patch_ms_swift.applied == ("logprobs", "entropy")
    assert everything(made) == before


def test_a_newer_trl_under_it_is_refused(monkeypatch):
    changed = modules()
    newer = stub("f", "logits", "index", "temperature", "row_mask")
    changed["swift.rlhf_trainers.rlhf_mixin"]["selective_log_softmax"] = newer
    made = install(monkeypatch, "ms-swift", "4.6.0", changed)
    before = everything(made)
    with pytest.raises(UnknownContract, match="temperature"):
        patch_ms_swift()
    assert everything(made) == before
