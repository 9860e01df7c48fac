"""Mistakes of users: exit code 2 and one line, before data are read or anything is compiled."""

import sys

import pytest

from flaxcls import main
from flaxcls.training import program

CASES = {
    "unknown key": (["--config.bath_size=3"], "did you mean 'batch_size'?"),
    "unknown key in a section": (["--config.optimizer.momentun=0.9"], "did you mean 'momentum'?"),
    "unused option of the model": (
        ["--config.model.depth=3"],
        "config.model.depth is not used by dense",
    ),
    "dropout of a resnet": (
        [
            "--config.model.name=resnet18",
            "--config.model.widths=None",
            "--config.model.dropout=0.1",
        ],
        "config.model.dropout is not used by resnet18",
    ),
    "unused option of the optimizer": (
        ["--config.optimizer.b1=0.9"],
        "config.optimizer.b1 is not used",
    ),
    "unused option of the schedule": (
        ["--config.schedule.power=2"],
        "config.schedule.power is not used",
    ),
    "unused option of the loss": (
        ["--config.loss.gamma=2"],
        "config.loss.gamma is not used by softmax",
    ),
    "unused option of the data": (["--config.data.num_classes=3"], "is not used by digits"),
    "text for a number": (["--config.batch_size=abc"], "config.batch_size must be int, got 'abc'"),
    "none for a number": (["--config.batch_size=None"], "config.batch_size must be int, got None"),
    "none for a name": (["--config.model.name=None"], "config.model.name must be str, got None"),
    "wrong type of an option": (["--config.model.dropout=a"], "config.model.dropout must be float"),
    "wrong type of a regex list": (
        ["--config.optimizer.weight_decay_factors=3"],
        "config.optimizer.weight_decay_factors must be",
    ),
    "batch of zero": (["--config.batch_size=0"], "config.batch_size must be at least 1, got 0"),
    "BatchNorm in groups that do not divide the batch": (
        ["--config.model.batch_norm_group=7"],
        "batch_norm_group must be 'global' or a divisor of config.batch_size (divided by "
        "config.gradient_accumulation), ",
    ),
    "BatchNorm in groups of nothing": (
        ["--config.model.batch_norm_group=0"],
        "batch_norm_group must be 'global' or a divisor of config.batch_size",
    ),
    "BatchNorm in some word": (
        ["--config.model.batch_norm_group=local"],
        "batch_norm_group must be 'global' or a divisor of config.batch_size",
    ),
    "no step in a dispatch": (
        ["--config.steps_per_dispatch=0"],
        "config.steps_per_dispatch must be at least 1, got 0",
    ),
    "negative seed": (
        ["--config.seed=-1"],
        "config.seed must be at least 0 and below 2**64, got -1",
    ),
    "negative learning rate": (
        ["--config.optimizer.learning_rate=-1"],
        "config.optimizer.learning_rate must be a number of at least 0, got -1",
    ),
    "negative weight decay": (["--config.optimizer.weight_decay=-1"], "weight_decay must be"),
    "momentum above 1": (["--config.optimizer.momentum=1.5"], "momentum must be float at least 0"),
    "dropout above 1": (["--config.model.dropout=1.5"], "dropout must be float at least 0"),
    "smoothing above 1": (["--config.loss.label_smoothing=1.5"], "label_smoothing must be float"),
    "average above 1": (
        ["--config.ema_decay=1.5"],
        "config.ema_decay must be at least 0 and below 1",
    ),
    "keep nothing": (["--config.checkpoint.keep=0"], "config.checkpoint.keep must be at least 1"),
    "unknown best metric": (
        ["--config.checkpoint.best_metric=f1"],
        "config.checkpoint.best_metric",
    ),
    "top 5 of 10 classes": (
        ["--config.checkpoint.best_metric=accuracy_top5"],
        "more than 10 classes",
    ),
    "unknown dtype": (["--config.model.dtype=float8"], "config.model.dtype must be"),
    "batch and devices": (["--config.batch_size=20"], "multiple of the 8 devices, got 20"),
    "batch and accumulation": (
        ["--config.gradient_accumulation=3"],
        "config.gradient_accumulation",
    ),
    "part of a batch and devices": (
        ["--config.gradient_accumulation=4"],
        "multiple of the 8 devices",
    ),
    "fsdp and devices": (["--config.mesh.fsdp=3"], "config.mesh.fsdp must divide"),
    "no devices": (["--config.mesh.cpu_devices=0"], "config.mesh.cpu_devices must be at least 1"),
    "image too small": (
        ["--config.model.name=keras_cnn", "--config.model.widths=None"],
        "keras_cnn needs images of at least 18x18 pixels, got 8x8",
    ),
    "unknown split": (
        ["--config.data.eval_split=validation"],
        "'validation'; there is train, test",
    ),
    "empty split": (["--config.data.train_split=train[:0]"], "split 'train[:0]' is empty"),
    "malformed split": (["--config.data.train_split=train[:x]"], "split 'train[:x]'"),
    "no augmentation": (
        ['--config.augment=({"name": "flap"},)'],
        "config.augment[0].name is 'flap', which is not known, did you mean 'flip'?",
    ),
    "option of an augmentation": (
        ['--config.augment=({"name": "pad_crop", "pading": 1},)'],
        "config.augment[0].pading is not used by pad_crop, did you mean 'padding'?",
    ),
    "range of an augmentation": (
        ['--config.augment=({"name": "pad_crop", "padding": -1},)'],
        "config.augment[0].padding must be int at least 0",
    ),
    "augmentation that is a number": (["--config.augment=5"], "config.augment must be a list"),
    "augmentation that is a name": (["--config.augment=flip"], "config.augment must be a list"),
    "unknown optimizer": (["--config.optimizer.name=adm"], "did you mean 'adam'?"),
    "unknown schedule": (["--config.schedule.name=cosin"], "did you mean 'cosine'?"),
    "unknown loss": (["--config.loss.name=focl"], "did you mean 'focal'?"),
    "unknown model": (["--config.model.name=resnet5"], "did you mean 'resnet50'?"),
    "unknown data": (["--config.data.name=cifar11"], "unknown data set 'cifar11'"),
    "unknown data with options": (
        ["--config.data.name=cifar11", "--config.data.path=x"],
        "unknown data set 'cifar11'",
    ),
    "folder as a list": (
        ["--config.data.name=list", "--config.data.path=configs"],
        "but configs is a folder",
    ),
    "duration without a unit": (["--config.duration=12"], "config.duration: a duration is"),
    "duration of nothing": (
        ["--config.duration=0 steps"],
        "config.duration must be at least a step",
    ),
    "duration in time": (["--config.duration=3 hours"], "config.duration: '3 hours' is a time"),
    "interval without a unit": (["--config.eval.every=5"], "config.eval.every: a duration is"),
    "interval of nothing": (
        ["--config.log_every=0 steps"],
        "config.log_every must be at least a step",
    ),
    "warm-up without a unit": (
        ["--config.schedule.warmup=5"],
        "config.schedule.warmup must be str or None for cosine, got 5",
    ),
    "class weights": (["--config.loss.class_weights=(1, 2)"], "config.loss.class_weights must be"),
    "bad regular expression": (
        ["--config.optimizer.no_weight_decay=("],
        "`no_weight_decay` is not",
    ),
    "regex without a match": (
        ["--config.optimizer.learning_rate_factors=(('nothing', 2.0),)"],
        "`learning_rate_factors`",
    ),
    "beyond what threads can wait": (
        ["--config.hang_after=1e300 hours"],
        "config.hang_after must be at most 10000 hours, got '1e300 hours'",
    ),
    "a million devices": (
        ["--config.mesh.cpu_devices=1000000"],
        "config.mesh.cpu_devices must be at most 1024, got 1000000",
    ),
    "port that is no number": (
        ["--coordinator_address=localhost:abc", "--num_processes=1", "--process_id=0"],
        "--coordinator_address must be HOST:PORT, got 'localhost:abc'",
    ),
    "empty name of a recipe": (["--config="], "--config=FILE is missing, such as"),
    "unknown flag": (["--wrkdir=x"], "'wrkdir'"),
    "no flag": (["extra"], "'extra' is not a flag; flags are written --name=value"),
}


