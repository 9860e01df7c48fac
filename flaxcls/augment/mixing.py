"""Augmentations that mix examples and their labels.

Every image is mixed with a neighbour, four rows on or back in its group of eight: in a shuffled
batch a random partner. Which one it is depends on the batch's size alone, not on how the batch is
split over devices, and as long as each device has whole groups, no image has to be sent from one
to another. (timm mixes with the mirrored row of the batch, which is mostly on another device.) The
copies of an example that `config.repeats` up to 4 makes are too close to be partners. One draw of
the parameters serves the whole batch, as in the papers. Images leave as float32: uint8 would round
the mixture.
"""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from flaxcls.augment.base import Augmentation, Batch, box_mask
from flaxcls.config.options import Range, UpToOne

Alpha = Annotated[float, Range(0.01, 100)]


@dataclasses.dataclass(frozen=True)
class MixUp(Augmentation):
    """With `probability`, blends pairs with a weight from Beta(alpha, alpha).

    Zhang et al. 2017, arXiv:1710.09412.
    """

    name: ClassVar[str] = "mixup"
    alpha: Alpha = 0.2
    probability: UpToOne = 1.0

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        apply_key, mix_key = jax.random.split(key)
        applied = jax.random.bernoulli(apply_key, self.probability)
        return _blend(batch, jnp.where(applied, _beta(mix_key, self.alpha), 1))


@dataclasses.dataclass(frozen=True)
class CutMix(Augmentation):
    """With `probability`, pastes a box of the partner, a part 1 - Beta(alpha, alpha) of the area.

    The centre of the box may be any pixel; what falls outside is cut off, and the labels are
    weighted by the number of pixels pasted. Yun et al. 2019, arXiv:1905.04899.
    """

    name: ClassVar[str] = "cutmix"
    alpha: Alpha = 1.0
    probability: UpToOne = 1.0

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        apply_key, share_key, box_key = jax.random.split(key, 3)
        applied = jax.random.bernoulli(apply_key, self.probability)
        kept = _outside_box(box_key, _beta(share_key, self.alpha), batch["image"].shape[1:3])
        return _blend(batch, jnp.where(applied, kept, 1))


@dataclasses.dataclass(frozen=True)
class Mix(Augmentation):
    """With `probability`, one of the two: cutmix with `switch_probability`, otherwise mixup.

    The fields are those of timm's `Mixup`, the defaults those of DeiT (arXiv:2012.12877).
    """

    name: ClassVar[str] = "mix"
    mixup_alpha: Alpha = 0.8
    cutmix_alpha: Alpha = 1.0
    switch_probability: UpToOne = 0.5
    probability: UpToOne = 1.0

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        apply_key, switch_key, share_key, box_key = jax.random.split(key, 4)
        applied = jax.random.bernoulli(apply_key, self.probability)
        cut = jax.random.bernoulli(switch_key, self.switch_probability)
        share = _beta(share_key, jnp.where(cut, self.cutmix_alpha, self.mixup_alpha))
        kept = _outside_box(box_key, share, batch["image"].shape[1:3])
        return _blend(batch, jnp.where(applied, jnp.where(cut, kept, share), 1))


def _beta(key: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """A draw from Beta(alpha, alpha), [1, 1].

    What `jax.random.beta` does, in half its compile time: both gamma variates in one call.
    """
    first, second = jax.random.loggamma(key, alpha, (2, 1, 1))
    return jax.nn.sigmoid(first - second)


def _outside_box(key: jax.Array, share: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[H, W]: 0 in a random box of a part 1 - `share` of the area, 1 outside of it."""
    box = (jnp.sqrt(1 - share[0, 0]) * jnp.array(shape)).astype(jnp.int32)
    corner = jax.random.randint(key, (2,), 0, jnp.array(shape)) - box // 2
    return 1 - box_mask(shape, *corner, *box).astype(jnp.float32)


def partners(x: jax.Array) -> jax.Array:
    """What each example of [B, ...] is mixed with, in its row.

    The two halves of each group of 8 are swapped; groups are of 4 or 2 where 8 does not divide
    B, and if B is odd all examples are one group, in reverse order.
    """
    size, group = x.shape[0], math.gcd(x.shape[0], 8)
    if group == 1:
        return x[::-1]
    halves = x.reshape(size // group, 2, group // 2, *x.shape[1:])
    return halves[:, ::-1].reshape(x.shape)


def _blend(batch: Batch, weight: jax.Array) -> Batch:
    """`weight` ([H, W] or [1, 1]) of each example and the rest of its partner."""
    images, labels = batch["image"].astype(jnp.float32), batch["label"]
    weight = weight[:, :, None]
    share = weight.mean()
    return {
        **batch,
        "image": weight * images + (1 - weight) * partners(images),
        "label": share * labels + (1 - share) * partners(labels),
    }
