"""A network below its head and from its head on, for training that leaves all below as it is."""

from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.models.dependence import depends_on

HEAD = "head"  # the name of the last layer


def features_of(
    module: nn.Module, variables: Any, images: jax.Array, *, train: bool = False
) -> jax.Array:
    """What the layer named "head" is given for some images, [B, ...]; with all that is below."""
    given = []

    def note(call, arguments, keywords, context):
        if _is_head(context):
            given.append(arguments[0])
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        module.apply(variables, images, train=train, mutable=["batch_stats"])
    (features,) = given
    return features


class AboveFeatures:
    """A network from its head on: `apply` takes what the head is given instead of images.

    The network is traced as it is, with the head's input replaced: what is below is not needed for
    the logits, so that XLA leaves it out.

    Args:
      module: a network for which `begin_at_head` is not None.
      image_shape: height, width and channels.
      dtype: what its head is given.
    """

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], dtype: jnp.dtype):
        self.num_classes: int = module.num_classes
        self._module, self._image_shape, self._dtype = module, image_shape, dtype

    def apply(self, variables: Any, features: jax.Array, **options: Any) -> Any:
        """As `module.apply` with images; float32 features become what they were."""
        images = jnp.zeros((features.shape[0], *self._image_shape), jnp.float32)
        features = features.astype(self._dtype)
        return _with_features(self._module, variables, images, features, **options)


def begin_at_head(
    module: nn.Module, variables: Any, image_shape: tuple[int, int, int]
) -> tuple[AboveFeatures, jax.ShapeDtypeStruct] | None:
    """The network from its head on, and the features of one image, float32.

    None where there is no layer "head", where anything random happens in training (dropout), or
    where the logits depend on the images otherwise than through the head.

    Args:
      variables: or their shapes.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def features(train: bool) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(lambda v, x: features_of(module, v, x, train=train), variables, image)

    try:
        given = features(train=True)
        if given != features(train=False):
            return None
    except (ValueError, flax.errors.InvalidRngError):  # not one "head", or something random
        return None
    if not _uses_head_alone(module, variables, image, given):
        return None
    above = AboveFeatures(module, image_shape, given.dtype)
    return above, jax.ShapeDtypeStruct(given.shape[1:], jnp.float32)


def _uses_head_alone(
    module: nn.Module, variables: Any, image: Any, features: jax.ShapeDtypeStruct
) -> bool:
    """Whether the logits are a function of the head's input alone, besides the variables."""

    def logits(images: jax.Array, features: jax.Array, variables: Any) -> jax.Array:
        return _with_features(
            module, variables, images, features, train=True, mutable=["batch_stats"]
        )[0]

    return not depends_on(logits, image, features, variables)[0]


def _with_features(
    module: nn.Module, variables: Any, images: jax.Array, features: jax.Array, **options: Any
) -> Any:
    """`module.apply` of images whose features are replaced."""

    def replace(call, arguments, keywords, context):
        arguments = (features, *arguments[1:]) if _is_head(context) else arguments
        return call(*arguments, **keywords)

    with nn.intercept_methods(replace):
        return module.apply(variables, images, **options)


def _is_head(context: Any) -> bool:
    return context.method_name == "__call__" and context.module.path == (HEAD,)
