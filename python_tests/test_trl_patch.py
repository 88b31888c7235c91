"""TRL with the patch against TRL without: runs, losses, metrics, functions, and the way back.

Works on either checked release. Release 1.15 has its head for GPUs alone; its kernels run here too
with TRITON_INTERPRET=1, as `make test` starts them.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_trl_loss import CONFIGS, correction_of, make_batch, trl_loss
from trl_run import G, even_share, logged, make_trainer, trl, write_model

from vcr1_fast.integrations import patching
from vcr1_fast.integrations.patching import UnknownContract
from vcr1_fast.integrations.trl import _is_ours, _out_dtype, patch_trl
from vcr1_fast.integrations.trl_loss import compute_loss
from vcr1_fast.ops.grpo.config import LOSS_TYPES

utils = importlib.import_module("trl.trainer.utils")
grpo = importlib.import_module("trl.trainer.grpo_trainer")
HAS_HEAD = not trl.__version__.startswith("1.15") or os.environ.get("TRITON_INTERPRET") == "1"
needs_head = pytest.mark.skipif(not HAS_HEAD, reason="1.15's head needs TRITON_INTERPRET=1 here")
# transformers renames a setting that TRL sets.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def undone():
    yield
    patch_trl.undo()


def assert_same_runs(ours, theirs, rtol=1e-5):
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        # Adam divides by the root of second moments near 0: rounding of 1e-7 grows with each step.
        bound = rtol * (1 + step)
        for name, value in other.items():
            # A loss of 0.04 is left of terms A log p of up to 10, each rounded to 1e-7 of itself.
            assert mine[name] == pytest.approx(value, rel=bound, abs=5e-6, nan_ok=True), name


RUNS = {
    **{name: {"loss_type": name, "beta": 0.1} for name in LOSS_TYPES},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.28},
    "accumulation": {
        "per_device_train_batch_size": G,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "entropy_coef": 0.01,
        "top_entropy_quantile": 0.5,
        "gradient_checkpointing": True,
    },
    "delta": {
        "loss_type": "bnpo",
        "delta": 1.5,
        "beta": 0.2,
        "use_bias_correction_kl": True,
        "mask_truncated_completions": True,
    },
}


@needs_head
@pytest.mark.parametrize("name", RUNS)
def test_a_patched_run_is_the_same_run(name, model, tmp_path):
    theirs = logged(make_trainer(model, tmp_path, **RUNS[name]))
    with patch_trl():
        ours = logged(make_trainer(model, tmp_path, **RUNS[name]))
    assert_same_runs(ours, theirs)
    assert theirs[1]["exact_norm"] > 0


@needs_head
def test_with_adapters_and_a_reference_without_them(model, tmp_path):
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    settings = {"beta": 0.1, "peft_config": adapters, "loss_type": "grpo"}
    theirs = logged(make_trainer(model, tmp_path, **settings))
    with patch_trl():
        ours = logged(make_trainer(model, tmp_path, **settings))
    assert_same_runs(ours, theirs)


def test_an_adapter_on_the_head_is_refused_by_trl_as_before(model, tmp_path):
    from peft import LoraConfig

    with patch_trl(), pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make_trainer(model, tmp_path, peft_config=LoraConfig(target_modules=["lm_head"]))


@needs_head
def test_under_autocast_the_run_is_the_same_to_bfloat16(model, tmp_path):
    settings = {"bf16": True, "max_steps": 1, "loss_type": "grpo"}
    (theirs,) = logged(make_trainer(model, tmp_path, **settings))
    with patch_trl():
        (ours,) = logged(make_trainer(model, tmp_path, **settings))
    assert ours["exact_norm"] == pytest.approx(theirs["exact_norm"], rel=2e-2)
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-2)


# The trainer's method from the log-probs on, in float64, with everything that it logs.


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.level}-{c.beta}")
@pytest.mark.parametrize("token_advantages", (False, True))
def test_same_loss_gradients_and_metrics(config, token_advantages):
    batch = make_batch(token_advantages)
    correction = correction_of(batch, config)
    *expected, logs = trl_loss(grpo.GRPOTrainer, batch, config, correction)
    *found, own_logs = trl_loss(grpo.GRPOTrainer, batch, config, correction, compute_loss)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert own_logs.keys() == logs.keys()
    for name, values in logs.items():  # TRL counts tokens in float32
        assert own_logs[name] == pytest.approx(values, rel=1e-6, abs=1e-7, nan_ok=True), name


def test_what_is_not_ours_goes_to_trls_own_method():
    class Own(grpo.GRPOTrainer):
        def get_off_policy_mask(self, **_):
            raise AssertionError

    with patch_trl("loss"):
        for trainer, inputs in ((object.__new__(Own), {}), (object.__new__(Own), {"a": 1})):
            # TRL's method begins with the prompt; ours would have asked for the settings.
            with pytest.raises(KeyError, match="prompt_ids"):
                trainer._compute_loss(None, inputs)


# The head.


def head_inputs(n=11, h=8, v=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(size, h, generator=generator, dtype=dtype).requires_grad_() for size in (n, v)
    )
    bias = torch.randn(v, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 1.0), (None, 0.25), (5.0, 0.25)])
def test_the_head_computes_what_its_arguments_say(softcap, scale):
    hidden, weight, bias, targets = head_inputs()
    with patch_trl("head"):
        outputs = utils._ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 0.7, 16, softcap, scale, ("log_probs", "entropy")
        )
    logps, entropy, *rest = outputs
    assert rest == [None, None, None]
    z = (hidden @ weight.T + bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z / 0.7).log_softmax(-1)
    expected = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    for mine, other in zip((logps, entropy), expected, strict=True):
        torch.testing.assert_close(mine, other)
    tensors = (hidden, weight, bias)
    mine = torch.autograd.grad((logps * 2 + entropy).sum(), tensors)
    theirs = torch.autograd.grad((expected[0] * 2 + expected[1]).sum(), tensors)
    for g, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(g, e)


@needs_head
@pytest.mark.parametrize("outputs", [("log_probs", "is_top1"), ("entropy", "mean_logits")])
def test_outputs_that_are_not_ours_come_from_trl(outputs):
    arguments = [x.float() if x.is_floating_point() else x for x in head_inputs()]
    hidden, weight, bias, targets = arguments
    call = (hidden, weight, bias, targets, 1.0, 16, None, 1.0, outputs)
    expected = utils._ChunkedLogProbFunction.apply(*call)
    with patch_trl("head"):
        found = utils._ChunkedLogProbFunction.apply(*call)
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        assert other is None or torch.equal(mine, other)


def test_no_labels_at_all_give_a_differentiable_zero(model):
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model)
    utils.add_fused_lm_head(llama, outputs=("log_probs", "entropy"))
    ids = torch.randint(0, 90, (2, 5))
    with patch_trl():
        out = llama(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        assert out.log_probs.shape == (2, 4) and not out.log_probs.any()
        (out.loss + out.entropy.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in llama.parameters())


def test_a_sharded_head_is_gathered_for_the_backward_pass(monkeypatch):
    """ZeRO-3 in miniature: the weight is there inside TRL's context only."""
    from contextlib import contextmanager

    hidden, weight, bias, targets = head_inputs()
    expected = (F.linear(hidden, weight, bias) / 0.9).log_softmax(-1)
    expected = expected.gather(-1, targets[:, None]).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    whole = {id(p): p.data for p in (weight, bias)}
    entered = []

    @contextmanager
    def gather(*parameters):
        entered.append(len(parameters))
        for p in parameters:
            p.data = whole[id(p)]
        yield
        for p in parameters:
            p.data = p.data.new_empty(0)

    for p in (weight, bias):
        p.ds_status = "NOT_AVAILABLE"
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    with patch_trl("head"):
        with gather(weight, bias):
            logps, *_ = utils._ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, 0.9, 16, None, 1.0, ("log_probs",)
            )
        assert weight.numel() == 0
        found = torch.autograd.grad(logps.sum(), (hidden, weight, bias))
    assert entered == [2, 2]
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)


