"""The optimizer as one visible list of optax transformations, and what it does to each parameter.

    clip -> weight decay (l2) -> rule, with weight decay (decoupled) -> learning rate -> scale(-1)

Weight decay w is one of two things, by `weight_decay_mode`:
  "l2"         the gradient of w/2 |p|^2 is added to the gradient before the rule. PyTorch's SGD,
               RMSprop and Adam do this, and so do sgd, rmsprop, rmsprop_tf, adam and lars here by
               default.
  "decoupled"  learning_rate * w * p is subtracted from the parameter besides the rule's step
               (AdamW, Loshchilov & Hutter 2019; multiplied by the learning rate, as in PyTorch and
               optax). The default of adamw, lamb, lion and muon.

A parameter is known by its path, such as "block1/conv1/kernel". The values that differ between
parameters are looked up by path, so that they also hold inside `optax.masked`, and the optimizer's
state has only trees of the parameters' structure, whose paths end in the parameter's path (which is
how sharding rules find them), and scalars. The state is float32 whatever the parameters are.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flaxcls.config.options import NonNegative, Positive, accepted, check, look_up
from flaxcls.config.user_code import file_of, in_user_code, is_path
from flaxcls.core.update_rules import (
    RULES,
    ParamGroup,
    Transforms,
    UpdateContext,
    by_path,
    compiled,
    only,
    path_name,
)
from flaxcls.errors import ConfigError

Schedule = Callable[[jax.Array], jax.Array]

L2_BY_DEFAULT = ("sgd", "rmsprop", "rmsprop_tf", "adam", "lars")


def build(
    name: str,
    *,
    schedule: Schedule,
    params: Any,
    shortened: Callable[[str], Schedule] | None = None,
    weight_decay: NonNegative = 0.0,
    weight_decay_mode: Literal["l2", "decoupled"] | None = None,
    no_weight_decay: str = r"(^|/)(bias|scale)$",
    weight_decay_factors: Sequence[tuple[str, NonNegative]] = (),
    learning_rate_factors: Sequence[tuple[str, NonNegative]] = (),
    learning_rate_durations: Sequence[tuple[str, str]] = (),
    frozen: Collection[str] = (),
    layers: tuple[float, Sequence[Sequence[str]]] | None = None,
    gradient_clip_norm: Positive | None = None,
    gradient_clip_value: Positive | None = None,
    mesh: Mesh | None = None,
    **options,
) -> tuple[optax.GradientTransformation, str]:
    """Returns the optimizer, and a description of what it does to which parameters.

    Regular expressions are searched for in paths such as "block1/conv1/kernel". In the lists of
    (regular expression, value) the first that is found counts, and one that is found in no path is
    an error.

    Args:
      name: one of RULES, or a user's own.
      schedule: step -> learning rate; the step is counted in the optimizer's state.
      params: the parameters or their shapes.
      shortened: duration -> the schedule of a run of that length, for `learning_rate_durations`.
      weight_decay: strength, at least 0.
      weight_decay_mode: see the module; None: the rule's own.
      no_weight_decay: parameters exempt from weight decay, and from the layerwise scaling of LAMB
        and LARS.
      weight_decay_factors: multiples of the weight decay for some parameters.
      learning_rate_factors: multiples of the learning rate for some parameters.
      learning_rate_durations: how long some parameters are trained, such as "3 epochs": they have
        the schedule of a run of that length, and from then on stay as they are.
      frozen: paths of parameters that are not trained: no update, no state, no part in the
        gradient's norm.
      layers: a decay and the paths of each layer, the lowest first: the learning rate of each is
        that of the layer above times the decay, besides its `learning_rate_factors`.
      gradient_clip_norm: largest global norm of the gradient.
      gradient_clip_value: largest absolute value of each element of the gradient.
      mesh: the devices that the step is for; None: one CPU.
      **options: those of the named rule.

    Raises ConfigError for what is unknown or out of range.
    """
    rule = look_up("config.optimizer.name", name, RULES)
    own = {
        "weight_decay": weight_decay,
        "weight_decay_mode": weight_decay_mode,
        "no_weight_decay": no_weight_decay,
        "weight_decay_factors": weight_decay_factors,
        "learning_rate_factors": learning_rate_factors,
        "learning_rate_durations": learning_rate_durations,
        "gradient_clip_norm": gradient_clip_norm,
        "gradient_clip_value": gradient_clip_value,
    }
    check("config.optimizer", name, own, accepted(build))
    options = check("config.optimizer", name, options, accepted(rule))
    mode = weight_decay_mode or ("l2" if name in L2_BY_DEFAULT else "decoupled")

    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    paths = paths_of(params)
    decay_factor = _value_of("weight_decay_factors", weight_decay_factors, paths, 1.0)
    rate_factor = _value_of("learning_rate_factors", learning_rate_factors, paths, 1.0)
    duration = _value_of("learning_rate_durations", learning_rate_durations, paths, None)
    exempt = compiled("`no_weight_decay`", no_weight_decay)
    groups = {}
    for path, shape in shapes.items():
        is_exempt = bool(exempt.search(path))
        groups[path] = ParamGroup(
            shape=tuple(shape),
            rule="frozen" if path in frozen else name,
            weight_decay=0.0 if is_exempt else weight_decay * decay_factor(path),
            learning_rate_factor=rate_factor(path),
            is_exempt=is_exempt,
            duration=duration(path),
        )

    decay = _add_decay(groups) if weight_decay else optax.identity()
    l2, decoupled = (decay, optax.identity()) if mode == "l2" else (optax.identity(), decay)
    context = UpdateContext(groups, decoupled, [], mesh)
    transforms = rule(context, **options)
    if is_path(name):
        needed = decoupled if weight_decay and mode == "decoupled" else None
        _check_transforms(name, transforms, needed)
    trained = optax.chain(*_clip(gradient_clip_norm, gradient_clip_value), l2, *transforms)
    if frozen:
        trained = only(context, trained, lambda t: t.rule != "frozen")
        trained = optax.chain(
            only(context, optax.set_to_zero(), lambda t: t.rule == "frozen"), trained
        )
    optimizer = optax.chain(
        trained,
        _scale_by_factors(groups, _layer_factors(*layers) if layers else {}),
        _scale_by_schedules(groups, schedule, shortened),
        optax.scale(-1.0),
        *context.last,
    )
    optimizer = _in_float32(optimizer)
    if is_path(name):  # whose errors are told now, and by file and line
        with in_user_code(file_of(rule)):
            jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    text = describe(groups, mode)
    return optimizer, f"{text}\n{_describe_layers(*layers)}" if layers else text


def _check_transforms(
    name: str, transforms: Any, decay: optax.GradientTransformation | None
) -> None:
    """ConfigError unless a user's own rule has returned a list, with the weight decay in it."""
    kind = optax.GradientTransformation
    if not isinstance(transforms, (list, tuple)) or isinstance(transforms, kind):
        raise ConfigError(
            f"{name} must return a list of optax transformations, got {type(transforms).__name__}"
        )
    for transform in transforms:
        if not isinstance(transform, kind):
            raise ConfigError(f"{name} must return optax transformations, got {transform!r:.60}")
    if decay and not any(transform is decay for transform in transforms):
        raise ConfigError(
            f"config.optimizer.weight_decay is not used by {name}: its list needs "
            "`context.decoupled`, or config.optimizer.weight_decay_mode must be 'l2'"
        )


