"""Weights that a network begins with instead of its initialisation."""

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.models.layers import title
from flaxcls.runtime.output import printable
from flaxcls.weights import torch_names
from flaxcls.weights.resampling import adapt_channels, resample_positions
from flaxcls.weights.sources import Weights, about, read

_SHOWN = 3  # of what does not fit
_CHANNELS = 4  # of images; a convolution of more inputs is none of images
_HEAD = re.compile(r"(^|/)head/[^/]+$")


class Initial(NamedTuple):
    """What a network begins with.

    Attributes:
      variables: {"params", "batch_stats"}, float32; arrays that are absent are initialised.
      sentence: what was taken, what was adapted, and why the head was not taken.
      digest: says which weights these are.
    """

    variables: dict[str, Any]
    sentence: str
    digest: str


def initial_weights(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    source: str,
    class_names: Sequence[str] | None = None,
) -> Initial:
    """The variables of a network for images of (H, W, C), of what config.init_from names.

    The head is zero for another number of classes, other `class_names` or where the source has
    none: the features are trained, and large, so that random weights would begin with confident
    nonsense (EfficientNet-Lite0 on 10 classes: a loss of 8 instead of ln 10 = 2.3). Learned
    position embeddings are resampled to another image size and the first convolution is adapted to
    another number of channels, as timm does. Raises ConfigError, which names what differs, if
    anything else does not fit, and for what can't be read.
    """
    weights = read(source)
    with about(source):
        return _Fitting(network, image_shape, weights).fit(source, class_names)


class _Layout(NamedTuple):
    """How weights name a network's variables, and in which axes they have them.

    Attributes:
      label: whose names these are.
      name: of the variable at a path such as "params/head/kernel".
      outward: (path, array) -> the array as it is there.
      inward: (path, array) -> the array as it is here, `torch_names.unfolded`.
    """

    label: str
    name: Callable[[str], str]
    outward: Callable[[str, np.ndarray], np.ndarray]
    inward: Callable[[str, np.ndarray], np.ndarray]


def _layouts(network: nn.Module, ours: bool) -> Iterator[_Layout]:
    """Those that weights of a network may have, `ours` or another one's."""
    own = _Layout(
        "flaxcls'",
        lambda path: path,
        lambda path, array: array,
        lambda path, array: torch_names.unfolded(network, _inner(path), array),
    )
    if ours or getattr(network, "torch_names", None) is None:
        yield own
        return
    for field, label in (
        ("torch_names", "its PyTorch reference's"),
        ("other_torch_names", "EfficientNet-PyTorch's"),
    ):
        if names := getattr(network, field, None):
            yield _Layout(
                label,
                lambda path, names=names: torch_names.torch_name(_inner(path), names),
                lambda path, array: torch_names.to_torch_layout(network, _inner(path), array),
                lambda path, array: torch_names.from_torch_layout(_inner(path), array),
            )


def _inner(path: str) -> str:
    """A path in params or batch_stats."""
    return path.partition("/")[2]


