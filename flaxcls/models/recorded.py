"""What a network computes on the way to its logits: features by name, and attention."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxcls.models.dependence import depends_on


def features(module: nn.Module, variables: dict, images: jax.Array) -> dict[str, jax.Array]:
    """What the network computes on the way to its logits, in evaluation, by name.

    "pooled", float32 [B,D], is there for every network; `layers.record` says which maps are. A
    module within the network records as "MODULE/NAME". A network that records no "pooled" has what
    the layer named "head", else its last nn.Dense, is given, and where there is neither the logits.
    """
    return logits_and_features(module, variables, images)[1]


def logits_and_features(
    module: nn.Module,
    variables: dict,
    images: jax.Array,
    perturbations: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The logits, float32 [B,K], and `features`, of one pass.

    `perturbations` are added to the maps of these names, for all that follows: the derivative with
    respect to one that is zero is that with respect to the map. They have its shape and dtype.
    """
    given = {}

    def note(call, arguments, keywords, context):
        if context.module.name == "head" and arguments:
            given.setdefault("head", arguments[0])
        elif isinstance(context.module, nn.Dense) and arguments:
            given["dense"] = arguments[0]
        return call(*arguments, **keywords)

    if perturbations:
        added = unflatten_dict(dict(perturbations), sep="/")
        variables = {**variables, "perturbations": added}
    with nn.intercept_methods(note):
        logits, recorded = module.apply(variables, images, train=False, mutable=["features"])
    logits = logits.astype(jnp.float32)
    named = flatten_dict(recorded.get("features", {}), sep="/")
    pooled = named.get("pooled", given.get("head", given.get("dense", logits)))
    pooled = pooled.reshape(pooled.shape[0], -1).astype(jnp.float32)
    return logits, {**named, "pooled": pooled}


def maps(module: nn.Module, variables: dict, images: jax.Array) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the maps that are recorded and that the logits depend on, the last one last.

    A network that does not go on with what `record` returns has none. Nothing is computed; the
    arguments may be shapes.
    """
    names = []  # in the order in which they are recorded, which a dict that leaves a trace forgets

    def recorded(variables, images):
        found = features(module, variables, images)
        names[:] = [name for name, x in found.items() if name != "pooled" and x.ndim == 4]
        return [found[name] for name in names]

    shapes = jax.eval_shape(recorded, variables, images)

    def logits(perturbations, variables, images):
        named = dict(zip(names, perturbations, strict=True))
        return logits_and_features(module, variables, images, named)[0]

    used = depends_on(logits, shapes, variables, images)[: len(names)]
    named = zip(names, shapes, used, strict=True)
    return {name: shape for name, shape, is_used in named if is_used}


def attention_weights(module: nn.Module, variables: dict, images: jax.Array) -> list[jax.Array]:
    """How much of each token goes into each other one, float32 [B,heads,T,T], block by block.

    Empty for a network without attention over all tokens.
    """
    _, recorded = module.apply(variables, images, train=False, mutable=["attention"])
    return list(flatten_dict(recorded.get("attention", {})).values())
