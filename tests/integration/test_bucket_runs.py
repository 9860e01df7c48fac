"""Runs in buckets, as real processes: kills, faults of the store, leases, moving, sharding."""

import itertools
import json
import random
import signal
import time

import pytest

STEPS = 60  # of `everything`
ON_GCS = ["gcs", pytest.param("s3", marks=pytest.mark.torture)]
ON_S3 = ["s3", pytest.param("gcs", marks=pytest.mark.torture)]
# A job on what looks like another machine, as fast as tests need.
ELSEWHERE = """
import sys
from flaxcls import cli, main
from flaxcls.runs import lease
from flaxcls.runtime import machine

machine.identity = lambda: sys.argv.pop(1)
identity = machine.identity()
machine.identity = lambda: identity
lease.SILENT_SECONDS = 2.0
lease.RENEWAL_SECONDS = 0.5
cli.run(main.main)
"""


@pytest.fixture
def assert_is_whole(whole, run_folder, saved_arrays, assert_same_arrays):
    """A folder is, to the last bit, that of the run of `everything` that nothing interrupted."""

    def check(folder):
        assert run_folder(folder).log() == run_folder(whole).log()
        steps = run_folder(whole).steps()
        assert set(run_folder(folder).steps()) == set(steps)
        for step in steps:
            assert_same_arrays(saved_arrays(folder, step), saved_arrays(whole, step))

    return check


