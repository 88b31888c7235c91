"""Configuration: what is refused names its field, what is accepted survives a round trip."""

from dataclasses import dataclass, field

import pytest

from vcr1_fast.config.loader import ConfigError, build, dump_config, load_config
from vcr1_fast.train.config import TrainConfig

NEEDED = ["model.path=m", "data.train=d.jsonl", "run.output=o"]


def load(*overrides):
    return load_config(TrainConfig, None, [*NEEDED, *overrides])


def test_defaults_are_the_recipe():
    config = load()
    assert (config.rollout.group_size, config.rollout.top_k) == (8, 0)
    assert (config.optim.lr, config.loss.beta) == (1e-6, 0.04)


def test_file_then_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 1e-5, steps: 7}\nloss: {eps_high: 0.28}\nmodel: {path: a}\n")
    config = load_config(TrainConfig, path, [*NEEDED[1:], "optim.lr=3e-5", "optim.lr=2e-5"])
    assert config.optim.lr == 2e-5
    assert (config.optim.steps, config.model.path) == (7, "a")
    # A section given in part keeps this tree's other defaults, not those of the section's class.
    assert (config.loss.eps_high, config.loss.beta) == (0.28, 0.04)


def test_values_of_every_kind():
    config = load(
        "data.tasks=[tracking, multiple_choice]",
        "data.frames.fps=4",
        "data.frames.total_pixels=null",
        "optim.betas=[0.9, 0.95]",
        "loss.kl_input_clamp=null",
        "run.resume=false",
        "data.system=",
        "advantage.scale=none",
    )
    assert config.data.tasks == ("tracking", "multiple_choice")
    assert config.data.frames.fps == 4.0
    assert config.data.frames.total_pixels is None
    assert config.optim.betas == (0.9, 0.95)
    assert config.loss.kl_input_clamp is None
    assert config.run.resume is False
    assert config.data.system is None
    assert config.advantage.scale == "none"


def test_round_trip(tmp_path):
    config = load("optim.lr=1e-7", "data.frames.total_pixels=null", "data.tasks=[tracking]")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(TrainConfig, path) == config


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("optim.lrr=1", "optim.lrr"),
        ("speed=1", "speed"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.lr=true", "optim.lr"),
        ("optim.lr=null", "optim.lr"),
        ("optim.steps=1.5", "optim.steps"),
        ("optim.steps=0", "optim.steps"),
        ("optim.schedule=cubic", "optim.schedule"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.betas=[0.9, 1.0]", "optim.betas"),
        ("optim.betas=[a, 0.9]", "optim.betas[0]"),
        ("optim.inner_steps=3", "optim.inner_steps"),
        ("optim.warmup_steps=1000", "optim.warmup_steps"),
        ("optim=3", "optim"),
        ("run.resume=1", "run.resume"),
        ("run.output=", "run.output"),
        ("run.device=cuda", "run.device"),
        ("model.dtype=float16", "model.dtype"),
        ("model.path=7", "model.path"),
        ("optim.tokens_per_microbatch=0", "optim.tokens_per_microbatch"),
        ("optim.memory_gib=0", "optim.memory_gib"),
        ("rollout.gap_mean_limit=-1", "rollout.gap_mean_limit"),
        ("rollout.group_size=1", "rollout.group_size"),
        ("rollout.top_p=0", "rollout.top_p"),
        ("rollout.stop=['']", "rollout.stop"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("data.tasks=tracking", "data.tasks"),
        ("data.tasks=[]", "data.tasks"),
        ("data.frames.fps=0", "data.frames"),
        ("loss.beta=x", "loss.beta"),
        ("loss.loss_type=ppo", "loss"),
        ("loss.num_items=3", "loss.num_items"),
        ("loss.entropy_aggregation=token_mean", "loss.entropy_aggregation"),
        ("optim.lr", "optim.lr"),
        ("optim.=1", "optim.=1"),
        ("optim.lr.x=1", "optim.lr"),
        ("optim.lr=[", "optim.lr"),
    ],
)
def test_refusals_name_the_field(override, name):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert error.value.field == name
    assert str(error.value).startswith(f"{name}: ")


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match=r"^model\.path: missing"):
        load_config(TrainConfig)
    with pytest.raises(ConfigError, match=r"^data\.train: missing"):
        load_config(TrainConfig, None, ["model.path=m", "run.output=o"])


def test_a_field_of_older_versions_is_explained():
    with pytest.raises(ConfigError, match=r"^optim\.micro_prompts: replaced by tokens_per_micro"):
        load("optim.micro_prompts=4")


def test_a_near_miss_is_suggested():
    with pytest.raises(ConfigError, match=r"did you mean optim\.prompts_per_step\?"):
        load("optim.prompt_per_step=4")


def test_bad_files(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"run\.yaml: not YAML"):
        load_config(TrainConfig, path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match=r"run\.yaml: expected fields"):
        load_config(TrainConfig, path)
    with pytest.raises(FileNotFoundError):
        load_config(TrainConfig, tmp_path / "none.yaml")


def test_build_serves_other_trees():
    @dataclass(frozen=True)
    class Inner:
        count: int = 1

    @dataclass(frozen=True)
    class Outer:
        handle: object = None
        inner: Inner = field(default_factory=Inner)

    assert build(Outer, {"inner": {"count": 2}}) == Outer(inner=Inner(2))
    with pytest.raises(ConfigError, match=r"^inner\.count: expected a whole number"):
        build(Outer, {"inner": {"count": "2"}})
    with pytest.raises(ConfigError, match=r"^handle: cannot be set"):
        build(Outer, {"handle": 1})
