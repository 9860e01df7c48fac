import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxcls.augment import normalize
from flaxcls.augment.color import (
    ColorJitter,
    Equalize,
    Grayscale,
    Posterize,
    Solarize,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    shift_hue,
)
from flaxcls.errors import ConfigError

KEY = jax.random.key(0)
FACTORS = np.array([0, 0.4, 0.9, 1, 1.3, 2.5], np.float32)


@pytest.fixture
def images():
    return np.random.default_rng(3).integers(0, 256, (6, 9, 7, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "adjust, enhancer",
    [
        (adjust_brightness, "Brightness"),
        (adjust_contrast, "Contrast"),
        (adjust_saturation, "Color"),
    ],
)
def test_adjustments_equal_pillow(images, adjust, enhancer):
    image_module = pytest.importorskip("PIL.Image")
    enhance = getattr(pytest.importorskip("PIL.ImageEnhance"), enhancer)
    result = adjust(jnp.asarray(images), jnp.asarray(FACTORS))
    for image, factor, adjusted in zip(images, FACTORS, result, strict=True):
        expected = enhance(image_module.fromarray(image.astype(np.uint8))).enhance(float(factor))
        # Pillow rounds the grey and truncates the result.
        np.testing.assert_allclose(adjusted, np.asarray(expected), atol=2)


def test_adjustments_equal_their_definition_in_float64(images):
    factor = FACTORS.astype(float)[:, None, None, None]
    exact = images.astype(float)
    grey = (exact @ [0.299, 0.587, 0.114])[..., None]
    mean = grey.mean(axis=(1, 2), keepdims=True)
    for adjust, origin in (
        (adjust_brightness, 0),
        (adjust_contrast, mean),
        (adjust_saturation, grey),
    ):
        expected = np.clip(factor * exact + (1 - factor) * origin, 0, 255)
        result = adjust(jnp.asarray(images), jnp.asarray(FACTORS))
        np.testing.assert_allclose(result, expected, atol=1e-3)


def test_hue_shift_equals_colorsys(images):
    images[:, 0] = images[:, 0, :, :1]  # grey pixels
    images[:, 1] = 255 * np.eye(3)[np.arange(7) % 3]  # pure red, green and blue
    images[:, 2] = 255 - images[:, 1]  # cyan, magenta, yellow: two channels tie for the maximum
    turns = np.array([-0.5, -0.2, 0, 0.05, 1 / 3, 0.5])
    result = np.asarray(shift_hue(jnp.asarray(images), jnp.asarray(turns, jnp.float32)))
    for image, turn, shifted in zip(images, turns, result, strict=True):
        for pixel, got in zip(image.reshape(-1, 3), shifted.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixel.astype(float) / 255))
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            np.testing.assert_allclose(got, 255 * np.array(expected), atol=0.01)


def test_brightness_factors_are_uniform_around_one(make_batch):
    batch = make_batch(images=np.full((600, 2, 2, 3), 100, np.float32))
    factors = np.asarray(ColorJitter(brightness=0.4)(KEY, batch)["image"])[:, 0, 0, 0] / 100
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert np.histogram(factors, bins=4, range=(0.6, 1.4))[0].min() > 115
    assert len(set(factors.tolist())) > 590


def test_factors_never_fall_below_zero(make_batch):
    images = np.zeros((300, 2, 2, 1), np.float32)
    images[:, 0] = 100
    spread = np.asarray(ColorJitter(contrast=2)(KEY, make_batch(images=images))["image"])
    spread = spread[:, 0, 0, 0] - spread[:, 1, 0, 0]
    assert spread.min() >= 0


@pytest.mark.parametrize("field", ["saturation", "hue"])
def test_each_field_changes_colour_images_and_leaves_grey_ones(make_batch, field):
    jitter = ColorJitter(**{field: 0.5})
    colour, grey = make_batch(), make_batch(channels=1)
    assert (jitter(KEY, colour)["image"] != colour["image"]).any()
    np.testing.assert_array_equal(jitter(KEY, grey)["image"], grey["image"])
    three_equal_channels = make_batch(images=np.asarray(grey["image"]).repeat(3, axis=-1))
    result = jitter(KEY, three_equal_channels)["image"]
    np.testing.assert_array_equal(result, three_equal_channels["image"])


def test_jitter_draws_its_four_factors_independently(make_batch):
    batch = make_batch(images=np.full((500, 2, 2, 3), (60.0, 100.0, 120.0), np.float32))
    result = np.asarray(ColorJitter(brightness=0.3, saturation=0.3)(KEY, batch)["image"])[:, 0, 0]
    brightness = result @ [0.299, 0.587, 0.114]
    saturation = (result.max(-1) - result.min(-1)) / brightness
    assert abs(np.corrcoef(brightness, saturation)[0, 1]) < 0.15


def test_jitter_refuses_other_channel_counts(make_batch):
    with pytest.raises(ConfigError, match="1 or 3 channels, got 2"):
        ColorJitter(hue=0.1)(KEY, make_batch(channels=2))


def test_jitter_without_any_strength_is_an_error():
    with pytest.raises(ConfigError, match="at least one of `brightness`, `contrast`"):
        ColorJitter()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalize_equals_its_definition(images, dtype):
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    result = normalize(jnp.asarray(images.astype(dtype)), mean, std)
    assert result.dtype == jnp.float32
    expected = (images.astype(float) / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_normalize_refuses_constants_of_another_channel_count(images):
    with pytest.raises(ConfigError, match="1 means .* the images have 3 channels"):
        normalize(images, (0.5,), (0.5,))


@pytest.mark.parametrize(
    "augmentation, name, argument",
    [
        (Grayscale(probability=0.2), "color", 0),
        (Solarize(threshold=100, probability=0.7), "solarize", 100),
        (Posterize(bits=3, probability=0.4), "posterize", 3),
        (Equalize(probability=0.5), "equalize", 0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_single_ops_change_their_share_of_the_images_as_pillow_does(
    make_batch, pillow, augmentation, name, argument
):
    batch = make_batch(300, 18, 19)
    images = np.asarray(batch["image"])
    results = np.asarray(jax.jit(augmentation)(KEY, batch)["image"])
    changed = [(image != result).any() for image, result in zip(images, results, strict=True)]
    assert stats.binomtest(sum(changed), 300, augmentation.probability).pvalue > 1e-3
    for image, result, different in zip(images, results, changed, strict=True):
        if different:
            np.testing.assert_array_equal(result, pillow(name, image, argument))
