"""The benchmarks run on any recipe and say what they measure."""

import json
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


def bench(run_main, *arguments, **options):
    return run_main(*arguments, "--steps=3", "--rounds=2", module="flaxcls.bench", **options)


def test_input_is_timed_by_its_parts_and_as_a_whole(run_main, recipe, tmp_path):
    report = tmp_path / "input.json"
    result = bench(run_main, "input", f"--config={recipe}", "--busy=0.5", f"--json={report}")
    assert result.returncode == 0, result.stderr
    shares = [int(share) for share in re.findall(r"(\d+) %(?:,|$)", result.stdout, re.MULTILINE)]
    assert 97 <= sum(shares[:4]) <= 103  # read, decode, crop and resize, transfer
    for expected in ("decoder alone", "images/s per core", "peak memory", "of the time"):
        assert expected in result.stdout
    figures = json.loads(report.read_text())["figures"]
    units = {name: figure["unit"] for name, figure in figures.items()}
    assert units == {
        **{
            f"{part}_on_one_thread": "ms/image"
            for part in ("read", "decode", "crop_and_resize", "transfer")
        },
        **dict.fromkeys(("decoder_alone", "rate", "rate_per_core"), "images/s"),
        **dict.fromkeys(("peak_memory_first_round", "peak_memory"), "MiB"),
        "waiting_of_busy_model": "%",
    }
    assert all(figure["value"] >= 0 for figure in figures.values())


def test_step_is_the_default_and_its_report_explains_itself(run_main, recipe, tmp_path):
    report = tmp_path / "step.json"
    result = bench(run_main, f"--config={recipe}", "--config.seed=3", f"--json={report}")
    assert result.returncode == 0, result.stderr
    assert len(re.search(r"images/s: (.*)", result.stdout)[1].split(", ")) == 2

    content = json.loads(report.read_text())
    assert content["benchmark"] == "step"
    assert content["flags"] == {"config": str(recipe), "steps": 3, "rounds": 2, "busy": 0.8}
    assert content["config"]["seed"] == 3 and content["config"]["model"]["widths"] == [8]
    assert {"python", "jax", "flax"} <= content["versions"].keys()
    assert content["device"]["kind"] == "cpu" and f"{content['device']['count']} x cpu" in (
        result.stdout
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", content["date"])
    rate = content["figures"].pop("rate")
    assert rate["unit"] == "images/s" and len(rate["rounds"]) == 2
    assert min(rate["rounds"]) <= rate["value"] <= max(rate["rounds"])
    assert f"median {rate['value']:,.0f} images/s" in result.stdout
    assert {name: each["unit"] for name, each in content["figures"].items()} == {
        "reading_data": "s",
        "compilation": "s",
    }


@pytest.mark.slow
def test_lost_figures_have_a_code_of_their_own(run_main, recipe):
    result = bench(run_main, f"--config={recipe}", "--json=/dev/full")
    assert result.returncode == 46
    assert "--json=/dev/full can't be written: No space left on device" in result.stderr
    with open("/dev/full", "w") as full:
        result = bench(run_main, "input", f"--config={recipe}", stdout=full)
    assert result.returncode == 46
    assert "standard output can't be written: No space left on device" in result.stderr


def test_unknown_benchmark_is_refused(run_main, recipe):
    result = bench(run_main, "inptu", f"--config={recipe}")
    assert result.returncode == 2
    assert "did you mean 'input'?" in result.stderr


def test_report_needs_a_folder(run_main, recipe):
    result = bench(run_main, f"--config={recipe}", "--json=/nowhere/step.json")
    assert result.returncode == 2 and "in a folder that does not exist" in result.stderr
