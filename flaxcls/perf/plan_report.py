"""A plan in words, and as JSON has it."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from flaxcls.build import Experiment
from flaxcls.errors import ConfigError
from flaxcls.perf.plan import (
    ASSUMPTION,
    StepPlan,
    chip,
    figures_of,
    image_seconds,
    recipe_seconds,
)
from flaxcls.perf.plan_search import THE_RECIPE, Planner, Tried
from flaxcls.runtime import sharding, topologies
from flaxcls.runtime.output import write_result


def report(planner: Planner, topology: str, *, tune: bool) -> dict[str, Any]:
    """Plans a recipe on a slice and prints it; returns the figures, as JSON."""
    experiment = planner.experiment()
    peaks = chip(experiment.mesh)
    if tune and peaks is None:
        raise ConfigError(f"--tune compares by peaks, which are not known of {topology} devices")
    for line in _heading(experiment, topology):
        write_result(line)
    if tune:
        tried = planner.tune()
        lines = table(tried)
    else:
        tried = list(planner.tried([THE_RECIPE]))
        lines = _result(tried[0])
    for line in lines:
        write_result(line)
    if not tune and not tried[0].fits:
        tried += _what_fits(planner)
    return {
        "devices": sharding.describe(experiment.mesh),
        "chip": peaks._asdict() if peaks else None,
        "assumption": ASSUMPTION if peaks else None,
        "config": experiment.config,
        "data_on_this_machine": experiment.train.source.is_readable,
        "variants": [_as_json(one) for one in tried],
    }


def _heading(experiment: Experiment, topology: str) -> Iterator[str]:
    peaks, source = chip(experiment.mesh), experiment.train.source
    each = ""
    if peaks:
        each = (
            f", each {peaks.peak_tflops:g} TFLOP/s in bfloat16 and {peaks.hbm_gb:g} GiB at "
            f"{peaks.hbm_gbps:,g} GB/s"
        )
    about = f"; {topologies.compiler(topology)}" if topology != topologies.LOCAL else ""
    yield f"{topology}: {sharding.describe(experiment.mesh)}{each}; jax {jax.__version__}{about}"
    there = "" if source.is_readable else "; not on this machine, by what is known of it"
    yield (
        f"data: {source.name}, {len(source):,} images of {len(source.class_names):,} classes "
        f"({source.split}){there}; not read"
    )


def _result(tried: Tried) -> Iterator[str]:
    if isinstance(tried.result, ConfigError):
        raise tried.result
    if tried.fits:
        yield from describe(tried.result)
    else:
        yield f"the recipe does not fit: it {tried.result}"


def _what_fits(planner: Planner) -> list[Tried]:
    """Looks for, and prints, what would fit instead of the recipe."""
    tried = []
    for search in (planner.remedies(), planner.smaller_batches()):
        for one in search:
            tried.append(one)
            if not one.fits:
                write_result(f"{one.variant.describe()}: {one.result}")
                continue
            write_result(f"with {one.variant.describe()} it fits:")
            for line in describe(one.result):
                write_result(line)
    if not any(one.fits for one in tried):
        write_result("nothing that was tried fits")
    return tried


def _as_json(tried: Tried) -> dict[str, Any]:
    steps = [figures_of(plan) for plan in tried.result] if tried.fits else []
    problem = {} if tried.fits else {"problem": str(tried.result)}
    return {"variant": tried.variant._asdict(), "fits": tried.fits, "steps": steps, **problem}


def describe(plans: Sequence[StepPlan]) -> Iterator[str]:
    """Lines about the steps of a recipe on one slice, and about the whole recipe."""
    for plan in plans:
        yield from _step(plan)
    first = plans[0]
    if first.chip is None:
        yield "no time is planned: the peaks of these devices are not known"
        return
    seconds, steps = recipe_seconds(plans), sum(plan.steps for plan in plans)
    yield (
        f"the whole recipe: {steps:,} steps, at least {duration(seconds)}, "
        f"{first.chips * seconds / 3600:,.3g} chip-hours"
    )
    yield f"assumed: {ASSUMPTION}"


def _step(plan: StepPlan) -> Iterator[str]:
    height, width = plan.image_size
    if plan.head_only:
        yield "only the head is trained, on features computed once, which is left out here"
    yield (
        f"{plan.batch_size:,} images of {height} x {width} a step, "
        f"{plan.batch_size / plan.chips:,.4g} a chip; compiled in {plan.seconds:.1f} s"
    )
    yield from _memory(plan)
    flops = f"work an image: {plan.per_image(plan.flops) / 1e9:,.4g} GFLOP"
    if plan.xla_bytes is None:
        yield f"{flops}, read off the program"
    else:
        size = f"{plan.per_image(plan.xla_bytes) / 1e6:,.4g} MB"
        yield f"{flops}, {size} that operators read and write (XLA's count)"
    if plan.chip:
        yield from _traffic(plan)
    yield from _collectives(plan)
    if plan.chip:
        step = f"{1e3 * plan.roofline.seconds:,.4g} ms a step"
        flops, memory, operators = (f"{1e3 * seconds:,.4g}" for seconds in plan.roofline)
        yield (
            f"roofline: {step} (FLOPs {flops}, memory {memory}, operators in turn {operators}): "
            f"{plan.rate / plan.chips:,.0f} images/s a chip, {plan.rate:,.0f} in all"
        )


def _memory(plan: StepPlan) -> Iterator[str]:
    memory = plan.memory
    rest = {
        "padding": memory.padding,
        "temporaries (activations)": memory.temporaries,
        "program": memory.code,
    }
    yield "memory a chip:"
    for name, size in {**memory.parts, **rest}.items():
        yield f"  {name:26}{_mib(size)}"
    fits = ""
    if plan.chip:
        share = memory.peak / plan.available
        of = f"{plan.chip.hbm_gb:g} GiB"
        if plan.available < plan.chip.hbm_bytes:
            of = f"the {plan.available / 2**30:g} GiB that JAX takes of {of}"
        fits = f": fits, {100 * share:.1f} % of {of}"
    yield f"  {'peak':26}{_mib(memory.peak)}{fits}"


def _mib(size: int) -> str:
    return f"{size / 2**20:12,.{1 if size >= 2**24 else 3}f} MiB"


def _traffic(plan: StepPlan) -> Iterator[str]:
    parts = {one.kind: plan.per_image(one.read + one.written) / 1e6 for one in plan.traffic}
    named = ", ".join(f"{kind} {size:,.4g}" for kind, size in parts.items())
    ridge = plan.chip.peak_flops / plan.chip.hbm_bandwidth
    yield (
        f"to and from HBM: {plan.per_image(plan.moved) / 1e6:,.4g} MB an image ({named}); "
        f"{plan.flops / max(plan.moved, 1):,.3g} FLOP a byte, the chip can do {ridge:,.3g}"
    )


def _collectives(plan: StepPlan) -> Iterator[str]:
    if plan.chips == 1:
        return
    found = [f"{count:,} x {kind}, {size / 1e6:,.4g} MB" for kind, count, size in plan.collectives]
    yield f"between chips, a step and chip: {'; '.join(found) or 'nothing'}"


def table(tried: Sequence[Tried]) -> Iterator[str]:
    """Lines about the variants of a recipe, the fastest by image first."""
    yield f"{'us/image':>10} {'images/s':>10} {'peak GiB':>9} {'compiled':>9}  variant"
    for variant, result in tried:
        if isinstance(result, Exception):
            yield f"{'-':>10} {'-':>10} {'-':>9} {'-':>9}  {variant.describe()}: {result}"
            continue
        seconds = image_seconds(result)
        peak = max(plan.memory.peak for plan in result) / 2**30
        compiled = sum(plan.seconds for plan in result)
        yield (
            f"{1e6 * seconds:10,.4g} {1 / seconds:10,.0f} {peak:9,.2f} {compiled:7,.0f} s"
            f"  {variant.describe()}"
        )


def duration(seconds: float) -> str:
    """Such as "5.2 h"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.3g} s"
