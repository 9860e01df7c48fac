"""What a saved run says of pictures: the same as its evaluation, in every format."""

import csv
import io
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import cli, models, predict
from flaxcls import config as configs
from flaxcls.core import losses
from flaxcls.errors import ConfigError, DataError, OutputError
from flaxcls.inference import evaluator, predictor
from flaxcls.inference.predictor import PROBABILITIES, Predictor, make_forward
from flaxcls.runtime import output
from flaxcls.training.train import train_config as train

CLASSES = ("crimson", "green", "sky blue")


def write_picture(path, pixels):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noisy pictures of three colours, in several sizes and formats: 60 to train on, 21 to test."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(81):
        split, label = "train" if number < 60 else "val", number % 3
        pixels = random.integers(0, 240, (10 + number % 7, 10 + number % 5, 3))
        pixels[..., label] += 15
        name = f"{number}.{('png', 'jpg', 'webp')[number % 4 % 3]}"
        write_picture(root / split / CLASSES[label] / name, pixels.astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """The folder of a run on these, with an average of its parameters."""
    config = configs.default()
    config.batch_size, config.duration, config.ema_decay = 16, "24 steps", 0.9
    config.eval.every = config.checkpoint.every = "12 steps"
    config.data.name, config.data.path, config.data.eval_split = "folder", str(pictures), "val"
    config.image_size = 8
    config.model.name, config.model.widths = "dense", (16,)
    config.optimizer.learning_rate = 0.05
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(config, workdir)
    return workdir


@pytest.fixture(autouse=True)
def forget_flags():
    """Every call starts from the defaults, as in a process of its own."""

    def forget():
        for name in predict.FLAGS:
            predict.FLAGS[name].unparse()

    yield forget
    forget()


@pytest.fixture
def command(run, capsys, forget_flags):
    """Runs the command in this process: what it wrote to both outputs, and the exit code."""

    def runner(*arguments):
        forget_flags()
        try:
            code = predict.main(["predict", f"--run={run}", *map(str, arguments)])
        except (ConfigError, DataError) as error:
            code = error.exit_code
        captured = capsys.readouterr()
        return SimpleNamespace(out=captured.out, err=captured.err, code=code)

    return runner


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("weights", ["eval", "ema"])
@pytest.mark.parametrize("checkpoint", ["12", "last"])
def test_predictions_on_the_evaluation_split_are_as_right_as_evaluation_says(
    command, run, pictures, checkpoint, weights
):
    _, _, results = evaluator.evaluate_run(run, checkpoint=checkpoint)
    flags = (f"--checkpoint={checkpoint}", "--ema" if weights == "ema" else "--noema")
    result = command(pictures / "val", "--format=csv", "--batch_size=5", *flags)
    rows = read_csv(result.out)
    right = sum(os.path.basename(os.path.dirname(row["file"])) == row["class_1"] for row in rows)
    assert (len(rows), right / len(rows)) == (21, results[weights]["accuracy"])
    assert 0 < right < 21  # or it would show little
    assert result.code == 0


def test_formats_say_the_same(command, pictures):
    folder = pictures / "val" / "sky blue"
    by_csv = read_csv(command(folder, "--format=csv", "--topk=2").out)
    assert list(by_csv[0]) == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row["file"] for row in by_csv] == sorted(map(str, folder.iterdir()))
    for row in by_csv:
        assert float(row["probability_1"]) >= float(row["probability_2"]) >= 0
        assert {row["class_1"], row["class_2"]} < {*CLASSES}

    lines = command(folder, "--format=jsonl", "--topk=2").out.splitlines()
    for row, found in zip(by_csv, map(json.loads, lines), strict=True):
        assert found["file"] == row["file"]
        assert [entry["class"] for entry in found["predictions"]] == [
            row["class_1"],
            row["class_2"],
        ]
        assert found["predictions"][0]["probability"] == float(row["probability_1"])

    table = [line.split("\t") for line in command(folder, "--topk=1").out.splitlines()]
    assert [line[:2] for line in table] == [[row["file"], row["class_1"]] for row in by_csv]


def test_table_on_a_terminal_names_a_file_once():
    out = io.StringIO()
    write = predict._terminal_table(out, CLASSES, 2)
    write("a[b].png", [("sky blue", 0.75), ("green", 0.25)])
    first, second = out.getvalue().splitlines()
    assert first.split() == ["a[b].png", "sky", "blue", "75.00%"]
    assert second.split() == ["green", "25.00%"] and second.index("green") == first.index("sky")


