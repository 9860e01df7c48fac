"""The input of large data sets: batches decoded as they are needed, some of them ahead.

Batch `step` is a function of (seed, step) and the data alone: the same examples with the same
random crops in one process or several, with any number of workers, before and after a resume.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import numpy as np

from flaxcls.data.decode import available_cores
from flaxcls.data.loader import Broken, BrokenImages, Loader
from flaxcls.data.order import Batch, Order, evaluation_batches, take_rows
from flaxcls.errors import DataError

_GRACE = 20  # seconds that a decoding process works on after SIGTERM


class Workers(NamedTuple):
    """Who decodes: `threads` of this process or, where `processes` is above 0, of each of those.

    Threads share everything and start at once, but Python's lock lets only some eight of them work
    at full speed. `read_ahead` batches are decoded before they are asked for.
    """

    threads: int
    processes: int = 0
    read_ahead: int = 4


def default_workers(read_ahead: int) -> Workers:
    """A thread a core; from 16 cores on a process for every 8 of them."""
    cores = available_cores()
    if cores < 16:
        return Workers(cores, 0, read_ahead)
    return Workers(8, cores // 8, read_ahead)


class Stream:
    """Batches of a split that is read while it is used.

    Args:
      loader: makes an image of an example.
      order: which examples come when; None for a split that is only evaluated.
      image_size: of the batch of a step, in pixels a side; a constant function mostly.
      workers: who decodes.
      rows: which rows of a batch of a size this process reads; None: all.
      broken: is told about unreadable images, which are replaced in training by their next
        neighbour; in evaluation nothing ever is.
    """

    arrays: Any = {}  # what lies on the devices all the time: nothing

    def __init__(
        self,
        loader: Loader,
        order: Order | None = None,
        *,
        image_size: Callable[[int], int | None],
        workers: Workers,
        rows: Callable[[int], np.ndarray] | None = None,
        broken: BrokenImages | None = None,
    ):
        self.loader, self._order, self._workers = loader, order, workers
        self.image_size = image_size
        self._rows, self._broken = rows or np.arange, broken
        self._pool: _Threads | _Processes | None = None

    def __len__(self) -> int:
        return len(self.loader.source)

    def batch(self, step: int, offset: int = 0) -> Batch:
        """This process's rows of the training batch `step`, counted from 0.

        "image" uint8 [B, H, W, C], "label", "index" and "epoch" int32 [B], and "broken" int32 [B],
        which is 1 where another example took the place of an unreadable one.

        Raises:
          DataError: an image is unreadable, or more are than `broken` allows.
        """
        (batch,) = self.batches(step, step + 1, offset)
        return batch

    def batches(self, start: int, stop: int, offset: int = 0) -> Iterator[Batch]:
        """The training batches of the steps `start` to `stop` - 1.

        Each has the image size of its step, and the examples that come `offset` steps later.
        """
        mine = self._rows(self._order.batch_size)

        def plans() -> Iterator[tuple[Batch, np.ndarray, int | None]]:
            for step in range(start, stop):
                chosen = self._order.batch(step + offset)
                draws = self._order.draws(step + offset, self.loader.draws)
                yield take_rows(chosen, mine), draws[mine], self.image_size(step)

        for plan, images, (taken, labels, broken) in self._load(
            plans(), substitute=self._broken is not None
        ):
            if broken:
                self._broken.note(broken)
            replaced = (taken != plan["index"]).astype(np.int32)
            yield {**plan, "index": taken, "image": images, "label": labels, "broken": replaced}

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, in order: "image", "label", "index" and "mask", as in `resident`.

        Raises:
          DataError: an image is unreadable; the sentence names it.
        """
        mine = self._rows(batch_size)

        def plans() -> Iterator[tuple[Batch, np.ndarray, int | None]]:
            for plan in evaluation_batches(len(self), batch_size):
                plan = take_rows(plan, mine)
                draws = np.zeros((len(plan["index"]), self.loader.draws))
                yield plan, draws, self.image_size(0)

        for plan, images, (_, labels, _) in self._load(plans(), substitute=False):
            yield {**plan, "image": images, "label": labels}

    def describe(self) -> str:
        """In words, with the most memory that batches under way take."""
        threads, processes, ahead = self._workers
        who = f"{processes} processes of {threads} threads" if processes else f"{threads} threads"
        # Those read ahead, the one that is handed over, and those that `sharding.prefetch` holds.
        batches = ahead + 3
        rows = len(self._rows(self._order.batch_size))
        size = batches * rows * int(np.prod(self._shape(self.image_size(2**31))))
        return f"streamed by {who}, at most {batches} batches in memory, {size / 2**20:,.0f} MiB"

    def close(self) -> None:
        """Ends the workers; the next batch would start new ones."""
        pool, self._pool = self._pool, None
        if pool:
            pool.close()

    def _load(self, plans: Iterable, *, substitute: bool) -> Iterator[tuple]:
        """(plan, images, what `Loader.fill` says) of every plan, `read_ahead` of them under way."""
        if self._pool is None:
            self._pool = (_Processes if self._workers.processes else _Threads)(
                self.loader, self._workers
            )
        ahead: collections.deque = collections.deque()
        try:
            for plan, draws, size in plans:
                indices, shape = plan["index"], self._shape(size)
                ahead.append((plan, self._pool.start(indices, draws, shape, substitute)))
                if len(ahead) > self._workers.read_ahead:
                    plan, work = ahead.popleft()
                    yield plan, *work.finish()
            while ahead:
                plan, work = ahead.popleft()
                yield plan, *work.finish()
        except BrokenProcessPool as error:
            self.close()
            raise DataError(
                "a process that decodes images has died; the system may have run out of memory"
            ) from error

    def _shape(self, size: int | None) -> tuple[int, int, int]:
        height, width, channels = self.loader.source.image_shape
        return (size, size, channels) if self.loader.transform else (height, width, channels)


