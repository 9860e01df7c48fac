"""Convolutions by oneDNN instead of XLA, where a step is for CPUs and oneDNN is installed."""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

from flaxcls.models.kernels import kernels_mesh
from flaxcls.runtime import onednn, sharding
from flaxcls.runtime.cores import available_cores

# FLOPs on a device from which on it is faster: a call costs some 50 microseconds. Images/s of the
# training step against XLA's, in turns, 2 cores of an AMD EPYC, jax 0.10.2, other jobs running:
# cifar10_quick 1.75, _vgg16_bn 1.40, _resnet20 1.26, _convnet 1.10; _keras_cnn, whose convolutions
# have 0.02 to 0.05 GFLOP, 0.92.
SMALLEST = 1e8

_BATCH, _EVERYWHERE = sharding.BATCH, sharding.REPLICATED


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array | None:
    """x [B,H,W,C] and kernel [h,w,C,D] -> [B,H,W,D]; None if it can't be done here by oneDNN.

    It can in a function of `kernels_for`, in float32 or bfloat16; small ones are left to XLA.
    """
    mesh = kernels_mesh("cpu")
    if mesh is None or onednn.version() is None:
        return None
    if x.dtype != kernel.dtype or len(x) % sharding.batch_parts(mesh):
        return None
    # What a device computes: its part of the batch, on its share of the cores.
    forward = onednn.Convolution(
        "forward",
        x.dtype.name,
        (len(x) // sharding.batch_parts(mesh), *x.shape[1:]),
        kernel.shape,
        tuple(strides),
        (*padding[0], *padding[1]),
        threads=max(1, available_cores() // len(mesh.local_devices)),
    )
    by_images, by_kernel = (forward._replace(kind=kind) for kind in ("images", "kernel"))
    if forward.flops < SMALLEST or not all(map(onednn.can, (forward, by_images, by_kernel))):
        return None
    return _convolve(mesh, forward, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(
    mesh: Mesh, forward: onednn.Convolution, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    return _on_each(mesh, forward, (_BATCH, _EVERYWHERE), _BATCH)(x, kernel)


def _forward(mesh: Mesh, forward: onednn.Convolution, x: jax.Array, kernel: jax.Array):
    return _convolve(mesh, forward, x, kernel), (x, kernel)


def _backward(
    mesh: Mesh,
    forward: onednn.Convolution,
    arrays: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
):
    x, kernel = arrays
    by_images, by_kernel = (forward._replace(kind=kind) for kind in ("images", "kernel"))
    return (
        _on_each(mesh, by_images, (_EVERYWHERE, _BATCH), _BATCH)(kernel, gradient),
        _on_each(mesh, by_kernel, (_BATCH, _BATCH), _EVERYWHERE)(x, gradient),
    )


_convolve.defvjp(_forward, _backward)


def _on_each(
    mesh: Mesh,
    convolution: onednn.Convolution,
    in_specs: tuple[PartitionSpec, PartitionSpec],
    out_spec: PartitionSpec,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The convolution on each device; what all are to have is the sum over them."""

    def compute(first: jax.Array, second: jax.Array) -> jax.Array:
        result = onednn.call(convolution, first, second)
        return jax.lax.psum(result, _BATCH[0]) if out_spec == _EVERYWHERE else result

    return jax.shard_map(compute, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)
