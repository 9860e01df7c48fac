"""What a run survives besides its own end: broken files, full disks, steps that hang or explode."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest

SHORT = ("--config.duration=20 steps", "--config.checkpoint.keep=3")


@pytest.fixture(scope="module")
def short(everything, tmp_path_factory):
    """The folder of an undisturbed run of 20 steps, with the checkpoints of the last three."""
    folder = tmp_path_factory.mktemp("short") / "run"
    command = [sys.executable, "-m", "flaxcls.main", "--noreport", f"--config={everything}", *SHORT]
    subprocess.run([*command, f"--workdir={folder}"], check=True)
    return folder


def flip_a_bit(checkpoint):
    path = max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def truncate(checkpoint):
    path = max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)
    return path.name


def remove_a_file(checkpoint):
    path = max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.unlink()
    return path.name


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    return "empty"


def link_elsewhere(checkpoint):
    path = max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    path.rename(checkpoint.parent.parent / "elsewhere")
    path.symlink_to(checkpoint.parent.parent / "elsewhere")
    return path.name


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in (flip_a_bit, empty)),
        *(
            pytest.param(damage, marks=pytest.mark.torture)  # as in tests/test_checkpoint.py
            for damage in (truncate, remove_a_file, link_elsewhere)
        ),
    ],
)
def test_damaged_checkpoint_is_named_and_quarantined_and_the_run_ends_bitwise_the_same(
    tmp_path, everything, short, run_main, run_folder, saved_arrays, assert_same_arrays, damage
):
    run, before = run_folder(tmp_path / "run"), run_folder(short)
    shutil.copytree(short, run.folder)
    (run.folder / "summary.json").unlink()
    newest = max(run.steps())
    name = damage(run.folder / "checkpoints" / str(newest))
    result = run_main(f"--config={everything}", *SHORT, f"--workdir={run.folder}")
    assert result.returncode == 0, result.stderr
    assert re.search(
        rf"checkpoint of step {newest} is damaged: .*{name}.*quarantine", result.stdout
    )
    assert (run.folder / "quarantine" / str(newest)).exists()
    assert run.log() == before.log()
    for step in before.steps():
        assert_same_arrays(saved_arrays(run.folder, step), saved_arrays(before.folder, step))
    print(f"RECOVERY {damage.__name__}: the whole restart and a step took {result.seconds:.1f} s")


@pytest.mark.slow
def test_run_all_of_whose_checkpoints_are_damaged_restarts_from_scratch_and_ends_the_same(
    tmp_path, everything, short, run_main, run_folder
):
    run = run_folder(tmp_path / "run")
    shutil.copytree(short, run.folder)
    (run.folder / "summary.json").unlink()
    for step in run.steps():
        flip_a_bit(run.folder / "checkpoints" / str(step))
    result = run_main(f"--config={everything}", *SHORT, f"--workdir={run.folder}")
    assert result.returncode == 0, result.stderr
    assert "no checkpoint is left: the run starts from scratch" in result.stdout
    assert run.log() == run_folder(short).log()


def file_size_limit(process, size):
    """RLIMIT_FSIZE stands for a full disk: what is written beyond it fails."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


LONG = (
    "--config.duration=20000 steps",
    "--config.log_every=20 steps",
    "--config.model.widths=(256,)",
)
UNLIMITED = resource.RLIM_INFINITY


def lines_of(process, path):
    """Starts noting what a process says on standard output; the lines so far."""
    return lambda: path.read_text().splitlines()


@pytest.mark.slow
def test_full_disk_is_reported_and_training_continues_until_there_is_room_again(
    tmp_path, recipe, start_main, run_folder, wait_until
):
    run, output = run_folder(tmp_path / "run"), tmp_path / "output"
    arguments = [f"--config={recipe}", *LONG, "--config.checkpoint.every=100 steps"]
    with output.open("w") as stdout:
        process = start_main(*arguments, f"--workdir={run.folder}", stdout=stdout)
    assert wait_until(process, run.steps)
    file_size_limit(process, 2**16)
    assert wait_until(process, lambda: "not saved" in output.read_text())
    kept = run.steps()
    assert kept, "the previous checkpoint is never lost"
    file_size_limit(process, UNLIMITED)
    began = time.perf_counter()
    assert wait_until(process, lambda: max(run.steps(), default=0) > max(kept))
    print(f"RECOVERY full disk: saved again after {time.perf_counter() - began:.1f} s")
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 42, stderr
    (sentence,) = {
        re.sub(r"\d+", "N", line) for line in output.read_text().splitlines() if "not saved" in line
    }
    assert sentence.endswith("training continues until the next one is due"), sentence
    assert "Traceback" not in output.read_text() + stderr
    assert not run.unfinished()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path):
    """Leaves not a byte on a disk, whatever has become free since the last time."""
    with path.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(2**10)):
                pass
        except OSError:
            return


