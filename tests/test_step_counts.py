"""What makes devices wait in the recipes' training steps is what it was, or changed on purpose."""

import json
from pathlib import Path

import jax
import pytest

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "step_counts.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    not jax.__version__.startswith(EXPECTED["jax"] + "."),
    reason=f"the counts are those of jax {EXPECTED['jax']}",
)
def test_collectives_branches_loops_and_transfers_of_every_recipe(start_python, tmp_path):
    file = tmp_path / "counts.json"
    process = start_python(GOLDEN / "update_step_counts.py", file)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    counts = json.loads(file.read_text())["recipes"]
    assert counts == EXPECTED["recipes"], (
        "if this is meant, run python tests/golden/update_step_counts.py and commit what it writes"
    )
    for recipe, of_platform in counts.items():
        # Nothing goes between devices but sums, of the gradient, BatchNorm's and the metrics'.
        assert of_platform["cpu"].keys() <= {"all-reduce", "conditional", "while"}, recipe
        assert of_platform["gpu"].keys() <= {"while"}, recipe
