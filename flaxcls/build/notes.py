"""What a user may not have meant, though it can be done: sentences for the beginning of a run."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls.build.accepted import SECTIONS
from flaxcls.build.length import Length
from flaxcls.build.pieces import batch_norm_group
from flaxcls.core import schedules
from flaxcls.data.pipeline import DatasetSummary, Sizes, summarize
from flaxcls.data.source import Source, Subset, all_ignored, resolve_split
from flaxcls.runtime.output import printable
from flaxcls.runtime.sharding import batch_parts

_LARGE = 96  # pixels per side; pictures are seldom so small that this would be much larger
_ENLARGED = 4  # times; more is taken for a mistake


def shortened(schedule: Mapping[str, Any], run: Length) -> Iterator[str]:
    """That warm-up, cooldown or the way to one_cycle's peak take more steps than there are."""
    peak = schedule.get("peak")
    if peak and run.to_steps(peak) > run.total_steps:
        yield (f"config.schedule.peak = {peak!r} is shortened to the run's {run.total_steps} steps")
    given = {field: schedule.get(field) for field in ("warmup", "cooldown")}
    warmup, cooldown = (run.to_steps(text) if text else 0 for text in given.values())
    if warmup + cooldown <= run.total_steps:
        return
    fitted = schedules.fitted(warmup, cooldown, run.total_steps)
    for (field, text), fits in zip(given.items(), fitted, strict=True):
        if text:
            yield (
                f"config.schedule.{field} = {text!r} is shortened to {fits} of the run's "
                f"{run.total_steps} steps"
            )


def in_both(first: Source, second: Source, open_split: Callable[[str], Source]) -> int:
    """How many examples two splits of the same data share; `open_split` opens others of it."""
    if first.fingerprint == second.fingerprint:
        return len(second)
    names = [_names(source) for source in (first, second)]
    if not names[0] & names[1]:
        return 0
    sizes = {name: len(open_split(name)) for name in sorted(names[0] | names[1])}
    return len(np.intersect1d(_positions(first, sizes), _positions(second, sizes)))


def evaluated_twice(
    train: Source, evaluation: Source, open_split: Callable[[str], Source]
) -> Iterator[str]:
    """That some images are both trained and evaluated on; `open_split` opens others of the data."""
    if both := in_both(train, evaluation, open_split):
        yield (
            f"{both:,} of the {len(evaluation):,} images to evaluate on are trained on as well "
            f"(config.data.train_split = {train.split!r}, eval_split = {evaluation.split!r}): the "
            "results will be too good"
        )


def balanced_twice(config: ConfigDict) -> Iterator[str]:
    """That rare classes come more often and weigh more as well."""
    loss, by_loss = config.loss, None
    if loss.class_weights in ("balanced", "effective_number"):
        by_loss = f"config.loss.class_weights = {loss.class_weights!r} makes them weigh more"
    elif loss.name == "logit_adjusted":
        by_loss = "config.loss.name = 'logit_adjusted' is for classes that come as often as they do"
    if by_loss and config.sampling != "shuffle":
        yield (
            f"config.sampling = {config.sampling!r} draws rare classes more often, and {by_loss}: "
            "one of the two balances them"
        )


def _names(source: Source) -> set[str]:
    """The splits that a source has examples of."""
    while isinstance(source, Subset):
        source = source.whole
    return {part.partition("[")[0].strip() for part in source.split.split("+")}


def _positions(source: Source, sizes: Mapping[str, int]) -> np.ndarray:
    """Where the examples of a source are in all splits, one after the other; int [N]."""
    if isinstance(source, Subset):
        return _positions(source.whole, sizes)[source.indices]
    begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    lengths = {name: [size] for name, size in sizes.items()}
    parts = (
        piece for part in source.split.split("+") for piece in resolve_split(part.strip(), lengths)
    )
    return np.concatenate([begins[part.split] + np.arange(part.start, part.stop) for part in parts])


def of_pictures(config: ConfigDict, sizes: Sizes, train: Source) -> Iterator[str]:
    """What the headers of some pictures tell, which are read once, where they are needed."""
    look = functools.cache(lambda: summarize(train, count=20))
    yield from _enlarged(sizes, train, look)
    yield from _grey(config, train, look)


def _enlarged(sizes: Sizes, train: Source, look: Callable[[], DatasetSummary]) -> Iterator[str]:
    """That pictures are made much larger than they are."""
    largest = max((size for size in sizes.sizes if size), default=0)
    height, width, _ = train.image_shape
    short_side = min(height, width) if height and width else None
    if largest > _LARGE and short_side is None and train.is_readable:
        short_side = look().short_side
    if short_side and largest > _ENLARGED * short_side:
        yield (
            f"config.image_size = {largest} enlarges pictures of {short_side} pixels "
            f"{largest / short_side:.0f} times: that costs time and adds nothing to see"
        )


def _grey(config: ConfigDict, train: Source, look: Callable[[], DatasetSummary]) -> Iterator[str]:
    """That grey pictures are read in three channels, which are equal."""
    may_be_grey = train.image_shape[2] == 3 and train.is_readable and not config.init_from
    if not may_be_grey or "channels" not in SECTIONS["data"].options(config.data.name):
        return
    if look().grey:
        yield (
            "the pictures are grey, and are read in three equal channels: "
            "--config.data.channels=1 reads one"
        )


def ignored(train: Source, evaluation: Source) -> Iterator[str]:
    """That there are pictures which are neither trained nor evaluated on."""
    ignored = all_ignored([train, evaluation])
    if ignored.pictures:
        yield f"{ignored.sentence()}, such as {printable(ignored.pictures[0])}"


def batch_norm_groups(config: ConfigDict, mesh: Mesh, variables: Mapping) -> Iterator[str]:
    """That config.model.batch_norm_group does nothing, or makes devices wait for each other."""
    group = batch_norm_group(config)
    if group is None:
        return
    share = config.batch_size // config.gradient_accumulation // batch_parts(mesh)
    if "batch_stats" not in variables:
        yield (
            f"config.model.batch_norm_group = {group} changes nothing: {config.model.name} has no "
            "BatchNorm"
        )
    elif share % group:
        yield (
            f"config.model.batch_norm_group = {group} does not divide the {share} examples that a "
            "device computes at a time: BatchNorm makes the devices wait for each other"
        )
