"""The only file of the kit that knows flaxcls from within: a workload's Trainer and its pieces."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from workloads import Workload

from flaxcls import augment, build, cli, losses
from flaxcls.models.layers import convolve as convolve
from flaxcls.models.layers import overlapping_max_pool as overlapping_max_pool
from flaxcls.step import make_eval_step, zero_metrics
from flaxcls.trainer import Trainer, mesh_for

CONFIGS = Path(__file__).parents[2] / "configs"


def made_up_config(workload: Workload, **changes: Any) -> Any:
    """The recipe's config with made-up images, which lie on the device; nothing is cropped."""
    config = cli.load_config(str(CONFIGS / f"{workload.recipe}.py"), [])
    config = config.copy_and_resolve_references()
    for section in (config.data, config.crop, config.eval.crop):
        for field in section:
            section[field] = None
    config.data.name, config.data.train_split, config.data.eval_split = "fake", "train", "test"
    config.data.image_shape = (workload.image_size, workload.image_size, 3)
    config.data.num_classes = workload.num_classes
    config.data.num_examples = 2 * workload.batch_size
    config.image_size = config.eval.image_size = None
    config.input.mode = "resident"
    config.batch_size = workload.batch_size
    config.duration, config.schedule.warmup = "1000 steps", None
    if config.schedule.name == "one_cycle":
        config.schedule.peak = "100 steps"
    for field, value in {**workload.overrides, **changes}.items():
        config.update_from_flattened_dict({field: value})
    build.check(config)
    return config


def trainer(config: Any, mesh: Mesh | None = None) -> Trainer:
    """A run's data on the devices and its compiled functions; on all devices, or those given."""
    mesh = mesh or mesh_for(config)
    return Trainer(config, build.plan(config, mesh), mesh)


def augmentation(specs: Sequence[Mapping[str, Any]]) -> Callable:
    """`(key, batch) -> batch`, normalised by some mean and standard deviation."""
    return augment.build(specs, mean=(0.5,) * 3, std=(0.25,) * 3)


def mesh_of_one(device: jax.Device) -> Mesh:
    """A mesh of that device alone."""
    axes = ("data", "fsdp")
    return jax.make_mesh((1, 1), axes, devices=[device], axis_types=(AxisType.Auto,) * 2)


def forward(config: Any) -> tuple[Any, Any, Mapping[str, jax.Array]]:
    """`(evaluate, sums, batch)`: `sums = evaluate(variables, sums, batch)` evaluates a batch."""
    mesh = mesh_for(config)
    plan = build.plan(config, mesh)
    count, (height, width, channels) = config.batch_size, config.data.image_shape
    mean = std = (0.5,) * channels
    evaluate = jax.jit(
        make_eval_step(
            plan.network,
            losses.likelihood(config.loss.name),
            lambda images: augment.normalize(images, mean, std),
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
