"""Which example comes when, as a pure function of (seed, step), for every kind of input.

Nothing about the data's position needs to be saved: a resumed run asks for the next step's batch.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from flaxcls.data.source import count_classes
from flaxcls.errors import ConfigError

Batch = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]  # and dtypes, of a batch

_DRAWS = 2**64 - 1  # second word of the key of the draws; an epoch's order has its number there


def batch_shapes(count: int, *names: str) -> Shapes:
    """int32 [count] under each name."""
    return {name: ((count,), np.dtype(np.int32)) for name in names}


class Order:
    """A shuffled, endless sequence of batches of the examples 0 to `num_examples` - 1.

    Training sees one epoch's permutation after the other as a single sequence; batch `step` is
    its positions step*B to step*B + B - 1. Every example comes once an epoch, and where the number
    of examples is not a multiple of B a batch straddles two epochs: nothing is dropped.

    With `repeats` r every example comes r times in a row, to be augmented differently (repeated
    augmentation, Hoffer et al. 2019, arXiv:1901.09335); a pass over the data takes r times as long.
    """

    def __init__(self, num_examples: int, *, batch_size: int, seed: int, repeats: int = 1):
        if batch_size < 1:
            raise ConfigError(f"`batch_size` must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self._num_examples, self._seed, self._repeats = num_examples, seed, repeats
        # A batch touches two epochs at most, unless it is larger than the split.
        self._cached_epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def batch(self, step: int) -> Batch:
        """Which examples batch `step` holds, and how often each has been drawn before it.

        {"index": int32 [B], "epoch": int32 [B]}; of repetitions in a row only the first counts.
        """
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch, position = np.divmod(positions // self._repeats, self._num_examples)
        batch = {name: np.empty(self.batch_size, np.int32) for name in ("index", "epoch")}
        for number in np.unique(epoch):
            chosen = epoch == number
            for name, column in self._cached_epoch(int(number)).items():
                batch[name][chosen] = column[position[chosen]]
        return batch

    def _epoch(self, number: int) -> Batch:
        """What `batch` says of all positions of an epoch, int32 [N] each."""
        order = epoch_order(self._num_examples, self._seed, number)
        return {"index": order, "epoch": np.full(len(order), number).astype(np.int32)}

    def draws(self, step: int, count: int) -> np.ndarray:
        """Uniform random numbers for every row of batch `step`, float64 [B, count] in [0, 1).

        One stretch of Philox's stream, so that a batch costs one call however large it is, and a
        host that needs some rows only finds the same numbers in them. `count` is a multiple of 4,
        which is what Philox makes at a time.
        """
        key = np.array([self._seed % 2**64, _DRAWS], np.uint64)
        begin = step * self.batch_size * (count // 4)
        words = np.random.Philox(key=key, counter=begin).random_raw(self.batch_size * count)
        return ((words >> 11) * 2.0**-53).reshape(self.batch_size, count)


class ClassOrder(Order):
    """An Order that draws examples of each class in proportion to (its number of them)^power.

    A power of 0 draws all classes alike, 0.5 by the square roots of their sizes (Kang et al. 2020,
    arXiv:1910.09217). An epoch still has as many positions as there are examples, of which a class
    has the same number, its share rounded, in each, at random positions. A class goes through one
    permutation of its examples after the other, from one epoch into the next: none comes again
    before all others of the class have.

    Args:
      labels: gives every example's label, int [N]; called for the first batch.
      num_classes: each of which needs an example; else DataError, from the first batch.
    """

    def __init__(
        self,
        num_examples: int,
        labels: Callable[[], np.ndarray],
        num_classes: int,
        *,
        power: float,
        batch_size: int,
        seed: int,
        repeats: int = 1,
    ):
        super().__init__(num_examples, batch_size=batch_size, seed=seed, repeats=repeats)
        self._labels, self._num_classes, self._power = labels, num_classes, power

    @functools.cached_property
    def _classes(self) -> list[tuple[np.ndarray, int]]:
        """The examples of each class, and how many of them an epoch draws."""
        labels = self._labels()
        counts = count_classes(labels, self._num_classes, "config.sampling")
        shares = counts**self._power * self._num_examples / (counts**self._power).sum()
        quotas = shares.astype(int)
        missing = self._num_examples - quotas.sum()  # by rounding down
        quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
        members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        return list(zip(members, quotas.tolist(), strict=True))

    def _epoch(self, number: int) -> Batch:
        index, passes = (np.empty(self._num_examples, np.int32) for _ in range(2))
        positions, begin = epoch_order(self._num_examples, self._seed, number), 0
        for label, (members, quota) in enumerate(self._classes):
            own = np.sort(positions[begin : begin + quota])
            begin += quota
            draws = np.arange(number * quota, (number + 1) * quota)
            passes[own], place = np.divmod(draws, len(members))
            for start, end in _runs(passes[own]):
                turn = int(draws[start] // len(members))
                order = epoch_order(len(members), self._seed, turn, label + 1)
                index[own[start:end]] = members[order[place[start:end]]]
        return {"index": index, "epoch": passes}


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    ends = [*np.flatnonzero(np.diff(values)) + 1, len(values)] if len(values) else []
    return zip([0, *ends], ends, strict=False)


def epoch_order(num_examples: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """The permutation of an epoch, int32 [N]: the same for every host and version of NumPy.

    Sorts Philox's raw stream keyed by (seed, epoch), one of many by its counter's highest word;
    `Generator.permutation` may change between versions of NumPy, the raw stream does not.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    draws = np.random.Philox(key=key, counter=counter).random_raw(num_examples)
    return np.argsort(draws, kind="stable").astype(np.int32)


def evenly_spaced(num_examples: int, most: int) -> list[int]:
    """At most so many of the examples, which stand for all of them."""
    return np.unique(np.linspace(0, num_examples - 1, min(num_examples, most)).astype(int)).tolist()


def take_rows(batch: Batch, rows: np.ndarray) -> Batch:
    """Some rows of a batch, in the order given."""
    return {name: column[rows] for name, column in batch.items()}


def evaluation_batches(num_examples: int, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order: {"index": int32 [B], "mask": float32 [B]}.

    The last batch is filled up with example 0 at mask 0, so that all have one shape.
    """
    for start in range(0, num_examples, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        mask = index < num_examples
        yield {"index": np.where(mask, index, 0), "mask": mask.astype(np.float32)}
