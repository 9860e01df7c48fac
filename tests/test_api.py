"""What `import flaxcls` offers, and the page that says so."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flaxcls
from flaxcls.errors import ConfigError, DataError, FlaxclsError

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_python(code, folder, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_code_of_the_page_runs_as_it_says(tmp_path):
    """One process for all of it, as a notebook; an error that is announced is expected."""
    blocks = FENCE.findall((ROOT / "docs" / "python.md").read_text())
    program = ["page = {'__name__': 'page'}"]
    for number, (kind, text) in enumerate(blocks):
        if kind != "python":
            continue
        after, said = (blocks + [("", "")])[number + 1]
        run = f"exec(compile({text!r}, 'block {number}', 'exec'), page)"
        if after == "error":
            run = (
                f"try:\n    {run}\nexcept Exception as error:\n"
                f"    said = f'{{type(error).__name__}}: {{error}}'\n"
                f"    assert said.startswith({said.strip()!r}), said\n"
                f"else:\n    raise SystemExit('block {number} was to fail')"
            )
        program.append(run)
    result = run_python("\n".join(program), tmp_path, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d\d\.\d% of 360 test images$", result.stdout, re.MULTILINE)
    assert "epoch" in result.stdout  # progress is seen


def test_import_is_instant_and_lists_what_there_is():
    code = (
        "import sys, flaxcls\n"
        "assert not {'jax', 'numpy', 'ml_collections'} & sys.modules.keys()\n"
        "assert set(flaxcls.__all__) <= set(dir(flaxcls))\n"
        "flaxcls.default_config, flaxcls.train\n"
        "try:\n    flaxcls.tran\nexcept AttributeError as error:\n    print(error)\n"
    )
    result = run_python(code, ROOT)
    assert result.returncode == 0, result.stderr
    assert "no attribute 'tran'" in result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on small made-up pictures."""
    folder = tmp_path_factory.mktemp("api") / "run"
    config = fake_config()
    return folder, flaxcls.train(config, folder)


def fake_config():
    config = flaxcls.default_config()
    config.batch_size, config.duration, config.log_every = 16, "12 steps", "3 steps"
    config.eval.every = config.checkpoint.every = "6 steps"
    config.data.name, config.data.image_shape, config.data.num_classes = "fake", (8, 10, 3), 4
    config.data.num_examples = 96
    config.model.name, config.model.widths = "dense", (16,)
    return config


def test_second_call_returns_the_summary_and_a_third_makes_it_longer(run):
    folder, summary = run
    assert flaxcls.train(fake_config(), folder) == summary
    assert summary["workdir"] == str(folder)
    saved = json.loads((folder / "summary.json").read_text())
    assert saved == {name: value for name, value in summary.items() if name != "workdir"}


def test_evaluate_gives_the_metrics_of_the_summary(run):
    folder, summary = run
    results = flaxcls.evaluate(folder)
    assert results == {"step": 12, "split": "test", "eval": summary["eval"]}


@pytest.mark.parametrize(
    "make",
    [
        lambda pixels, folder: pixels,
        lambda pixels, folder: Image.fromarray(pixels),
        lambda pixels, folder: Image.fromarray(pixels).convert("RGBA"),
        lambda pixels, folder: str(folder / "p.png"),
        lambda pixels, folder: folder / "p.png",
    ],
)
def test_paths_arrays_and_pil_images_are_the_same_picture(run, tmp_path, make):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    predictor = flaxcls.load(run[0])
    expected = predictor(pixels[None])
    prediction = predictor.predict(make(pixels, tmp_path))
    best = int(expected.logits[0].argmax())
    assert prediction.name == f"class_{best}" == next(iter(prediction.probabilities))
    assert prediction.probability == max(prediction.probabilities.values())
    for label, name in enumerate(predictor.class_names):
        assert prediction.probabilities[name] == pytest.approx(
            expected.probabilities[0, label], abs=1e-6
        )


