"""What a recipe needs on a slice of accelerators, by compiling its training step for it."""

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flaxcls.build import Experiment
from flaxcls.errors import one_line
from flaxcls.perf import devices, hlo
from flaxcls.perf.figures import Figures, figure
from flaxcls.perf.flops import product_flops, xla_flops
from flaxcls.perf.hlo_text import Module
from flaxcls.perf.roofline import Roofline, roofline
from flaxcls.perf.traffic import Traffic, traffic
from flaxcls.runtime import compilation_cache, sharding
from flaxcls.training.data import RunData
from flaxcls.training.program import Program

ASSUMPTION = (
    "every chip at the published peak of what limits it, without waiting for input or for other "
    "chips; evaluation, checkpoints and compilation left out: a real run takes longer"
)
# "... the total memory required for ... (27.94G) exceeds available HBM (15.75G)", and
# "... Used 20.1G of 15.75G hbm".
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)"),
    re.compile(r"Used ([\d.]+)G of ([\d.]+)G hbm"),
)

_MEMORY_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class TooLarge(Exception):
    """A step that doesn't fit into the memory of its chips: how many GiB it needs of how many."""

    def __init__(self, needed: float | None = None, available: float | None = None):
        super().__init__(needed, available)
        self.needed, self.available = needed, available

    @classmethod
    def by_compiler(cls, message: str) -> "TooLarge":
        """As the compiler refuses it; without figures where it gives none."""
        found = next(filter(None, (pattern.search(message) for pattern in _TOO_LARGE)), None)
        return cls(*map(float, found.groups())) if found else cls()

    def __str__(self) -> str:
        if self.needed is None:
            return "does not fit into a chip's memory"
        return f"needs {self.needed:,.2f} GiB of the {self.available:,.2f} that programs get"


class Memory(NamedTuple):
    """Bytes on a chip.

    Attributes:
      parts: of the state and the input by name, without padding.
      padding: what the layouts of these add.
      temporaries: activations and all else that lives within the step.
      code: the program.
    """

    parts: Mapping[str, int]
    padding: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values()) + self.padding + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A training step, compiled for images of one size.

    Attributes:
      image_size: (height, width) of the images.
      steps: that the recipe makes of it.
      head_only: whether its input are features of the images, computed once before the first step.
      batch_size, chips: images a step, and what they are split over.
      chip: the published peaks; None for what has none, such as a CPU.
      available: bytes of a chip's memory that programs get; None where chip is.
      flops: of a chip a step, by XLA's count; or, where it has none or less, those of products and
        convolutions, read off the program.
      xla_bytes: that operators read and write a step, by XLA's count: to fast memory, too, and of a
        loop once. None where it has none.
      memory: of a chip.
      collectives: of a step.
      seconds: that lowering and compiling took.
      traffic: between a chip and its own memory, a step.
      roofline: the least time of a step; None where chip is.
    """

    image_size: tuple[int, int]
    steps: int
    head_only: bool
    batch_size: int
    chips: int
    chip: devices.Chip | None
    available: float | None
    flops: float
    xla_bytes: float | None
    memory: Memory
    collectives: tuple[hlo.Collective, ...]
    seconds: float
    traffic: tuple[Traffic, ...] = ()
    roofline: Roofline | None = None

    def per_image(self, amount: float) -> float:
        """What a chip's share of a step is of an image."""
        return amount * self.chips / self.batch_size

    @property
    def moved(self) -> int:
        """The bytes of `traffic`."""
        return sum(one.read + one.written for one in self.traffic)

    @property
    def rate(self) -> float:
        """Images/s of all chips, by the roofline."""
        return self.batch_size / self.roofline.seconds


def plan_steps(
    experiment: Experiment, compiler_options: Mapping[str, str] | None = None
) -> list[StepPlan]:
    """The training step for every image size of a recipe; no example is read.

    Args:
      experiment: its mesh may be of devices that this machine doesn't have.
      compiler_options: of XLA, by name.

    Raises:
      TooLarge: a step does not fit into the memory of its chips.
    """
    program = Program(experiment, RunData.unread(experiment))
    begins = experiment.train.sizes.begins
    ends = (*begins[1:], max(experiment.length.total_steps, begins[-1]))
    return [
        _plan_step(experiment, program, begin, end - begin, dict(compiler_options or {}))
        for begin, end in zip(begins, ends, strict=True)
    ]


