"""Real processes that hang, or only look as if they did."""

import signal
import time

import pytest

from flaxcls.errors import HUNG_EXIT_CODE
from flaxcls.runtime.watchdog import Watchdog

PROGRAM = """
import sys, threading, time
from flaxcls.runtime.watchdog import Watchdog

def go_on(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watchdog.alive(8)
        time.sleep(0.01)

with Watchdog({seconds}) as watchdog:
    watchdog.alive(7)
    print("entered", flush=True)
{body}
print("left", flush=True)
"""


@pytest.fixture
def start_watched(start_python):
    """Starts a process that runs `body` watched."""

    def starter(body, seconds=1.0):
        indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
        return start_python("-c", PROGRAM.format(seconds=seconds, body=indented))

    return starter


HANGS = {
    "sleep": """
def never_returns():
    time.sleep(1000)
never_returns()
""",
    "lock": """
lock = threading.Lock()
def never_returns():
    with lock, lock:
        pass
never_returns()
""",
    "callback": """
def never_returns(x):
    threading.Event().wait()
    return x
with watchdog.pause():
    import jax
    shape = jax.ShapeDtypeStruct((), "float32")
    program = jax.jit(lambda x: jax.pure_callback(never_returns, shape, x)).lower(1.0).compile()
jax.block_until_ready(program(1.0))
""",
}


@pytest.mark.parametrize("hang", HANGS)
def test_process_that_hangs_ends_with_the_stacks_of_its_threads(start_watched, hang):
    process = start_watched(HANGS[hang], seconds=0.5)
    out, err = process.communicate(timeout=100)
    assert process.returncode == HUNG_EXIT_CODE == 44, err
    assert out == "entered\n"
    assert "no step for 0.5 s; the last one was step 7; the stacks of all threads follow" in err
    assert "never_returns" in err and "MainThread" in err and "flaxcls-watchdog" in err


def test_hang_before_the_first_step_is_one(start_watched):
    process = start_watched("watchdog._sign = (None,)\ntime.sleep(1000)", seconds=0.5)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 44
    assert "no step for 0.5 s; there was none before;" in err


def test_hang_is_ended_though_nobody_reads_what_it_prints(start_watched):
    # The main thread hangs in a full pipe, with the lock of sys.stderr in its hands.
    process = start_watched(
        "import flaxcls.runtime.watchdog\nflaxcls.runtime.watchdog.PRINTING_SECONDS = 1\n"
        "sys.stderr.write('x' * 10_000_000)",
        seconds=0.5,
    )
    assert process.wait(60) == -signal.SIGALRM


def test_process_that_goes_on_is_not_ended(start_watched):
    process = start_watched("go_on(2.5)", seconds=1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "entered\nleft\n", "")


def test_pause_may_take_any_time_and_ends(start_watched):
    process = start_watched("with watchdog.pause():\n    time.sleep(1.5)\ngo_on(0.1)", seconds=0.5)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "entered\nleft\n", "")
    process = start_watched("with watchdog.pause():\n    go_on(0.1)\ntime.sleep(1000)", seconds=0.5)
    assert process.wait(60) == 44


def test_stopped_and_continued_process_is_not_ended(start_watched):
    process = start_watched("go_on(4)", seconds=1)
    assert process.stdout.readline() == "entered\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "left\n", "")


def test_none_watches_nothing_and_leaving_does_not_wait():
    with Watchdog(None) as watchdog:
        watchdog.alive(1)
        assert not watchdog._thread.is_alive()
    began = time.monotonic()
    with Watchdog(1000) as watchdog:
        watchdog.alive(1)
        assert watchdog._thread.is_alive()
    assert not watchdog._thread.is_alive()
    assert time.monotonic() - began < 40  # a look is due after 50