def updates_made(opt_state: Any) -> jax.Array:
    """How many updates an optimizer of `build` has made, int32 []; its schedule is at that step."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    (state,) = filter(is_schedule, jax.tree.leaves(opt_state, is_leaf=is_schedule))
    return state.count


def describe(groups: dict[str, ParamGroup], mode: str) -> str:
    """One line for each group of parameters with the same settings, the largest group first."""
    by_settings: dict[tuple, list[str]] = {}
    for path, group in groups.items():
        rule, decay, factor = group.rule, group.weight_decay, group.learning_rate_factor
        settings = (rule,) if rule == "frozen" else (rule, decay, factor, group.duration)
        by_settings.setdefault(settings, []).append(path)

    def size(paths: list[str]) -> int:
        return sum(math.prod(groups[path].shape) for path in paths)

    lines = []
    for (rule, *others), paths in sorted(by_settings.items(), key=lambda item: -size(item[1])):
        text = rule
        if others:
            decay, factor, duration = others
            text += f", weight decay {decay:g} ({mode})" if decay else ", no weight decay"
            text += f", learning rate x {factor:g}" if factor != 1 else ""
            text += f", for {duration}" if duration else ""
        names = paths if len(paths) <= 3 else sorted({f"*/{p.split('/')[-1]}" for p in paths})
        arrays = "1 array" if len(paths) == 1 else f"{len(paths)} arrays"
        lines.append(f"{text}: {arrays}, {size(paths):,} parameters: {', '.join(names)}")
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


def _clip(norm: float | None, value: float | None) -> Transforms:
    transforms = []
    if norm is not None:
        transforms.append(optax.clip_by_global_norm(norm))
    if value is not None:
        transforms.append(optax.clip(value))
    return transforms


def _add_decay(groups: dict[str, ParamGroup]) -> optax.GradientTransformation:
    return by_path(lambda path, update, param: update + groups[path].weight_decay * param)


def _scale_by_factors(
    groups: dict[str, ParamGroup], by_layer: Mapping[str, float]
) -> optax.GradientTransformation:
    def scale(path: str, update: jax.Array, _param: jax.Array) -> jax.Array:
        return update * (groups[path].learning_rate_factor * by_layer.get(path, 1.0))

    return by_path(scale)


def _scale_by_schedules(
    groups: dict[str, ParamGroup], schedule: Schedule, shortened: Callable[[str], Schedule] | None
) -> optax.GradientTransformation:
    """`optax.scale_by_schedule`, by the shortened schedule for parameters with a duration."""
    durations = {group.duration for group in groups.values() if group.duration}
    if not durations:
        return optax.scale_by_schedule(schedule)
    if shortened is None:
        raise TypeError("`learning_rate_durations` needs `shortened`")
    schedules = {None: schedule, **{duration: shortened(duration) for duration in durations}}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rates = {duration: rate(state.count) for duration, rate in schedules.items()}
        scaled = jax.tree.map_with_path(
            lambda path, update: update * rates[groups[path_name(path)].duration], updates
        )
        return scaled, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(optax.scale_by_schedule(schedule).init, update)


def _layer_factors(decay: float, layers: Sequence[Sequence[str]]) -> dict[str, float]:
    """What each path's learning rate is multiplied by: decay ** (layers above)."""
    top = len(layers) - 1
    return {path: decay ** (top - i) for i, paths in enumerate(layers) for path in paths}