@pytest.fixture
def fails(monkeypatch, capfd, tmp_path):
    """Runs the command inside this process, without what is slow; returns its single line."""

    class Slow(Exception):
        pass

    def too_late(*arguments):
        raise Slow("the mistake was not found before the data were read")

    def run(*arguments):
        for name in main.FLAGS:
            main.FLAGS[name].unparse()
        monkeypatch.setattr(program.Program, "__init__", too_late)
        monkeypatch.setattr(
            sys, "argv", ["main", f"--workdir={tmp_path / 'run'}", *map(str, arguments)]
        )
        with pytest.raises(SystemExit) as stop:
            main.cli.run(main.main)
        stdout, stderr = capfd.readouterr()
        assert stop.value.code == 2, stderr
        assert len(stderr.splitlines()) == 1 and stderr.startswith("flaxcls: "), stderr
        assert len(stderr) < 400
        assert not stdout and not (tmp_path / "run").exists()
        return stderr

    return run


@pytest.mark.parametrize("case", CASES)
def test_mistake_is_told_in_one_line_with_exit_code_2(fails, recipe, case):
    arguments, message = CASES[case]
    assert message in fails(f"--config={recipe}", *arguments)


def test_missing_config_is_told_in_one_line(fails):
    assert "--config=FILE is missing" in fails()


def test_recipe_that_is_not_there_is_told_in_one_line(fails, tmp_path):
    assert "there is no config file" in fails(f"--config={tmp_path / 'nothing.py'}")


def test_other_config_for_a_run_is_told_with_the_field(fails, recipe, tmp_path, run_main):
    run = tmp_path / "first"
    arguments = ["--config.duration=1 steps"]
    assert run_main(f"--config={recipe}", f"--workdir={run}", *arguments).returncode == 0
    line = fails(
        f"--config={recipe}", f"--workdir={run}", "--config.optimizer.momentum=0.8", *arguments
    )
    assert "config.optimizer.momentum = 0.9, got 0.8; give another --workdir" in line


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["--config.bath_size=3"], 3),
        (["--config.data.eval_split=validation"], 10),
        (["--config.model.name=resnet5"], 10),
    ],
)
def test_mistake_ends_a_real_process_quickly(run_main, recipe, arguments, seconds):
    result = run_main(f"--config={recipe}", *arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("flaxcls: ")
    assert result.seconds < seconds


def test_evaluating_nothing_is_told_in_one_line(run_main, tmp_path):
    for arguments, message in (
        ([], "--run=DIR is missing"),
        ([f"--run={tmp_path}"], "there is no run in"),
    ):
        result = run_main(*arguments, module="flaxcls.evaluate")
        assert result.returncode == 2
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
