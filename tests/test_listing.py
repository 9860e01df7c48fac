"""`python -m flaxcls.main --list=...`: all that a config can name, as it can be typed."""

import ast
import dataclasses
import importlib.util
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flaxcls import augment, models
from flaxcls.augment import views
from flaxcls.build import accepted, listing
from flaxcls.config import default
from flaxcls.config.recipes import load_recipe
from flaxcls.core import adversarial, losses, optim, schedules
from flaxcls.data import SOURCES
from flaxcls.data.transform import TRANSFORMS
from flaxcls.errors import ConfigError
from flaxcls.weights.pretrained import PRETRAINED

ROOT = Path(__file__).parent.parent
NAMES = {
    "models": models.MODELS,
    "crops": TRANSFORMS,
    "augmentations": {**augment.AUGMENTATIONS, "normalize": None},
    "optimizers": optim.RULES,
    "schedules": schedules.SCHEDULES,
    "losses": losses.LOSSES,
    "tta": views.VIEWS,
    "adversarial": adversarial.METHODS,
    "data": {**SOURCES, "(any of TFDS)": None},
    "recipes": {path.stem for path in (ROOT / "configs").glob("*.py")},
}
SECTIONS = {"models": "model", "crops": "crop", "optimizers": "optimizer", "losses": "loss"}
SECTIONS |= {"schedules": "schedule", "data": "data", "adversarial": "adversarial"}


def entries(kind):
    return {entry.name: entry for entry in listing.KINDS[kind]()}


@pytest.mark.parametrize("kind", NAMES)
def test_every_name_is_listed_with_a_line_about_it(kind):
    listed = entries(kind)
    assert listed.keys() - {"*"} == {*NAMES[kind]}
    assert all(len(entry.about) > 15 and "\n" not in entry.about for entry in listed.values())


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_option_is_listed_and_can_be_typed_so(kind):
    where, listed = SECTIONS[kind], entries(kind)
    section = accepted.SECTIONS[where]
    for name in NAMES[kind].keys() - {"(any of TFDS)"}:
        fields = [field for entry in ("*", name) for field, _ in listed[entry].options]
        overrides = [field.removeprefix("config.") for field in fields]
        options = [text.partition("=")[0].removeprefix(f"{where}.") for text in overrides]
        assert sorted(options) == sorted({*section.options(name), *section.own})
        config = load_recipe(None, [f"{where}.name={name}", *overrides]).config
        accepted.check(config)
        for option, parameter in section.options(name).items():
            assert config[where][option] == parameter.default
        for option in section.own:
            assert config[where][option] == default()[where][option]


def test_listed_defaults_of_augmentations_are_theirs():
    for name, entry in entries("augmentations").items():
        listed = dict(field.split("=", 1) for field, _ in entry.options)
        augmentation = augment.AUGMENTATIONS.get(name)
        fields = dataclasses.fields(augmentation) if augmentation else ()  # normalize has none
        defaults = {field.name: field.default for field in fields}
        assert {name: ast.literal_eval(value) for name, value in listed.items()} == defaults


def test_what_all_take_is_listed_once_and_variants_say_what_they_fix():
    optimizers = entries("optimizers")
    assert ("config.optimizer.weight_decay=0.0", "float at least 0") in optimizers["*"].options
    assert ("config.optimizer.learning_rate=0.1", "float") in optimizers["*"].options
    assert optimizers["sgd"].options == [
        ("config.optimizer.momentum=0.0", "float at least 0 and below 1"),
        ("config.optimizer.nesterov=False", "bool"),
    ]
    wrn = entries("models")["wrn28_10"]
    assert wrn.about.endswith("pre-activation. Here depth = 28, width = 10.")
    assert [field for field, _ in wrn.options] == [
        "config.model.dropout=0.0",
        "config.model.remat=False",
    ]


def test_recipes_are_described_without_being_run(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name, text in {
        "own": '"""Mine,\nall mine.\n\nRun: accuracy 12.3 % (n = 1,\nno more). Slow."""\n1 / 0\n',
        "long": f'"""Long.\n\nRun: accuracy 12.3 % {"on and " * 30}on.\n"""\n',
        "broken": "def get_config(:\n",
        "digits_cnn": '"""Another."""\n',
    }.items():
        (tmp_path / f"configs/{name}.py").write_text(text)
    (tmp_path / "configs/binary.py").write_bytes(b"\xff\x00")
    monkeypatch.chdir(tmp_path)
    about = {name: entry.about for name, entry in entries("recipes").items()}
    assert about["own"] == "Mine, Run: accuracy 12.3 % (n = 1, no more)."
    assert (about["long"], about["broken"], about["binary"]) == ("Long.", "", "")
    assert about["digits_cnn"] == "Another."  # which is what --config=digits_cnn gets here
    assert "Published: 91.25 % on the original CIFAR-10." in about["cifar10_resnet20"]


def test_lines_stand_alone_where_there_is_no_terminal(run_main):
    result = run_main("--list=crops")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line for line in lines if line[0] == "center_crop"] == [
        [
            "center_crop",
            "Shrinks the shorter side to size / `ratio` and takes the square in the centre.",
        ],
        ["center_crop", "config.crop.ratio=0.875", "float at most 1 and above 0"],
    ]
    assert lines[0][0] == "*" and {len(line) for line in lines} == {2, 3}


