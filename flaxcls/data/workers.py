"""Who decodes the batches of a stream: threads of this process, or other processes."""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import NamedTuple

import numpy as np

from flaxcls.data.loader import Broken, Loader

SHARED_MEMORY = "/dev/shm"  # where Linux keeps it
_GRACE = 20  # seconds that a decoding process works on after SIGTERM


class Workers(NamedTuple):
    """Who decodes: `threads` of this process or, where `processes` is above 0, of each of those.

    Threads share everything and start at once, but Python's lock lets only some eight of them work
    at full speed. `read_ahead` batches are decoded before they are asked for.
    """

    threads: int
    processes: int = 0
    read_ahead: int = 4


class Work:
    """A batch under way; `release` is called once, when its images are no longer needed."""

    def __init__(
        self,
        parts: list[Future],
        images: Callable[[], np.ndarray],
        release: Callable[[], None],
    ):
        self._parts, self._images, self._release = parts, images, release

    def finish(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, list[Broken]]]:
        try:
            taken, labels, broken = zip(*[part.result() for part in self._parts], strict=True)
            images = self._images()
        finally:
            self.cancel()
        return images, (np.concatenate(taken), np.concatenate(labels), sum(broken, []))

    def cancel(self) -> None:
        release, self._release = self._release, lambda: None
        release()


def _parts(rows: int, workers: int, smallest: int = 8) -> list[slice]:
    """A batch in parts: some for every worker, so that none waits long for the slowest at the end.

    But not too small ones, or handing them out costs more than decoding small images.
    """
    size = max(smallest, -(-rows // (4 * workers)))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class Threads:
    """Decodes in threads of this process."""

    def __init__(self, loader: Loader, workers: Workers):
        self._loader, self._count = loader, workers.threads
        self._smallest = 1 if loader.source.is_remote else 8
        self._executor: Executor = ThreadPoolExecutor(workers.threads, "flaxcls-decode")

    def start(self, indices, draws, shape, substitute) -> Work:
        images = np.empty((len(indices), *shape), np.uint8)
        return self.start_into(images, indices, draws, substitute)

    def start_into(self, images, indices, draws, substitute) -> Work:
        parts = [
            self._executor.submit(
                self._loader.fill, images[part], indices[part], draws[part], substitute=substitute
            )
            for part in _parts(len(indices), self._count, self._smallest)
        ]

        def cancel() -> None:
            for part in parts:
                part.cancel()

        return Work(parts, lambda: images, cancel)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


class NoSharedMemory(Exception):
    """Shared memory can't be had."""


def free_shared_memory() -> float:
    """The bytes of shared memory that are free."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # a system that keeps it elsewhere
        return math.inf
    return status.f_bavail * status.f_frsize


def _share(size: int) -> SharedMemory:
    """New shared memory, all of it there: a process that writes where there is none is killed."""
    try:
        memory = SharedMemory(create=True, size=size)
    except OSError as error:
        raise NoSharedMemory(error.strerror or str(error)) from error
    path = os.path.join(SHARED_MEMORY, memory.name)
    if os.path.exists(path):
        file = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            memory.close()
            memory.unlink()
            raise NoSharedMemory(error.strerror) from error
        finally:
            os.close(file)
    return memory


class Processes:
    """Decodes in other processes, which write into memory that is shared with this one."""

    def __init__(self, loader: Loader, workers: Workers):
        self._count = workers.processes
        self._memory: list[SharedMemory] = []
        self._released: list[tuple[SharedMemory, list[Future]]] = []  # and who may still write
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

    def start(self, indices, draws, shape, substitute) -> Work:
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
            return np.ndarray(shape, np.uint8, memory.buf[:]).copy()

        # The parts are not cancelled: on one that was, Python 3.11's pool fails when its processes
        # end (InvalidStateError). They are decoded for nobody, unless all is closed.
        return Work(parts, images, lambda: self._released.append((memory, parts)))

    def _memory_of(self, size: int) -> SharedMemory:
        for released in list(self._released):
            memory, parts = released
            if all(part.done() for part in parts):
                self._released.remove(released)
                if memory.size >= size:
                    return memory
                self._memory.remove(memory)  # of smaller images, of a part of the run that is over
                _remove(memory)
        self._memory.append(_share(size))
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
            _remove(memory)


Pool = Threads | Processes


def _remove(memory: SharedMemory) -> None:
    memory.close()
    memory.unlink()


_worker: Threads  # of a process that was started to decode
_attached: dict[str, SharedMemory] = {}


def _begin_worker(loader: Loader, workers: Workers, lifeline: Connection) -> None:
    global _worker
    # The main process decides when to end. SIGTERM, which the executor sends when another worker
    # has died, ends this one too, but later: a scheduler sends it to all, and then the main process
    # still has a step to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(_GRACE, os._exit, (1,)).start())
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    _worker = Threads(loader, workers)


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


def _in_worker(name, shape, part, indices, draws, substitute):
    if name not in _attached:
        _attached[name] = SharedMemory(name)
        for old in [old for old, memory in _attached.items() if memory.size < _attached[name].size]:
            _attached.pop(old).close()  # may be gone elsewhere, and takes room until it is here
    images = np.ndarray(shape, np.uint8, _attached[name].buf)[part]
    return _worker.start_into(images, indices, draws, substitute).finish()[1]
