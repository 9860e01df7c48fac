"""The mesh, and the rules that shard every array over it; the only file that knows devices.

A batch is split over the mesh's axes `data` and `fsdp`; parameters, optimizer state and averages
are replicated over `data` and, where `fsdp` is larger than 1, split over `fsdp` (fully sharded data
parallelism: each device keeps its share of every large array and gathers it when it is used). Over
`model` the layers themselves are split, as the network's own rules say (tensor parallelism: each
device computes its share of the heads and of the hidden channels, for the same examples).
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxcls.errors import ConfigError
from flaxcls.runtime import onednn, read_ahead
from flaxcls.runtime.cores import available_cores

BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()

# Pairs of a regular expression and what shards the arrays whose path it is found in.
Rules = Sequence[tuple[str, PartitionSpec]]

# The first rule whose pattern is found in an array's path shards it.
RULES = (
    (r"(scale|bias|mean|var|step|count|rng)$", "replicate"),
    (r".*", "split_largest_axis"),
)
SMALLEST_TO_SPLIT = 2**14  # elements; below this the gather costs more than the memory saved


def cpu_devices(batch_size: int, num_processes: int = 1, *, tokens: bool = False) -> int:
    """How many host devices serve a CPU best: one, or one per core.

    With oneDNN one, but for networks of `tokens`, such as ViT. Else XLA:CPU uses the cores badly
    inside one device, so there is one per core, at most 8, and a divisor of the batch. Training
    steps in images/s with one device and with two (2 cores of an AMD EPYC, jax 0.10.2):
      with oneDNN     cifar10_mlp 7,300 and 2,500, _convnet 2,190 and 1,650, _resnet20 518 and 382,
                      _quick 645 and 584, _convnext 513 and 457, _vit 88 and 119
      without it      _quick 225 and 288, _resnet20 222 and 255
    Several processes are taken to be on one machine: clusters of CPUs are for tests.
    """
    if onednn.version() and not tokens:
        return 1
    most = max(1, min(available_cores(), 8) // num_processes)
    return max(d for d in range(1, most + 1) if batch_size % (d * num_processes) == 0 or d == 1)


def set_up_devices(
    count: int | None, batch_size: int, num_processes: int = 1, *, tokens: bool = False
) -> None:
    """Chooses the number of CPU host devices; must come before the first use of a device.

    `batch_size` is that of all processes; `count` None is what `cpu_devices` says.
    """
    count = count or cpu_devices(batch_size, num_processes, tokens=tokens)
    # XLA:CPU takes this for the number of threads, which is that of the cores without it. A device
    # that waits for the others in a collective holds a thread; with as few threads as devices runs
    # hung for good, 4 of 6 on 2 busy cores (jax 0.10.2), and none with at least 4 threads. A device
    # that is alone waits for none, and more threads than cores slow it down: with eight on two
    # cores cifar10_keras_cnn made 2,120 instead of 3,200 images/s, as idle ones spin.
    if count * num_processes > 1:
        os.environ.setdefault("NPROC", str(max(8, 4 * count)))
    # In a process that already uses its devices (a notebook, a test) their number is settled.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def platform(mesh: Mesh) -> str:
    """What the devices are: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def fast_dtype(device: jax.Device) -> str:
    """What a network is best computed in on a device: "bfloat16" where it has it, or "float32".

    XLA:CPU computes bfloat16 in float32, only slower; NVIDIA's GPUs have it from compute capability
    8.0 (Ampere) on.
    """
    if device.platform == "cpu":
        return "float32"
    # "7.5"; other makers' GPUs have none, or a name such as "gfx90a".
    capability = re.match(r"\d+", str(getattr(device, "compute_capability", "")))
    return "float32" if capability and int(capability[0]) < 8 else "bfloat16"


def block_on_cpu(mesh: Mesh, result: Any) -> Any:
    """On CPUs waits until `result` is computed, elsewhere does nothing; returns it.

    Running ahead of a CPU gains nothing, while every program that waits in XLA's queue brings the
    collectives nearer to running out of threads (see `set_up_devices`).
    """
    return jax.block_until_ready(result) if platform(mesh) == "cpu" else result


def make_mesh(fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or those given, as a (data, fsdp, model) mesh.

    `fsdp` times `model` must divide their number.
    """
    count = jax.device_count() if devices is None else len(devices)
    for field, size in (("fsdp", fsdp), ("model", model)):
        if size < 1 or count % size:
            raise ConfigError(
                f"config.mesh.{field} must divide the number of devices, {count}, got {size}"
            )
    if count % (fsdp * model):
        raise ConfigError(
            f"config.mesh.fsdp times config.mesh.model must divide the number of devices, "
            f"{count}, got {fsdp} x {model}"
        )
    return jax.make_mesh(
        (count // (fsdp * model), fsdp, model),
        ("data", "fsdp", "model"),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(mesh: Mesh, size: int) -> None:
    """ConfigError unless a batch, or its part in gradient accumulation, splits over the devices."""
    parts = batch_parts(mesh)
    if size % parts:
        alike = mesh.size // parts
        divided = f" divided by config.mesh.model = {alike}" if alike > 1 else ""
        raise ConfigError(
            f"config.batch_size (divided by config.gradient_accumulation) must be a multiple of "
            f"the {mesh.size} devices{divided}, got {size}"
        )


def _partition_spec(path: tuple, shape: tuple[int, ...], fsdp: int, rules: Rules) -> PartitionSpec:
    """The network's rule first; of the axes that it leaves whole the largest one over `fsdp`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    fits = (s for pattern, s in rules if re.search(pattern, name) and len(s) == len(shape))
    spec = list(next(fits, [None] * len(shape)))
    by_default = next(rule for pattern, rule in RULES if re.search(pattern, name))
    divisible = [axis for axis, size in enumerate(shape) if spec[axis] is None and size % fsdp == 0]
    large = np.prod(shape, dtype=int) >= SMALLEST_TO_SPLIT
    if fsdp > 1 and by_default != "replicate" and large and divisible:
        spec[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    return PartitionSpec(*spec) if any(spec) else REPLICATED


def shardings(mesh: Mesh, shapes: Any, rules: Rules = ()) -> Any:
    """For a tree of arrays or shapes, the tree of their NamedShardings.

    `rules` are the network's for the axis `model`; they hold for the optimizer's state and averages
    as for the parameters, whose paths are the ends of theirs. RULES are those for `fsdp`.
    """
    fsdp, model = mesh.shape["fsdp"], mesh.shape.get("model", 1)
    rules = rules if model > 1 else ()
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _partition_spec(path, leaf.shape, fsdp, rules)),
        shapes,
    )


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, REPLICATED)