class _Fitting:
    """The variables of a network beside the arrays that are to be theirs."""

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int], weights: Weights):
        self._network, self._image_shape, self._weights = network, image_shape, weights
        shapes = models.shapes(network, image_shape)
        self._shapes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree.leaves_with_path(dict(shapes))
        }
        ours = any(name.startswith("params/") for name in weights.arrays)
        self._layout = max(
            _layouts(network, ours),
            key=lambda layout: len({*map(layout.name, self._shapes)} & weights.arrays.keys()),
        )
        self._adapted: list[str] = []

    def fit(self, source: str, class_names: Sequence[str] | None) -> Initial:
        """Takes all that fits; ConfigError if too little does."""
        arrays, name = self._weights.arrays, self._layout.name
        head = [path for path in self._shapes if _HEAD.search(path)]
        reason = self._why_not_the_head(head, class_names)
        left = [path for path in self._shapes if not (reason and path in head)]
        taken, problems = {}, []
        for path in left:
            if name(path) not in arrays:
                problems.append(f"{name(path)} is missing")
            elif (array := self._adapt(path, arrays[name(path)])) is None:
                expected = self._layout.outward(path, np.empty(self._shapes[path])).shape
                problems.append(
                    f"{name(path)} is {_shape(arrays[name(path)].shape)} and must be "
                    f"{_shape(expected)}"
                )
            else:
                taken[path] = np.ascontiguousarray(array)
        known = {*map(name, self._shapes)}
        extra = [key for key in arrays if key not in known and not torch_names.IGNORED.search(key)]
        problems += [f"{key} is not one of its arrays" for key in extra]
        if problems:
            raise ConfigError(self._refusal(problems))
        for path, array in taken.items():
            if not np.isfinite(array).all():
                raise ConfigError(f"{name(path)} holds values that are not finite")
        fresh = {path: np.zeros(self._shapes[path], np.float32) for path in head if reason}
        variables = unflatten_dict(
            {tuple(path.split("/")): array for path, array in (taken | fresh).items()}
        )
        return Initial(variables, self._sentence(source, taken, head, reason), _digest(taken))

    def _why_not_the_head(
        self, head: Sequence[str], class_names: Sequence[str] | None
    ) -> str | None:
        """In words, why the head is not taken; None if it is."""
        arrays, name = self._weights.arrays, self._layout.name
        there = [path for path in head if name(path) in arrays]
        if head and not there:
            return "they have none"
        for path in there:
            given = self._layout.inward(path, arrays[name(path)]).shape
            needed = self._shapes[path]
            if given[:-1] == needed[:-1] and given != needed:
                return f"{given[-1]:,} -> {needed[-1]:,} classes"
        of_run = self._weights.class_names
        if head and of_run and class_names and [*of_run] != [*class_names]:
            return "other classes"
        return None

    def _adapt(self, path: str, given: np.ndarray) -> np.ndarray | None:
        """An array as the network needs it; None if it can't be."""
        shape = self._shapes[path]
        if given.ndim != self._layout.outward(path, np.empty(shape)).ndim:
            return None
        unfolded = torch_names.unfolded(self._network, _inner(path), np.empty(shape)).shape
        try:
            array = np.asarray(self._layout.inward(path, np.asarray(given, np.float32)))
        except ValueError:  # its elements don't divide by those of a patch
            return None
        if array.shape == unfolded:
            return array.reshape(shape)
        if path.endswith("pos_embed") and array.ndim == 3 and array.shape[2] == shape[2]:
            return self._resampled(path, array)
        channels = self._image_shape[2]
        others = (array.shape[:2], array.shape[3:]) == (unfolded[:2], unfolded[3:])
        if array.ndim == 4 and others and unfolded[2] == channels and array.shape[2] <= _CHANNELS:
            self._adapted.append(f"{path} adapted from {array.shape[2]} to {channels} channels")
            return adapt_channels(array, channels).reshape(shape)
        return None

    def _resampled(self, path: str, array: np.ndarray) -> np.ndarray | None:
        """Position embeddings of another image size."""
        patch = getattr(self._network, "patch", 0)
        prefix = getattr(self._network, "embedded_tokens", 0)
        if not patch:
            return None
        rows, columns = (side // patch for side in self._image_shape[:2])
        resampled = resample_positions(array, rows, columns, prefix)
        if resampled is not None:
            before, after = array.shape[1] - prefix, f"{rows} x {columns}"
            self._adapted.append(f"{path} resampled from {before:,} patches to {after}")
        return resampled

    def _refusal(self, problems: Sequence[str]) -> str:
        network, whose = title(self._network), self._weights.network
        of = f"of {whose} " if whose and whose != network else ""
        known = [self._layout.name(path) for path in self._shapes]
        if not {*known} & self._weights.arrays.keys():
            given = _some(self._weights.arrays)
            problems = [f"they have {given} and none of {_some(known)}, which it needs"]
        return f"the weights {of}don't fit {network}: {_some(problems)}"

    def _sentence(
        self, source: str, taken: Mapping[str, Any], head: Sequence[str], reason: str | None
    ) -> str:
        details = "; ".join(filter(None, (self._weights.about, f"{self._layout.label} names")))
        parts = [f"{len(taken):,} of {len(self._shapes):,} arrays taken ({details})"]
        if reason:
            parts.append(f"{', '.join(map(_inner, head))} zero ({reason})")
        return f"init_from={printable(source)}: {'; '.join([*parts, *self._adapted])}"


def _some(texts: Collection[str]) -> str:
    """The first few of them, and how many there are besides."""
    more = f" and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    return ", ".join(itertools.islice(texts, _SHOWN)) + more


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        digest.update(path.encode())
        digest.update(array)
    return digest.hexdigest()[:16]
