"""Names that are safe to print, and printing that can't fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from flaxcls.runtime.output import printable

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Größe 2.jpg", "Größe 2.jpg"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m", "\\x9b31m"),  # the same escape sequence in one character
        ("gpj.\u202etac", "gpj.\\u202etac"),  # would be shown as cat.jpg
        ("\udcff.jpg", "\\xff.jpg"),  # a byte that is not UTF-8, as Python has it
        ("half \ud800", "half \\ud800"),
        (Path("a") / "b", "a/b"),
    ],
)
def test_name_is_one_line_without_control_characters(name, expected):
    assert printable(name) == expected


SAY = "from flaxcls.runtime.output import say\nfor n in range(10000): say(f'line {n}')\n"


def run(code, tail, **environment):
    command = f'set -o pipefail; {sys.executable} -c "$CODE" {tail}'
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={"CODE": code, "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("tail", ["| head -1", "> /dev/full", ">&-"])
def test_saying_something_to_nobody_is_no_error(tail):
    result = run(SAY + "import os; os.write(2, b'went on')", tail)
    assert (result.returncode, result.stderr) == (0, "went on")


def test_letter_that_the_encoding_lacks_is_escaped():
    result = run(
        "from flaxcls.runtime.output import say\nsay('Kätzchen \U0001f431')",
        "",
        PYTHONIOENCODING="ascii",
    )
    assert result.stdout == "K\\xe4tzchen \\U0001f431\n"


@pytest.mark.parametrize(
    ("tail", "sentence"),
    [
        ("| head -1", "the reader of standard output has gone"),
        ("> /dev/full", "standard output can't be written: No space left on device"),
        (">&-", "standard output can't be written: it is closed"),
    ],
)
def test_result_that_is_lost_is_an_error(tail, sentence):
    code = (
        "import sys\n"
        "from flaxcls.errors import FlaxclsError\n"
        "from flaxcls.runtime.output import write_result\n"
        "try:\n"
        "    for n in range(10000): write_result(f'line {n}')\n"
        "except FlaxclsError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    result = run(code, tail)
    assert result.returncode == 46
    assert result.stderr.startswith(sentence) and len(result.stderr.splitlines()) == 1


def test_lines_are_written_again_when_a_full_disk_has_room(tmp_path):
    code = (
        "import os, sys\n"
        "from flaxcls.runtime.output import say\n"
        "with open(sys.argv[1], 'wb', buffering=0) as ballast:\n"
        "    try:\n"
        "        while ballast.write(bytes(4096)): pass\n"
        "    except OSError: pass\n"
        "say('x' * 100)\n"
        "os.remove(sys.argv[1])\n"
        "say('told')\n"
    )
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    program = f'{sys.executable} -c "$CODE" ballast > log; echo $?; cat log'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && cd {tmp_path} && {program}"],
        env={"CODE": code, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.splitlines()[0] == "0" and result.stdout.endswith("told\n")
    assert result.stderr == ""


def test_no_file_takes_the_place_of_a_standard_stream_that_is_closed():
    code = "from flaxcls import cli; cli.run(lambda argv: print(open('/dev/null').fileno() > 2))"
    result = run(code, "2>&-")
    assert (result.returncode, result.stdout) == (0, "True\n")


@pytest.mark.parametrize("tail", ["> /dev/full", "| true", ">&-"])
def test_what_others_print_does_not_change_the_exit_code(tail):
    code = "import time; from flaxcls import cli; cli.run(lambda argv: print(3) or time.sleep(0.2))"
    result = run(code, tail)
    assert (result.returncode, result.stderr) == (0, "")
