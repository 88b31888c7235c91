"""Help and docs/config.md have every setting, as the code declares it."""

import runpy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
from pydantic import Field

from vcr1_fast.cli import SETTINGS, parser, settings_of
from vcr1_fast.config.loader import dump_config, load_config
from vcr1_fast.config.section import ConfigError, section
from vcr1_fast.config.settings import field_docs, sections
from vcr1_fast.train.config import OptimConfig, RolloutConfig, RunConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def leaves(cls, prefix=""):
    """Dotted names of all fields, found without the code under test."""
    for name, hint in get_type_hints(cls).items():
        if name not in {field.name for field in fields(cls)}:
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        elif name not in ("num_items", "num_sequences"):  # counted by the trainer
            yield prefix + name


@pytest.mark.parametrize("command", SETTINGS)
def test_help_lists_every_setting_with_its_default(command, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in leaves(settings_of(command)):
        found = [line for line in lines if line.startswith(f"  {name} (")]
        assert len(found) == 1, name
        assert "): " in found[0], name


def test_help_shows_the_defaults_of_the_tree(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--help"])
    reported = capsys.readouterr().out
    for line in ("loss.beta (0.04): ", "optim.lr (1e-06): ", "model.path (required): "):
        assert f"\n  {line}" in reported


@pytest.mark.parametrize("command", SETTINGS)
def test_every_setting_is_documented(command):
    for part in sections(settings_of(command)):
        assert part.text, part.name
        undocumented = [setting.name for setting in part.settings if not setting.text]
        assert not undocumented


def test_the_page_is_current():
    written = runpy.run_path(str(ROOT / "docs" / "write_config.py"))
    assert written["PAGE"].read_text(encoding="utf-8") == written["text"](), "run: make docs"


def test_a_shared_setting_is_declared_once():
    # The same text for train, eval and chat, from one place.
    texts = {}
    for command in ("train", "eval", "chat"):
        for part in sections(settings_of(command)):
            for setting in part.settings:
                texts.setdefault(setting.name.split(".")[-1], {})[command] = setting.text
    for name in ("mrope", "system", "decoder", "decode_workers", "think", "media_first", "fps"):
        assert len(texts[name]) >= 2 and len(set(texts[name].values())) == 1, name


def test_docs_of_fields():
    @dataclass(frozen=True)
    class Plain:
        """Text.

        Attributes:
            a, b: both,
                over two lines.
            c: one.
        """

        a: int = 0
        b: int = 0
        c: int = 0

    class Below(Plain):
        d: int = 0
        """Four."""

    assert field_docs(Plain) == {
        "a": "both, over two lines.",
        "b": "both, over two lines.",
        "c": "one.",
    }
    assert field_docs(dataclass(frozen=True)(Below))["d"] == "Four."


def test_a_section_refuses_in_python_what_it_refuses_in_a_file():
    for values, reported in (
        ({"group_size": 1}, "group_size: must be at least 2, got 1"),
        ({"group_size": "8"}, "group_size: expected a whole number, got '8'"),
        ({"top_p": True}, "top_p: expected a finite number, got True"),
        ({"temperature": float("inf")}, "temperature: expected a finite number, got inf"),
        ({"stop": ("a", 3)}, "stop[1]: expected a text, got 3"),
        ({"stop": ("",)}, "stop: must not hold an empty string, got ['']"),
        ({"groups": 4}, "groups: unknown field; did you mean group_size?"),
    ):
        with pytest.raises(ConfigError) as caught:
            RolloutConfig(**values)
        assert str(caught.value) == reported


def test_a_wrong_value_is_reported_before_a_missing_one():
    for values, reported in (
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        ({"outputs": "o"}, "outputs: unknown field; did you mean output?"),
        ({}, "output: missing"),
    ):
        with pytest.raises(ConfigError) as caught:
            RunConfig(**values)
        assert str(caught.value) == reported
    with pytest.raises(ConfigError, match=r"^micro_prompts: replaced by tokens_per_microbatch"):
        OptimConfig(micro_prompts=4)


def test_texts_that_look_like_numbers_survive_a_round_trip(tmp_path):
    config = RunConfig(output="1e5")
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    assert load_config(RunConfig, path) == config
    for text, value in (("1e-6", 1e-6), ("1.5E+3", 1500.0), ("2", 2.0), ("-1e5", None)):
        path.write_text(f"lr: {text}")
        if value is None:
            with pytest.raises(ConfigError, match=r"lr: must be above 0, got -100000\.0"):
                load_config(OptimConfig, path)
        else:
            assert load_config(OptimConfig, path).lr == value


def test_an_error_of_a_file_names_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: fast}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    assert str(caught.value) == f"optim.lr: expected a finite number, got 'fast' ({path})"
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, ["optim.lr=slow"])
    assert str(caught.value) == "optim.lr: expected a finite number, got 'slow'"


def test_a_union_or_a_bound_inside_a_list_is_named():
    @section
    class Bounded:
        shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
        either: int | str | None = None

    with pytest.raises(ConfigError, match=r"^shares\[1\]: must be at most 1, got 1\.5$"):
        load_config(Bounded, None, ["shares=[0.5, 1.5]"])
    with pytest.raises(ConfigError, match=r"^either: expected a whole number, got 1\.5$"):
        load_config(Bounded, None, ["either=1.5"])
    assert load_config(Bounded, None, ["shares=[1]", "either=a"]) == Bounded(
        shares=(1.0,), either="a"
    )
