"""docs/scale.md: its tables are those of the plan; the plan's sizes are the published ones."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("write_scale", ROOT / "docs/write_scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_plan(scale):
    assert scale.text() == scale.PAGE.read_text(encoding="utf-8"), "run docs/write_scale.py"


@pytest.mark.parametrize(("name", "billions"), [("3B", 3.75), ("7B", 8.29)])
def test_sizes_are_those_of_the_checkpoints(scale, name, billions):
    count = sum(p.numel() for p in scale.model_of(name).parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_shards_take_what_the_formula_says(scale):
    """Bytes a parameter on n GPUs: 16 / n of masters, moments and gradients, 2 of whole weights, 4
    of whole gradients, 2 / n of the reference model; and activations, which are as on one GPU."""
    for n in (8, 64):
        needs, *_ = scale.needs_of("7B", n, False)
        count = needs.parameters
        held = needs.weights + needs.training + needs.gathered + needs.gradients + needs.reference
        assert held == pytest.approx(count * (16 / n + 2 + 4 + 2 / n), rel=1e-6)
    one, *_ = scale.needs_of("7B", 1, False)
    assert one.weights + one.training + one.reference == count * 20
    assert one.micro_batch == needs.micro_batch


def test_the_recipes_run_where_the_pages_say(scale):
    """The 7B recipe on 8 GPUs of 80 GB, with the tokens that docs/reproduce.md names."""
    page = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    found = re.search(r"holds (\d+) GiB .*? of ([\d,]+)\s+tokens, and up to ([\d,]+)", page, re.S)
    gib, tokens, most = (int(number.replace(",", "")) for number in found.groups())
    assert gib == round(scale.peak("7B", 8, tokens))
    assert "80 GB" in scale.fits(scale.peak("7B", 8, tokens))
    assert most == scale.longest("7B", 8, "80 GB", lora=False)
    assert scale.fits(scale.peak("7B", 1)) == "none"
