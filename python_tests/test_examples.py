"""The examples: run where nothing else is needed, else started on stand-ins for their trainers."""

import importlib
import importlib.util
import py_compile
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from peer_stubs import install, stub

from vcr1_fast.integrations.liger import LigerFusedLinearGRPOFunction, LigerFusedLinearGRPOLoss
from vcr1_fast.integrations.patching import Patch
from vcr1_fast.integrations.verl_losses import POLICY_LOSSES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_every_example_compiles_and_says_what_it_is(path, tmp_path):
    py_compile.compile(str(path), cfile=str(tmp_path / "out.pyc"), doraise=True)
    assert path.read_text().startswith('"""')


def test_the_custom_loop_learns(capsys):
    history = load(EXAMPLES / "custom_loop.py").main(steps=40)
    assert history[0] < 0.25 and history[-1] > 0.8
    assert "reward" in capsys.readouterr().out


def test_the_verl_config_names_what_exists():
    config = yaml.safe_load((EXAMPLES / "verl/grpo.yaml").read_text())
    policy = config["actor_rollout_ref"]
    assert importlib.util.find_spec(policy["model"]["external_lib"]) is not None
    assert policy["actor"]["policy_loss"]["loss_mode"] in POLICY_LOSSES
    assert policy["model"]["fused_kernel_options"]["impl_backend"] in ("torch", "triton")


def test_the_verl_script_hands_its_config_to_verl(monkeypatch):
    seen = []
    entry = {"main": lambda: seen.extend(sys.argv)}
    install(monkeypatch, "verl", "0.9.1", {"verl.trainer.main_ppo": entry})
    monkeypatch.setattr(sys, "argv", ["train.py"])
    load(EXAMPLES / "verl/train.py").main(["data.train_files=a.parquet"])
    options = dict(option.lstrip("-").split("=", 1) for option in seen[1:])
    config = Path(options["config-path"]) / f"{options['config-name']}.yaml"
    assert config.exists() and options["data.train_files"] == "a.parquet"


@pytest.mark.parametrize("name", ("openrlhf_grpo", "easyr1_grpo"))
def test_ray_scripts_hook_their_patch_into_every_worker(name, monkeypatch):
    started = []
    ray = ModuleType("ray")
    ray.init = lambda **options: started.append(options)
    monkeypatch.setitem(sys.modules, "ray", ray)
    script = load(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [name])
    ran = []
    monkeypatch.setattr(
        script.runpy, "run_module", lambda *call, **_: ran.append((*call, *sys.argv))
    )
    script.main(["--one", "two"])
    module, _, attribute = started[0]["runtime_env"]["worker_process_setup_hook"].rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), attribute), Patch)
    assert ran == [(script.ENTRY, script.ENTRY, "--one", "two")]


def test_the_swift_plugin_patches_when_it_is_imported(monkeypatch):
    softmax = stub("f", "logits", "index")
    trainers = {
        "swift.rlhf_trainers.grpo_trainer": {
            "selective_log_softmax": softmax,
            "entropy_from_logits": stub("f", "logits", "chunk_size"),
        },
        "swift.rlhf_trainers.rlhf_mixin": {"selective_log_softmax": softmax},
    }
    made = install(monkeypatch, "ms-swift", "4.6.0", trainers)
    forward = stub(
        "f", "self", "_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages",
        "bias", "ref_per_token_logps", "old_per_token_logps", "ref_input", "ref_weight", "ref_bias",
        "vllm_is_ratio", "num_items_in_batch",
    )  # fmt: skip
    apply = stub("f", "ctx", *LigerFusedLinearGRPOFunction.apply.__code__.co_varnames[:31])
    losses = {
        "LigerFusedLinearGRPOLoss": type("L", (torch.nn.Module,), {"forward": forward}),
        "LigerFusedLinearGRPOFunction": type("F", (), {"forward": staticmethod(apply)}),
    }
    liger = {"liger_kernel.chunked_loss.grpo_loss": losses, "liger_kernel.chunked_loss": losses}
    made |= install(monkeypatch, "liger-kernel", "0.8.5", liger)
    plugin = load(EXAMPLES / "ms_swift_plugin.py")
    try:
        chunked = made["liger_kernel.chunked_loss"]
        assert chunked.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
        trainer = made["swift.rlhf_trainers.grpo_trainer"]
        assert trainer.selective_log_softmax is not softmax
    finally:
        plugin.patch_ms_swift.undo()
        plugin.patch_liger.undo()
    assert trainer.selective_log_softmax is softmax
