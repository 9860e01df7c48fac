"""The update rules, and what an optimizer is built from.

A rule in RULES is `rule(context, /, *, ...) -> transformations`. What comes after the star are its
options.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxcls.config.options import BelowOne, Count, Positive
from flaxcls.core.newton_schulz import orthogonalize
from flaxcls.errors import ConfigError

Transforms = list[optax.GradientTransformation]


class ParamGroup(NamedTuple):
    """What happens to one parameter.

    Attributes:
      shape: of the parameter.
      rule: the name of the rule that moves it, or "frozen".
      weight_decay: the weight decay it gets, 0 for none.
      learning_rate_factor: its learning rate as a multiple of the schedule's.
      duration: how long it is trained, by a schedule of that length; None: to the end.
      is_exempt: whether its path matches `no_weight_decay` (a bias, a scale of a normalisation).
    """

    shape: tuple[int, ...]
    rule: str
    weight_decay: float
    learning_rate_factor: float
    is_exempt: bool
    duration: str | None = None


class UpdateContext(NamedTuple):
    """What a rule is given to build its transformations from.

    Attributes:
      groups: path -> ParamGroup of every parameter. A rule may replace entries.
      decoupled: the weight decay that the rule puts where its paper has it; identity for "l2".
      last: transformations of the finished update, to which a rule may add.
      mesh: the devices that the step is for; None: one CPU.
    """

    groups: dict[str, ParamGroup]
    decoupled: optax.GradientTransformation
    last: Transforms
    mesh: Mesh | None = None


def sgd(
    context: UpdateContext, /, *, momentum: BelowOne = 0.0, nesterov: bool = False
) -> Transforms:
    """Stochastic gradient descent; velocity = momentum * velocity + gradient, as in PyTorch."""
    return [*_momentum("sgd", momentum, nesterov), context.decoupled]


def rmsprop(
    context: UpdateContext,
    /,
    *,
    decay: BelowOne = 0.9,
    eps: Positive = 1e-8,
    momentum: BelowOne = 0.0,
) -> Transforms:
    """Gradient / (sqrt(mean square) + eps), the mean starting at 0; then momentum; as PyTorch's."""
    rms = optax.scale_by_rms(decay, eps, initial_scale=0.0, eps_in_sqrt=False)
    return [rms, *_momentum("rmsprop", momentum, False), context.decoupled]


def rmsprop_tf(
    context: UpdateContext,
    /,
    *,
    decay: BelowOne = 0.9,
    eps: Positive = 1e-3,
    momentum: BelowOne = 0.9,
) -> Transforms:
    """TensorFlow's RMSprop, as EfficientNet and MobileNetV3 were trained by; timm's RMSpropTF.

    Gradient / sqrt(mean square + eps), the mean starting at 1; the momentum is that of updates with
    their learning rates, so that a rate that falls does not act on earlier gradients. Decoupled
    weight decay, which timm keeps out of the momentum, goes through it here. The defaults are
    EfficientNet's (Tan & Le 2019); timm's are eps 1e-10 and no momentum.
    """
    if momentum:
        trained = only(context, optax.trace(momentum), lambda t: t.rule != "frozen")
        context.last.append(trained)
    rms = optax.scale_by_rms(decay, eps, initial_scale=1.0, eps_in_sqrt=True)
    return [rms, context.decoupled]


def adam(
    context: UpdateContext,
    /,
    *,
    b1: BelowOne = 0.9,
    b2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    nesterov: bool = False,
) -> Transforms:
    """Adam (Kingma & Ba 2015); with `nesterov` NAdam (Dozat 2016).

    NAdam at step t, counted from 1, has b1 m / (1 - b1^(t + 1)) + (1 - b1) g / (1 - b1^t) for the
    gradient. timm's NAdamW has 1 - b1^t under both, which is the same after some 50 steps.
    PyTorch's NAdam also lets b1 grow from half its value, by its `momentum_decay`.
    """
    return [optax.scale_by_adam(b1, b2, eps, nesterov=nesterov), context.decoupled]


