import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxcls.augment import enhance, ops
from flaxcls.augment.noise import blur

ALL = {**ops.WARPS, **ops.TABLES, **ops.BLENDS}
FACTORS = (0, 0.1, 0.19, 0.3, 0.55, 0.7, 0.95, 1, 1.05, 1.33, 1.7, 1.81, 1.9, 1.99)
ARGUMENTS = {
    **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), FACTORS),
    "posterize": tuple(range(9)),
    "solarize": (0, 1, 100, 127.5, 128, 255, 256),
    "solarize_add": (0, 33, 110),
    **dict.fromkeys(("shear_x", "shear_y"), (0, 0.3, -0.27, 0.99)),
    **dict.fromkeys(("translate_x", "translate_y"), (0, 7, -3, 4.5, -60)),
    "rotate": (0, 27, -30, 90, 135, -100.5),
}


def pictures(height, width, channels):
    """Noise, ramps, one value, few values, little contrast, many zeros: uint8 [9, H, W, C]."""
    random = np.random.default_rng(0)
    shape = (height, width, channels)
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([9 * x, 5 * y, 3 * (x + y)], axis=-1)
    return np.stack(
        [
            random.integers(0, 256, shape),
            np.clip(random.normal(128, 40, shape), 0, 255),
            np.broadcast_to(ramps[..., :channels] % 256, shape),
            np.broadcast_to((255 * y // max(height - 1, 1))[..., None], shape),
            np.full(shape, 77),
            random.choice([3, 200], shape),
            random.integers(100, 120, shape),
            random.integers(0, 256, shape) * (random.random(shape) < 0.02),
            np.clip(random.exponential(30, shape), 0, 255),
        ]
    ).astype(np.uint8)


def applied(name, images, argument, **options):
    count = len(images)
    arguments = {name: jnp.full(count, argument, jnp.float32)}
    return ops.apply(jnp.asarray(images), arguments, jnp.zeros(count, int), **options)


applied = jax.jit(applied, static_argnames=("name", "interpolation", "fill"))


@pytest.mark.parametrize("shape", [(37, 23, 3), (24, 40, 1)])
@pytest.mark.parametrize("name", ALL)
def test_every_op_equals_pillow(assert_like_pillow, name, shape):
    images = pictures(*shape)
    for argument in ARGUMENTS.get(name, (0,)):
        argument = float(np.float32(argument))
        results = applied(name, images, argument, fill=90)
        assert results.dtype == jnp.uint8
        for image, result in zip(images, results, strict=True):
            assert_like_pillow(result, name, image, argument, fill=90)


@pytest.mark.parametrize("name", ops.WARPS)
def test_the_nearest_pixel_is_that_of_pillow(assert_like_pillow, name):
    images = pictures(37, 23, 3)
    for argument in ARGUMENTS[name]:
        argument = float(np.float32(argument))
        results = applied(name, images, argument, fill=90, interpolation="nearest")
        for image, result in zip(images, results, strict=True):
            assert_like_pillow(result, name, image, argument, nearest=True, fill=90)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 1), (3, 3, 3)])
@pytest.mark.parametrize("name", [*ops.TABLES, *ops.BLENDS])
def test_tiny_images_equal_pillow(assert_like_pillow, name, shape):
    images = pictures(*shape)
    argument = float(np.float32(ARGUMENTS.get(name, (0,))[2 % len(ARGUMENTS.get(name, (0,)))]))
    for image, result in zip(images, applied(name, images, argument), strict=True):
        assert_like_pillow(result, name, image, argument)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_one_batch_holds_every_op_and_examples_without_any(assert_like_pillow, interpolation):
    image = pictures(30, 33, 3)[1]
    names = sorted([*ALL, "identity"])
    images = np.repeat(image[None], len(names) + 1, axis=0)
    strength = {name: float(np.float32(ARGUMENTS.get(name, (0, 0))[1])) for name in names}
    arguments = {name: jnp.full(len(images), strength[name], jnp.float32) for name in names}
    drawn = np.random.default_rng(1).permutation(np.arange(-1, len(names)))
    apply = jax.jit(ops.apply, static_argnames=("interpolation", "fill"))
    results = apply(images, arguments, jnp.asarray(drawn), interpolation=interpolation, fill=90)
    for position, result in zip(drawn, results, strict=True):
        name = names[position] if position >= 0 else "identity"
        assert_like_pillow(result, name, image, strength[name], interpolation == "nearest", fill=90)


def test_a_batch_in_which_nothing_is_drawn_stays():
    images = jnp.asarray(pictures(8, 9, 3))
    arguments = {name: jnp.full(len(images), 0.3) for name in ALL}
    result = ops.apply(images, arguments, jnp.full(len(images), -1), fill=90)
    np.testing.assert_array_equal(result, images)


def test_cutout_fills_a_square_and_only_where_drawn():
    images = jnp.asarray(pictures(12, 10, 3)[:3])
    place = jnp.array([[5.9, 4.2, 2.0], [0.0, 9.9, 3.0], [5.0, 5.0, 2.0]])
    result = np.asarray(ops.apply(images, {"cutout": place}, jnp.array([0, 0, -1]), fill=90))
    expected = np.array(images)
    expected[0, 3:7, 2:6] = 90
    expected[1, :3, 6:] = 90
    np.testing.assert_array_equal(result, expected)


