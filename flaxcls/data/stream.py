"""The input of large data sets: batches decoded as they are needed, some of them ahead.

Batch `step` is a function of (seed, step) and the data alone: the same examples with the same
random crops in one process or several, with any number of workers, before and after a resume.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from flaxcls.data.loader import BrokenImages, Loader
from flaxcls.data.order import Batch, Order, Shapes, batch_shapes, evaluation_batches, take_rows
from flaxcls.data.source import WAITING
from flaxcls.data.workers import (
    SHARED_MEMORY,
    NoSharedMemory,
    Pool,
    Processes,
    Threads,
    Work,
    Workers,
    free_shared_memory,
)
from flaxcls.errors import WorkersError
from flaxcls.runtime.cores import available_cores
from flaxcls.runtime.output import say

RESTARTS = 3  # of the workers of a stream: what kills them more often is no accident


def default_workers(read_ahead: int, is_remote: bool = False) -> Workers:
    """One thread per core, or `WAITING` of data in the cloud; from 16 cores on processes, of 8."""
    cores, threads = available_cores(), WAITING if is_remote else 1
    if cores < 16:
        return Workers(cores * threads, 0, read_ahead)
    return Workers(8 * threads, cores // 8, read_ahead)


class Stream:
    """Batches of a split that is read while it is used.

    Args:
      loader: makes an image of an example.
      order: which examples come when; None for a split that is only evaluated.
      image_size: of the batch of a step, in pixels per side; a constant function mostly.
      workers: who decodes.
      rows: which rows of a batch of a size this process reads; None: all.
      broken: records unreadable images, which are replaced in training by their next neighbour;
        in evaluation nothing ever is.
    """

    arrays: Any = {}  # what is kept on the devices: nothing

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
        self._pool: Pool | None = None
        self._restarts = 0

    def __len__(self) -> int:
        return len(self.loader.source)

    def batch(self, step: int, offset: int = 0) -> Batch:
        """This process's rows of the training batch `step`, counted from 0.

        "image" uint8 [B, H, W, C], "label", "index" and "epoch" int32 [B], and "broken" int32 [B],
        which is 1 where another example replaced an unreadable one.

        Raises:
          DataError: an image is unreadable, or more are than `broken` allows.
          WorkersError: the processes that decode died more than RESTARTS times.
        """
        (batch,) = self.batches(step, step + 1, offset)
        return batch

    def batch_shapes(self, step: int) -> Shapes:
        """The shapes of a step's batch, of the rows of all processes; needs no data."""
        count = self._order.batch_size
        shape = (count, *self._shape(self.image_size(step)))
        shapes = batch_shapes(count, "label", "index", "epoch", "broken")
        return {"image": (shape, np.dtype(np.uint8)), **shapes}

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

        Those of a training split without random crops, unreadable ones replaced as in `batches`.

        Raises:
          DataError: an image is unreadable, in a split that is only evaluated; it is named.
        """
        mine = self._rows(batch_size)

        def plans() -> Iterator[tuple[Batch, np.ndarray, int | None]]:
            for plan in evaluation_batches(len(self), batch_size):
                plan = take_rows(plan, mine)
                draws = np.zeros((len(plan["index"]), self.loader.draws))
                yield plan, draws, self.image_size(0)

        is_training = self._order is not None
        for plan, images, (_, labels, broken) in self._load(plans(), substitute=is_training):
            if broken:
                self._broken.note(broken)
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
        ahead: collections.deque[_PendingBatch] = collections.deque()
        try:
            for plan, draws, size in plans:
                ahead.append(_PendingBatch(plan, draws, self._shape(size), substitute))
                self._start(ahead[-1])
                if len(ahead) > self._workers.read_ahead:
                    yield self._finish(ahead)
            while ahead:
                yield self._finish(ahead)
        finally:
            for batch in ahead:
                batch.cancel()

    def _start(self, batch: "_PendingBatch") -> None:
        """Starts the work on a batch, or restarts it with other workers."""
        while True:
            try:
                if self._pool is None:
                    self._pool = self._open_pool(batch)
                return batch.start(self._pool)
            except BrokenProcessPool as error:
                self._restart(self._pool, error)
            except NoSharedMemory as error:
                self._use_threads(str(error))

    def _finish(self, ahead: "collections.deque[_PendingBatch]") -> tuple:
        """The first batch, which leaves; work that has lost its workers is restarted."""
        while True:
            if lost := [batch for batch in ahead if batch.pool is not self._pool]:
                self._start(lost[0])
                continue
            try:
                result = ahead[0].plan, *ahead[0].finish()
            except BrokenProcessPool as error:
                self._restart(ahead[0].pool, error)
            else:
                ahead.popleft()
                return result

    def _open_pool(self, batch: "_PendingBatch") -> Pool:
        if self._workers.processes:
            last = int(np.prod(self._shape(self.image_size(2**31))))
            size = len(batch.plan["index"]) * max(int(np.prod(batch.shape)), last)
            needed, free = (self._workers.read_ahead + 3) * size, free_shared_memory()
            if needed <= free:
                return Processes(self.loader, self._workers)
            self._use_threads(f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
        return Threads(self.loader, self._workers)

    def _use_threads(self, why: str) -> None:
        self.close()
        threads, processes, read_ahead = self._workers
        self._workers = Workers(threads * processes, 0, read_ahead)
        say(
            f"flaxcls: there is not enough shared memory in {SHARED_MEMORY} to decode images in "
            f"{processes} processes ({why}): {threads * processes} threads of this process do it; "
            "more memory is given by, for example, `docker run --shm-size=8g`",
            error=True,
        )

    def _restart(self, pool: Pool, error: BrokenProcessPool) -> None:
        """Ends workers one of which has died, so that new ones start; not too often."""
        if pool is not self._pool:  # done already, for other batches
            return
        self.close()
        self._restarts += 1
        died = "a process that decodes images has died; the system may have run out of memory"
        if self._restarts > RESTARTS:
            raise WorkersError(f"{died}: it is the {self._restarts}th time") from error
        say(
            f"flaxcls: {died}: the workers are restarted ({self._restarts} of {RESTARTS} times)",
            error=True,
        )

    def _shape(self, size: int | None) -> tuple[int, int, int]:
        height, width, channels = self.loader.source.image_shape
        return (size, size, channels) if size else (height, width, channels)


class _PendingBatch:
    """A batch that has been asked for: what it shall be, who works on it, and their work."""

    def __init__(self, plan: Batch, draws: np.ndarray, shape: tuple, substitute: bool):
        self.plan, self.shape = plan, shape
        self._draws, self._substitute = draws, substitute
        self.pool: Pool | None = None
        self._work: Work | None = None

    def start(self, pool: Pool) -> None:
        self._work = pool.start(self.plan["index"], self._draws, self.shape, self._substitute)
        self.pool = pool

    def finish(self) -> tuple[np.ndarray, tuple]:
        return self._work.finish()

    def cancel(self) -> None:
        if self._work:
            self._work.cancel()
