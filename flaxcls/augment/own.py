"""A user's own augmentation among those of flaxcls: a class as they are, or a function."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from flaxcls.augment.base import Augmentation, Batch
from flaxcls.config.user_code import file_of, in_user_code
from flaxcls.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Own(Augmentation):
    """What the name `package.module:Name` stands for, with its options, and a check of its result.

    Its own order among the others is checked as theirs is; a function may come anywhere.
    """

    path: str
    augmentation: Callable[[jax.Array, Batch], Batch]
    file: str

    def check_order(self, normalized: bool) -> None:
        if isinstance(self.augmentation, Augmentation):
            self.augmentation.check_order(normalized)

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        with in_user_code(self.file):
            result = self.augmentation(key, dict(batch))
        got, expected = _shapes(result), _shapes(batch)
        if got != expected:
            raise ConfigError(
                f"{self.path} must return the batch with arrays of the same shapes and dtypes, "
                f"{expected}, got {got}"
            )
        return result


def own(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> Own:
    """The augmentation that `look_up` has found for `package.module:Name`, with these options."""
    entry = make.__wrapped__
    if not isinstance(entry, type):
        return Own(name, partial(make, **options), file_of(entry))
    if not issubclass(entry, Augmentation):
        raise ConfigError(
            f"{name} must be a function (key, batch, /, *, ...) or a class of "
            f"flaxcls.augment.Augmentation, got a class of {entry.__mro__[1].__name__}"
        )
    return Own(name, make(**options), file_of(entry))


def _shapes(batch: Any) -> Any:
    """What a batch holds, in words."""
    if not isinstance(batch, Mapping):
        return type(batch).__name__
    return {
        key: f"{getattr(x, 'dtype', type(x).__name__)}{[*getattr(x, 'shape', ())]}"
        for key, x in sorted(batch.items())
    }
