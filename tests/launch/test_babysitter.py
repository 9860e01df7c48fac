"""The babysitter's decisions, and its loop against a slice that is faked by a real program.

The fake `gcloud` keeps the slice's state in a file and runs what is sent to the hosts in a shell,
each host with a home folder of its own. There launch/tpu_host.sh starts and watches real processes.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.babysitter import Limits, Tries, combine, decide

LIMITS = Limits(failures=2, preemptions=3, unreachable=4)

GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys

world = pathlib.Path("{world}")
slice = world / "slice.json"  # there while there is a slice: how often its state was asked for
plan = json.loads((world / "plan.json").read_text())
made = len(list(world.glob("made-*")))
homes = sorted(world.glob("home-*"))
verb, words = sys.argv[4], sys.argv[5:]
with open(world / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[3:5]) + "\\n")


def kill():
    for home in homes:
        pid = home / "flaxcls-run" / "pid"
        if pid.exists():
            subprocess.run(["bash", "-c", f"kill -KILL -- -$(cat {{pid}}) 2>/dev/null"])
        shutil.rmtree(home)


if verb == "create":
    assert not slice.exists() and "--spot" in words
    (world / f"made-{{made}}").touch()
    slice.write_text('{{"asked": 0}}')
    for host in range(2):
        (world / f"home-{{host}}").mkdir()
elif verb == "delete":
    kill()
    slice.unlink()
elif verb == "describe":
    if not slice.exists():
        sys.exit("ERROR: (gcloud...describe) NOT_FOUND: Resource not found")
    asked = json.loads(slice.read_text())["asked"] + 1
    slice.write_text(json.dumps({{"asked": asked}}))
    states = plan[made - 1]
    if asked <= len(states):
        if states[asked - 1] == "SUSPENDED" and homes:
            kill()
        print(states[asked - 1])
    else:
        print(states[-1])
elif verb == "scp":
    for home in homes:
        shutil.copy(words[0], home)
elif verb == "ssh":
    command = next(word for word in words if word.startswith("--command="))
    codes = []
    for host, home in enumerate(homes):
        environment = {{**os.environ, "HOME": str(home), "HOST": str(host), "MADE": str(made)}}
        shell = ["bash", "-c", command.removeprefix("--command=")]
        codes.append(subprocess.run(shell, cwd=home, env=environment).returncode)
    sys.exit(max(codes, default=255))
"""
# In place of the host's Python: "uv venv" makes one that trains as the plan says.
PYTHON3 = """#!/bin/bash
if rm '{world}/broken' 2>/dev/null; then exit 1; fi
if [ "$1 $2 $3" = "-m uv venv" ]; then
  mkdir -p ~/flaxcls-venv/bin
  cp '{world}/train' ~/flaxcls-venv/bin/python
fi
"""
# The first words are those of the launcher; the run's number is counted on each host of each slice.
TRAIN = """#!/bin/bash
[ "$1 $2" = "-m flaxcls.main" ] || exit 99
[ -e flaxcls/main.py ] || exit 98
echo "slice $MADE host $HOST: $*" >>'{world}/runs'
runs=$(grep -c "slice $MADE host $HOST" '{world}/runs')
eval "$(sed -n "${{runs}}p" '{world}/slice-'"$MADE")"
"""


@pytest.fixture
def world(tmp_path, executable):
    """Makes the fakes, and a checkout to type the command in: plan(states, what training does)."""
    folder = tmp_path / "world"
    folder.mkdir()
    executable("gcloud", GCLOUD.format(python=sys.executable, world=folder))
    executable("python3", PYTHON3.format(world=folder))
    (folder / "train").write_text(TRAIN.format(world=folder))
    (folder / "train").chmod(0o755)
    root = Path(__file__).parent.parent.parent
    checkout = tmp_path / "checkout"
    (checkout / "flaxcls").mkdir(parents=True)
    (checkout / "flaxcls" / "main.py").touch()
    (checkout / "launch").mkdir()
    for path in (root / "launch").iterdir():
        if path.suffix in (".py", ".sh"):
            (checkout / "launch" / path.name).write_bytes(path.read_bytes())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=a"], check=True)

    def plan(*slices):
        """`slices`: of each the states that it takes, one a look, and each run's shell command."""
        (folder / "plan.json").write_text(json.dumps([states for states, _ in slices]))
        for number, (_, runs) in enumerate(slices, 1):
            (folder / f"slice-{number}").write_text("\n".join(runs) + "\n")
        return folder

    plan.checkout = checkout
    return plan


