"""Commands start anew with malloc asking for huge pages, where Linux gives them on request."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flaxcls.runtime import huge_pages

ROOT = Path(__file__).parent.parent
VARIABLE = "GLIBC_TUNABLES"
ON = "glibc.malloc.hugetlb=1"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not begun, as `restart_with_huge_pages` sees it; the restarts it does."""
    restarts = []
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    monkeypatch.setattr(os, "execv", lambda *arguments: restarts.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "flaxcls.main", "--config=a b.py"])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delitem(sys.modules, "jax")
    return restarts


@pytest.mark.parametrize("own", ["", "glibc.malloc.arena_max=1"])
def test_it_starts_anew_with_the_same_arguments_and_the_users_other_tunables(
    fresh, monkeypatch, own
):
    monkeypatch.setenv(VARIABLE, own)
    huge_pages.restart_with_huge_pages()
    arguments = [sys.executable, "-m", "flaxcls.main", "--config=a b.py"]
    assert fresh == [(sys.executable, arguments)]
    assert os.environ[VARIABLE] == (f"{own}:{ON}" if own else ON)


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_it_does_not_where_the_kernel_does_not_wait_to_be_asked(fresh, setting):
    if setting is None:
        huge_pages._SETTING.unlink()
    else:
        huge_pages._SETTING.write_text(setting)
    huge_pages.restart_with_huge_pages()
    assert fresh == [] and os.environ[VARIABLE] == ""


def test_it_does_not_twice_nor_against_the_users_word(fresh, monkeypatch):
    for chosen in (ON, "glibc.malloc.hugetlb=0"):
        monkeypatch.setenv(VARIABLE, chosen)
        huge_pages.restart_with_huge_pages()
    assert fresh == []


def test_it_does_not_in_a_process_that_works_already_or_can_not_be_started_again(
    fresh, monkeypatch
):
    for change in (
        lambda patch: patch.setitem(sys.modules, "jax", None),
        lambda patch: patch.setattr(sys, "argv", ["-"]),
        lambda patch: patch.setattr(sys, "gettrace", lambda: print),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            huge_pages.restart_with_huge_pages()
    assert fresh == []


def test_a_restart_that_fails_changes_nothing(fresh, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "execv", refused)
    huge_pages.restart_with_huge_pages()


@pytest.mark.skipif(not huge_pages._gives_on_request(), reason="no huge pages on request here")
def test_a_real_command_keeps_its_number_arguments_input_and_exit_code():
    code = (
        "import os, sys; from flaxcls import cli; "
        "cli.run(lambda argv: print(os.getpid(), argv[1:], os.environ['GLIBC_TUNABLES'],"
        " sys.stdin.read()) or 7)"
    )
    environment = {name: os.environ[name] for name in os.environ if name != VARIABLE}
    with subprocess.Popen(
        [sys.executable, "-c", code, "a b", "--c"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        printed, _ = process.communicate("read")
    assert process.returncode == 7
    assert printed == f"{process.pid} ['a b', '--c'] {ON} read\n"