def share_out(
    mesh: Mesh | None, function: Callable[[jax.Array], jax.Array], stack: jax.Array
) -> jax.Array:
    """`function(stack)` within a compiled step, each device computing its share of the rows.

    Args:
      mesh: the devices; None: one.
      function: [n, ...] -> [n, ...] for any n, each row from that row alone.
      stack: [N, ...]. It and the result are replicated; the result is gathered.

    Rows of zeros are added until each share is as large. Where there are more devices than rows,
    groups of devices do the same: padding for all would be gathered, too.
    """
    rows = len(stack)
    parts = _parts(mesh.size, rows) if mesh else 1
    if mesh is None or parts == 1:
        return function(stack)
    groups = Mesh(mesh.devices.reshape(-1, parts), ("group", "part"))
    share = PartitionSpec("part")
    padding = [(0, -rows % parts)] + [(0, 0)] * (stack.ndim - 1)
    # Without the first constraint XLA copies more: 0.31 instead of 0.21 GB for Muon's kernels of
    # airbench94 (4 CPU devices, jax 0.10.2).
    stack = jax.lax.with_sharding_constraint(jnp.pad(stack, padding), everywhere(mesh))
    stack = jax.shard_map(function, mesh=groups, in_specs=share, out_specs=share)(stack)
    return jax.lax.with_sharding_constraint(stack, everywhere(mesh))[:rows]


def _parts(devices: int, rows: int) -> int:
    """The smallest divisor of `devices` into which `rows` are split as finely as by all."""
    finest = -(-rows // devices)
    return next(d for d in range(1, devices + 1) if devices % d == 0 and -(-rows // d) == finest)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Replicates host arrays, the same in every process, on every device.

    CPU devices share the memory of host arrays that begin at a multiple of 64 bytes: what comes out
    must not be donated, and the host arrays must not be changed any more.
    """
    sharding = everywhere(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape), tree
    )


def copies(array: jax.Array) -> int:
    """How many copies of a replicated array this process's devices hold."""
    shards = array.addressable_shards
    if shards[0].device.platform != "cpu":
        return len(shards)
    return len({shard.data.unsafe_buffer_pointer() for shard in shards})


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch are on this process's devices, in their order."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices.values()]))


def batch_sharding(mesh: Mesh, stacked: bool = False) -> NamedSharding:
    """The sharding of an array of a batch: split over all devices but those of an axis `model`.

    Of `stacked` batches, [k, B, ...], each is split.
    """
    return NamedSharding(mesh, PartitionSpec(None, *BATCH) if stacked else BATCH)


def is_stacked(batch: Mapping[str, Any]) -> bool:
    """Whether these are the batches of several steps, [k, B, ...]."""
    return "index" in batch and batch["index"].ndim == 2


def split_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global device arrays, split over all devices, of this process's rows of a batch."""
    sharding = batch_sharding(mesh, is_stacked(batch))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def round_up(mesh: Mesh, batch_size: int) -> int:
    """The next number of examples that splits over the devices."""
    parts = batch_parts(mesh)
    return -(-batch_size // parts) * parts


def prefetch(
    mesh: Mesh, batches: Iterator[dict[str, np.ndarray]], ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """`split_batch` of every batch, made `ahead` of time in a thread while the devices compute."""

    def put_next(batches: Iterator[dict[str, np.ndarray]]) -> dict[str, jax.Array] | None:
        batch = next(batches, None)  # in the thread: making it is most of the work
        return batch if batch is None else split_batch(mesh, batch)

    on_devices = read_ahead.in_order(
        put_next, itertools.repeat(batches), threads=1, ahead=ahead, name="flaxcls-transfer"
    )
    with contextlib.closing(on_devices):
        yield from itertools.takewhile(lambda batch: batch is not None, on_devices)


def device_kind_and_count() -> dict[str, str | int]:
    """{"kind": "NVIDIA H100", "count": 8}, of all processes."""
    return {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}


def describe(mesh: Mesh) -> str:
    """`2 x cpu (data 2, fsdp 1)`; the axis `model` is named where it splits something.

    On CPUs with what convolves, where that is not XLA: `2 x cpu (data 2, fsdp 1), oneDNN 3.2.0`.
    """
    device = mesh.devices.flat[0]
    shown = {name: size for name, size in mesh.shape.items() if name != "model" or size > 1}
    axes = ", ".join(f"{name} {size}" for name, size in shown.items())
    library = onednn.version() if platform(mesh) == "cpu" else None
    return f"{mesh.size} x {device.device_kind} ({axes})" + (
        f", oneDNN {library}" if library else ""
    )