def test_as_many_classes_as_there_are_add_up_to_one(command, pictures):
    for line in command(pictures / "val", "--format=jsonl").out.splitlines():
        predictions = json.loads(line)["predictions"]
        assert {entry["class"] for entry in predictions} == {*CLASSES}
        assert sum(entry["probability"] for entry in predictions) == pytest.approx(1, abs=1e-5)


def test_files_that_cannot_be_read_are_named_and_the_others_are_there(
    command, pictures, tmp_path, run_main, run
):
    good = sorted((pictures / "val" / "green").iterdir())
    empty, text = tmp_path / "empty.png", tmp_path / "text.jpg"
    empty.write_bytes(b"")
    text.write_text("not a picture")
    short = tmp_path / "short.png"
    short.write_bytes(good[0].read_bytes()[:60])
    files = [good[0], empty, text, good[1], tmp_path / "missing.png", short, good[2]]
    result = run_main(f"--run={run}", *files, "--format=csv", module="flaxcls.predict")
    assert result.returncode == 45
    assert [row["file"] for row in read_csv(result.stdout)] == [str(good[i]) for i in range(3)]
    assert "4 of 7 files could not be read" in result.stderr.splitlines()[-1]
    for file in (empty, text, tmp_path / "missing.png", short):
        assert sum(str(file) in line for line in result.stderr.splitlines()) == 1
    only_broken = command(text, "--format=csv", f"--features={tmp_path / 'f.npz'}")
    assert only_broken.code == 45 and len(only_broken.out.splitlines()) == 1
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize("weights", ["--ema", "--noema"])
def test_features_are_what_an_independent_forward_pass_gives(
    command, run, pictures, tmp_path, saved_arrays, weights
):
    path = tmp_path / "features.npz"
    result = command(pictures / "val", f"--features={path}", "--format=csv", weights)
    stored = np.load(path)
    assert stored["features"].dtype == np.float32
    assert stored["files"].tolist() == [row["file"] for row in read_csv(result.out)]
    assert os.listdir(tmp_path) == ["features.npz"]

    predict_images = Predictor(run)
    images = np.stack([predict_images.read(file) for file in stored["files"]])
    facts = json.loads((run / "config.json").read_text())
    arrays = saved_arrays(run, 24)
    prefix = "ema/params" if weights == "--ema" else "params"
    x = (images / 255 - facts["mean"]) / facts["std"]
    hidden = x.reshape(len(x), -1) @ arrays[f"{prefix}/hidden1/kernel"]
    hidden = np.maximum(hidden + arrays[f"{prefix}/hidden1/bias"], 0)
    np.testing.assert_allclose(stored["features"], hidden, rtol=1e-4, atol=1e-5)
    logits = hidden @ arrays[f"{prefix}/head/kernel"] + arrays[f"{prefix}/head/bias"]
    names = [sorted(CLASSES)[label] for label in logits.argmax(axis=1)]
    assert names == [row["class_1"] for row in read_csv(result.out)]


def test_logits_probabilities_and_features_are_float32():
    network = models.build("digits_cnn", num_classes=3, dtype=jnp.bfloat16)
    variables = models.shapes(network, (8, 8, 3))
    forward = make_forward(network, "softmax_cross_entropy", (0.5,) * 3, (0.2,) * 3)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.uint8)
    predictions = jax.eval_shape(forward, variables, images)
    assert [x.shape for x in predictions] == [(2, 3), (2, 3), (2, 4 * 4 * 64)]
    assert {x.dtype for x in predictions} == {jnp.dtype(jnp.float32)}


def test_features_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "features.npz"
    path.write_bytes(b"before")
    with pytest.raises(DataError), predict.features_file(str(path)) as add:
        add(["a.jpg"], np.ones((1, 4), np.float32))
        raise DataError("stopped half-way")
    assert os.listdir(tmp_path) == ["features.npz"] and path.read_bytes() == b"before"
    with predict.features_file(str(path)) as add:
        add(["a.jpg", "b.jpg"], np.ones((2, 4), np.float32))
        add(["ç.jpg"], np.zeros((1, 4), np.float32))
    stored = np.load(path)
    assert stored["files"].tolist() == ["a.jpg", "b.jpg", "ç.jpg"]
    np.testing.assert_array_equal(stored["features"], np.repeat([1, 1, 0], 4).reshape(3, 4))


def test_any_number_of_images_can_be_classified(run):
    images = np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3)).astype(np.uint8)
    classify = Predictor(run, batch_size=8)
    whole = classify(images)
    assert [array.shape for array in whole] == [(19, 3), (19, 3), (19, 16)]
    for count in (0, 1, 8):
        for part, array in zip(classify(images[:count]), whole, strict=True):
            np.testing.assert_array_equal(part, array[:count])
    with pytest.raises(ValueError, match=r"shape \(N, 8, 8, 3\), got uint8 of \(2, 9, 8, 3\)"):
        classify(np.zeros((2, 9, 8, 3), np.uint8))