@pytest.mark.parametrize("columns", [60, 200])
def test_terminal_shows_all_of_it_whatever_its_width(columns):
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "flaxcls.main", "--list=losses"]
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, stdout=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(master, 4096):
                shown += part
        except OSError:  # Linux says so that the other end is closed
            pass
    os.close(master)
    assert process.returncode == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).splitlines()
    assert "\x1b[1mfocal\x1b[0m" in shown.decode()
    assert all(len(line) <= columns for line in lines)
    letters = sorted("".join("".join(lines).split()))
    texts = [text for entry in entries("losses").values() for text in (entry.name, entry.about)]
    texts += [text for e in entries("losses").values() for option in e.options for text in option]
    assert letters == sorted("".join("".join(texts).split()))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--list=model", "--list=model is not known, did you mean 'models'?"),
        (
            "--list=",
            "--list= is not known; known: adversarial, augmentations, crops, data, losses, ",
        ),
    ],
)
def test_unknown_kind_is_one_sentence(flag, message, run_main):
    result = run_main(flag)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"flaxcls: {message}")
    assert len(result.stderr.splitlines()) == 1
    with pytest.raises(ConfigError):
        listing.write(flag.removeprefix("--list="))


def test_list_that_cannot_be_written_is_an_error():
    command = [sys.executable, "-m", "flaxcls.main", "--list=models"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 46
    assert result.stderr == "flaxcls: standard output can't be written: No space left on device\n"


_spec = importlib.util.spec_from_file_location("update_zoo", ROOT / "tests/golden/update_zoo.py")
update_zoo = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(update_zoo)
ZOO = json.loads(update_zoo.FILE.read_text())


def test_every_network_has_a_row():
    assert list(ZOO) == list(models.MODELS)
    known = {row["weights"] for row in ZOO.values()} - {None}
    assert known == {weights.package for weights in PRETRAINED.values()}
    assert all(row["imports"] for row in ZOO.values() if row["source"] in ("torchvision", "timm"))


def test_page_has_the_figures_of_every_network_that_is_of_a_fixed_size():
    page = (ROOT / "docs/networks.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", page, re.M))
    own = {"vit", "mixer", "swin", "convnext", "wrn"}  # their sizes are the user's
    assert rows == {n: f"{row['parameters']:,}" for n, row in ZOO.items() if n not in own}


@pytest.mark.parametrize("name", ["keras_cnn", "cifar_resnet20", "resnet18", "vit_ti16", "swin_t"])
def test_row_is_what_the_network_has(name):
    row = json.loads(json.dumps(update_zoo.row(name)))
    flops = row.pop("flops"), ZOO[name]["flops"]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)  # XLA's counting may change a little
    assert row == {key: value for key, value in ZOO[name].items() if key != "flops"}


@pytest.mark.parametrize(
    ("name", "macs"),
    # Published as multiplications with additions: torchvision's documentation and the papers.
    [
        ("resnet50", 4.09e9),
        ("resnext50_32x4d", 4.23e9),
        ("densenet121", 2.83e9),
        ("efficientnet_b0", 0.39e9),
        ("mobilenet_v3_large", 0.22e9),
        ("convnext_tiny", 4.46e9),
        ("vgg16", 15.47e9),
        ("cifar_resnet20", 0.041e9),
    ],
)
def test_operations_are_twice_the_published_multiplications(name, macs):
    assert ZOO[name]["flops"] == pytest.approx(2 * macs, rel=0.1)  # XLA leaves out what is padded


def test_networks_are_a_table_on_a_terminal_and_rows_elsewhere(run_main):
    lines = [line.split("\t") for line in run_main("--list=models").stdout.splitlines()]
    rows = [line[1:] for line in lines if line[0] == "efficientnet_lite0" and len(line) == 7]
    assert rows == [["4.65 M", rows[0][1], "224x224x3", "1000", "timm", "known"]]
    assert float(rows[0][1]) == pytest.approx(ZOO["efficientnet_lite0"]["flops"] / 1e9, rel=0.01)
    out = io.StringIO()
    listing._print(list(listing.KINDS["models"]()), Console(file=out, width=120, highlight=False))
    table = out.getvalue().partition("\n\n")[0].splitlines()
    columns = ["parameters", "GFLOPs", "input", "classes", "source", "weights"]
    assert table[0].split() == ["name", *columns]
    assert len(table) == 1 + len(models.MODELS)
