"""Work in threads, in order and within bounds."""

import itertools
import threading
import time

import pytest

from flaxcls.runtime.read_ahead import in_order


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def threads():
    return [each for each in threading.enumerate() if each.name.startswith("ahead")]


def test_results_come_in_the_order_of_the_items_whichever_is_ready_first():
    def slow_first(number):
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number

    assert list(in_order(slow_first, range(20), threads=4)) == list(range(20))


@pytest.mark.parametrize(("count", "ahead"), [(1, 1), (2, 3), (3, None)])
def test_it_is_so_many_results_ahead_and_no_more(count, ahead):
    begun = []
    results = in_order(begun.append, itertools.count(), threads=count, ahead=ahead)
    expected = 2 * count if ahead is None else ahead
    for taken in range(1, 4):
        next(results)
        wait_until(lambda taken=taken: len(begun) == taken + expected)
    time.sleep(0.02)
    assert len(begun) == 3 + expected
    results.close()


def test_error_comes_out_in_its_place():
    def fail_at_3(number):
        if number == 3:
            raise ValueError("3")
        return number

    results = in_order(fail_at_3, range(10), threads=2, name="ahead")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert not threads()


def test_closing_cancels_what_waits_and_ends_the_threads():
    begun, go_on = [], threading.Event()

    def work(number):
        begun.append(number)
        return number if number == 0 else go_on.wait(5)

    results = in_order(work, range(100), threads=1, ahead=5, name="ahead")
    next(results)
    wait_until(lambda: len(begun) == 2)
    threading.Timer(0.05, go_on.set).start()
    results.close()
    assert begun == [0, 1] and not threads()