def lamb(
    context: UpdateContext, /, *, b1: BelowOne = 0.9, b2: BelowOne = 0.999, eps: Positive = 1e-6
) -> Transforms:
    """LAMB (You et al. 2020): Adam's step plus the decay, scaled per layer to the parameters' norm.

    As in timm, parameters exempt from weight decay keep Adam's step. Unlike here, timm's scales no
    parameter at all where the weight decay is 0, and by default clips the gradient's norm to 1,
    which `gradient_clip_norm` does.
    """
    trust = only(context, optax.scale_by_trust_ratio(), lambda t: not t.is_exempt)
    return [optax.scale_by_adam(b1, b2, eps), context.decoupled, trust]


def lars(
    context: UpdateContext,
    /,
    *,
    momentum: BelowOne = 0.9,
    nesterov: bool = False,
    trust_coefficient: Positive = 0.001,
) -> Transforms:
    """LARS (You et al. 2017): each gradient scaled to norm trust_coefficient |p|, then momentum.

    The norm is that of the gradient g with its weight decay, |g + w p|, as in optax; the paper's
    and timm's is |g| + w |p|, which is never smaller. The learning rate comes after the momentum,
    as in timm and PyTorch's SGD; in the paper it comes before. Parameters exempt from weight decay
    are not rescaled; in timm none is where the weight decay is 0.
    """
    trust = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    trust = only(context, trust, lambda t: not t.is_exempt)
    return [trust, *_momentum("lars", momentum, nesterov), context.decoupled]


def lion(context: UpdateContext, /, *, b1: BelowOne = 0.9, b2: BelowOne = 0.99) -> Transforms:
    """Lion (Chen et al. 2023): the sign of an interpolation of gradient and momentum."""
    return [optax.scale_by_lion(b1, b2), context.decoupled]


def muon(
    context: UpdateContext,
    /,
    *,
    momentum: BelowOne = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: Count = 5,
    exclude: str = r"(^|/)head/",
    renormalize: bool = False,
    rest: Literal["adam", "sgd"] = "adam",
    rest_learning_rate: Positive = 1.0,
    rest_momentum: BelowOne = 0.9,
) -> Transforms:
    """Muon (Jordan et al. 2024): the momentum of each kernel is replaced by an orthogonal matrix.

    A kernel is a matrix [inputs, outputs]: a convolution's [H, W, I, O] is taken as [H W I, O]. The
    matrix is scaled by sqrt(max(1, outputs / inputs)). Everything else is for the rule `rest`:
    vectors, embeddings, depthwise convolutions and the kernels that `exclude` matches.

    Args:
      context: see UpdateContext.
      momentum: of the kernels.
      nesterov: for the kernels and, with `rest` "sgd", the others.
      newton_schulz_steps: iterations of the orthogonalisation; airbench takes 3.
      exclude: regular expression for paths of kernels that are for `rest`.
      renormalize: before each step, scale each kernel to the norm sqrt(outputs), as airbench does;
        such kernels have no weight decay.
      rest: "adam" (b2 0.999), or "sgd".
      rest_learning_rate: the rest's learning rate as a multiple of the kernels'.
      rest_momentum: momentum, or Adam's b1, of the rest.
    """
    excluded = compiled("`exclude`", exclude)
    matrices = {}
    for path, group in context.groups.items():
        matrix = None if excluded.search(path) else _matrix(path, group.shape)
        if group.rule == "frozen":
            continue
        if matrix:
            matrices[path] = matrix
            changes = {"weight_decay": 0.0} if renormalize else {}
        else:
            factor = group.learning_rate_factor * rest_learning_rate
            changes = {"rule": rest, "learning_rate_factor": factor}
        context.groups[path] = group._replace(**changes)
    if not matrices:
        raise ConfigError("muon found no kernel to train; `exclude` may match too much")
    if renormalize:
        context.last.append(_renormalize(matrices))

    kernels = [
        *_momentum("muon", momentum, nesterov),
        _orthogonalize(matrices, newton_schulz_steps, context.mesh),
    ]
    if rest == "adam":
        others = [optax.scale_by_adam(rest_momentum)]
    else:
        others = _momentum("muon", rest_momentum, nesterov)
    return [
        only(context, optax.chain(*kernels), lambda t: t.rule == "muon"),
        only(context, optax.chain(*others), lambda t: t.rule == rest),
        context.decoupled,
    ]


