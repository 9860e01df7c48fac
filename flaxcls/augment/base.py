"""What every augmentation is: a frozen dataclass whose fields say their type and range."""

import dataclasses
import math
import types
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin
from typing import get_type_hints as type_hints

import jax
import jax.numpy as jnp

from flaxcls.errors import ConfigError

Batch = dict[str, jax.Array]


class Range(NamedTuple):
    """The closed range of a number; written `Annotated[float, Range(0, 1)]`."""

    low: float
    high: float = math.inf

    def __str__(self):
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


class Augmentation:
    """Base of the augmentations, which are frozen dataclasses.

    Creating one checks every field against its annotation (`int`, `float`, a pair of floats, a
    `Literal`, each perhaps with a `Range`) and raises `ConfigError` with the op, the field, what
    it got and what would do.

    Calling one, `augmentation(key, batch)`, returns a new batch: "image" is [B, H, W, C], uint8
    or float32, and keeps its dtype; "label" is float32 [B, K]; random parameters are drawn
    independently for every example unless the op says otherwise. It is pure and can be jitted.
    """

    name: ClassVar[str]

    # The images an op can take: "any", "pixels" (in [0, 255]) or "normalized".
    domain: ClassVar[str] = "any"

    def __post_init__(self):
        hints = type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            converted, accepted = _convert(value, hints[field.name])
            if not accepted:
                raise ConfigError(
                    f"`{field.name}` of `{self.name}` must be {describe(hints[field.name])}, "
                    f"got {value!r}"
                )
            object.__setattr__(self, field.name, converted)

    def check_order(self, normalized: bool) -> None:
        """Raises `ConfigError` if the op can't take images that are, or aren't, normalized."""
        if normalized and self.domain == "pixels":
            raise ConfigError(f"`{self.name}` needs images in [0, 255]: list it before `normalize`")
        if not normalized and self.domain == "normalized":
            raise ConfigError(f"{self} needs normalized images: list `normalize` before it")
        fill = getattr(self, "fill", 0)
        if not normalized and not 0 <= fill <= 255:
            raise ConfigError(
                f"`fill` of `{self.name}` before `normalize` must be a number between 0 and 255, "
                f"got {fill:g}"
            )

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        raise NotImplementedError


def per_example(values: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1, 1], to broadcast against images."""
    return values[:, None, None, None]


def like(images: jax.Array, original: jax.Array) -> jax.Array:
    """Float `images` in the dtype of `original`; uint8 is rounded and clipped to [0, 255]."""
    if original.dtype == jnp.uint8:
        images = jnp.clip(jnp.round(images), 0, 255)
    return images.astype(original.dtype)


def box_mask(
    shape: tuple[int, int], top: jax.Array, left: jax.Array, height: jax.Array, width: jax.Array
) -> jax.Array:
    """True inside boxes: [..., H, W] for `shape` (H, W) and boxes given as integers [...].

    A box may reach over the border; what lies outside is cut off.
    """
    rows, columns = jnp.arange(shape[0]), jnp.arange(shape[1])
    top, left, height, width = (side[..., None] for side in (top, left, height, width))
    inside_rows = (rows >= top) & (rows < top + height)
    inside_columns = (columns >= left) & (columns < left + width)
    return inside_rows[..., :, None] & inside_columns[..., None, :]


def describe(hint: Any) -> str:
    """What a field annotated with `hint` accepts, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1]}"
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin is tuple:
        return "two numbers (low, high)"
    return {int: "an integer", float: "a number"}[hint]


def _convert(value: Any, hint: Any) -> tuple[Any, bool]:
    """`value` as the type in `hint`, and whether it is acceptable there."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted, accepted = _convert(value, arguments[0])
        low, high = arguments[1]
        numbers = converted if isinstance(converted, tuple) else (converted,)
        return converted, accepted and all(low <= number <= high for number in numbers)
    if origin is Literal:
        return value, isinstance(value, str) and value in arguments
    if origin in (Union, types.UnionType):
        attempts = (_convert(value, choice) for choice in arguments)
        return next((attempt for attempt in attempts if attempt[1]), (value, False))
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return value, False
        (low, low_accepted), (high, high_accepted) = (_convert(item, float) for item in value)
        accepted = low_accepted and high_accepted
        return (low, high), accepted and low <= high
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if hint is int:
        return value, is_integer
    if is_integer or isinstance(value, float):
        return float(value), math.isfinite(value)
    return value, False
