"""The waiting and the work of the recipes' training steps are what they were, or what was meant."""

import json
import re
from pathlib import Path

import jax
import pytest

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "step_counts.json").read_text())


# Large networks, in steps that those of other recipes are like: they take minutes to compile.
LARGE = re.compile(
    r"finetune_|imagenet_(resnet18|resnet50_(a1|a3|fast)|resnet50d|deit3|convnext|vit)"
    r"|cifar10_(airbench94|convnext|densenet|lt|resnet18|short|vgg|wrn)"
)


@pytest.mark.skipif(
    not jax.__version__.startswith(EXPECTED["jax"] + "."),
    reason=f"the counts are those of jax {EXPECTED['jax']}",
)
@pytest.mark.parametrize(
    "large",
    [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.torture)],
)
def test_collectives_branches_transfers_and_work_of_every_recipe(start_python, tmp_path, large):
    file = tmp_path / "counts.json"
    expected = {
        recipe: counts
        for recipe, counts in EXPECTED["recipes"].items()
        if bool(LARGE.match(recipe)) == large
    }
    process = start_python(GOLDEN / "update_step_counts.py", file, *expected)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    counts = json.loads(file.read_text())["recipes"]
    wanted = (
        "if it is meant, run python tests/golden/update_step_counts.py and commit what it writes"
    )
    for recipe, of_platform in counts.items():
        work, stored = of_platform.pop("work"), expected[recipe].pop("work", {})
        assert {name: work[name] for name in stored} == pytest.approx(stored, rel=0.02), wanted
    assert counts == expected, wanted
    for recipe, of_platform in counts.items():
        # Nothing goes between devices but sums, of the gradient, BatchNorm's and the metrics', and
        # the kernels' updates of Muon, which they share out.
        allowed = {"all-gather", "all-reduce", "conditional", "while"}
        assert of_platform["cpu"].keys() <= allowed, recipe
        assert of_platform["gpu"].keys() <= {"while"}, recipe


def test_every_recipe_has_its_counts():
    recipes = {path.stem for path in (GOLDEN.parents[1] / "configs").glob("*.py")} - {"folder"}
    assert recipes | {"folder, gpu", "folder, cpu"} == EXPECTED["recipes"].keys()