@pytest.mark.slow
def test_disk_without_a_byte_left_costs_no_row_of_the_log(
    small_disk, tmp_path, recipe, start_main, run_main, run_folder, wait_until, stopped_step
):
    run, output = run_folder(small_disk / "run"), tmp_path / "output"
    arguments = [f"--config={recipe}", *LONG, "--config.checkpoint.every=100 steps"]
    with output.open("w") as stdout:
        process = start_main(*arguments, f"--workdir={run.folder}", stdout=stdout)
    assert wait_until(process, run.steps)

    def said(text):
        fill(small_disk / "ballast")
        return re.search(text, output.read_text())

    assert wait_until(process, lambda: said("its rows are kept"))
    assert wait_until(process, lambda: said("checkpoint of step .* not saved"))
    kept = run.steps()
    (small_disk / "ballast").unlink()
    assert wait_until(process, lambda: max(run.steps(), default=0) > max(kept))
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 42 and "Traceback" not in stderr + output.read_text(), stderr
    step = stopped_step(stderr)
    rows = [row[0] for row in run.rows() if row[1] == "train"]
    assert rows == sorted({*range(20, step + 1, 20), *range(6, step + 1, 6)} & set(rows))
    assert set(range(20, step + 1, 20)) <= set(rows)


@pytest.mark.slow
def test_full_disk_ends_the_run_where_the_config_says_so_or_the_state_would_be_lost(
    tmp_path, recipe, start_main, run_folder, wait_until
):
    for name, option in (("stop", ["--config.checkpoint.on_error=stop"]), ("last", [])):
        run = run_folder(tmp_path / name)
        arguments = [f"--config={recipe}", *LONG, "--config.checkpoint.every=100 steps", *option]
        process = start_main(*arguments, f"--workdir={run.folder}")
        assert wait_until(process, run.steps)
        file_size_limit(process, 2**16)
        if not option:
            process.terminate()
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1, stderr
        assert re.match(r"flaxcls: checkpoint of step \d+ not saved: .*\n$", stderr), stderr
        assert run.steps() and not (run.folder / "summary.json").exists()


INJECT = """
from flaxcls.training import program
update = program.Program.update


def injected(self, state, batch, calls=[0]):
    calls[0] += 1
    if calls[0] == 5:
        {fault}
    return update(self, state, batch)


program.Program.update = injected
"""


@pytest.mark.slow
def test_step_that_hangs_ends_the_run_with_44_and_every_threads_stack(
    tmp_path, recipe, run_main, run_folder
):
    hanging = tmp_path / "hanging.py"
    hanging.write_text(recipe.read_text() + INJECT.format(fault="import time; time.sleep(600)"))
    run = run_folder(tmp_path / "run")
    arguments = ["--config.checkpoint.every=2 steps", f"--workdir={run.folder}"]
    result = run_main(f"--config={hanging}", "--config.hang_after=5 seconds", *arguments)
    assert result.returncode == 44, result.stderr
    assert "no step for 5 s; the last one was step 4" in result.stderr
    assert "in injected" in result.stderr and result.stderr.count("Thread 0x") >= 2
    print(f"RECOVERY hang: ended {result.seconds:.1f} s after its start (hang_after 5 s)")

    again = run_main(f"--config={recipe}", *arguments)
    assert again.returncode == 0, again.stderr
    assert max(run.steps()) == 12


@pytest.mark.slow
def test_run_that_meets_a_stretch_of_nan_goes_back_and_on_with_other_data(
    tmp_path, recipe, poison, run_main, run_folder, saved_arrays
):
    poison(recipe, "epoch == 1")
    run = run_folder(tmp_path / "run")
    result = run_main(
        f"--config={recipe}",
        f"--workdir={run.folder}",
        "--config.divergence.max_skipped=3",
        "--config.log_every=1 steps",
        "--config.checkpoint.every=2 steps",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("and on with the examples that come after those") == 2
    print(
        f"RECOVERY NaN: the whole run of 12 steps, with two rollbacks, took {result.seconds:.1f} s"
    )
    assert run.json("summary.json")["rollbacks"] == 2
    assert [row[0] for row in run.rows() if row[1] == "train"] == list(range(1, 13))
    for name, array in saved_arrays(run.folder, 12).items():
        assert (array == array).all(), name


def test_goodput_accounts_for_the_seconds_of_all_attempts(
    tmp_path, recipe, start_main, run_main, run_folder, wait_until
):
    run = run_folder(tmp_path / "run")
    arguments = [f"--config={recipe}", f"--workdir={run.folder}", "--config.duration=200 steps"]
    began = time.monotonic()
    process = start_main(*arguments)
    assert wait_until(process, run.steps)
    process.kill()
    process.wait()
    time.sleep(1.5)
    result = run_main(*arguments)
    wall = time.monotonic() - began
    assert result.returncode == 0, result.stderr
    goodput = run.json("goodput.json")
    assert goodput["restarts"] == 1
    assert goodput["seconds"]["down"] >= 1.4
    assert 0.7 * wall < sum(goodput["seconds"].values()) < wall + 1
    assert "goodput" in result.stdout and "1 restart" in result.stdout
