"""The only file of the kit that knows flaxcls from within: a workload's Program and its pieces."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from workloads import Workload

from flaxcls import augment, build, cli
from flaxcls.config.fields import update
from flaxcls.config.recipes import apply_override
from flaxcls.core.step import make_eval_step, zero_metrics
from flaxcls.models.attention import attention as attention
from flaxcls.models.layers import convolve as convolve
from flaxcls.models.pooling import overlapping_max_pool as overlapping_max_pool
from flaxcls.perf.hlo_text import Module
from flaxcls.perf.traffic import operators
from flaxcls.runtime import topologies
from flaxcls.training.data import RunData
from flaxcls.training.program import Program

CONFIGS = Path(__file__).parents[2] / "configs"


def made_up_config(workload: Workload, **changes: Any) -> Any:
    """The recipe's config with made-up images, which lie on the device; nothing is cropped."""
    config = cli.load_config(str(CONFIGS / f"{workload.recipe}.py"), [])
    config.batch_size = workload.batch_size
    size, classes = workload.image_size, workload.num_classes
    config = build.on_fake_data(config, image_size=size, num_classes=classes)
    config.input.mode = "resident"
    config.duration = "1000 steps"
    config.model.batch_norm_group = None  # as the peers: of all that the device computes
    if config.schedule.name == "one_cycle":
        config.schedule.peak = "100 steps"
    update(config, {**workload.overrides, **changes})
    build.check(config)
    return config


def program(config: Any, mesh: Mesh | None = None) -> Program:
    """A run's data on the devices and its compiled functions; on all devices, or those given."""
    return Program.open(build.make_experiment(config, mesh or build.mesh(config)))


def compiled_step(
    workload: Workload, overrides: Sequence[str], device: jax.Device
) -> jax.stages.Compiled:
    """A workload's training step for a device that need not be there; no image is made.

    Its config is changed by overrides "field=value".
    """
    config = made_up_config(workload)
    for override in overrides:
        apply_override(config, override)
    build.check(config)
    open_split = build.source_or_description
    experiment = build.make_experiment(config, mesh_of_one(device), open_split)
    lowered = Program(experiment, RunData.unread(experiment)).lower(0)
    return lowered.compile(compiler_options=topologies.compiler_options([device]))


def kernels(program: str) -> Iterator[tuple[str, int]]:
    """The name of each that a step starts, and the bytes that it reads and writes, by HLO text."""
    for operator, times, read, written in operators(Module(program)):
        yield from [(operator.name, read + written)] * times


def augmentation(specs: Sequence[Mapping[str, Any]]) -> Callable:
    """`(key, batch) -> batch`, normalised by some mean and standard deviation."""
    return augment.build(specs, mean=(0.5,) * 3, std=(0.25,) * 3)


def mesh_of_one(device: jax.Device) -> Mesh:
    """A mesh of that device alone."""
    axes = ("data", "fsdp")
    return jax.make_mesh((1, 1), axes, devices=[device], axis_types=(AxisType.Auto,) * 2)


def forward(config: Any) -> tuple[Any, Any, Mapping[str, jax.Array]]:
    """`(evaluate, sums, batch)`: `sums = evaluate(variables, sums, batch)` evaluates a batch."""
    experiment = build.make_experiment(config, build.mesh(config))
    count, (height, width, channels) = config.batch_size, config.data.image_shape
    mean = std = (0.5,) * channels
    evaluate = jax.jit(
        make_eval_step(
            lambda variables, images: experiment.network.apply(
                variables, augment.normalize(images, mean, std), train=False
            ),
            experiment.loss.likelihood,
        ),
        donate_argnums=1,
    )
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)
    batch = {
        "image": jnp.asarray(images),
        "label": jnp.arange(count) % config.data.num_classes,
        "mask": jnp.ones(count),
    }
    return evaluate, zero_metrics(config.data.num_classes), batch
