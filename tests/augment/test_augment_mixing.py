import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxcls.augment.mixing import CutMix, Mix, MixUp, partners

KEY = jax.random.key(0)
EVERY_OP = [MixUp(alpha=1.0), CutMix(), Mix()]


def mixed_many_times(augmentation, batch, draws=1000):
    """Images and labels for `draws` keys."""
    result = jax.jit(jax.vmap(augmentation, (0, None)))(jax.random.split(KEY, draws), batch)
    return np.asarray(result["image"]), np.asarray(result["label"])


def ones_and_zeros(height=16, width=12):
    """The first example is all ones and of class 0, its partner all zeros and of class 1."""
    images = np.stack([np.ones((height, width, 1)), np.zeros((height, width, 1))])
    return {"image": jnp.asarray(images, jnp.float32), "label": jnp.eye(2)}


@pytest.mark.parametrize("augmentation", EVERY_OP, ids=lambda op: op.name)
def test_labels_weigh_what_the_pixels_show(augmentation):
    images, labels = mixed_many_times(augmentation, ones_and_zeros())
    own, partner = images.mean(axis=(2, 3, 4)).T
    np.testing.assert_allclose(labels[:, 0, 0], own, atol=1e-6)
    np.testing.assert_allclose(labels[:, 1, 0], partner, atol=1e-6)
    np.testing.assert_allclose(own + partner, 1, atol=1e-6)
    np.testing.assert_allclose(labels.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 4.0])
def test_mixup_weight_is_beta_distributed(alpha):
    images, _ = mixed_many_times(MixUp(alpha=alpha), ones_and_zeros(1, 1))
    weight = images[:, 0, 0, 0, 0]
    bins = [0, 0.02, 0.2, 0.4, 0.6, 0.8, 0.98, 1]
    expected = np.diff(stats.beta(alpha, alpha).cdf(bins)) * len(weight)
    assert stats.chisquare(np.histogram(weight, bins)[0], expected).pvalue > 1e-3


PARTNERS = {
    2: [1, 0],
    4: [2, 3, 0, 1],
    6: [1, 0, 3, 2, 5, 4],
    7: [6, 5, 4, 3, 2, 1, 0],  # an odd batch: the middle example is its own partner
    12: [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9],
    16: [4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11],
}


@pytest.mark.parametrize("size", PARTNERS)
def test_mixup_equals_its_definition(make_batch, size):
    batch = make_batch(size)
    mixed = jax.jit(MixUp(alpha=8.0))(KEY, batch)
    images, labels = np.asarray(batch["image"], float), np.asarray(batch["label"], float)
    weight = float(mixed["label"][0, 0])  # the first pair is of two classes
    assert 0.05 < weight < 0.95
    partner = np.array(PARTNERS[size])
    np.testing.assert_allclose(
        mixed["image"], weight * images + (1 - weight) * images[partner], atol=1e-3
    )
    np.testing.assert_allclose(
        mixed["label"], weight * labels + (1 - weight) * labels[partner], atol=1e-6
    )


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_copies_of_repeated_augmentation_are_not_mixed_with_each_other(repeats):
    example = np.arange(48) // repeats
    assert (example != np.asarray(partners(jnp.asarray(example)))).all()


def yun_boxes(count, height, width, alpha):
    """True where the paper's pseudo-code pastes, [count, height, width], in plain NumPy."""
    random = np.random.default_rng(0)
    pasted = np.zeros((count, height, width), bool)
    for mask in pasted:
        side = np.sqrt(1 - random.beta(alpha, alpha))
        tall, wide = int(side * height), int(side * width)
        top = random.integers(height) - tall // 2
        left = random.integers(width) - wide // 2
        mask[max(top, 0) : max(top + tall, 0), max(left, 0) : max(left + wide, 0)] = True
    return pasted


def test_cutmix_pastes_rectangles_of_the_papers_size_and_place():
    images, _ = mixed_many_times(CutMix(), ones_and_zeros())
    assert set(np.unique(images)) == {0, 1}
    pasted = images[:, 0, :, :, 0] == 0
    rows, columns = pasted.any(axis=2).sum(axis=1), pasted.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(pasted.sum(axis=(1, 2)), rows * columns)
    expected = yun_boxes(5000, 16, 12, 1.0)
    areas = pasted.mean(axis=(1, 2)), expected.mean(axis=(1, 2))
    assert stats.ks_2samp(*areas).pvalue > 1e-3
    np.testing.assert_allclose(pasted.mean(axis=0), expected.mean(axis=0), atol=0.06)


def test_cutmix_takes_the_pixels_of_the_partner(make_batch):
    batch = make_batch(16, 8, 5)
    mixed, images = (
        np.asarray(jax.jit(CutMix(alpha=8.0))(KEY, batch)["image"]),
        np.asarray(batch["image"]),
    )
    partner = images[PARTNERS[16]]
    assert ((mixed == images) | (mixed == partner)).all()
    assert (mixed != images).any() and (mixed != partner).any()


@pytest.mark.parametrize("cls", [MixUp, CutMix])
def test_a_batch_is_mixed_with_its_probability(cls):
    batch = ones_and_zeros(8, 8)
    images, labels = mixed_many_times(cls(alpha=8.0, probability=0.3), batch)
    untouched = (images == np.asarray(batch["image"])).all(axis=(1, 2, 3, 4))
    assert 0.65 < untouched.mean() < 0.75
    assert (labels[untouched] == np.eye(2)).all()


def test_mix_chooses_between_mixup_cutmix_and_neither():
    batch = ones_and_zeros()
    mix = Mix(mixup_alpha=100.0, cutmix_alpha=8.0, switch_probability=0.2, probability=0.5)
    images, labels = mixed_many_times(mix, batch)
    untouched = (images == np.asarray(batch["image"])).all(axis=(1, 2, 3, 4))
    assert (labels[untouched] == np.eye(2)).all()
    cut = np.isin(images[:, 0], [0, 1]).all(axis=(1, 2, 3)) & ~untouched
    blended = (images[:, 0] == images[:, 0, :1, :1]).all(axis=(1, 2, 3)) & ~untouched
    assert (untouched | cut | blended).all()
    assert abs(untouched.mean() - 0.5) < 0.05
    assert abs(cut.mean() - 0.1) < 0.03
    # Each with its own alpha: Beta(100, 100) is narrow.
    assert labels[blended, 0, 0].min() > 0.35 and labels[blended, 0, 0].max() < 0.65


def test_the_smallest_alpha_gives_finite_labels():
    images, labels = mixed_many_times(MixUp(0.01), ones_and_zeros(1, 1))
    assert np.isfinite(images).all() and np.isfinite(labels).all()
    assert labels.min() >= 0 and labels.max() <= 1