def _plan_step(
    experiment: Experiment, program: Program, begin: int, steps: int, options: dict[str, str]
) -> StepPlan:
    mesh = experiment.mesh
    start = time.perf_counter()
    try:
        with compilation_cache.unused():
            compiled = program.lower(begin).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge.by_compiler(one_line(error)) from error
        raise
    seconds = time.perf_counter() - start
    cost, text = compiled.cost_analysis(), compiled.as_text()
    module, peaks = Module(text), chip(mesh)
    # XLA counts a loop's body once; with products in loops, as for gradient accumulation, these
    # alone are more.
    flops = max(xla_flops(compiled, text), product_flops(module))
    height, width, _ = experiment.train.image_shape(begin)
    plan = StepPlan(
        image_size=(height, width),
        steps=steps,
        head_only=program.head_only is not None,
        batch_size=experiment.batch_size,
        chips=mesh.size,
        chip=peaks,
        available=available(mesh),
        flops=flops,
        xla_bytes=cost.get("bytes accessed") if cost else None,
        memory=_memory(program.step_arguments(begin), compiled.memory_analysis()),
        collectives=tuple(hlo.collectives(module)),
        seconds=seconds,
        traffic=tuple(traffic(module)),
        roofline=peaks and roofline(module, peaks, flops),
    )
    if plan.chip and plan.memory.peak > plan.available:  # not every compiler minds
        raise TooLarge(plan.memory.peak / 2**30, plan.available / 2**30)
    return plan


def chip(mesh: Mesh) -> devices.Chip | None:
    """What the mesh is made of, where its peaks are known."""
    return devices.find(mesh.devices.flat[0].device_kind)


def available(mesh: Mesh) -> float | None:
    """Bytes of a chip's memory that programs get, where its peaks are known.

    Of a GPU's JAX takes three quarters unless it is told another share; the compiler for TPUs knows
    what it leaves.
    """
    peaks = chip(mesh)
    if peaks is None or sharding.platform(mesh) != "gpu":
        return peaks and peaks.hbm_bytes
    given = filter(None, map(os.environ.get, _MEMORY_FRACTION))
    return float(next(given, 0.75)) * peaks.hbm_bytes


def _memory(arguments: tuple[Any, Any, Any], found: Any) -> Memory:
    """From the arguments' shapes and XLA's `CompiledMemoryStats`."""
    state, data, batch = arguments
    parts = {
        "parameters": state.params,
        "batch statistics": state.batch_stats,
        "optimizer state": state.opt_state,
        "average (EMA)": state.ema,
        "metrics and counters": (state.step, state.rng, state.skipped, state.metrics),
        "data kept on the chip": data,
        "batch": batch,
    }
    sizes = {name: _bytes_on_a_device(tree) for name, tree in parts.items()}
    return Memory(
        parts={name: size for name, size in sizes.items() if size},
        padding=max(0, found.argument_size_in_bytes - sum(sizes.values()))
        + max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def _bytes_on_a_device(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for side in leaf.sharding.shard_shape(leaf.shape):
            size *= side
        total += size
    return total


def recipe_seconds(plans: Sequence[StepPlan]) -> float:
    """The roofline time of all steps of a recipe."""
    return sum(plan.steps * plan.roofline.seconds for plan in plans)


def image_seconds(plans: Sequence[StepPlan]) -> float:
    """The mean of that time over the recipe's images."""
    return recipe_seconds(plans) / sum(plan.steps * plan.batch_size for plan in plans)


def figures_of(plan: StepPlan) -> Figures:
    """All that is planned of a step, for machines."""
    memory = {name: figure(size, "bytes/chip") for name, size in plan.memory.parts.items()}
    found = {
        "image_height": figure(plan.image_size[0], "pixels"),
        "image_width": figure(plan.image_size[1], "pixels"),
        "steps": figure(plan.steps, "steps"),
        "batch_size": figure(plan.batch_size, "images"),
        "chips": figure(plan.chips, "chips"),
        **{f"memory: {name}": value for name, value in memory.items()},
        "memory: padding": figure(plan.memory.padding, "bytes/chip"),
        "memory: temporaries": figure(plan.memory.temporaries, "bytes/chip"),
        "memory: program": figure(plan.memory.code, "bytes/chip"),
        "memory: peak": figure(plan.memory.peak, "bytes/chip"),
        "flops": figure(plan.per_image(plan.flops), "FLOP/image"),
        "memory traffic": figure(plan.per_image(plan.moved), "bytes/image"),
        "compilation": figure(plan.seconds, "s"),
    }
    if plan.xla_bytes is not None:
        found["bytes_accessed"] = figure(plan.per_image(plan.xla_bytes), "bytes/image")
    for kind, count, size in plan.collectives:
        found[f"{kind}: count"] = figure(count, "a step")
        found[f"{kind}: bytes"] = figure(size, "bytes/chip/step")
    for one in plan.traffic:
        found[f"memory traffic: {one.kind}: read"] = figure(plan.per_image(one.read), "bytes/image")
        size = plan.per_image(one.written)
        found[f"memory traffic: {one.kind}: written"] = figure(size, "bytes/image")
    if plan.chip:
        found["memory: available"] = figure(plan.available, "bytes/chip")
        for bound, seconds in plan.roofline._asdict().items():
            found[f"roofline: {bound}"] = figure(seconds, "s")
        found["roofline_step"] = figure(plan.roofline.seconds, "s")
        found["roofline_rate"] = figure(plan.rate, "images/s")
        found["roofline_rate_per_chip"] = figure(plan.rate / plan.chips, "images/s/chip")
        found["roofline_time"] = figure(plan.steps * plan.roofline.seconds, "s")
    return found