def test_images_too_small_to_equalize_stay_as_in_pillow():
    images = pictures(8, 8, 3)
    np.testing.assert_array_equal(applied("equalize", images, 0), images)


@pytest.mark.parametrize("sigma, largest", [(0.1, 2.0), (0.8, 2.0), (2.0, 2.0), (3.0, 4.0)])
def test_blur_equals_scipy(sigma, largest):
    gaussian_filter = pytest.importorskip("scipy.ndimage").gaussian_filter
    images = pictures(21, 9, 3).astype(np.float32)
    result = blur(jnp.asarray(images), jnp.full(len(images), sigma), largest)
    radius = int(np.ceil(3 * largest))
    expected = gaussian_filter(
        images.astype(float), (0, sigma, sigma, 0), mode="nearest", radius=(0, radius, radius, 0)
    )
    np.testing.assert_allclose(result, expected, atol=1e-3)


def test_blur_looks_like_that_of_pillow():
    image_module = pytest.importorskip("PIL.Image")
    filters = pytest.importorskip("PIL.ImageFilter")
    y, x = np.mgrid[:40, :31][..., None]
    waves = 128 + 50 * np.sin(x * [0.9, 0.2, 1.3]) + 50 * np.sin(y * [0.3, 1.1, 0.8])
    sigma = np.array([0.1, 0.5, 1, 1.5, 2])
    images = np.repeat(np.round(waves).astype(np.uint8)[None], len(sigma), axis=0)
    results = blur(jnp.asarray(images), jnp.asarray(sigma, jnp.float32), 2)
    for image, radius, result in zip(images, sigma, results, strict=True):
        expected = image_module.fromarray(image).filter(filters.GaussianBlur(float(radius)))
        # Pillow makes its Gaussian of boxes, and extends the border before each of them.
        difference = np.abs(np.asarray(expected).astype(float) - result)[6:-6, 6:-6]
        assert difference.mean() < 1.5 and difference.max() < 5
    assert np.abs(images[-1] - np.asarray(results[-1])).mean() > 20


def test_blur_leaves_images_of_sigma_0():
    images = jnp.asarray(pictures(12, 7, 3), jnp.float32)
    result = blur(images, jnp.where(jnp.arange(len(images)) % 2 == 0, 0.0, 1.5), 2)
    np.testing.assert_array_equal(result[::2], images[::2])
    assert (np.abs(result[1] - images[1]) > 1).any()


def test_histogram_counts_every_value():
    images = pictures(37, 23, 3)
    counts = jax.jit(enhance._histogram)(jnp.asarray(images))
    for image, count in zip(images, counts, strict=True):
        for channel in range(3):
            expected = np.bincount(image[..., channel].ravel(), minlength=256)
            np.testing.assert_array_equal(count[channel], expected)


def test_maybe_applies_as_often_as_the_probability_says():
    images = jnp.asarray(np.random.default_rng(2).integers(0, 256, (600, 4, 4, 3)), jnp.uint8)
    result = jax.jit(ops.maybe, static_argnums=(1, 3))(jax.random.key(0), 0.3, images, "invert")
    inverted = (result == 255 - images).all(axis=(1, 2, 3))
    kept = (result == images).all(axis=(1, 2, 3))
    assert (inverted ^ kept).all()
    assert stats.binomtest(int(inverted.sum()), 600, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("shape", [(37, 23, 3), (24, 40, 1)])
@pytest.mark.parametrize("name", ALL)
def test_every_op_on_the_host_equals_that_on_the_device(name, shape, interpolation):
    images = pictures(*shape)
    for argument in ARGUMENTS.get(name, (0,)):
        expected = applied(name, images, argument, fill=90, interpolation=interpolation)
        for image, other in zip(images, np.asarray(expected), strict=True):
            result = ops.apply_on_host(image, name, np.float32([argument]), interpolation, 90)
            assert result.dtype == np.uint8
            difference = np.abs(result.astype(int) - other)
            if name not in ops.WARPS:
                np.testing.assert_array_equal(result, other)
            elif interpolation == "bilinear":  # between pixels OpenCV knows 32 positions
                assert difference.max() <= 255 * 2 / 64 + 2, (argument, difference.max())
            elif argument % 1 != 0.5:  # in the middle between two pixels either may be taken
                assert (difference > 0).mean() < 0.05, argument


@pytest.mark.parametrize("place", [(5.9, 4.2, 2.0), (0.0, 9.9, 3.0), (11.0, 0.0, 9.0)])
def test_cutout_on_the_host_fills_the_same_square(place):
    images = pictures(12, 10, 3)[:1]
    place = np.float32([place])
    expected = ops.apply(jnp.asarray(images), {"cutout": jnp.asarray(place)}, jnp.array([0]))
    result = ops.apply_on_host(images[0], "cutout", place, "bilinear", 0)
    np.testing.assert_array_equal(result, expected[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_tables_and_histograms_by_comparison_equal_those_by_gather(monkeypatch, channels):
    """What a TPU is given, on the devices that there are."""
    images = jnp.asarray(pictures(37, 23, channels))
    tables = np.random.default_rng(3).integers(0, 256, (len(images), channels, 256))
    tables = jnp.asarray(tables, jnp.uint8)
    gathered, counts = enhance.look_up(images, tables), enhance._histogram(images)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, tpu, default: tpu(*a))
    np.testing.assert_array_equal(enhance.look_up(images, tables), gathered)
    np.testing.assert_array_equal(enhance._histogram(images), counts)
