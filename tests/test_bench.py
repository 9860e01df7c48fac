"""The benchmarks run on any recipe and say what they measure."""

import re

import pytest

RECIPE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 8
    config.data.name = "fake"
    config.data.image_shape = (12, 12, 3)
    config.data.num_examples = 40
    config.image_size = 8
    config.crop.name = "random_resized_crop"
    config.model.name = "dense"
    config.model.widths = (8,)
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def bench(run_main, *arguments):
    return run_main(*arguments, "--steps=3", "--rounds=2", module="flaxcls.bench")


def test_input_is_timed_by_its_parts_and_as_a_whole(run_main, recipe):
    result = bench(run_main, "input", f"--config={recipe}", "--busy=0.5")
    assert result.returncode == 0, result.stderr
    shares = [int(share) for share in re.findall(r"(\d+) %(?:,|$)", result.stdout, re.MULTILINE)]
    assert 97 <= sum(shares[:4]) <= 103  # read, decode, crop and resize, transfer
    for expected in ("decoder alone", "images/s a core", "peak memory", "of the time"):
        assert expected in result.stdout


def test_step_is_the_default(run_main, recipe):
    result = bench(run_main, f"--config={recipe}")
    assert result.returncode == 0, result.stderr
    assert len(re.search(r"images/s: (.*)", result.stdout)[1].split(", ")) == 2


def test_unknown_benchmark_is_refused(run_main, recipe):
    result = bench(run_main, "inptu", f"--config={recipe}")
    assert result.returncode == 2
    assert "did you mean 'input'?" in result.stderr
