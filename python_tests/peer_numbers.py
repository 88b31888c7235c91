"""Another trainer's own functions beside ours, in a process that can import it.

    python peer_numbers.py verl | openrlhf | easyr1

Prints how many comparisons were equal, or fails. Run by test_peer_sources.py with the trainer's
sources, and what they import, on PYTHONPATH.
"""

import sys
from importlib import import_module, metadata
from itertools import product

import torch
from packaging.version import Version

from vcr1_fast.integrations import patching

B, T, V = 5, 11, 33
LENGTHS = torch.tensor([11, 5, 1, 0, 7])


def patch_of(module, name, package):
    """The patch, where a checkout without package metadata counts as the version it states."""
    known = metadata.version

    def version(distribution):
        try:
            return known(distribution)
        except metadata.PackageNotFoundError:
            if distribution != package:
                raise
            return str(Version(import_module(package).__version__))

    patching.metadata.version = version
    return getattr(import_module(f"vcr1_fast.integrations.{module}"), name)


def close(got, expected):
    assert (got is None) == (expected is None)
    if expected is not None:
        got, expected = torch.as_tensor(got), torch.as_tensor(expected)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6, check_dtype=False)


def tensors(seed, spread=0.4):
    normal = torch.randn(5, B, T, generator=torch.Generator().manual_seed(seed))
    logps = -normal[0].abs()
    old = logps + spread * normal[1]
    return logps, old, old + 0.4 * normal[2], normal[3], normal[4].abs()


def compare(functions, logps):
    """Each function is given the log-probs as a leaf, and returns (loss, other results)."""
    results = []
    for function in functions:
        leaf = logps.clone().requires_grad_()
        loss, rest = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad, rest))
    (loss, grad, rest), (ours, our_grad, our_rest) = results
    close(ours, loss)
    close(our_grad, grad)
    if isinstance(rest, dict):
        assert rest.keys() == our_rest.keys()
        rest, our_rest = rest.values(), our_rest.values()
    for expected, got in zip(rest, our_rest, strict=True):
        close(got, expected)


def compare_rows(original, ours, *arguments):
    """Values, dtypes and gradients of a function of logits."""
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, V, generator=generator).to(dtype)
        results = []
        for function in (original, ours):
            leaf = logits.clone().requires_grad_()
            out = function(leaf * 1.0, *arguments)
            out.sum().backward()
            results.append((out.detach().float(), leaf.grad.float()))
        coarse = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(*results, rtol=coarse, atol=coarse)


def verl():
    patch = patch_of("verl", "patch_verl", "verl")
    core = import_module("verl.trainer.ppo.core_algos")
    functions = import_module("verl.utils.torch_functional")
    head = import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    config = import_module("verl.workers.config.actor").FSDPActorConfig
    engine = import_module("verl.workers.engine.fsdp.transformer_impl")
    originals = [functions.logprobs_from_logits, functions.entropy_from_logits, head]
    recent = Version(patch.version) >= Version("0.9.1") and not Version(patch.version).is_devrelease
    count = 0
    with patch():
        assert engine.logprobs_from_logits is functions.logprobs_from_logits is not originals[0]
        compare_rows(originals[0], functions.logprobs_from_logits, torch.tensor([3, 0, 32]))
        compare_rows(originals[1], functions.entropy_from_logits)
        module = import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
        generator = torch.Generator().manual_seed(8)
        hidden = torch.randn(2, 9, 8, generator=generator)
        weight = torch.randn(V, 8, generator=generator)
        for got, expected in zip(
            module(hidden, weight, torch.ones(2, 9).long(), 0.7),
            originals[2]()(hidden, weight, torch.ones(2, 9).long(), 0.7),
            strict=True,
        ):
            close(got, expected)
        counts = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 10}
        modes = ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
        for name, mode, info, weighted, spread in product(
            ("vanilla", "gspo", "sapo", "cispo"),
            [*modes, "seq-mean-token-mean"],
            ({}, {**counts, "loss_scale_factor": 17}),
            (False, True),
            (0.3, 4.0),
        ):
            if name == "gspo" and not recent:  # it did not listen to the mode then
                mode = "seq-mean-token-mean"
            logps, old, _, advantages, weights = tensors(count, spread)
            options = config(
                rollout_n=4, use_dynamic_bsz=True, clip_ratio_high=0.28, global_batch_info=info
            )
            rest = (mode, options, weights if weighted else None)
            mask = torch.arange(T) < LENGTHS[:, None]
            names = (name, f"vcr1_{name}")
            losses = [core.get_policy_loss_fn(registered) for registered in names]
            compare(
                [lambda x, f=f: f(old, x, advantages, mask, *rest) for f in losses],  # noqa: B023
                logps,
            )
            count += 1
    assert functions.logprobs_from_logits is originals[0]
    return count


def openrlhf():
    patch = patch_of("openrlhf", "patch_openrlhf", "openrlhf")
    losses = import_module("openrlhf.models.loss")
    functions = import_module("openrlhf.models.utils")
    original, logprobs = losses.PolicyLoss, functions.log_probs_from_logits
    corrections = [("off", "mask", "ratio"), ("token", "clip", "ratio"), ("token", "mask", "ratio")]
    corrections += [("seq", "mask", "ratio"), ("token", "mask", "binary_kl")]
    counts = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 10.0}
    count = 0
    with patch():
        assert losses.PolicyLoss is not original
        compare_rows(logprobs, functions.log_probs_from_logits, torch.tensor([3, 0, 32]))
        for kind, dual, by_token, correction, info in product(
            ("ppo", "gspo"), (None, 3.0), (True, False), corrections, ({}, counts)
        ):
            logps, old, rollout, advantages, _ = tensors(count)
            lengths = LENGTHS.clamp(min=1) if correction[0] == "seq" else LENGTHS
            mask = (torch.arange(T) < lengths[:, None]).long()
            band = [0.7, 1.3] if correction[2] == "ratio" else [0, 0.05]
            modules = [
                make(0.2, 0.28, dual, by_token, kind, *correction, band)
                for make in (original, losses.PolicyLoss)
            ]

            def run(module, x):
                out = module(x, old, advantages, mask, rollout, **info)  # noqa: B023
                return out[0], out[1:]

            compare([lambda x, m=m: run(m, x) for m in modules], logps)
            count += 1
    assert losses.PolicyLoss is original
    return count


def easyr1():
    patch = patch_of("easyr1", "patch_easyr1", "verl")
    core = import_module("verl.trainer.core_algos")
    functions = import_module("verl.utils.torch_functional")
    original, logprobs = core.compute_policy_loss, functions.log_probs_from_logits
    mask = (torch.arange(T) < LENGTHS[:, None]).long()
    count = 0
    with patch():
        compare_rows(logprobs, functions.log_probs_from_logits, torch.tensor([3, 0, 32]))
        for kind, mode, spread in product(
            ("default", "gspo", "gspo_token", "cispo", "sapo"), ("token", "seq"), (0.3, 4.0)
        ):
            logps, old, _, advantages, _ = tensors(count, spread)
            options = (mask, 0.2, 0.28, 3.0, 1.0, 1.05, kind, mode)
            compare(
                [
                    lambda x, f=f: f(old, x, advantages, *options)  # noqa: B023
                    for f in (original, core.compute_policy_loss)
                ],
                logps,
            )
            count += 1
    assert core.compute_policy_loss is original
    return count


if __name__ == "__main__":
    print(f"equal: {globals()[sys.argv[1]]()}")
