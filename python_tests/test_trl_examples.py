"""The examples for TRL run as they stand."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed", exc_type=ImportError)
from vcr1_fast.integrations.trl import patch_trl

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed")


@pytest.fixture(autouse=True)
def undone():
    yield
    patch_trl.undo()


@pytest.mark.parametrize("name", ["trl_grpo", "trl_video_grpo"])
def test_runs(name, tmp_path):
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    assert patch_trl.applied == tuple(patch_trl.parts)
    trainer = main(["--tiny", "--steps", "2", "--output", str(tmp_path)])
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == 2 and any(row["grad_norm"] > 0 for row in steps)


def test_the_video_example_asks_for_records(capsys):
    main = runpy.run_path(str(EXAMPLES / "trl_video_grpo.py"))["main"]
    with pytest.raises(SystemExit):
        main([])
    assert "--records is needed" in capsys.readouterr().err
