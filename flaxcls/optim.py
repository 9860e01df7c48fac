"""The optimizer as one visible list of optax transformations, and what it does to each parameter.

    clip -> weight decay (l2) -> rule, with weight decay (decoupled) -> learning rate -> scale(-1)

Weight decay w is one of two things, by `weight_decay_mode`:
  "l2"         the gradient of w/2 |p|^2 is added to the gradient before the rule. PyTorch's SGD,
               RMSprop and Adam do this, and so do sgd, rmsprop, adam and lars here by default.
  "decoupled"  learning_rate * w * p is taken off the parameter besides the rule's step (AdamW,
               Loshchilov & Hutter 2019; multiplied by the learning rate, as in PyTorch and optax).
               The default of adamw, lamb, lion and muon.

A parameter is known by its path, such as "block1/conv1/kernel". The numbers that differ between
parameters are looked up by path, so that they also hold inside `optax.masked`, and the optimizer's
state has only trees of the parameters' structure, whose paths end in the parameter's path (which is
how sharding rules find them), and scalars. The state is float32 whatever the parameters are.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxcls.errors import ConfigError
from flaxcls.options import accepted, check, look_up

L2_BY_DEFAULT = ("sgd", "rmsprop", "adam", "lars")
Transforms = list[optax.GradientTransformation]


class Treatment(NamedTuple):
    """What happens to one parameter.

    Attributes:
      shape: of the parameter.
      rule: the name of the rule that moves it, or "frozen".
      weight_decay: the weight decay it gets, 0 for none.
      learning_rate_factor: its learning rate as a multiple of the schedule's.
      is_exempt: whether its path matches `no_weight_decay` (a bias, a scale of a normalisation).
    """

    shape: tuple[int, ...]
    rule: str
    weight_decay: float
    learning_rate_factor: float
    is_exempt: bool


class Plan(NamedTuple):
    """What a rule is given to build its transformations from.

    Attributes:
      treatments: path -> Treatment of every parameter. A rule may replace entries.
      decoupled: the weight decay that the rule puts where its paper has it; identity for "l2".
      last: transformations of the finished update, to which a rule may add.
    """

    treatments: dict[str, Treatment]
    decoupled: optax.GradientTransformation
    last: Transforms


def sgd(plan: Plan, /, *, momentum: float = 0.0, nesterov: bool = False) -> Transforms:
    """Stochastic gradient descent; velocity = momentum * velocity + gradient, as in PyTorch."""
    return [*_momentum("sgd", momentum, nesterov), plan.decoupled]


def rmsprop(
    plan: Plan, /, *, decay: float = 0.9, eps: float = 1e-8, momentum: float = 0.0
) -> Transforms:
    """Gradient / (sqrt(mean square) + eps), the mean starting at 0; then momentum; as PyTorch's."""
    _require_share("rmsprop", decay=decay)
    _require_positive("rmsprop", eps=eps)
    rms = optax.scale_by_rms(decay, eps, initial_scale=0.0, eps_in_sqrt=False)
    return [rms, *_momentum("rmsprop", momentum, False), plan.decoupled]


def adam(
    plan: Plan,
    /,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    nesterov: bool = False,
) -> Transforms:
    """Adam (Kingma & Ba 2015); with `nesterov` NAdam (Dozat 2016)."""
    _require_share("adam", b1=b1, b2=b2)
    _require_positive("adam", eps=eps)
    return [optax.scale_by_adam(b1, b2, eps, nesterov=nesterov), plan.decoupled]


