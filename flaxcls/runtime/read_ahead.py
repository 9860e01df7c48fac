"""Work in threads that is started before it is needed, in order and within bounds."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    *,
    ahead: int | None = None,
    name: str = "",
) -> Iterator[Result]:
    """`function` of every item, in order, computed in threads before it is asked for.

    The items are taken in the caller's thread. What `function` raises is raised in its turn. When
    the iterator is closed, what has not been started is cancelled and the threads end.

    Args:
      threads: how many compute.
      ahead: how many results are computed ahead at most, those under way included; None: two a
        thread.
      name: what the threads' names begin with.
    """
    ahead = 2 * threads if ahead is None else ahead
    under_way: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(threads, name) as pool:
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) > ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
