"""What the networks share: convolution, residual branches, initialisers and types of options."""

import contextlib
import functools
from collections.abc import Callable
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxcls.config.options import Range
from flaxcls.errors import ConfigError
from flaxcls.models.convolution import convolve, convolve_fixed

View = Callable[[jax.Array], jax.Array]

# `nn.Conv` with the same parameters, otherwise computed.
Conv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: convolve)
FixedConv = functools.partial(nn.Conv, conv_general_dilated_cls=lambda: convolve_fixed)


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


def record(module: nn.Module, name: str, x: jax.Array, view: View = lambda x: x) -> jax.Array:
    """Keeps `view(x)` as the network's feature `name` where features are asked for; returns `x`.

    "pooled" [B,D] is what the head is given, before dropout; "stage1", "stage2" and so on [B,H,W,C]
    are the last maps of each resolution, and "block1" and so on those of transformers, whose tokens
    are patches. The last map of all is what is pooled, where the network pools by a mean.
    `models.features` asks for them; elsewhere this costs nothing. The last of a name stays.

    What follows in the network is to use what is returned: `models.logits_and_features` can add to
    a map (a perturbation of 0 has the gradient of the map), whose `view` must be linear, then.
    """
    if module.is_mutable_collection("features") and not module.is_initializing():
        if module.has_variable("perturbations", name):
            added = module.get_variable("perturbations", name)
            x = x + jax.linear_transpose(view, x)(added)[0]  # each value to where it is seen
        module.put_variable("features", name, view(x))  # `sow` wants a name that no layer has
    return x


def rematerialized(block: type[nn.Module], remat: bool) -> type[nn.Module]:
    """The block, with `remat` computed again in the backward pass: a third more time, less memory.

    Between blocks nothing is computed again, so the map that each is given is kept.
    """
    return nn.remat(block) if remat else block


def scale_channels(module: nn.Module, name: str, x: jax.Array, initial: float) -> jax.Array:
    """LayerScale: a factor a channel that starts small (Touvron et al. 2021, arXiv:2103.17239)."""
    factor = module.param(name, nn.initializers.constant(initial), x.shape[-1:])
    return x * factor.astype(x.dtype)


def pyramid(
    network: nn.Module,
    x: jax.Array,
    begin: Callable[[jax.Array, int, int], jax.Array],
    block: Callable[..., nn.Module],
    end: View = lambda x: x,
) -> jax.Array:
    """Stages of `network.depths` blocks, each twice as wide as the one before; they are recorded.

    `begin(x, stage, width)` halves the pixels before a stage (its number counts from 1),
    `block(width, i, drop_path=, name=)` makes its block i, and the last map goes through `end`.
    """
    rates = iter(drop_path_rates(network.drop_path, sum(network.depths)))
    for stage, depth in enumerate(network.depths, start=1):
        width = network.width * 2 ** (stage - 1)
        x = begin(x, stage, width)
        for i in range(depth):
            x = block(width, i, drop_path=next(rates), name=f"stage{stage}_block{i + 1}")(x)
        if stage == len(network.depths):
            x = end(x)
        x = record(network, f"stage{stage}", x)
    return x


# How an Mlp is split over the mesh's axis `model`: each device has some of the hidden channels.
MLP_PARTITION_RULES = (
    (r"/fc1/kernel$", PartitionSpec(None, "model")),
    (r"/fc1/bias$", PartitionSpec("model")),
    (r"/fc2/kernel$", PartitionSpec("model", None)),
)


class PatchEmbedding:
    """A network whose first layer is the nn.Dense "patch_embed" over squares of `patch` pixels."""

    @property
    def torch_shapes(self):
        return ((r"^patch_embed/kernel", (self.patch, self.patch, -1, self.width)),)

    @property
    def image_size_multiple(self) -> int:
        return self.patch


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
        y = exact_gelu(dense(self.hidden, name="fc1")(x))
        return dropout()(dense(x.shape[-1], name="fc2")(dropout()(y)))


def exact_gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's P(X <= x) (Hendrycks & Gimpel 2016), in float32 inside.

    By erf, as PyTorch computes it. `nn.gelu` takes erfc, for which XLA computes both, in bfloat16:
    on a CPU that takes 2.5 times as long in float32 and 2.8 in bfloat16, with the gradient 1.4 and
    3.6 times (jax 0.10.2).
    """
    y = x.astype(jnp.float32)
    return (y * 0.5 * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid, "tanh": jnp.tanh, "gelu": nn.gelu}

# The types of options that several networks have.
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


def batch_stats_of_examples(mask: jax.Array) -> contextlib.AbstractContextManager:
    """In this context BatchNorm normalises by the statistics of the batch, and keeps just these.

    The network is to be called with `train=False`, so that there is no dropout. Only the examples
    with 1 in `mask`, [B], count. Of a network whose "batch_stats" are mutable these come out as the
    mean and the (biased) variance over the examples and their pixels.
    """

    def by_examples(call, arguments, keywords, context):
        module = context.module
        if not isinstance(module, nn.BatchNorm) or module.use_running_average is False:
            return call(*arguments, **keywords)
        x = arguments[0]
        like = module.clone(parent=module.scope, use_running_average=False, momentum=0.0)
        return like(x, mask=mask.astype(bool).reshape(-1, *(1,) * (x.ndim - 1)))

    return nn.intercept_methods(by_examples)


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
