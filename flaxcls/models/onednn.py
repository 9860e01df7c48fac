"""Convolutions by oneDNN instead of XLA, where a step is for CPUs and oneDNN is installed."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from flaxcls.runtime import onednn, sharding
from flaxcls.runtime.cores import available_cores

# FLOPs on a device from which on it is faster: a call costs some 50 microseconds. Images/s of the
# training step against XLA's, in turns, 2 cores of an AMD EPYC, jax 0.10.2, other jobs running:
# cifar10_quick 1.75, _vgg16_bn 1.40, _resnet20 1.26, _convnet 1.10; _keras_cnn, whose convolutions
# have 0.02 to 0.05 GFLOP, 0.92.
SMALLEST = 1e8

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def convolutions_for(mesh: Mesh, function: Callable) -> Callable:
    """The function, in which `convolve` may use oneDNN when it is traced for a mesh of CPUs.

    It is compiled for this machine and mesh alone: not what is exported.
    """
    if sharding.platform(mesh) != "cpu" or onednn.version() is None:
        return function

    @functools.wraps(function)
    def traced(*arguments):
        with _for(mesh):
            return function(*arguments)

    return traced


@contextlib.contextmanager
def _for(mesh: Mesh) -> Iterator[None]:
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


class _Geometry(NamedTuple):
    mesh: Mesh
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array | None:
    """x [B,H,W,C] and kernel [h,w,C,D] -> [B,H,W,D]; None if it can't be done here by oneDNN.

    It can in a function of `convolutions_for`, in float32 or bfloat16; small ones are left to XLA.
    """
    mesh = _MESH.get()
    if mesh is None or x.dtype != kernel.dtype or len(x) % sharding.batch_parts(mesh):
        return None
    geometry = _Geometry(mesh, tuple(strides), (*padding[0], *padding[1]))
    kinds = ("forward", "images", "kernel")
    all_kinds = [_on_device(geometry, kind, x, kernel) for kind in kinds]
    if all_kinds[0].flops < SMALLEST or not all(map(onednn.can, all_kinds)):
        return None
    return _convolve(geometry, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(geometry: _Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    convolution = _on_device(geometry, "forward", x, kernel)
    in_specs = sharding.BATCH, PartitionSpec()
    return _on_each(geometry, convolution, in_specs, sharding.BATCH)(x, kernel)


def _forward(geometry: _Geometry, x: jax.Array, kernel: jax.Array):
    return _convolve(geometry, x, kernel), (x, kernel)


def _backward(geometry: _Geometry, arrays: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, kernel = arrays
    by_x = _on_device(geometry, "images", x, kernel)
    by_kernel = _on_device(geometry, "kernel", x, kernel)
    batch, everywhere = sharding.BATCH, PartitionSpec()
    return (
        _on_each(geometry, by_x, (everywhere, batch), batch)(kernel, gradient),
        _on_each(geometry, by_kernel, (batch, batch), everywhere)(x, gradient),
    )


_convolve.defvjp(_forward, _backward)


def _on_device(
    geometry: _Geometry, kind: onednn.Kind, x: jax.Array, kernel: jax.Array
) -> onednn.Convolution:
    """What a device computes of it: its part of the batch, on its share of the cores."""
    mesh, strides, padding = geometry
    images = len(x) // sharding.batch_parts(mesh), *x.shape[1:]
    devices = len(mesh.local_devices)
    threads = max(1, available_cores() // devices)
    return onednn.Convolution(kind, x.dtype.name, images, kernel.shape, strides, padding, threads)


def _on_each(
    geometry: _Geometry,
    convolution: onednn.Convolution,
    in_specs: tuple[PartitionSpec, PartitionSpec],
    out_spec: PartitionSpec,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The convolution on each device; what all are to have is the sum over them."""

    def compute(first: jax.Array, second: jax.Array) -> jax.Array:
        result = onednn.call(convolution, first, second)
        if out_spec == PartitionSpec():
            return jax.lax.psum(result, sharding.BATCH[0])
        return result

    return jax.shard_map(
        compute, mesh=geometry.mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False
    )