def test_folder_of_a_run_is_enough(run, pictures, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoints", moved / "checkpoints")
    content = (run / "config.json").read_text().replace(str(pictures), "/nowhere")
    (moved / "config.json").write_text(content)
    picture = next((pictures / "val" / "green").iterdir())
    before, after = (Predictor(folder) for folder in (run, moved))
    np.testing.assert_array_equal(
        before(before.read(picture)[None]).logits, after(after.read(picture)[None]).logits
    )


def test_runs_on_small_images_take_pictures_of_any_size_and_colour(tiny_config, tmp_path, capsys):
    from PIL import Image

    run = tmp_path / "run"
    train(tiny_config(), run)
    random = np.random.default_rng(1)
    small = random.integers(0, 256, (8, 8)).astype(np.uint8)
    large = random.integers(0, 256, (13, 21, 3)).astype(np.uint8)
    files = [
        write_picture(tmp_path / "small.png", small),
        write_picture(tmp_path / "large.png", large),
    ]
    classify = Predictor(run)
    np.testing.assert_array_equal(classify.read(files[0])[..., 0], small)
    expected = Image.fromarray(large).convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(classify.read(files[1])[..., 0], np.asarray(expected))
    capsys.readouterr()
    assert predict.main(["predict", f"--run={run}", *map(str, files)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("not 8 x 8 pixels are stretched to it") == 1
    assert len(captured.out.splitlines()) == 2 * 5


def test_colour_runs_take_grey_pictures(run, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (9, 9)).astype(np.uint8)
    image = Predictor(run).read(write_picture(tmp_path / "grey.png", grey))
    assert image.shape == (8, 8, 3)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize(
    ("results", "metric", "expected"),
    [
        ({}, "accuracy", "eval"),
        ({"eval": {"accuracy": 0.5}}, "accuracy", "eval"),
        ({"eval": {"accuracy": 0.5}, "ema": {"accuracy": 0.6}}, "accuracy", "ema"),
        ({"eval": {"accuracy": 0.6}, "ema": {"accuracy": 0.6}}, "accuracy", "eval"),
        ({"eval": {"loss": 0.5}, "ema": {"loss": 0.6}}, "loss", "eval"),
        ({"eval": {"loss": 0.7}, "ema": {"loss": 0.6}}, "loss", "ema"),
    ],
)
def test_better_weights_are_the_default(results, metric, expected):
    trained = SimpleNamespace(
        metadata={"progress": {"results": results}},
        experiment=SimpleNamespace(best_metric=metric),
        ema={"params": {}},
    )
    assert predictor.choose_weights(trained, "run", None) == expected
    assert predictor.choose_weights(trained, "run", True) == "ema"
    assert predictor.choose_weights(trained, "run", False) == "eval"
    trained.ema = {}
    with pytest.raises(ConfigError, match="run kept no average of its parameters"):
        predictor.choose_weights(trained, "run", True)


def test_which_weights_were_used_is_told(command, pictures):
    file = next((pictures / "val" / "green").iterdir())
    assert ", averaged parameters, accuracy" in command(file, "--ema").err
    assert "step 12, parameters, accuracy" in command(file, "--noema", "--checkpoint=12").err


def test_every_loss_has_its_probabilities():
    assert PROBABILITIES.keys() == losses.LOSSES.keys()
    logits = jnp.array([[2.0, -1.0, 0.5], [30.0, 29.0, -20.0]])
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    for name in ("softmax_cross_entropy", "focal", "logit_adjusted"):
        np.testing.assert_allclose(PROBABILITIES[name](logits), expected, rtol=1e-5)
    np.testing.assert_allclose(
        PROBABILITIES["sigmoid_cross_entropy"](logits), 1 / (1 + np.exp(-logits)), rtol=1e-5
    )


def test_outputs_trained_to_the_squared_error_become_the_nearest_distribution():
    outputs = jnp.array([[0.2, 0.5, 0.3], [1.3, 1.1, -0.1], [1.2, 0.1, -0.2]])
    expected = [[0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]
    np.testing.assert_allclose(PROBABILITIES["squared_error"](outputs), expected, atol=1e-6)


def test_pictures_are_found_in_folders_sorted(tmp_path):
    for name in ("b/2.jpg", "b/10.JPEG", "a.png", "b-c.gif", "b/d/x.webp", ".hidden.png", "n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "d" / "up").symlink_to(tmp_path)  # a circle
    found = list(cli.find_pictures([str(tmp_path / "n.txt"), str(tmp_path), "missing.png"]))
    names = [os.path.relpath(path, tmp_path) for path in found[1:-1]]
    assert names == ["a.png", "b-c.gif", "b/10.JPEG", "b/2.jpg", "b/d/x.webp"]
    assert (found[0], found[-1]) == (str(tmp_path / "n.txt"), "missing.png")


def test_files_with_strange_names_keep_them(command, pictures, tmp_path):
    source = next((pictures / "val" / "green").iterdir())
    names = ['a, "b".png', "c\td é.png", "-e.png"]
    for name in names:
        (tmp_path / name).write_bytes(source.read_bytes())
    files = [tmp_path / name for name in names]
    assert [row["file"] for row in read_csv(command(*files, "--format=csv").out)] == [
        str(file) for file in files
    ]
    lines = command(*files, "--format=jsonl").out.splitlines()
    assert [json.loads(line)["file"] for line in lines] == [str(file) for file in files]


@pytest.fixture
def strange(pictures, tmp_path):
    """Names of a picture that are several lines, an escape sequence, and no UTF-8."""
    source = next((pictures / "val" / "green").iterdir())
    names = [b"two\nlines.png", b"\x1b[31mred.png", b"\xff.png"]
    files = [os.path.join(tmp_path, os.fsdecode(name)) for name in names]
    for file in files:
        shutil.copy(source, file)
    return files


def test_table_shows_names_in_one_line_without_control_characters(command, strange, monkeypatch):
    names = [f"{os.path.dirname(strange[0])}/{name}" for name in
             ("two\\nlines.png", "\\x1b[31mred.png", "\\xff.png")]  # fmt: skip
    lines = command(*strange, "--topk=1").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == names
    monkeypatch.setattr(output.Guarded, "isatty", lambda self: True)
    for form in ("table", "csv"):
        shown = re.sub(r"\x1b\[[\d;]*m", "", command(*strange, f"--format={form}").out)
        assert "\x1b" not in shown
        for name in names:
            assert os.path.basename(name) in shown


def test_broken_file_is_named_without_control_characters(command, tmp_path):
    file = tmp_path / "\x1b[31mred\n.png"
    file.write_bytes(b"no picture")
    (sentence,) = command(file).err.splitlines()[1:]
    assert "\\x1b[31mred\\n.png is not a readable image" in sentence


def test_csv_and_jsonl_have_the_bytes_of_names_in_any_encoding(run, strange, start_main):
    for form, encoding in (("csv", "utf-8"), ("jsonl", "ascii")):
        process = start_main(
            f"--run={run}", *strange, f"--format={form}", module="flaxcls.predict", text=False,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        out, err = process.communicate()
        assert process.returncode == 0, err
        if form == "csv":
            rows = list(csv.reader(io.StringIO(out.decode("utf-8", "surrogateescape"), "")))[1:]
            assert [row[0] for row in rows] == strange
        else:
            assert [json.loads(line)["file"] for line in out.splitlines()] == strange


def test_reader_that_has_gone_is_told_with_a_code_of_its_own(run, pictures, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(OutputError, match="the reader of standard output has gone") as error:
            predict.main(["predict", f"--run={run}", str(pictures / "val")])
        monkeypatch.undo()
    assert error.value.exit_code == 46
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/config.json"], "--run=DIR is missing"),
        (["--run={run}"], "no pictures are given: name files, or folders"),
        (["--run={run}", "/nowhere/a.png"], "there is no file /nowhere/a.png"),
        (["--run={run}", "{run}/checkpoints"], "there are no pictures in .*/checkpoints"),
        (["--run=/nowhere", "{run}/config.json"], "there is no run in /nowhere: it holds no"),
        (["--run={run}", "{run}/config.json", "--checkpoint=7"], "there is no checkpoint '7'"),
        (["--run={run}", "{run}/config.json", "--format=xml"], "should be one of <table|csv|jsonl"),
        (["--run={run}", "{run}/config.json", "--topk=0"], "topk"),
        (["--run={run}", "{run}/config.json", "--features=/no/f.npz"], "folder that does not"),
        (["--run={run}", "{run}/config.json", "--top=3"], "Unknown command line flag 'top'"),
    ],
)
def test_wrong_usage_is_told_in_one_sentence(run, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        predict.main(["predict", *(text.format(run=run) for text in arguments)])
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_help_is_fast_and_prints_the_columns(run_main):
    result = run_main("--help", module="flaxcls.predict")
    assert result.returncode == 0 and result.seconds < 3
    assert "file,class_1,probability_1,class_2,probability_2,..." in result.stdout
