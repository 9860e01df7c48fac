"""The progress of what takes minutes."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flaxcls.runtime.output import Guarded


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows on standard error how far it is: live on a terminal, else a line every minute.

    Yields a function to call with how many pictures have been done since its last call.
    """
    console = Console(highlight=False, emoji=False, file=Guarded(error=True))
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(what, total=total, completed=done)
    first, began = done, time.monotonic()
    said = began

    def state() -> str:
        rate = (done - first) / max(time.monotonic() - began, 1e-9)
        return f"{what}: {done:,} of {total:,} pictures, {rate:,.0f} images/s"

    def advance(number: int) -> None:
        nonlocal done, said
        done += number
        bar.update(task, completed=done, description=state())
        if not console.is_terminal and time.monotonic() - said >= 60:
            said = time.monotonic()
            console.print(state(), markup=False, soft_wrap=True)

    with bar:
        yield advance
    if done > first:
        console.print(state(), markup=False, soft_wrap=True)
