"""What the networks share: convolution, pooling, initialisers and types of options."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxcls.config.options import Range
from flaxcls.errors import ConfigError
from flaxcls.models.convolution import convolve, convolve_fixed

View = Callable[[jax.Array], jax.Array]

# `nn.Conv` with the same parameters, otherwise computed.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: convolve)
FixedConv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: convolve_fixed)


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """The maximum of each non-overlapping `window` x `window` square of [B,H,W,C].

    Equals `nn.max_pool` with VALID padding: rows and columns that fill no window are cut off, and
    the first of equal maxima has the gradient. Which that is is kept as a number: XLA:CPU may
    compute what is pooled anew for the gradient, with other roundings, which equal no maximum then.
    On CPU a training step of keras_cnn or torch_convnet takes 2/3 of the time (jax 0.10.2).
    """
    return _gathered_max_pool(x, window, window, 0)


def overlapping_max_pool(
    x: jax.Array, window: int = 3, stride: int = 2, padding: int = 1
) -> jax.Array:
    """The maximum of each `window` x `window` square, `stride` apart, of [B,H,W,C].

    Equals `nn.max_pool` with that padding on each side. On GPUs the gradient is not scattered, as
    XLA does it, by additions in an order that may change, but gathered: 1.63 instead of 2.25 ms for
    256 images of 112 pixels and 64 channels in bfloat16 (H200, jax 0.11.2).
    """
    options = {"window": window, "stride": stride, "padding": padding}
    gathered = functools.partial(_gathered_max_pool, **options)

    def scattered(x: jax.Array) -> jax.Array:
        sides = (padding, padding)
        return nn.max_pool(x, (window, window), (stride, stride), padding=(sides, sides))

    return lax.platform_dependent(x, cuda=gathered, rocm=gathered, default=scattered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered_max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    return _max_and_position(x, window, stride, padding)[0]


def _max_and_position(
    x: jax.Array, window: int, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The maxima, and which pixel of its window each is, uint8: the first of equal ones."""
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(x, sides, constant_values=-jnp.inf)
    rows, columns = (-(-(size - window + 1) // stride) for size in padded.shape[1:3])
    # One after the other: the window's pixels meet in one fused loop.
    best = position = None
    for number, (i, j) in enumerate(itertools.product(range(window), repeat=2)):
        stop = i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1
        pixel = padded[:, i : stop[0] : stride, j : stop[1] : stride]
        if best is None:
            best, position = pixel, jnp.zeros(pixel.shape, jnp.uint8)
        else:
            position = jnp.where(pixel > best, jnp.uint8(number), position)
            best = jnp.maximum(best, pixel)
    return best, position


def _gathered_max_pool_forward(x: jax.Array, window: int, stride: int, padding: int):
    best, position = _max_and_position(x, window, stride, padding)
    return best, (position, jnp.zeros((0, *x.shape[1:3])))  # the second for its shape alone


def _gathered_max_pool_backward(window: int, stride: int, padding: int, saved, gradient: jax.Array):
    """Each pixel adds up the gradients of the windows, at most four, whose maximum it is."""
    position, image = saved
    zero = jnp.zeros((), gradient.dtype)
    total = None
    for number, start in enumerate(itertools.product(range(window), repeat=2)):
        own = jnp.where(position == number, gradient, zero)
        sides = [
            (i - padding, size - (i - padding) - (count - 1) * stride - 1, stride - 1)
            for i, size, count in zip(start, image.shape[1:], own.shape[1:3], strict=True)
        ]
        own = lax.pad(own, zero, [(0, 0, 0), *sides, (0, 0, 0)])
        total = own if total is None else total + own
    return (total,)


_gathered_max_pool.defvjp(_gathered_max_pool_forward, _gathered_max_pool_backward)


def average_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """The mean of each non-overlapping `window` x `window` square of [B,H,W,C]."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x[:, : rows * window, : columns * window]
    return x.reshape(batch, rows, window, columns, window, channels).mean(axis=(2, 4))


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """[B,H,W,C] -> [B,size,size,C], as PyTorch's AdaptiveAvgPool2d.

    The mean i of a side of H pixels spans floor(i * H / size) to ceil((i + 1) * H / size): where
    `size` does not divide H they overlap, and where it is larger pixels are repeated.
    """
    for axis in (1, 2):
        pixels = x.shape[axis]
        if pixels == size:
            continue
        spans = [(i * pixels // size, -(-(i + 1) * pixels // size)) for i in range(size)]
        parts = [lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in spans]
        x = jnp.concatenate([part.mean(axis, keepdims=True) for part in parts], axis)
    return x


def flatten(x: jax.Array) -> jax.Array:
    """[B, ...] -> [B, N]; B may be symbolic, which `len` can't tell."""
    return x.reshape(x.shape[0], -1)


def patches(x: jax.Array, size: int) -> jax.Array:
    """[B,H,W,C] -> [B, H/size, W/size, size * size * C]: a pixel a patch.

    A Dense layer over them is the convolution of that size and stride: its kernel is the
    convolution's [size, size, C, D], flattened. XLA:GPU is slow to tune convolutions of 16 pixels.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return x.reshape(batch, rows, columns, size * size * channels)


def drop_path(x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Stochastic depth: zeroes whole examples of a branch [B, ...], scales the others up.

    Huang et al. 2016, arXiv:1603.09382; per example as in timm and torchvision.
    """
    alike = tuple(range(1, x.ndim))
    return nn.Dropout(rate, broadcast_dims=alike, deterministic=not train)(x)


def record(module: nn.Module, name: str, x: jax.Array, view: View = lambda x: x) -> None:
    """Keeps `view(x)` as the network's feature `name` where features are asked for.

    "pooled" [B,D] is what the head is given, before dropout; "stage1", "stage2" and so on [B,H,W,C]
    are the last maps of each resolution, and "block1" and so on those of transformers, whose tokens
    are patches. The last map of all is what is pooled, where the network pools by a mean.
    `models.features` asks for them; elsewhere this costs nothing. The last of a name stays.
    """
    if module.is_mutable_collection("features") and not module.is_initializing():
        module.put_variable("features", name, view(x))  # `sow` wants a name that no layer has


def global_average(x: jax.Array) -> jax.Array:
    """The mean over the pixels of [B,H,W,C], at least in float32: [B,C]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rate of each block: from 0 for the first, linearly, to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


class Mlp(nn.Module):
    """Two dense layers over the last axis, which keeps its size, with GELU (exact) between."""

    hidden: int
    dtype: jnp.dtype
    kernel_init: Callable[..., jax.Array]
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    dropout: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not self.train)
        y = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
        return dropout()(dense(x.shape[-1], name="fc2")(dropout()(y)))


POOLS = {"max": max_pool, "average": average_pool}
ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": jnp.tanh, "gelu": nn.gelu}

# The types of options that several networks have.
Pool = Literal[*POOLS]
Activation = Literal[*ACTIVATIONS]
Widths = Annotated[tuple[int, ...], Range(1)]

# PyTorch's default for Linear and Conv2d, kaiming_uniform(a=sqrt(5)): U(-1, 1) / sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# He et al. 2015 (arXiv:1502.01852), by the outputs as torchvision's ResNets and VGGs use it.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
he_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
# U(-1, 1) / sqrt(fan_out): EfficientNet's last layer.
uniform_fan_out = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for the bias of a layer that sums `fan_in` inputs."""
    limit = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def batch_norm(
    train: bool, dtype: jnp.dtype, momentum: float = 0.9, epsilon: float = 1e-5
) -> Callable[..., nn.Module]:
    """BatchNorm as the ResNets use it: PyTorch's momentum 0.1 is 0.9 here.

    The running variance is Flax's, of the batch as it is (biased); PyTorch multiplies it
    by n / (n - 1), which at 128 images of 8x8 pixels is 1.0001.
    """
    return functools.partial(
        nn.BatchNorm, use_running_average=not train, momentum=momentum, epsilon=epsilon, dtype=dtype
    )


def batch_stats_frozen() -> contextlib.AbstractContextManager:
    """In this context BatchNorm, of any network, is as in evaluation, though the rest is trained.

    The trainer says "train" to the whole network, so that its dropout is on: each nn.BatchNorm is
    replaced by its like that uses the running statistics, and so changes none.
    """

    def as_evaluated(call, arguments, keywords, context):
        module = context.module
        if not isinstance(module, nn.BatchNorm) or module.use_running_average:
            return call(*arguments, **keywords)
        keywords = {k: v for k, v in keywords.items() if k != "use_running_average"}
        like = module.clone(parent=module.scope, use_running_average=True)
        return like(*arguments, **keywords)

    return nn.intercept_methods(as_evaluated)


def title(module: nn.Module) -> str:
    """The name users know a network by: its name in MODELS, else its class."""
    return module.name or type(module).__name__


def require_depth(module: nn.Module, rest: int) -> None:
    """Raises ConfigError unless `depth` is `rest` + 6n: 3 stages of n blocks of 2 layers."""
    depth = module.depth
    if depth <= rest or (depth - rest) % 6:
        raise ConfigError(
            f"`depth` of {title(module)} must be {rest} plus a multiple of 6, got {depth}"
        )
