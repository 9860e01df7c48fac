"""Runs that are killed, interrupted or diverge, in real processes."""

import itertools
import json
import random
import re
import signal
import time

import numpy as np
import pytest

STEPS = 60  # of `everything`


def progress_of(workdir, step):
    """What a checkpoint says besides its arrays, without the time it took."""
    path = workdir / "checkpoints" / str(step) / "facts"
    metadata = json.loads(next(p for p in path.iterdir() if p.name == "metadata").read_text())
    del metadata["progress"]["seconds"]
    return metadata


@pytest.mark.parametrize(
    "count",
    [pytest.param(4, marks=pytest.mark.slow), pytest.param(27, marks=pytest.mark.torture)],
)
def test_run_that_is_killed_again_and_again_ends_bitwise_the_same(
    tmp_path,
    everything,
    whole,
    start_main,
    run_folder,
    wait_until,
    saved_arrays,
    assert_same_arrays,
    count,
):
    seed = random.SystemRandom().randrange(10**6)
    print("the kills' seed is", seed)  # pytest shows it if the test fails
    rng = random.Random(seed)
    killed, whole = run_folder(tmp_path / "killed"), run_folder(whole)
    # So that all of many kills come before the end, however late the last one.
    most = max(1, 2 * STEPS // (3 * count))

    def newest():
        return max(killed.steps(), default=0)

    def at_random_time(process):
        time.sleep(rng.uniform(0, 4))

    def after_some_steps(process):
        goal = newest() + rng.randint(1, 2 * most)
        wait_until(process, lambda: newest() >= goal)
        time.sleep(rng.uniform(0, 0.05))

    def while_saving(process):
        before, skip = killed.unfinished(), rng.randint(1, most) + newest()
        wait_until(process, lambda: newest() >= skip)
        wait_until(process, lambda: killed.unfinished() - before)

    order = (while_saving, at_random_time, after_some_steps, while_saving)
    torn, deaths = 0, 0
    for moment in itertools.islice(itertools.cycle(order), count):
        process = start_main(f"--config={everything}", f"--workdir={killed.folder}")
        moment(process)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        deaths += process.returncode == -signal.SIGKILL
        torn += bool(killed.unfinished())
    print(deaths, "kills,", torn, "of them left a half-written checkpoint behind")
    assert deaths >= 3 * count // 4 and torn >= 1

    before, began = killed.log(), time.perf_counter()
    process = start_main(f"--config={everything}", f"--workdir={killed.folder}")
    if wait_until(process, lambda: killed.log() not in (before, b"")):
        print(f"RECOVERY SIGKILL: the next row after {time.perf_counter() - began:.1f} s")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert "waiting until" not in stdout  # for a job that was killed on this machine
    assert killed.log() == whole.log()
    assert set(killed.steps()) == set(whole.steps())
    for step in whole.steps():
        arrays = saved_arrays(whole.folder, step)
        kinds = {name.split("/")[0] for name in arrays}
        assert {"params", "batch_stats", "opt_state", "ema", "rng", "step"} <= kinds
        assert_same_arrays(saved_arrays(killed.folder, step), arrays)
        assert progress_of(killed.folder, step) == progress_of(whole.folder, step)
    first, second = (run.json("summary.json") for run in (whole, killed))
    assert first["best"] == second["best"] and first["eval"] == second["eval"]
    assert first["ema"] == second["ema"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_run_that_is_asked_to_stop_saves_and_goes_on_bitwise(
    tmp_path,
    everything,
    whole,
    run_main,
    start_main,
    run_folder,
    wait_until,
    stopped_step,
    saved_arrays,
    assert_same_arrays,
    number,
    code,
):
    arguments = [f"--config={everything}", "--config.checkpoint.every=1000 seconds"]
    stopped = run_folder(tmp_path / "stopped")
    process = start_main(*arguments, f"--workdir={stopped.folder}")
    assert wait_until(process, stopped.log)
    began = time.perf_counter()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    print(f"RECOVERY signal {number}: saved and ended after {time.perf_counter() - began:.1f} s")
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr + stdout
    assert re.fullmatch(r"flaxcls: stopped after step \d+ of 60 and saved; .*\n", stderr), stderr
    step = stopped_step(stderr)
    assert stopped.steps() == [step] and step < STEPS

    result = run_main(*arguments, f"--workdir={stopped.folder}")
    assert result.returncode == 0, result.stderr
    assert stopped.log() == run_folder(whole).log()
    assert_same_arrays(saved_arrays(stopped.folder, STEPS), saved_arrays(whole, STEPS))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_run_that_is_asked_to_stop_before_it_trains_ends_at_once(
    tmp_path, everything, start_main, number, code
):
    for moment in (1.0, 2.5):  # while JAX is imported; while the step is compiled, or near it
        process = start_main(f"--config={everything}", f"--workdir={tmp_path / str(moment)}")
        time.sleep(moment)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == code and "Traceback" not in stderr, stderr


def test_finished_run_says_so_and_is_left_alone(tmp_path, recipe, run_main):
    arguments = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    first = run_main(*arguments)
    assert first.returncode == 0, first.stderr
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = run_main(*arguments)
    assert again.returncode == 0, again.stderr
    assert "finished" in again.stdout.lower()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_diverged_run_exits_43_and_keeps_the_last_good_checkpoint(
    tmp_path, recipe, poison, run_main, run_folder, saved_arrays
):
    run = tmp_path / "run"
    poison(recipe, "epoch >= 1")
    options = [f"--config.{field}" for field in (
        "duration=100 steps",
        "log_every=1 steps",
        "checkpoint.every=1 steps",
        "divergence.max_skipped=3",
    )]  # fmt: skip
    result = run_main(f"--config={recipe}", f"--workdir={run}", *options)
    assert result.returncode == 43, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert re.search(r"steps \d+ to \d+ were not finite or too large", result.stderr)
    assert "after 3 rollbacks within 10 updates" in result.stderr
    last = max(run_folder(run).steps())
    assert f"the checkpoint of step {last} is good" in result.stderr
    for name, array in saved_arrays(run, last).items():
        assert np.isfinite(array).all(), name
    result = run_main(f"--run={run}", module="flaxcls.evaluate")
    assert result.returncode == 0 and "accuracy" in result.stdout, result.stderr
