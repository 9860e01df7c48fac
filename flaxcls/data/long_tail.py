"""A part of a split whose classes have a long tail, to study training on imbalanced data."""

from collections.abc import Sequence

import numpy as np

from flaxcls.data.source import Source, Subset, count_classes
from flaxcls.errors import ConfigError


def long_tailed(source: Source, imbalance: float) -> Subset:
    """The first n_i examples of class i, where n_i falls exponentially (Cui et al. 2019).

    n_i = n / imbalance^(i / (K - 1)), rounded down, from n, the size of the smallest class, for
    class 0 down to n / imbalance for the last: CIFAR-10 by 100 has 5,000 to 50, 12,406 in all.
    They stay in the order of the data. Raises ConfigError if the last class would have none.
    """
    labels, num_classes = source.labels(), len(source.class_names)
    smallest = int(count_classes(labels, num_classes, "config.data.long_tail").min())
    if imbalance > smallest:
        raise ConfigError(
            f"config.data.long_tail must be at most {smallest}, the examples of the smallest class "
            f"of {source.name} '{source.split}', got {imbalance:g}"
        )
    counts = profile(smallest, imbalance, num_classes)
    first = [np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)]
    return Subset(source, np.sort(np.concatenate(first)), source.split)


def profile(most: int, imbalance: float, num_classes: int) -> Sequence[int]:
    """The examples of each class: most / imbalance^(i / (K - 1)), rounded down."""
    steps = np.arange(num_classes) / max(num_classes - 1, 1)
    # A share that is a whole number is not to lose one by its last bit.
    return np.floor(most / imbalance**steps + 1e-9).astype(int).tolist()
