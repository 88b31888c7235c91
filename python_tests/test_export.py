"""Checkpoints as models, adapters as adapters, and runs that start from either."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import configure, write_inputs

from vcr1_fast import cli
from vcr1_fast.model.checkpoint import load
from vcr1_fast.train.checkpoint import load_state
from vcr1_fast.train.export import export, model_folder
from vcr1_fast.train.loop import train
from vcr1_fast.train.setup import prepare_model
from vcr1_fast.train.sft import sft

LORA = ("model.lora_rank=4", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def full(inputs, tmp_path_factory):
    """A run of three steps with all its checkpoints."""
    run = tmp_path_factory.mktemp("full") / "run"
    settings = ("run.save_every=1", "run.keep_checkpoints=3", "optim.steps=3", "optim.lr=1e-2")
    sft(configure(*inputs, run, *settings, "data.think=false"))
    return run


@pytest.fixture(scope="module")
def lora(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    sft(configure(*inputs, run, *LORA))
    return run


def weights(folder):
    return {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_checkpoint_exports_as_the_model_it_holds(full, tmp_path):
    # The last checkpoint holds the finished model; an earlier one holds other weights.
    last = weights(export(full, output=None))
    finished = weights(full / "model")
    assert last.keys() == finished.keys()
    assert all(torch.equal(last[name], finished[name]) for name in last)
    first = export(full, 1, output=tmp_path / "first")
    state = load_state(full / "checkpoints" / "step-00000001")["model"]
    model, _ = load(first)
    named = dict(model.named_parameters())
    assert state.keys() == {name for name, p in named.items() if p.requires_grad}
    assert all(torch.equal(named[name], value) for name, value in state.items())
    other = weights(first)
    assert any(not torch.equal(other[name], finished[name]) for name in finished)


def test_the_command_names_what_is_there(full, lora, tmp_path, capsys):
    assert cli.main(["export", str(full), "--step", "2", "--output", str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "two")
    assert (tmp_path / "two" / "vcr1.yaml").read_text().count("step: 2\n") == 1
    for words, told in (
        ([str(full), "--step", "7"], "no checkpoint of step 7; there are 1, 2, 3"),
        ([str(tmp_path)], "no run with a checkpoint"),
        ([str(full), "--adapter"], "has no adapter"),
    ):
        assert cli.main(["export", *words]) == 2
        assert told in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(inputs, tmp_path):
    run = tmp_path / "run"
    sft(configure(*inputs, run, "optim.steps=1"))
    file = next((run / "checkpoints").glob("step-*")) / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.pt: differs from its SHA-256"):
        export(run, output=None)


def test_a_run_and_a_checkpoint_stand_for_their_models(full, inputs, tmp_path, capsys):
    assert model_folder(full) == full / "model" == model_folder(full / "model")
    assert model_folder("owner/name") is None
    checkpoint = full / "checkpoints" / "step-00000002"
    exported = model_folder(checkpoint)
    assert exported == full / "exports" / "step-00000002"
    assert "exporting" in capsys.readouterr().err
    assert model_folder(checkpoint) == exported and capsys.readouterr().err == ""
    # A run started again in the same folder writes other weights under the same step.
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes())
    model_folder(checkpoint)
    assert "exporting" in capsys.readouterr().err


def test_eval_and_chat_take_a_run_that_was_killed(full, inputs, tmp_path, capsys, monkeypatch):
    import io
    import shutil

    killed = tmp_path / "killed"
    shutil.copytree(full / "checkpoints", killed / "checkpoints")
    settings = ["eval.max_new_tokens=2", "eval.decode_workers=0", "eval.pictured=0"]
    words = ["--data", str(inputs[1]), "--output", str(tmp_path / "eval"), *settings]
    assert cli.main(["eval", "--model", str(killed), *words]) == 0
    told = json.loads((tmp_path / "eval" / "run.json").read_text())
    assert told["model"] == str(killed / "exports" / "step-00000003")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    step = str(killed / "checkpoints" / "step-00000001")
    assert cli.main(["chat", "--model", step, "--question", "What?", "max_new_tokens=2"]) == 0
    assert (killed / "exports" / "step-00000001" / "config.json").exists()


# Adapters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_adapter_and_merges_to_the_model(lora, inputs):
    from peft import PeftModel

    base, _ = load(inputs[0])
    with_adapter = PeftModel.from_pretrained(base, lora / "adapter")
    config = json.loads((lora / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(inputs[0]) and config["r"] == 4
    merged = dict(with_adapter.merge_and_unload().named_parameters())
    ours = dict(load(lora / "model")[0].named_parameters())
    assert ours.keys() == merged.keys()
    for name, value in ours.items():
        torch.testing.assert_close(merged[name].detach(), value.detach(), rtol=1e-5, atol=1e-6)
    start = dict(load(inputs[0])[0].named_parameters())
    assert any(not torch.equal(ours[name], start[name]) for name in ours)


def test_an_adapter_exported_from_a_checkpoint_is_that_of_the_run(lora):
    folder = export(lora, adapter=True, output=None)
    assert folder == lora / "exports" / "step-00000002-adapter"
    one, other = (
        load_file(path / "adapter_model.safetensors") for path in (folder, lora / "adapter")
    )
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="is an adapter alone"):
        model_folder(folder)


def test_a_run_starts_from_an_adapter_and_is_measured_against_it(lora, inputs, tmp_path):
    settings = (f"model.adapter={lora / 'adapter'}", "loss.beta=0.1", "optim.steps=1")
    run = tmp_path / "run"
    train(configure(*inputs, run, *settings))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    # Before the first update policy and reference are one model: base and adapter.
    assert abs(row["kl"]) < 1e-6
    config = configure(*inputs, tmp_path / "x", *settings)
    model, _ = prepare_model(config, torch.device("cpu"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and ".default." in name for name in trained)
    # And they are not the base model, from which the KL would not be 0.
    with torch.no_grad():
        state = load_file(lora / "adapter" / "adapter_model.safetensors")
    loaded = dict(model.named_parameters())
    for name, value in state.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value)
    # The second run's adapter began at the first one's.
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    moved = max(float((after[name] - state[name]).abs().max()) for name in state)
    assert 0 <= moved < 5e-3


def test_resuming_with_an_adapter_keeps_the_reference(lora, inputs, tmp_path):
    settings = (f"model.adapter={lora / 'adapter'}", "loss.beta=0.1", "run.save_every=1")
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    train(configure(*inputs, straight, *settings, "optim.steps=2", "optim.schedule=constant"))
    for steps in (1, 2):
        train(
            configure(*inputs, halves, *settings, f"optim.steps={steps}", "optim.schedule=constant")
        )
    one, other = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, halves)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_that_does_not_fit_is_refused(lora, inputs, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        sft(configure(*inputs, tmp_path / "a", f"model.adapter={tmp_path}"))
    with pytest.raises(ValueError, match=r"lora_rank: must be 0 with model\.adapter"):
        configure(*inputs, tmp_path / "b", f"model.adapter={lora}", "model.lora_rank=4")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (lora / "adapter").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(ValueError, match=r"model\.adapter .* does not fit"):
        sft(configure(*inputs, tmp_path / "c", f"model.adapter={broken}"))
    # peft fills what a file lacks with random numbers.
    from safetensors.torch import save_file

    (broken / "adapter_config.json").write_text(json.dumps(config))
    state = load_file(broken / "adapter_model.safetensors")
    save_file(dict(list(state.items())[1:]), broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"model\.adapter .* does not fit"):
        sft(configure(*inputs, tmp_path / "d", f"model.adapter={broken}"))


# Resuming from a named checkpoint


def test_a_run_branches_off_from_a_named_checkpoint(full, inputs, tmp_path, capsys):
    start = full / "checkpoints" / "step-00000002"
    branch = tmp_path / "branch"
    settings = ("run.save_every=1", "optim.lr=1e-2", f"run.resume_from={start}")
    # The same settings: the branch ends where the run did.
    sft(configure(*inputs, branch, *settings, "optim.steps=3"))
    assert f"resuming after step 2 from {start}" in capsys.readouterr().err
    ours, theirs = weights(branch / "model"), weights(full / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # The branch resumes from its own checkpoints afterwards, by the same command.
    sft(configure(*inputs, branch, *settings, "optim.steps=4"))
    assert f"resuming after step 3 from {branch}" in capsys.readouterr().err
    # Another learning rate, another model.
    other = tmp_path / "other"
    sft(configure(*inputs, other, *settings, "optim.steps=3", "optim.lr=1e-1"))
    theirs = weights(other / "model")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_going_back_in_the_same_folder_is_refused(full, inputs):
    def resume(step, *settings):
        path = full / "checkpoints" / step
        common = ("optim.steps=3", "optim.lr=1e-2", f"run.resume_from={path}")
        sft(configure(*inputs, full, *common, *settings))

    with pytest.raises(ValueError, match=r"is not the newest checkpoint .* step-00000003 is"):
        resume("step-00000001")
    with pytest.raises(ValueError, match="resume_from: needs resume: true"):
        resume("step-00000003", "run.resume=false")


def test_what_is_no_checkpoint_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"run\.resume_from: .* is no checkpoint"):
        sft(configure(*inputs, tmp_path / "run", f"run.resume_from={tmp_path}"))


# --- the hub


class Hub:
    """What `huggingface_hub.HfApi` does here, with what it was asked."""

    asked: list = []  # noqa: RUF012 - of the class, as every call makes an object
    fault = None

    def whoami(self):
        self.asked.append("whoami")
        if self.fault == "whoami":
            raise ConnectionError("no route to the host\nat all")

    def create_repo(self, name, **options):
        self.asked.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.fault == "upload":
            raise OSError("413: too large")
        self.asked.append((repo_id, sorted(file.name for file in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "fault", None)
    return Hub


def test_a_model_goes_to_the_hub_with_its_card(full, hub, tmp_path, capsys):
    output = tmp_path / "mine"
    words = ["export", str(full), "--step", "2", "--output", str(output), "--push", "me/mine"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [str(output), "https://hub/me/mine"]
    me, created, uploaded = hub.asked
    assert me == "whoami" and created == ("me/mine", {"private": True, "exist_ok": True})
    assert {"model.safetensors", "config.json", "vcr1.yaml", "README.md"} <= set(uploaded[1])
    card = (output / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and head["tags"] == ["vcr1_fast", "sft"]
    # The base is a folder of this machine: neither its path nor a wrong name on the hub.
    assert "base_model" not in head and str(full.parent) not in card and "/tmp/" not in card
    assert "2 steps on 18 records" in card and "no think, 4 frames" in card


def test_an_adapter_goes_to_the_hub_as_one(lora, hub, tmp_path):
    words = ["export", str(lora), "--adapter", "--output", str(tmp_path / "a"), "--push", "me/a"]
    assert cli.main([*words, "--public"]) == 0
    assert hub.asked[1] == ("me/a", {"private": False, "exist_ok": True})
    assert "library_name: peft" in (tmp_path / "a/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "fault", "said"),
    [
        (["--push", "mine"], None, "--push mine: expected USER/NAME"),
        (["--push", "me/mine"], "offline", "the hub is switched off (HF_HUB_OFFLINE)"),
        (["--push", "me/mine"], "whoami", "does not know you (ConnectionError: no route to"),
        (["--public"], None, "--public goes with --push"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_export(
    full, hub, tmp_path, capsys, monkeypatch, words, fault, said
):
    import huggingface_hub

    monkeypatch.setattr(Hub, "fault", fault)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", fault == "offline")
    assert cli.main(["export", str(full), "--output", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_export(full, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Hub, "fault", "upload")
    words = ["export", str(full), "--output", str(tmp_path / "out"), "--push", "me/mine"]
    assert cli.main(words) == 2
    assert "--push me/mine: OSError: 413: too large" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").exists()