def lamb(plan: Plan, /, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> Transforms:
    """LAMB (You et al. 2020): Adam's step plus the decay, made as long as the layer's parameters.

    As in timm, parameters exempt from weight decay keep Adam's step.
    """
    _require_share("lamb", b1=b1, b2=b2)
    _require_positive("lamb", eps=eps)
    trust = _only(plan, optax.scale_by_trust_ratio(), lambda t: not t.is_exempt)
    return [optax.scale_by_adam(b1, b2, eps), plan.decoupled, trust]


def lars(
    plan: Plan,
    /,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
) -> Transforms:
    """LARS (You et al. 2017): each layer's gradient made trust_coefficient |p| long, then momentum.

    The length is that of the gradient with its weight decay, as in optax. The learning rate comes
    after the momentum, as in PyTorch's SGD. Parameters exempt from weight decay are not rescaled.
    """
    _require_positive("lars", trust_coefficient=trust_coefficient)
    trust = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    trust = _only(plan, trust, lambda t: not t.is_exempt)
    return [trust, *_momentum("lars", momentum, nesterov), plan.decoupled]


def lion(plan: Plan, /, *, b1: float = 0.9, b2: float = 0.99) -> Transforms:
    """Lion (Chen et al. 2023): the sign of an interpolation of gradient and momentum."""
    _require_share("lion", b1=b1, b2=b2)
    return [optax.scale_by_lion(b1, b2), plan.decoupled]


def muon(
    plan: Plan,
    /,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    exclude: str = r"(^|/)head/",
    renormalize: bool = False,
    rest: Literal["adam", "sgd"] = "adam",
    rest_learning_rate: float = 1.0,
    rest_momentum: float = 0.9,
) -> Transforms:
    """Muon (Jordan et al. 2024): the momentum of each kernel is replaced by an orthogonal matrix.

    A kernel is a matrix [inputs, outputs]: a convolution's [H, W, I, O] is taken as [H W I, O]. The
    matrix is scaled by sqrt(max(1, outputs / inputs)). Everything else is for the rule `rest`:
    vectors, embeddings, depthwise convolutions and the kernels that `exclude` matches.

    Args:
      plan: see Plan.
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
    if newton_schulz_steps < 1:
        raise ConfigError(
            f"`newton_schulz_steps` of muon must be at least 1, got {newton_schulz_steps}"
        )
    _require_positive("muon", rest_learning_rate=rest_learning_rate)
    excluded = _pattern("exclude", exclude)
    matrices = {}
    for path, treatment in plan.treatments.items():
        matrix = None if excluded.search(path) else _matrix(path, treatment.shape)
        if treatment.rule == "frozen":
            continue
        if matrix:
            matrices[path] = matrix
            changes = {"weight_decay": 0.0} if renormalize else {}
        else:
            factor = treatment.learning_rate_factor * rest_learning_rate
            changes = {"rule": rest, "learning_rate_factor": factor}
        plan.treatments[path] = treatment._replace(**changes)
    if not matrices:
        raise ConfigError("muon found no kernel to train; `exclude` may match too much")
    if renormalize:
        plan.last.append(_renormalize(matrices))

    kernels = [
        *_momentum("muon", momentum, nesterov),
        _orthogonalize(matrices, newton_schulz_steps),
    ]
    if rest == "adam":
        _require_share("muon", rest_momentum=rest_momentum)
        others = [optax.scale_by_adam(rest_momentum)]
    else:
        others = _momentum("muon", rest_momentum, nesterov)
    return [
        _only(plan, optax.chain(*kernels), lambda t: t.rule == "muon"),
        _only(plan, optax.chain(*others), lambda t: t.rule == rest),
        plan.decoupled,
    ]


RULES: dict[str, Callable[..., Transforms]] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adam,  # with another default for `weight_decay_mode`
    "lamb": lamb,
    "lars": lars,
    "lion": lion,
    "muon": muon,
}


def build(
    name: str,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    params: Any,
    weight_decay: float = 0.0,
    weight_decay_mode: Literal["l2", "decoupled"] | None = None,
    no_weight_decay: str = r"(^|/)(bias|scale)$",
    weight_decay_factors: Sequence[tuple[str, float]] = (),
    learning_rate_factors: Sequence[tuple[str, float]] = (),
    frozen: str | None = None,
    gradient_clip_norm: float | None = None,
    gradient_clip_value: float | None = None,
    **options,
) -> tuple[optax.GradientTransformation, str]:
    """Returns the optimizer, and a description of what it does to which parameters.

    Regular expressions are searched for in paths such as "block1/conv1/kernel". In the lists of
    (regular expression, factor) the first that is found counts, and one that is found in no path is
    an error, as is a `frozen` that is.

    Args:
      name: one of RULES.
      schedule: step -> learning rate; the step is counted in the optimizer's state.
      params: the parameters or their shapes.
      weight_decay: strength, at least 0.
      weight_decay_mode: see the module; None: the rule's own.
      no_weight_decay: parameters exempt from weight decay, and from the layerwise lengths of LAMB
        and LARS.
      weight_decay_factors: multiples of the weight decay for some parameters.
      learning_rate_factors: multiples of the learning rate for some parameters.
      frozen: parameters that are not trained: no update, no state, no part in the gradient's norm.
      gradient_clip_norm: largest norm of the gradient of all parameters together.
      gradient_clip_value: largest absolute value of each element of the gradient.
      **options: those of the named rule.

    Raises ConfigError for what is unknown or out of range.
    """
    rule = look_up("config.optimizer.name", name, RULES)
    check("config.optimizer", name, options, accepted(rule, ("plan",)))
    mode = weight_decay_mode or ("l2" if name in L2_BY_DEFAULT else "decoupled")
    if mode not in ("l2", "decoupled"):
        raise ConfigError(f"`weight_decay_mode` must be 'l2' or 'decoupled', got {mode!r}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"`weight_decay` must be at least 0, got {weight_decay}")

    paths = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    shapes = dict(zip(paths, (leaf.shape for leaf in jax.tree.leaves(params)), strict=True))
    decay_factor = _factor_of("weight_decay_factors", weight_decay_factors, paths)
    rate_factor = _factor_of("learning_rate_factors", learning_rate_factors, paths)
    is_frozen = _found_in("frozen", frozen, paths) if frozen else set()
    exempt = _pattern("no_weight_decay", no_weight_decay)
    treatments = {}
    for path, shape in shapes.items():
        is_exempt = bool(exempt.search(path))
        treatments[path] = Treatment(
            shape=tuple(shape),
            rule="frozen" if path in is_frozen else name,
            weight_decay=0.0 if is_exempt else weight_decay * decay_factor(path),
            learning_rate_factor=rate_factor(path),
            is_exempt=is_exempt,
        )
    if len(is_frozen) == len(paths):
        raise ConfigError(f"`frozen` leaves no parameter to train, got {frozen!r}")

    decay = _add_decay(treatments) if weight_decay else optax.identity()
    l2, decoupled = (decay, optax.identity()) if mode == "l2" else (optax.identity(), decay)
    plan = Plan(treatments, decoupled, [])
    trained = optax.chain(
        *_clip(gradient_clip_norm, gradient_clip_value), l2, *rule(plan, **options)
    )
    if is_frozen:
        trained = _only(plan, trained, lambda t: t.rule != "frozen")
        trained = optax.chain(
            _only(plan, optax.set_to_zero(), lambda t: t.rule == "frozen"), trained
        )
    optimizer = optax.chain(
        trained,
        _scale_by_factors(treatments),
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
        *plan.last,
    )
    return _in_float32(optimizer), describe(treatments, mode)


def describe(treatments: dict[str, Treatment], mode: str) -> str:
    """One line for each group of parameters that are treated alike, the largest group first."""
    groups: dict[tuple, list[str]] = {}
    for path, treatment in treatments.items():
        rule, decay, factor = treatment.rule, treatment.weight_decay, treatment.learning_rate_factor
        groups.setdefault((rule,) if rule == "frozen" else (rule, decay, factor), []).append(path)

    def size(group: list[str]) -> int:
        return sum(math.prod(treatments[path].shape) for path in group)

    lines = []
    for (rule, *numbers), group in sorted(groups.items(), key=lambda item: -size(item[1])):
        text = rule
        if numbers:
            decay, factor = numbers
            text += f", weight decay {decay:g} ({mode})" if decay else ", no weight decay"
            text += f", learning rate x {factor:g}" if factor != 1 else ""
        names = group if len(group) <= 3 else sorted({f"*/{p.split('/')[-1]}" for p in group})
        arrays = "1 array" if len(group) == 1 else f"{len(group)} arrays"
        lines.append(f"{text}: {arrays}, {size(group):,} numbers: {', '.join(names)}")
    return "\n".join(lines)


def ema_update(ema: Any, tree: Any, step: jax.Array, decay: float) -> Any:
    """The exponential moving average after one more step, float32.

    The decay is min(decay, (1 + step) / (10 + step)), as that of TensorFlow's
    ExponentialMovingAverage with `num_updates`: the average is of use from the beginning.

    Args:
      ema: the average so far; at first a copy of the tree.
      tree: what is averaged, after the update number `step`.
      step: int32 [], counted from 0.
      decay: 0 to 1.
    """
    # 1 - decay, not decay, as float32 knows 1e-5 far better than 0.99999.
    share = jnp.maximum(np.float32(1 - decay), 9 / (10 + jnp.asarray(step, jnp.float32)))
    return jax.tree.map(
        lambda old, new: old + share * (new.astype(jnp.float32) - old), _to_float32(ema), tree
    )


def _momentum(owner: str, momentum: float, nesterov: bool) -> Transforms:
    """Nothing for a momentum of 0, so that it costs no memory."""
    _require_share(owner, momentum=momentum)
    if nesterov and not momentum:
        raise ConfigError(f"`nesterov` of {owner} needs a `momentum` above 0")
    return [optax.trace(momentum, nesterov)] if momentum else []


def _clip(norm: float | None, value: float | None) -> Transforms:
    transforms = []
    if norm is not None:
        _require_positive("the optimizer", gradient_clip_norm=norm)
        transforms.append(optax.clip_by_global_norm(norm))
    if value is not None:
        _require_positive("the optimizer", gradient_clip_value=value)
        transforms.append(optax.clip(value))
    return transforms


def _add_decay(treatments: dict[str, Treatment]) -> optax.GradientTransformation:
    return _by_path(lambda path, update, param: update + treatments[path].weight_decay * param)


def _scale_by_factors(treatments: dict[str, Treatment]) -> optax.GradientTransformation:
    return _by_path(lambda path, update, _: update * treatments[path].learning_rate_factor)


def _orthogonalize(
    matrices: dict[str, tuple[int, int]], steps: int
) -> optax.GradientTransformation:
    """Newton-Schulz iterations towards the nearest orthogonal matrix, scaled by the shape.

    The coefficients, from Jordan's Muon, bring all singular values to between 0.7 and 1.2 in few
    steps rather than to 1. (optax's `scale_by_muon` is not used because its Nesterov momentum is
    not that of Muon and PyTorch in the first steps.)
    """

    def orthogonalize(path: str, update: jax.Array, _: jax.Array) -> jax.Array:
        inputs, outputs = matrices[path]
        x = update.reshape(inputs, outputs)
        x = x.T if inputs > outputs else x
        x = x / jnp.maximum(jnp.linalg.norm(x), 1e-8)
        for _ in range(steps):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.T if inputs > outputs else x
        return math.sqrt(max(1, outputs / inputs)) * x.reshape(update.shape)

    return _by_path(orthogonalize)


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

    return _by_path(renormalize)


def _by_path(
    function: Callable[[str, jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """The stateless transformation update -> function(path, update, param) of every parameter."""

    def update_function(updates: Any, params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, update, param: function(_name(path), update, param), updates, params
        )

    return optax.stateless(update_function)


def _only(
    plan: Plan, transform: optax.GradientTransformation, chosen: Callable[[Treatment], bool]
) -> optax.GradientTransformation:
    """The transformation of the chosen parameters; the updates of the others pass unchanged."""

    def mask(tree: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: chosen(plan.treatments[_name(path)]), tree)

    return optax.masked(transform, mask)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps state and arithmetic in float32, whatever the dtypes of parameters and gradients."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return inner.update(_to_float32(updates), state, _to_float32(params))

    return optax.GradientTransformation(lambda params: inner.init(_to_float32(params)), update)


def _to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _pattern(option: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"`{option}` is not a regular expression ({error}), got {pattern!r}"
        ) from None


def _found_in(option: str, pattern: str, paths: list[str]) -> set[str]:
    found = {path for path in paths if _pattern(option, pattern).search(path)}
    if not found:
        raise ConfigError(
            f"`{option}` {pattern!r} is found in no parameter's path, such as '{paths[0]}'"
        )
    return found


def _factor_of(
    option: str, factors: Sequence[tuple[str, float]], paths: list[str]
) -> Callable[[str], float]:
    for pattern, factor in factors:
        _found_in(option, pattern, paths)
        if not (math.isfinite(factor) and factor >= 0):
            raise ConfigError(f"`{option}` of {pattern!r} must be at least 0, got {factor}")

    def factor_of(path: str) -> float:
        return next((factor for pattern, factor in factors if re.search(pattern, path)), 1.0)

    return factor_of


def _require_share(owner: str, **options: float) -> None:
    for option, value in options.items():
        if not 0 <= value < 1:
            raise ConfigError(f"`{option}` of {owner} must be at least 0 and below 1, got {value}")


def _require_positive(owner: str, **options: float) -> None:
    for option, value in options.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"`{option}` of {owner} must be above 0, got {value}")
