"""Output that goes away: training continues, and a lost result has an exit code of its own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(module, *arguments, tail, **environment):
    """A command in a shell, with what comes after it there; its own exit code."""
    command = shlex.join([sys.executable, "-m", module, *map(str, arguments)])
    return subprocess.run(
        ["bash", "-c", f"{command} {tail}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_run_whose_output_no_one_reads_finishes_and_evaluation_says_so(recipe, tmp_path):
    for tail in ("2>&- | head -1", ">/dev/full 2>/dev/full"):
        workdir = tmp_path / str(len(tail))
        result = run("flaxcls.main", f"--config={recipe}", f"--workdir={workdir}", tail=tail)
        assert (result.returncode, result.stderr) == (0, ""), tail
        assert (workdir / "summary.json").exists()
    result = run("flaxcls.evaluate", f"--run={workdir}", tail=">/dev/full")
    assert result.returncode == 46
    assert result.stderr == ("flaxcls: standard output can't be written: No space left on device\n")


@pytest.mark.slow
def test_suggested_commands_are_quoted_for_the_shell(recipe, tmp_path):
    workdir = tmp_path / "my \x1b[31mrun's"
    result = run("flaxcls.main", f"--config={recipe}", f"--workdir={workdir}", tail="")
    assert result.returncode == 0 and "\x1b" not in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if "flaxcls.evaluate" in line)
    shown = str(workdir).replace("\x1b", "\\x1b")
    assert shlex.split(line)[1:] == ["python", "-m", "flaxcls.evaluate", f"--run={shown}"]
    result = run("flaxcls.evaluate", f"--run={workdir}", tail="")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{shown}, step 12")


@pytest.mark.parametrize(
    ("tail", "sentence"),
    [
        ("| true", "the reader of standard output has gone: not all of the result was written"),
        (">/dev/full", "standard output can't be written: No space left on device"),
        (">&-", "standard output can't be written: it is closed"),
    ],
)
def test_lost_report_on_data_is_reported_with_a_code_of_its_own(tail, sentence):
    result = run("flaxcls.data", "check", "--source=digits", tail=tail)
    assert result.returncode == 46
    assert result.stderr.splitlines()[2:] == [f"flaxcls: {sentence}"]


def test_letters_and_control_characters_in_the_names_of_classes(tmp_path):
    from PIL import Image

    for name in ("Kätzchen", "\x1b[31mred", "two\nlines"):
        for split in ("train", "test"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), len(name)).save(folder / "a.png")
    result = run("flaxcls.data", "check", f"--source={tmp_path}", tail="", PYTHONIOENCODING="ascii")
    assert "Traceback" not in result.stderr and "\x1b" not in result.stdout
    for name in ("K\\xe4tzchen", "\\x1b[31mred", "two\\nlines"):
        assert name in result.stdout