class _Work:
    """A batch under way."""

    def __init__(self, parts: list[Future], images: Callable[[], np.ndarray]):
        self._parts, self._images = parts, images

    def finish(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, list[Broken]]]:
        taken, labels, broken = zip(*[part.result() for part in self._parts], strict=True)
        images = self._images()
        return images, (np.concatenate(taken), np.concatenate(labels), sum(broken, []))


def _parts(rows: int, workers: int) -> list[slice]:
    """A batch in parts: some for every worker, so that none waits long for the slowest at the end.

    But not too small ones, or handing them out costs more than decoding small images.
    """
    size = max(8, -(-rows // (4 * workers)))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _Threads:
    """Decodes in threads of this process."""

    def __init__(self, loader: Loader, workers: Workers):
        self._loader, self._count = loader, workers.threads
        self._executor: Executor = ThreadPoolExecutor(workers.threads, "flaxcls-decode")

    def start(self, indices, draws, shape, substitute) -> _Work:
        images = np.empty((len(indices), *shape), np.uint8)
        return self.start_into(images, indices, draws, substitute)

    def start_into(self, images, indices, draws, substitute) -> _Work:
        parts = [
            self._executor.submit(
                self._loader.fill, images[part], indices[part], draws[part], substitute=substitute
            )
            for part in _parts(len(indices), self._count)
        ]
        return _Work(parts, lambda: images)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


class _Processes:
    """Decodes in other processes, which write into memory that is shared with this one."""

    def __init__(self, loader: Loader, workers: Workers):
        self._count = workers.processes
        self._memory: list[SharedMemory] = []
        self._free: list[SharedMemory] = []
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        # The workers live as long as this end of a pipe is open, which is at most until this
        # process ends, in whatever way.
        far_end, self._lifeline = context.Pipe(duplex=False)
        self._lock = threading.Lock()
        self._executor: Executor = ProcessPoolExecutor(
            workers.processes,
            context,
            initializer=_begin_worker,
            initargs=(loader, workers, far_end),
        )

    def start(self, indices, draws, shape, substitute) -> _Work:
        shape = (len(indices), *shape)
        memory = self._memory_of(int(np.prod(shape)))
        parts = [
            self._executor.submit(
                _in_worker, memory.name, shape, part, indices[part], draws[part], substitute
            )
            for part in _parts(len(indices), self._count)
        ]
        for part in parts:
            part.add_done_callback(self._end_if_broken)

        def images() -> np.ndarray:
            copy = np.ndarray(shape, np.uint8, memory.buf).copy()
            self._free.append(memory)
            return copy

        return _Work(parts, images)

    def _memory_of(self, size: int) -> SharedMemory:
        for memory in self._free:
            if memory.size >= size:
                self._free.remove(memory)
                return memory
        self._memory.append(SharedMemory(create=True, size=size))
        return self._memory[-1]

    def _end_if_broken(self, part: Future) -> None:
        # If one has died the others may wait for a lock that it held, and the executor for them.
        if not part.cancelled() and isinstance(part.exception(), BrokenProcessPool):
            self._end_workers()

    def _end_workers(self) -> None:
        with self._lock:  # closed by two threads at once, it could be another file the second time
            self._lifeline.close()

    def close(self) -> None:
        self._end_workers()
        self._executor.shutdown(cancel_futures=True)
        for memory in self._memory:
            memory.close()
            memory.unlink()


_worker: _Threads  # of a process that was started to decode
_attached: dict[str, SharedMemory] = {}


def _begin_worker(loader: Loader, workers: Workers, lifeline: Connection) -> None:
    global _worker
    # The main process decides when to end. SIGTERM, which the executor sends when another worker
    # has died, ends this one too, but later: a scheduler sends it to all, and then the main process
    # still has a step to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE, os._exit, (1,)).start())
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    _worker = _Threads(loader, workers)


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


def _in_worker(name, shape, part, indices, draws, substitute):
    if name not in _attached:
        _attached[name] = SharedMemory(name)
    images = np.ndarray(shape, np.uint8, _attached[name].buf)[part]
    return _worker.start_into(images, indices, draws, substitute).finish()[1]
