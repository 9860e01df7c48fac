"""What would make a recipe fit on a slice, and what would make it fast there."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from flaxcls import build, models
from flaxcls.build import Experiment
from flaxcls.data.source import Source
from flaxcls.errors import ConfigError
from flaxcls.perf.plan import StepPlan, TooLarge, image_seconds, plan_steps
from flaxcls.runtime import sharding, topologies
from flaxcls.runtime.output import say

OpenSplit = Callable[[ConfigDict, str], Source]
# Of XLA, for TPUs: how much of a core's fast memory (VMEM) a fused operator may take.
COMPILER_OPTIONS = (
    {"xla_tpu_scoped_vmem_limit_kib": "32768"},
    {"xla_tpu_scoped_vmem_limit_kib": "65536"},
)


class Variant(NamedTuple):
    """What is changed of a recipe: None and {} leave it as it is."""

    batch_per_chip: int | None = None
    remat: bool | None = None
    fsdp: int | None = None
    compiler_options: Mapping[str, str] = {}

    def describe(self) -> str:
        """As it would be written on the command line."""
        options = (f"{name}={value}" for name, value in self.compiler_options.items())
        fields = {
            "--batch_per_chip": self.batch_per_chip,
            "--config.model.remat": self.remat,
            "--config.mesh.fsdp": self.fsdp,
        }
        given = (f"{name}={value}" for name, value in fields.items() if value is not None)
        return " ".join((*given, *options)) or "the recipe"


THE_RECIPE = Variant()


class Tried(NamedTuple):
    """A variant, and its steps or why there are none."""

    variant: Variant
    result: list[StepPlan] | TooLarge | ConfigError

    @property
    def fits(self) -> bool:
        return isinstance(self.result, list)


class Planner:
    """Plans the variants of a recipe on one set of devices.

    Args:
      config: the recipe's.
      devices: what it is planned for; None: the machine's own.
      open_split: the data, or what is known of them.
      batch_per_chip: images; None: the recipe's.
    """

    def __init__(
        self,
        config: ConfigDict,
        devices: Sequence[jax.Device] | None,
        open_split: OpenSplit = build.source_or_description,
        batch_per_chip: int | None = None,
    ):
        self._config, self._devices = config.copy_and_resolve_references(), devices
        self._open_split = open_split
        if batch_per_chip is not None:
            self._config.batch_size = batch_per_chip * self.chips

    def experiment(self, variant: Variant = THE_RECIPE) -> Experiment:
        """The recipe on the devices; ConfigError for what doesn't fit together."""
        config = self._config.copy_and_resolve_references()
        if variant.fsdp is not None:
            config.mesh.fsdp = variant.fsdp
        if variant.remat is not None:
            config.model.remat = variant.remat
        if variant.batch_per_chip is not None:
            config.batch_size = variant.batch_per_chip * self.chips
        build.check(config)
        mesh = build.mesh(config, self._devices)
        return build.make_experiment(config, mesh, self._open_split)

    @property
    def chips(self) -> int:
        """The number of devices."""
        if self._devices is not None:
            return len(self._devices)
        return build.mesh(self._config).size

    def plan(self, variant: Variant = THE_RECIPE) -> list[StepPlan]:
        """The steps of a variant; TooLarge or ConfigError for one that can't be."""
        options = {**topologies.compiler_options(self._devices), **variant.compiler_options}
        return plan_steps(self.experiment(variant), options)

    def tried(self, variants: Iterable[Variant]) -> Iterator[Tried]:
        """What comes of each variant; says which one is being compiled."""
        for variant in variants:
            say(f"compiling {variant.describe()} ...", error=True)
            try:
                yield Tried(variant, self.plan(variant))
            except (TooLarge, ConfigError) as error:
                yield Tried(variant, error)

    def remedies(self) -> Iterator[Tried]:
        """For a recipe that does not fit: variants of the same numbers, until one fits.

        Computing activations again and sharding the state; each alone, then both.
        """
        remat = (True,) if self._takes_remat() else ()
        fsdp = (self.chips,) if self.chips > 1 and self._config.mesh.fsdp == 1 else ()
        variants = [Variant(remat=value) for value in remat]
        variants += [Variant(fsdp=value) for value in fsdp]
        variants += [Variant(remat=a, fsdp=b) for a, b in itertools.product(remat, fsdp)]
        yield from _until_one_fits(self.tried(variants))

    def smaller_batches(self) -> Iterator[Tried]:
        """Half of the batch a chip, a quarter, ... until one fits."""
        sizes = _halves(self._config.batch_size // self.chips)
        yield from _until_one_fits(self.tried(Variant(batch_per_chip=size) for size in sizes))

    def tune(self) -> list[Tried]:
        """Batches and remat in all combinations, then compiler options for the best; sorted.

        By the roofline time an image; what can't be comes last.
        """
        size = self._config.batch_size // self.chips
        sizes = [size, 2 * size, *_halves(size)[:1]]
        remat = (None, True) if self._takes_remat() else (None,)
        variants = (Variant(*pair) for pair in itertools.product(sizes, remat))
        tried = sorted(self.tried(variants), key=_speed)
        if tried[0].fits and self._is_tpu():
            best = tried[0].variant
            more = (best._replace(compiler_options=options) for options in COMPILER_OPTIONS)
            tried = sorted([*tried, *self.tried(more)], key=_speed)
        return tried

    def _takes_remat(self) -> bool:
        """Whether the recipe's network can compute activations again, and doesn't yet."""
        model = self._config.model
        return "remat" in models.options(model.name) and not model.get("remat")

    def _is_tpu(self) -> bool:
        return sharding.platform(build.mesh(self._config, self._devices)) == "tpu"


def _until_one_fits(tried: Iterable[Tried]) -> Iterator[Tried]:
    for one in tried:
        yield one
        if one.fits:
            return


def _halves(size: int) -> list[int]:
    """A half, a quarter, ... down to 1."""
    return [size >> times for times in range(1, size.bit_length())]


def _speed(tried: Tried) -> float:
    """The roofline time an image; infinite for what can't be."""
    return image_seconds(tried.result) if tried.fits else math.inf
