"""The benchmarks run on any recipe and say what they measure."""

import json
import os
import re
import signal
import time

import jax
import pytest

from flaxcls import build
from flaxcls.config import default
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError
from flaxcls.perf import devices, step
from flaxcls.perf.augmentations import changes_on_host
from flaxcls.perf.figures import Effort
from flaxcls.perf.made_up import made_up
from flaxcls.runtime import sharding

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


@pytest.mark.parametrize(
    ("where", "names"), [("host", ["flip on the host", "rand_augment on the host"]), ("device", [])]
)
def test_augmentations_of_the_host_are_timed_there(recipe, capsys, where, names):
    config = load_recipe(str(recipe), [f"input.policies={where}", "input.mode=stream"]).config
    config.augment = ({"name": "flip"}, {"name": "rand_augment"}, {"name": "mixup"})
    figures = changes_on_host(build.make_experiment(config, build.mesh(config)), rounds=1)
    assert [*figures] == names
    assert all(figure["unit"] == "ms/image" and figure["value"] > 0 for figure in figures.values())
    assert capsys.readouterr().out.count("ms an image on one core of the host") == len(names)


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
    arguments = ("--config.seed=3", "--peak_tflops=0.5", f"--json={report}")
    result = bench(run_main, f"--config={recipe}", *arguments)
    assert result.returncode == 0, result.stderr
    assert len(re.search(r"images/s: (.*)", result.stdout)[1].split(", ")) == 2

    content = json.loads(report.read_text())
    assert content["benchmark"] == "step"
    assert content["flags"] == {
        **{"config": str(recipe), "steps": 3, "rounds": 2, "busy": 0.8},
        **{"fake": False, "peak_tflops": 0.5},
    }
    assert content["config"]["seed"] == 3 and content["config"]["model"]["widths"] == [8]
    assert {"python", "jax", "flax"} <= content["versions"].keys()
    assert content["device"]["kind"] == "cpu" and f"{content['device']['count']} x cpu" in (
        result.stdout
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", content["date"])
    figures = content["figures"]
    rate = figures["rate"]
    assert rate["unit"] == "images/s" and len(rate["rounds"]) == 2
    assert min(rate["rounds"]) <= rate["value"] <= max(rate["rounds"])
    assert f"median {rate['value']:,.0f} images/s" in result.stdout
    # No dispatch and no memory of devices: this is a CPU, and the command says so.
    assert {name: each["unit"] for name, each in figures.items()} == {
        **dict.fromkeys(("reading_data", "initialisation", "compilation"), "s"),
        **dict.fromkeys(("rate", "rate_per_device"), "images/s"),
        **dict.fromkeys(("step", "input_wait", "compute"), "ms"),
        "flops_per_image": "GFLOP",
        "peak_per_device": "TFLOP/s",
        "flop_utilisation": "%",
        "peak_memory_host": "MiB",
    }
    assert "dispatch is not told apart, as on CPUs the loop waits for each step" in result.stdout
    values = {name: each["value"] for name, each in figures.items()}
    assert figures["step"]["rounds"] == pytest.approx([8e3 / each for each in rate["rounds"]])
    assert 0 <= values["input_wait"] < values["step"]
    count = content["device"]["count"]
    assert values["rate_per_device"] == pytest.approx(values["rate"] / count)
    # 192 inputs, 8 units and 10 classes, forward and back, without the inputs' gradient: that is
    # what has to be multiplied and added, and this small network does more beside it.
    least = 2 * (2 * 192 * 8 + 3 * 8 * 10) / 1e9
    assert least < values["flops_per_image"] < 20 * least
    done = 1e9 * values["flops_per_image"] * values["rate"]
    assert values["flop_utilisation"] == pytest.approx(100 * done / (0.5e12 * count))


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


def test_accelerators_have_dispatch_and_a_peak_of_their_own(tiny_config, monkeypatch, capsys):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    experiment = build.make_experiment(tiny_config(), mesh)
    chip = devices.CHIPS["NVIDIA H200"]._replace(peak_tflops=0.25)
    monkeypatch.setitem(devices.CHIPS, "cpu", chip)
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    figures = step.bench_step(experiment, Effort(steps=10, rounds=2))
    assert 0 < figures["dispatch"]["value"] <= figures["compute"]["value"]
    done = 1e9 * figures["flops_per_image"]["value"] * figures["rate"]["value"]
    assert figures["flop_utilisation"]["value"] == pytest.approx(100 * done / 0.25e12)
    assert f"0.25 TFLOP/s a device (bfloat16, {chip.source})" in capsys.readouterr().out


def test_flops_do_not_depend_on_devices_or_accumulation(tiny_config, monkeypatch):
    def flops(count, parts):
        config = tiny_config(gradient_accumulation=parts, batch_size=96, model__widths=(128,))
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        figures = step.bench_step(build.make_experiment(config, mesh), Effort(1, 1))
        return figures["flops_per_image"]["value"]

    one = flops(1, 1)
    assert flops(4, 1) == pytest.approx(one, rel=0.2)  # each device updates all parameters
    assert flops(1, 4) == pytest.approx(one, rel=0.2)
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")  # a loop, not four times the step
    assert flops(1, 4) == pytest.approx(one, rel=0.2)


def test_train_times_the_real_loop_and_leaves_nothing(run_main, recipe, tmp_path):
    report, folder = tmp_path / "train.json", tmp_path / "temporary"
    folder.mkdir()
    result = bench(
        run_main,
        *("train", f"--config={recipe}", f"--json={report}"),
        *("--config.eval.every=4 steps", "--config.checkpoint.every=5 steps"),
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert result.returncode == 0, result.stderr
    assert "step 9/9" in result.stdout and result.stdout.count("eval: accuracy") == 3  # 4, 8, 9
    assert list(folder.iterdir()) == []
    content = json.loads(report.read_text())
    assert content["config"]["duration"] == "9 steps"
    figures = content["figures"]
    rows = figures["rate"]["rounds"]
    assert len(rows) == 4  # after steps 4, 6, 8 and 9
    assert figures["rate_of_the_whole"]["value"] < max(rows)
    shares = [each["value"] for name, each in figures.items() if name.startswith("share_of")]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100)
    seconds = {name: figures[f"seconds_of_{name}"]["value"] for name in ("evaluate", "save")}
    assert all(spent > 0 for spent in seconds.values())
    assert 0 < figures["loop_on_host"]["value"] < 1e6


def test_train_that_is_interrupted_leaves_nothing(start_main, recipe, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = start_main(
        *("train", f"--config={recipe}", "--steps=100000"),
        module="flaxcls.bench",
        env={**os.environ, "TMPDIR": str(folder)},
    )
    until = time.monotonic() + 120
    while not list(folder.glob("*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 42, stderr
    assert list(folder.iterdir()) == []


def test_startup_is_that_of_real_processes_cold_and_warm(run_main, recipe, tmp_path):
    report, folder = tmp_path / "startup.json", tmp_path / "temporary"
    folder.mkdir()
    arguments = ("startup", f"--config={recipe}", "--rounds=1", f"--json={report}")
    env = {**os.environ, "TMPDIR": str(folder)}
    result = run_main(*arguments, module="flaxcls.bench", env=env)
    assert result.returncode == 0, result.stderr
    assert list(folder.iterdir()) == []
    figures = {name: f["value"] for name, f in json.loads(report.read_text())["figures"].items()}
    stages = ("imported", "checked", "read", "initialised", "compiled", "first_step")
    for kind in ("cold", "warm"):
        times = [figures[f"{stage}_{kind}"] for stage in stages]
        assert times == sorted(times) and times[0] > 0
        assert f"{times[-1]:8.2f}" in result.stdout

    def compiling(kind):
        return figures[f"compiled_{kind}"] - figures[f"initialised_{kind}"]

    assert compiling("warm") < compiling("cold")


def test_start_that_fails_says_why(run_main, recipe):
    arguments = ("startup", f"--config={recipe}", "--config.duration=0 steps")
    result = run_main(*arguments, module="flaxcls.bench")
    assert result.returncode == 2
    assert (
        "before its first step: flaxcls: config.duration must be at least a step" in result.stderr
    )


def test_evaluation_is_timed_with_its_input(run_main, recipe, tmp_path):
    report = tmp_path / "eval.json"
    arguments = ("eval", f"--config={recipe}", f"--json={report}", "--config.ema_decay=0.9")
    result = bench(run_main, *arguments)
    assert result.returncode == 0, result.stderr
    assert "fake 'test', 10 images, 2 batches of 8" in result.stdout
    figures = json.loads(report.read_text())["figures"]
    assert len(figures["rate"]["rounds"]) == 2 and figures["first_evaluation"]["value"] > 0


def test_recipe_is_timed_on_made_up_images_of_its_size(run_main, tmp_path):
    report = tmp_path / "step.json"
    small = ("--config.model.widths=(4,)", "--config.batch_size=8", f"--json={report}")
    arguments = ("step", "--config=cifar10_mlp", "--fake", "--config.data.dir=/nowhere", *small)
    result = bench(run_main, *arguments)
    assert result.returncode == 0, result.stderr
    data = json.loads(report.read_text())["config"]["data"]
    assert (data["name"], data["image_shape"], data["num_classes"]) == ("fake", [32, 32, 3], 10)
    result = bench(run_main, "input", "--config=cifar10_mlp", "--fake")
    assert result.returncode == 2
    assert "--fake is for step, train, eval, not for input" in result.stderr


def test_size_of_made_up_images_is_the_last_of_the_recipe():
    config = default()
    config.data.name, config.data.dir, config.crop.name = "imagenet2012", "/nowhere", "resize"
    with pytest.raises(ConfigError, match="--fake needs config.image_size: the images of imagenet"):
        made_up(config)
    config.image_size = (("0 epochs", 16), ("2 epochs", 24))
    made = made_up(config)
    assert made.data.image_shape == (24, 24, 3) and made.data.num_classes == 1000
    assert config.data.name == "imagenet2012"