def babysit(world, *options):
    words = [sys.executable, "-m", "launch.tpu_pod", "babysit", "pod", "--zone=z", "--spot"]
    run = ["--", "--config=c.py", "--workdir=gs://b/r", "--config.duration=90 epochs"]
    result = subprocess.run(
        [*words, "--interval=0.1", *options, *run],
        cwd=world.checkout,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result, [line.split()[2].rstrip(":") for line in result.stdout.splitlines()]


def test_slice_that_is_taken_away_twice_is_made_again_and_training_ends(world):
    folder = world(
        (["WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED"], ["sleep 60"]),
        (["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], ["sleep 60"]),
        (["PROVISIONING", "ACTIVE"], ["exit 0"]),
    )
    result, actions = babysit(world)
    assert result.returncode == 0, result.stdout + result.stderr
    shortened = [action for action in actions if action != "wait"]
    assert shortened == ["create", "start", "delete"] * 2 + ["create", "start", "stop"]
    runs = (folder / "runs").read_text().splitlines()
    assert len(runs) == 3 * 2  # on both hosts of each slice, always with the same workdir
    tail = "-m flaxcls.main --config=c.py --workdir=gs://b/r --config.duration=90 epochs"
    assert all(run.endswith(tail) for run in runs)


def test_preempted_and_crashed_training_runs_again_on_the_same_slice(world):
    folder = world((["ACTIVE"], ["exit 42", "exit 44", "exit 0"]))
    result, actions = babysit(world)
    assert result.returncode == 0, result.stdout + result.stderr
    wanted = ["create", "start", "rerun", "rerun", "stop"]
    assert [action for action in actions if action != "wait"] == wanted
    assert (folder / "calls").read_text().count("scp") == 1


@pytest.mark.parametrize("code, words", [(43, "diverged"), (45, "data"), (2, "config")])
def test_training_that_would_fail_again_is_not_repeated(code, words, world):
    folder = world((["ACTIVE"], [f'[ "$HOST" = 0 ] && exit {code}; exit 134', "exit 0"]))
    result, actions = babysit(world)
    assert result.returncode == code, result.stdout + result.stderr
    assert words in result.stdout.splitlines()[-1] and "rerun" not in actions
    assert len((folder / "runs").read_text().splitlines()) == 2


def test_crashes_are_repeated_no_more_than_allowed(world):
    folder = world((["ACTIVE"], ["exit 1"] * 9))
    result, _ = babysit(world, "--max_failures=1")
    assert result.returncode == 1
    assert "retries were in vain" in result.stdout
    assert len((folder / "runs").read_text().splitlines()) == 2 * 2


def test_set_up_that_fails_is_tried_again(world):
    folder = world((["ACTIVE"], ["exit 0"]))
    (folder / "broken").touch()
    result, actions = babysit(world)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tpu_host.sh setup' ended with exit code 1; retry 1 of 5" in result.stdout
    assert actions.count("start") == 2
    assert len((folder / "runs").read_text().splitlines()) == 2


def test_training_killed_with_its_shell_counts_as_a_crash(world):
    world((["ACTIVE"], ['kill -KILL -- -"$(cat ~/flaxcls-run/pid)"', "exit 0"]))
    result, actions = babysit(world)
    assert result.returncode == 0, result.stdout + result.stderr
    assert actions.count("rerun") == 1 and "exit code 137" in result.stdout


def test_exit_code_is_kept_when_the_whole_group_is_told_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flaxcls").mkdir()
    host = Path(__file__).parent.parent.parent / "launch" / "tpu_host.sh"
    saves = (
        "trap 'sleep 0.2; echo saved; exit 42' TERM; echo ready; while true; do sleep 0.05; done"
    )
    subprocess.run(["bash", host, "run", "bash", "-c", saves], check=True, timeout=30)
    log = tmp_path / "flaxcls-run" / "log"
    wait_until(lambda: log.exists() and "ready" in log.read_text())
    assert ask(host) == "running"
    group = (tmp_path / "flaxcls-run" / "pid").read_text().strip()
    subprocess.run(["bash", "-c", f"kill -TERM -- -{group}"], check=True)
    wait_until(lambda: ask(host) != "running")
    assert ask(host) == "42" and "saved" in log.read_text()


def test_processes_left_behind_do_not_hold_up_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flaxcls").mkdir()
    host = Path(__file__).parent.parent.parent / "launch" / "tpu_host.sh"
    leaves = f"sleep 600 & echo $! >'{tmp_path}/left'; exit 44"
    subprocess.run(["bash", host, "run", "bash", "-c", leaves], check=True, timeout=30)
    wait_until(lambda: ask(host) == "44")
    left = Path("/proc") / (tmp_path / "left").read_text().strip()
    assert left.exists()
    subprocess.run(["bash", host, "run", "true"], check=True, timeout=30)
    wait_until(lambda: ask(host) == "0" and not left.exists())


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def ask(host):
    result = subprocess.run(["bash", host, "state"], capture_output=True, text=True, check=True)
    return result.stdout.removeprefix("flaxcls-state: ").strip()


@pytest.mark.parametrize(
    "state, doing, action",
    [
        (None, "", "create"),
        ("WAITING_FOR_RESOURCES", "", "wait"),
        ("PROVISIONING", "", "wait"),
        ("SUSPENDING", "", "wait"),
        ("DELETING", "", "wait"),
        ("SUSPENDED", "", "delete"),
        ("FAILED", "", "delete"),
        ("ACTIVE", "unreachable", "wait"),
        ("ACTIVE", "absent", "start"),
        ("ACTIVE", "running", "wait"),
        ("ACTIVE", 0, "stop"),
        ("ACTIVE", 42, "rerun"),
        ("ACTIVE", 44, "rerun"),
        ("ACTIVE", 1, "rerun"),
        ("ACTIVE", 137, "rerun"),
        ("ACTIVE", 2, "stop"),
        ("ACTIVE", 43, "stop"),
        ("ACTIVE", 45, "stop"),
        ("ACTIVE", 130, "stop"),
    ],
)
def test_decision(state, doing, action):
    decision = decide(state, doing, Tries(), LIMITS)
    assert decision.action == action
    assert decision.code == (doing if action == "stop" else 0)


def test_preemptions_and_failures_are_bounded_apart_and_failures_wait_longer_each_time():
    tries = Tries()
    for _ in range(LIMITS.preemptions):
        decision = decide("ACTIVE", 42, tries, LIMITS)
        assert (decision.action, decision.delay) == ("rerun", 0)
        tries = decision.tries
    assert decide("SUSPENDED", "", tries, LIMITS).action == "stop"
    assert decide("SUSPENDED", "", tries, LIMITS).code == 42

    delays = []
    for _ in range(LIMITS.failures):
        decision = decide("ACTIVE", 1, tries, LIMITS)
        assert decision.action == "rerun"
        tries = decision.tries
        delays.append(decision.delay)
    assert delays == [2, 4]
    assert decide("ACTIVE", 44, tries, LIMITS).action == "stop"
    assert decide("ACTIVE", 44, tries, LIMITS).code == 44
    assert decide("FAILED", "", tries, LIMITS).code == 1


def test_slice_that_never_answers_is_made_anew_but_one_that_does_in_between_is_not():
    tries = Tries()
    for _ in range(LIMITS.unreachable):
        decision = decide("ACTIVE", "unreachable", tries, LIMITS)
        assert decision.action == "wait"
        tries = decision.tries
    assert decide("ACTIVE", "unreachable", tries, LIMITS).action == "delete"
    tries = decide("ACTIVE", "running", tries, LIMITS).tries
    assert decide("ACTIVE", "unreachable", tries, LIMITS).action == "wait"


def test_gcloud_that_can_not_say_is_asked_for_long_and_nothing_is_deleted():
    tries = Tries()
    for _ in range(LIMITS.unknown):
        decision = decide("UNKNOWN", "", tries, LIMITS)
        assert decision.action == "wait"
        tries = decision.tries
    assert decide("ACTIVE", "unreachable", tries, LIMITS).action == "wait"
    decision = decide("UNKNOWN", "", tries, LIMITS)
    assert (decision.action, decision.code) == ("stop", 1)


@pytest.mark.parametrize(
    "told, what",
    [
        (["absent", "absent"], "absent"),
        (["running", "42"], "running"),
        (["absent", "running"], "running"),
        (["0", "0"], 0),
        (["42", "42"], 42),
        (["0", "42"], 42),
        (["134", "45", "134"], 45),
        (["1", "43"], 43),
        (["1", "42"], 1),
        (["absent", "1"], 1),
    ],
)
def test_what_hosts_say_is_combined(told, what):
    assert combine(told) == what
