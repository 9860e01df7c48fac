"""`python -m flaxcls`: what there is, and each command as its own module has it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flaxcls import cli

ROOT = Path(__file__).parent.parent
HELP = """
import runpy, sys
before = {*sys.modules}
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__")
finally:
    print(*{name.partition(".")[0] for name in {*sys.modules} - before}, file=sys.stderr)
"""
# Besides Python's own; the last one comes with yaml.
LIGHT = {"flaxcls", "absl", "ml_collections", "yaml", "cython_runtime"}
OF_PICTURES = {"numpy", "PIL", "cv2", "rich"}  # what their commands have besides


def cpu_seconds(*command):
    """Of a process that ends well; unlike the time on the clock, what runs beside counts little."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_all_commands_are_listed_with_a_line_each(run_main):
    for arguments in ((), ("--help",)):
        result = run_main(*arguments, module="flaxcls")
        assert (result.returncode, result.stderr) == (0, "")
        lines = result.stdout.partition("Commands:\n")[2].splitlines()
        assert [line[:15].strip() for line in lines] == list(cli.COMMANDS)
        assert "  evaluate      Prints the exact metrics of a saved run." in lines
        assert all(line.endswith(".") and len(line) > 30 for line in lines)


def test_list_that_cannot_be_written_is_an_error():
    command = [sys.executable, "-m", "flaxcls"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 46
    assert result.stderr == "flaxcls: standard output can't be written: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("trian --config=digits_cnn", "'trian' is not a command, did you mean 'train'?"),
        (
            "--config=digits_cnn",
            "'--config=digits_cnn' is not a command; known: attack, audit, average, bench, ",
        ),
        ("data", "a command is missing; known: check, prepare, preview"),
        ("data chek", "'chek' is not a command, did you mean 'check'?"),
        ("train", "--config=FILE is missing, such as --config=configs/digits_cnn.py"),
        ("train --confg=x", "Unknown command line flag 'confg'. Did you mean: config ?"),
        ("evaluate", "--run=DIR is missing; it is the folder that training made"),
        ("data check", "--source=NAME-or-PATH is missing (or --config=FILE)"),
        ("crossval", "--config=FILE is missing, such as --config=configs/digits_cnn.py"),
        ("sweep --config=digits_cnn --jobs=0", "flag --jobs=0: 0 is not a positive integer"),
        ("sweep --grid a=1", "--config=FILE is missing, such as --config=configs/digits_cnn.py"),
        ("plan", "--config=FILE is missing, such as --config=configs/digits_cnn.py"),
        ("bench stp", "there is no benchmark 'stp', did you mean 'step'?"),
    ],
)
def test_wrong_command_is_one_sentence_and_exit_code_2(run_main, arguments, sentence):
    result = run_main(*arguments.split(), module="flaxcls")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"flaxcls: {sentence}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_answers_at_once_and_imports_nothing_heavy(start_python, command):
    words = (*command.split(), "--help")
    process = start_python("-c", HELP, "flaxcls", *words)
    stdout, stderr = process.communicate()
    assert process.returncode == 0
    imported = {name for name in stderr.split() if not name.startswith("_")}
    known = LIGHT | OF_PICTURES if command.startswith(("data", "predict")) else LIGHT
    assert imported - {*sys.stdlib_module_names} <= known
    assert "    python -m flaxcls" in stdout or command == "data"
    groups = re.findall(r"^(\S+):$", stdout.partition("\nFlags:\n")[2], re.MULTILINE)
    assert not groups or len(groups) == 2 and groups[1] == "absl.flags"  # after all of its own
    quickest = min(cpu_seconds(sys.executable, "-m", "flaxcls", *words) for _ in range(3))
    assert quickest < 0.5


@pytest.mark.slow
def test_commands_do_what_their_modules_do(run_main, recipe, tmp_path):
    for name in ("tensorflow", "keras", "grain", "pandas", "matplotlib"):  # no training needs them
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} is imported')")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    train = (f"--config={recipe}", "--config.duration=6 steps", f"--workdir={tmp_path}/run")
    result = run_main("train", *train, module="flaxcls", env=environment)
    assert result.returncode == 0 and "Finished after 6 steps" in result.stdout, result.stderr
    one, other = (
        run_main("evaluate", f"--run={tmp_path}/run", module="flaxcls"),
        run_main(f"--run={tmp_path}/run", module="flaxcls.evaluate"),
    )
    assert one.stdout == other.stdout and "/run, step 6, test[:50]: accuracy" in one.stdout


IMPORTED = """
import importlib, pkgutil, sys, ml_collections
before = {*sys.modules}
import flaxcls.config as config
for module in pkgutil.iter_modules(config.__path__, "flaxcls.config."):
    importlib.import_module(module.name)
print(*sorted({*sys.modules} - before))
"""


def test_config_imports_ml_collections_only(start_python):
    process = start_python("-c", IMPORTED)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    ours = ("flaxcls.config", "flaxcls.errors")
    names = [n for n in stdout.split() if n.partition(".")[0] not in sys.stdlib_module_names]
    assert "flaxcls.config.recipes" in names
    assert [n for n in names if not n.startswith(ours)] == ["flaxcls"]