# torch's tracer makes a Function object while it inspects one, and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_in_a_compiled_function_and_under_autocast():
    hidden, weight, _, targets = head_inputs(dtype=torch.float32)

    def head(hidden, weight):
        out = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 16, None, 1.0, ("log_probs", "entropy")
        )
        return out[0].sum() + out[1].sum()

    with patch_trl("head"):
        eager = torch.autograd.grad(head(hidden, weight), (hidden, weight))
        compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = torch.autograd.grad(head(hidden, weight), (hidden, weight))
    for mine, other in zip(found, eager, strict=True):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(rounded, eager, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=5e-2, atol=5e-2)


@needs_head
def test_in_ddp_and_with_a_head_that_fsdp_shards(model, tmp_path):
    """One process each, in one that the test starts: a process group stays for good."""
    code = Path(__file__).with_name("trl_parallel.py")
    done = subprocess.run(
        [sys.executable, str(code), str(model), str(tmp_path / "store")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# The functions on logits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("several", [False, True])
def test_log_probs_and_entropy_have_trls_values_and_dtypes(dtype, several):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 40, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(0, 40, (3, 5, 2) if several else (3, 5), generator=generator)
    row_mask = torch.randint(0, 2, index.shape, generator=generator)
    calls = [
        ("selective_log_softmax", (logits, index)),
        ("selective_log_softmax", (logits, index, 0.7, row_mask)),
        ("entropy_from_logits", (logits, 2)),
    ]
    if not several:
        calls.append(("selective_log_softmax_and_entropy", (logits, index, False, 0.7, row_mask)))
        calls.append(("selective_log_softmax_and_entropy", (logits, index, True, 1.0)))
    for name, arguments in calls:
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        results = []
        for leaf, parts in zip(leaves, ((), ("logprobs",)), strict=True):
            handle = patch_trl(*parts) if parts else None
            out = getattr(utils, name)(leaf, *arguments[1:])
            out = out if isinstance(out, tuple) else (out,)
            out[0].sum().backward(retain_graph=True)
            if len(out) == 2 and out[1].requires_grad:
                out[1].sum().backward()
            results.append(out)
            if handle is not None:
                patch_trl.undo()
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
        for mine, other in zip(results[1], results[0], strict=True):
            assert mine.dtype == other.dtype == dtype
            assert mine.requires_grad == other.requires_grad
            torch.testing.assert_close(mine, other, **tolerance)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **tolerance)


def test_a_temperature_of_zero_is_refused_as_by_trl():
    logits, index = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    with patch_trl(), pytest.raises(ValueError, match="positive"):
        utils.selective_log_softmax(logits, index, temperature=0.0)


def test_on_a_gpu_results_are_float32_as_trls_are(monkeypatch):
    logits = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    assert _out_dtype(logits, None, None) == torch.bfloat16
    monkeypatch.setattr(utils, "_supports_trl_loss_kernel", lambda *_: True)
    assert _out_dtype(logits, None, None) == torch.float32


def test_where_our_kernels_do_not_run():
    assert _is_ours(torch.zeros(1)) and not _is_ours(torch.zeros(1, device="meta"))
    logits = torch.zeros(1, 2, 3, device="meta")
    with patch_trl():
        assert utils.entropy_from_logits(logits).shape == (1, 2)


# In and out.

NAMES = (
    "_ChunkedLogProbFunction",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "entropy_from_logits",
)
BY_VALUE = ("cpo", "orpo", "tpo", "a2po")  # experimental trainers that import them by value


def held():
    """Every global of every module of TRL that is one of the replaced objects' kin, by identity."""
    return {
        (module, key): value
        for module in list(sys.modules)
        if module.partition(".")[0] == "trl"
        for key, value in vars(sys.modules[module]).items()
        if key.lstrip("_") in {name.lstrip("_") for name in NAMES} or key == "_use_triton"
    }


def test_every_copy_is_replaced_and_undo_brings_the_very_objects_back():
    copy = importlib.import_module(f"trl.experimental.{BY_VALUE[0]}.{BY_VALUE[0]}_trainer")
    before, method = held(), vars(grpo.GRPOTrainer)["_compute_loss"]
    originals = [getattr(utils, name) for name in NAMES]
    assert copy.selective_log_softmax is utils.selective_log_softmax
    patch_trl()
    assert patch_trl.applied == ("head", "logprobs", "loss")
    replaced = [getattr(utils, name) for name in NAMES]
    assert not any(new is old for new, old in zip(replaced, originals, strict=True))
    left = [key for key, value in held().items() if any(value is old for old in originals)]
    assert left == []
    assert copy.selective_log_softmax is utils.selective_log_softmax
    patch_trl()  # again: nothing changes
    assert all(getattr(utils, name) is new for name, new in zip(NAMES, replaced, strict=True))
    late = f"trl.experimental.{BY_VALUE[1]}.{BY_VALUE[1]}_trainer"
    sys.modules.pop(late, None)
    late = importlib.import_module(late)
    assert late.selective_log_softmax is utils.selective_log_softmax is not originals[1]
    patch_trl.undo()
    after = held()
    assert all(after[key] is value for key, value in before.items())
    assert late.selective_log_softmax is originals[1]
    assert vars(grpo.GRPOTrainer)["_compute_loss"] is method


def test_an_unknown_release_is_refused(monkeypatch):
    before = utils.selective_log_softmax
    monkeypatch.setattr(patching.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(UnknownContract, match=r"trl 1\.17\.0 is installed; .* 1\.15, 1\.16"):
        patch_trl()
    assert utils.selective_log_softmax is before


def test_a_loss_that_was_not_checked_is_refused(monkeypatch):
    def get_gamma_weights(self):
        """Another formula."""

    monkeypatch.setattr(grpo.GRPOTrainer, "get_gamma_weights", staticmethod(get_gamma_weights))
    before = utils.selective_log_softmax
    with pytest.raises(UnknownContract, match="_compute_loss has another body"):
        patch_trl()
    assert utils.selective_log_softmax is before
    patch_trl("logprobs")  # the other parts do not depend on it


def test_rewards_of_the_runs_differ():
    assert even_share([[2, 3], [2, 4]]) == [0.5, 1.0]


OWN_TESTS = (
    "tests/test_utils.py::TestSelectiveLogSoftmax",
    "tests/test_utils.py::TestEntropyFromLogits",
    "tests/test_utils.py::TestAddFusedLMHead",
)


@pytest.mark.skipif("VCR1_TRL_SOURCE" not in os.environ, reason="VCR1_TRL_SOURCE names no TRL")
def test_trls_own_tests_pass_with_the_patch():
    """Those of the checkout of TRL that VCR1_TRL_SOURCE names, of the installed release."""
    plugin = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "trl_patched", *OWN_TESTS],
        cwd=os.environ["VCR1_TRL_SOURCE"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(plugin), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