def _describe_layers(decay: float, layers: Sequence[Sequence[str]]) -> str:
    """The factor of each layer, which is named by the modules at the network's top that it has."""
    parts = []
    for above, paths in enumerate(reversed(layers)):
        names = list(dict.fromkeys(path.split("/")[0] for path in paths))
        names = names if len(names) <= 3 else [names[0], "...", names[-1]]
        parts.append(f"x {decay**above:.3g} {', '.join(names)}")
    return f"learning rate by layer, decay {decay:g}: " + "; ".join(reversed(parts))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps state and arithmetic in float32, whatever the dtypes of parameters and gradients."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return inner.update(_to_float32(updates), state, _to_float32(params))

    return optax.GradientTransformation(lambda params: inner.init(_to_float32(params)), update)


def _to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def paths_of(params: Any) -> list[str]:
    """The paths of parameters or their shapes, such as "block1/conv1/kernel"."""
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def found_in(option: str, pattern: str, paths: Sequence[str]) -> set[str]:
    """The paths that a regular expression is found in; ConfigError where there are none."""
    found = {path for path in paths if compiled(option, pattern).search(path)}
    if not found:
        raise ConfigError(
            f"{option} {pattern!r} is found in no parameter's path, such as '{paths[0]}'"
        )
    return found


def _value_of(
    option: str, values: Sequence[tuple[str, Any]], paths: list[str], default: Any
) -> Callable[[str], Any]:
    """path -> the value of the first pattern that is found in it, or the default."""
    for pattern, _ in values:
        found_in(f"`{option}`", pattern, paths)

    def value_of(path: str) -> Any:
        return next((value for pattern, value in values if re.search(pattern, path)), default)

    return value_of
