"""A run that an earlier version of the code has made is used by this one.

tests/fixtures/old_run was made in November 2026 (jax 0.10.2, Orbax 0.12.8): 12 steps of a narrow
`quick` on 96 digits, saved after 8 and 12. It must never be made again: what can't be read any more
is what people can't read any more.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from flaxcls.inference.evaluator import evaluate_run
from flaxcls.runs import run_folder
from flaxcls.training.train import train_config as train

OLD = Path(__file__).parent / "fixtures/old_run"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_old_run_evaluates_to_what_it_said(old, checkpoint):
    step, _, results = evaluate_run(old, checkpoint=checkpoint)
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    (said,) = [row for row in rows if row["step"] == step and "eval" in row]
    for name in ("eval", "ema"):
        assert results[name]["count"] == 50
        for metric, value in results[name].items():
            assert value == pytest.approx(said[name][metric], rel=1e-3), (name, metric)


def test_old_run_goes_on_and_ends_as_it_did(old, saved_arrays, capfd):
    ended = saved_arrays(old, 12)
    summary = json.loads((old / "summary.json").read_text())
    shutil.rmtree(old / "checkpoints/12")
    (old / "summary.json").unlink()
    again = train(run_folder.load_config(old), old)
    assert not (old / "quarantine").exists()
    assert again["eval"]["accuracy"] == pytest.approx(summary["eval"]["accuracy"], abs=0.05)
    assert again["eval"]["loss"] == pytest.approx(summary["eval"]["loss"], rel=1e-2)
    for name, array in saved_arrays(old, 12).items():
        if name.split("/")[0] in ("params", "batch_stats", "ema"):
            np.testing.assert_allclose(array, ended[name], rtol=5e-2, atol=5e-3, err_msg=name)