@pytest.mark.parametrize("bucket", ON_GCS, indirect=True)
@pytest.mark.parametrize(
    "count",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.torture)],
)
def test_run_that_is_killed_again_and_again_ends_bitwise_the_same(
    there, everything, start_main, wait_until, assert_is_whole, count
):
    seed = random.SystemRandom().randrange(10**6)
    print("the kills' seed is", seed)
    rng = random.Random(seed)
    most = max(1, STEPS // (2 * count))
    arguments = (f"--config={everything}", f"--workdir={there.path}")

    def newest():
        return max(there.steps(), default=0)

    def after_some_steps(process):
        goal = newest() + rng.randint(1, most)
        wait_until(process, lambda: newest() >= goal)
        time.sleep(rng.uniform(0, 0.1))

    def while_saving(process):
        goal = newest() + rng.randint(1, most)
        wait_until(process, lambda: newest() >= goal)
        while process.poll() is None:  # it stands still while it is looked at
            process.send_signal(signal.SIGSTOP)
            if there.unfinished():
                time.sleep(0.5)  # what it has sent already, such as the manifest, still arrives
                if there.unfinished():
                    return
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)

    def at_random_time(process):
        time.sleep(rng.uniform(0, 5))

    deaths = torn = 0
    order = itertools.cycle((while_saving, after_some_steps, at_random_time, while_saving))
    for moment in itertools.islice(order, count):
        process = start_main(*arguments)
        moment(process)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        deaths += process.returncode != 0
        torn += bool(there.unfinished())
    print(deaths, "kills,", torn, "of them left a step without manifest")
    assert deaths >= max(1, 3 * count // 4) and torn >= 1
    before, began = there.log(), time.perf_counter()
    process = start_main(*arguments)
    if wait_until(process, lambda: there.log() not in (before, b"")):
        print(f"RECOVERY SIGKILL in a bucket: {time.perf_counter() - began:.1f} s")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert not there.unfinished() and "waiting until" not in stdout
    assert_is_whole(there.copy())


@pytest.mark.parametrize("bucket", ON_S3, indirect=True)
@pytest.mark.torture
def test_store_that_fails_now_and_then_is_asked_again_and_nothing_is_lost(
    there, faults, everything, run_main, assert_is_whole
):
    faults.plan(
        {"fault": "status", "status": 503, "every": 17, "times": 4},
        {"fault": "status", "status": 429, "every": 23, "times": 3},
        {"fault": "slow", "seconds": 0.5, "every": 11, "times": 5},
        {"fault": "lost", "match": "^(PUT|POST) ", "every": 9, "times": 3},
        {"fault": "cut", "every": 29, "times": 3},
        {"fault": "refuse", "every": 31, "times": 2},
    )
    result = run_main(f"--config={everything}", f"--workdir={there.path}")
    print(f"RECOVERY a failing store: the run took {result.seconds:.1f} s")
    assert result.returncode == 0, result.stderr
    answers = [line.rpartition(" -> ")[2] for line in faults.log()]
    print({answer: answers.count(answer) for answer in sorted(set(answers))})
    assert {"503", "429", "200 lost", "refused"} <= set(answers)
    assert "Traceback" not in result.stdout + result.stderr
    assert_is_whole(there.copy())


@pytest.mark.parametrize("bucket", ON_GCS, indirect=True)
@pytest.mark.slow
def test_store_that_refuses_from_the_start_is_a_sentence_alone_and_as_two(
    there, faults, everything, run_main, run_two
):
    arguments = (f"--config={everything}", f"--workdir={there.path}")
    faults.plan({"fault": "status", "status": 403, "match": "^(PUT|POST|DELETE) "})
    result = run_main(*arguments)
    print(f"RECOVERY a store that refuses: ended after {result.seconds:.1f} s")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f"{there.path}" in result.stderr and "can't be written" in result.stderr
    codes = run_two(arguments, arguments)
    assert [code for code, *_ in codes] == [2, 2], codes
    assert not there.path.files()


@pytest.mark.torture
def test_store_that_refuses_ends_the_run_with_a_sentence_and_no_checkpoint_is_lost(
    there, faults, everything, start_main, run_main, wait_until, assert_is_whole
):
    arguments = (f"--config={everything}", f"--workdir={there.path}")
    process = start_main(*arguments)
    assert wait_until(process, lambda: there.steps() and there.log())
    faults.plan({"fault": "status", "status": 403, "match": "^(PUT|POST|DELETE) "})
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in stdout + stderr, stderr
    assert f"checkpoint of step {STEPS} not saved: " in stderr.splitlines()[-1]
    assert "training continues until the next one is due" in stdout
    saved = there.steps()
    assert saved

    faults.plan()
    result = run_main(*arguments)
    assert result.returncode == 0, result.stderr
    assert_is_whole(there.copy())


@pytest.mark.torture
def test_second_job_is_refused_and_one_that_was_taken_over_wakes_up_and_writes_nothing(
    there, everything, start_python, run_main, run_two, wait_until, assert_is_whole
):
    arguments = (f"--config={everything}", f"--workdir={there.path}")

    def versions():
        return {
            str(there.path / name): (there.path / name).version() for name in there.path.files()
        }

    first = start_python("-c", ELSEWHERE, "one", *arguments)
    assert wait_until(first, lambda: there.steps() and there.log())
    for code, _, stderr in run_two(arguments, arguments):  # it is alive, elsewhere
        assert code == 2, stderr
    first.send_signal(signal.SIGSTOP)
    began = time.perf_counter()
    second = start_python("-c", ELSEWHERE, "two", *arguments)
    lease = there.path / "lease.json"
    assert wait_until(second, lambda: json.loads(lease.read_bytes()).get("pid") == second.pid)
    before = there.log()
    assert wait_until(second, lambda: there.log() not in (before, b""))
    print(f"RECOVERY another host, in a bucket: {time.perf_counter() - began:.1f} s")
    second.send_signal(signal.SIGSTOP)  # what is written from here on is by the first one
    before = None
    while before != (before := versions()):  # until no request of its is under way any more
        time.sleep(2)
    began = time.perf_counter()
    first.send_signal(signal.SIGCONT)
    _, stderr = first.communicate(timeout=60)
    print(f"RECOVERY woken up, in a bucket: ended after {time.perf_counter() - began:.1f} s")
    assert first.returncode == 2 and "Traceback" not in stderr, stderr
    assert f"the run was taken over: it is now that of process {second.pid} on" in stderr
    after = versions()
    # Requests that were under way may have ended: what is new is in steps without a manifest.
    assert before.items() <= after.items()
    new = [path.removeprefix(f"{there.path}/") for path in after.keys() - before.keys()]
    assert all(name.startswith("checkpoints/") and "manifest" not in name for name in new), new
    second.send_signal(signal.SIGCONT)
    stdout, stderr = second.communicate(timeout=120)
    assert second.returncode == 0, stderr
    assert_is_whole(there.copy())


@pytest.mark.torture
def test_run_that_moves_from_a_disk_to_a_bucket_and_back_ends_bitwise_the_same(
    tmp_path, there, everything, start_main, run_main, run_folder, wait_until, assert_is_whole
):
    """As `gsutil cp -r` or `aws s3 cp --recursive` move it."""

    disk = run_folder(tmp_path / "disk")

    def train_until(place, steps, saved):
        process = start_main(f"--config={everything}", f"--workdir={place}")
        assert wait_until(process, lambda: max(saved(), default=0) >= steps)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 42, stderr

    train_until(disk.folder, 10, disk.steps)
    there.path.upload_folder(disk.folder)
    train_until(there.path, 30, there.steps)
    back = there.copy()
    result = run_main(f"--config={everything}", f"--workdir={back}")
    assert result.returncode == 0, result.stderr
    assert "waiting until" not in result.stdout
    assert_is_whole(back)


@pytest.mark.parametrize("bucket", ON_S3, indirect=True)
@pytest.mark.slow
def test_two_processes_that_share_no_disk_save_what_one_can_resume(
    there, tmp_path, everything, start_two, run_main, wait_until, saved_arrays, assert_same_arrays
):
    """Parameters are split over both; each has a temporary folder of its own."""
    options = (f"--config={everything}", "--config.mesh.fsdp=2", "--config.duration=9 steps")
    two = (*options, f"--workdir={there.path}", "--config.mesh.cpu_devices=1")
    processes = start_two(two, two)
    assert wait_until(processes[0], lambda: max(there.steps(), default=0) >= 4)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    result = run_main(*options, f"--workdir={there.path}", "--config.mesh.cpu_devices=2")
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stdout
    result = run_main(*options, f"--workdir={tmp_path / 'disk'}", "--config.mesh.cpu_devices=2")
    assert result.returncode == 0, result.stderr
    arrays = saved_arrays(there.copy(), 9)
    assert_same_arrays(arrays, saved_arrays(tmp_path / "disk", 9))