def test_pictures_of_any_size_shape_and_mode_are_taken(run):
    predictor = flaxcls.load(run[0], batch_size=3)
    grey = np.zeros((30, 20), np.uint8)
    pictures = [grey, grey[..., None], np.zeros((5, 5, 4), np.uint8)]
    pictures += [Image.new(mode, (9, 7)) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA")]
    predictions = predictor.predict(pictures)
    assert len(predictions) == len(pictures) and predictions[0] == predictions[1]
    assert predictor.predict([]) == []


@pytest.mark.parametrize(
    "picture", [np.zeros((8, 10, 3)), np.zeros((8, 10, 2), np.uint8), np.zeros(3, np.uint8), 7]
)
def test_what_is_no_picture_is_refused(run, picture):
    with pytest.raises(ValueError, match="a picture must be a path, a PIL image or a uint8 array"):
        flaxcls.load(run[0]).predict([picture])


def test_file_that_can_not_be_read_is_named(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="broken.jpg"):
        flaxcls.load(run[0]).predict(tmp_path / "broken.jpg")


def test_hooks_see_every_row(tmp_path):
    logged, evaluated = [], []
    config = fake_config()
    flaxcls.train(config, tmp_path / "run", on_log=logged.append, on_evaluation=evaluated.append)
    rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    rows = list(rows)
    trained = [row for row in rows if "train" in row]
    assert [row["step"] for row in logged] == [row["step"] for row in trained] == [3, 6, 9, 12]
    for row, written in zip(logged, trained, strict=True):
        assert row["loss"] == written["train"]["loss"] and row["images_per_second"] > 0
        assert row["learning_rate"] == written["train"]["learning_rate"]
    assert [row["eval"] for row in evaluated] == [row["eval"] for row in rows if "eval" in row]


def test_hook_stops_a_run_that_the_next_call_resumes_bitwise(tmp_path):
    def stop(row):
        if row["step"] == 6:
            raise flaxcls.StopTraining

    summary = flaxcls.train(fake_config(), tmp_path / "run", on_log=stop)
    assert not summary["finished"] and summary["step"] == 6
    resumed = flaxcls.train(fake_config(), tmp_path / "run")
    assert resumed["finished"] and resumed["step"] == 12
    flaxcls.train(fake_config(), tmp_path / "whole")
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("hook", ["on_log", "on_evaluation"])
def test_error_of_a_hook_is_the_users_and_comes_after_saving(tmp_path, hook):
    def fail(row):
        raise ZeroDivisionError(row["step"])

    with pytest.raises(ZeroDivisionError) as error:
        flaxcls.train(fake_config(), tmp_path / "run", **{hook: fail})
    step = {"on_log": 3, "on_evaluation": 6}[hook]
    assert error.value.args == (step,)
    assert (tmp_path / "run/checkpoints" / str(step)).is_dir()
    assert flaxcls.train(fake_config(), tmp_path / "run")["finished"]


def test_training_in_a_thread_works(tmp_path):
    """As in notebooks and servers; there Python takes no handlers of signals."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(flaxcls.train(fake_config(), tmp_path / "run"))
    )
    thread.start()
    thread.join(120)
    assert results and results[0]["finished"]


def test_errors_are_exceptions_with_a_sentence(tmp_path):
    config = fake_config()
    config.model.widht = 3
    with pytest.raises(ConfigError, match="config.model.widht is not used by dense, did you mean"):
        flaxcls.train(config, tmp_path)
    with pytest.raises(ConfigError, match="`overrides` are for a recipe"):
        flaxcls.train(fake_config(), tmp_path, overrides={"seed": 1})
    with pytest.raises(FlaxclsError, match="there is no config file digits_cn, did you mean"):
        flaxcls.train("digits_cn", tmp_path)
    with pytest.raises(ConfigError, match="there is no run in"):
        flaxcls.load(tmp_path / "nothing")


def test_overrides_are_those_of_the_command_line():
    for overrides in (
        {"batch_size": 32, "optimizer.learning_rate": 0.25, "duration": "3 epochs"},
        ["batch_size=32", "optimizer.learning_rate=0.25", "duration=3 epochs"],
    ):
        config = flaxcls.load_config("digits_mlp", overrides)
        assert (config.batch_size, config.duration) == (32, "3 epochs")
        assert config.optimizer.learning_rate == 0.25
    assert flaxcls.load_config() == flaxcls.default_config()


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_leaves_the_process_alive(tmp_path):
    code = (
        "import flaxcls\n"
        "try:\n"
        "    flaxcls.train('digits_cnn', 'run', overrides={'log_every': '1 steps', "
        "'duration': '999 epochs'})\n"
        "except flaxcls.Interrupted as error:\n"
        "    print('saved:', error)\n"
        "summary = flaxcls.train('digits_cnn', 'other', overrides={'duration': '1 epochs'})\n"
        "print('alive', summary['step'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "step 5/" in line:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            break
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert re.search(r"^saved: stopped after step \d+ of", output, re.MULTILINE)
    assert "alive 22" in output or "alive 23" in output
