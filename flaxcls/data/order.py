"""Which example comes when, as a pure function of (seed, step), for every kind of input.

Nothing about the data's position needs to be saved: a resumed run asks for the next step's batch.
"""

import functools
from collections.abc import Iterator

import numpy as np

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
        self._permutation = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, num_examples, seed)
        )

    def batch(self, step: int) -> Batch:
        """Which examples batch `step` holds: {"index": int32 [B], "epoch": int32 [B]}."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch, position = np.divmod(positions // self._repeats, self._num_examples)
        index = np.empty(self.batch_size, np.int32)
        for number in np.unique(epoch):
            chosen = epoch == number
            index[chosen] = self._permutation(int(number))[position[chosen]]
        return {"index": index, "epoch": epoch.astype(np.int32)}

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


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, int32 [N]: the same for every host and version of NumPy.

    Sorts Philox's raw stream keyed by (seed, epoch); `Generator.permutation` may change between
    versions of NumPy, the raw stream does not.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    draws = np.random.Philox(key=key).random_raw(num_examples)
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