RULES: dict[str, Callable[..., Transforms]] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "rmsprop_tf": rmsprop_tf,
    "adam": adam,
    "adamw": adam,  # with another default for `weight_decay_mode`
    "lamb": lamb,
    "lars": lars,
    "lion": lion,
    "muon": muon,
}


def _momentum(owner: str, momentum: float, nesterov: bool) -> Transforms:
    """Nothing for a momentum of 0, so that it costs no memory."""
    if nesterov and not momentum:
        raise ConfigError(f"`nesterov` of {owner} needs a `momentum` above 0")
    return [optax.trace(momentum, nesterov)] if momentum else []


def _orthogonalize(
    matrices: dict[str, tuple[int, int]], steps: int, mesh: Mesh | None
) -> optax.GradientTransformation:
    """An orthogonal matrix instead of every update, scaled by its shape.

    (optax's `scale_by_muon` is not used because its Nesterov momentum is not that of Muon and
    PyTorch in the first steps.)
    """

    def orthogonal(updates: Any, _params: Any) -> Any:
        given = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(updates)}
        found = orthogonalize({p: x.reshape(matrices[p]) for p, x in given.items()}, steps, mesh)

        def scaled(path: tuple, update: jax.Array) -> jax.Array:
            inputs, outputs = matrices[path_name(path)]
            x = found[path_name(path)].reshape(update.shape)
            return math.sqrt(max(1, outputs / inputs)) * x

        return jax.tree.map_with_path(scaled, updates)

    return optax.stateless(orthogonal)


def _matrix(path: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """A parameter as (inputs, outputs) of a matrix, or None if it isn't one."""
    *_, layer, name = ("", *path.split("/"))
    is_depthwise = len(shape) == 4 and shape[2] == 1
    if name != "kernel" or len(shape) < 2 or is_depthwise:
        return None
    if layer in ("query", "key", "value", "qkv"):  # [inputs, heads, size of a head]
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


def _renormalize(matrices: dict[str, tuple[int, int]]) -> optax.GradientTransformation:
    """Adds to the update what brings the parameter, before the step, to the norm sqrt(outputs)."""

    def renormalize(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        if path not in matrices:
            return update
        norm = jnp.maximum(jnp.linalg.norm(param.reshape(-1)), 1e-8)
        return update + (math.sqrt(matrices[path][1]) / norm - 1) * param

    return by_path(renormalize)


def by_path(
    function: Callable[[str, jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """The stateless transformation update -> function(path, update, param) of every parameter."""

    def update_function(updates: Any, params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, update, param: function(path_name(path), update, param), updates, params
        )

    return optax.stateless(update_function)


def only(
    context: UpdateContext,
    transform: optax.GradientTransformation,
    chosen: Callable[[ParamGroup], bool],
) -> optax.GradientTransformation:
    """The transformation of the chosen parameters; the updates of the others pass unchanged."""

    def mask(tree: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: chosen(context.groups[path_name(path)]), tree)

    return optax.masked(transform, mask)


def path_name(path: tuple) -> str:
    """A path of a tree such as "block1/conv1/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def compiled(option: str, pattern: str) -> re.Pattern:
    """The regular expression; ConfigError if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{option} is not a regular expression ({error}), got {pattern!r}"
        ) from None
