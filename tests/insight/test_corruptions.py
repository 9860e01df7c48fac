"""Corruptions: equal to the published rules written anew with NumPy, SciPy, OpenCV and Pillow."""

import colorsys
import io
import math
from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

import flaxcls
from flaxcls.errors import ConfigError
from flaxcls.insight import resampling
from flaxcls.insight.corrupted import corrupt_run
from flaxcls.insight.corruptions import CORRUPTIONS, SEVERITIES, corrupt, disk_kernel


@pytest.fixture(scope="module")
def images():
    """Smooth pictures with edges, uint8 [4, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(4, 32, 32, 3)), (0, 2, 2, 0))
    noise += np.where(scipy.ndimage.gaussian_filter(noise, (0, 3, 3, 3)) > 0, 0.3, -0.1)
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return np.round(noise * 255).astype(np.uint8)


def keys_of(count, seed=0):
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(count))


def corrupted(name, severity, images, seed=0):
    return np.asarray(corrupt(name, severity, keys_of(len(images), seed), images))


def differ(found, expected):
    return np.abs(found.astype(int) - expected.astype(int)).max()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_keyed_and_of_each_image_alone(name, images):
    found = corrupted(name, 3, images)
    assert found.dtype == np.uint8 and found.shape == images.shape
    assert 1 < np.abs(found.astype(int) - images).mean() < 80
    np.testing.assert_array_equal(found, corrupted(name, 3, images))
    keys = keys_of(4)[jnp.array([2, 0, 1, 3])]
    moved = np.asarray(corrupt(name, 3, keys, images[[2, 0, 1, 3]]))
    assert differ(moved, found[[2, 0, 1, 3]]) <= 1
    is_random = (corrupted(name, 3, images, seed=1) != found).any()
    fixed = "defocus_blur zoom_blur brightness contrast pixelate jpeg_compression"
    assert is_random == (name not in fixed.split())


def test_gaussian_noise_has_the_published_deviation(images):
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    for severity, scale in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        found = corrupted("gaussian_noise", severity, grey)
        normal = np.stack([jax.random.normal(key, (32, 32, 3)) for key in keys_of(4)])
        expected = np.floor(np.clip(grey / 255 + scale * normal, 0, 1) * 255 + 1e-3)
        assert differ(found, expected) <= 1 and (found == expected).mean() > 0.999
        assert found.std() / 255 == pytest.approx(scale, rel=0.03)
    large = np.full((1, 80, 80, 3), 128, np.uint8)  # ImageNet-C's
    assert corrupted("gaussian_noise", 1, large).std() / 255 == pytest.approx(0.08, rel=0.03)


def test_shot_and_impulse_noise_have_the_published_share(images):
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    found = corrupted("shot_noise", 5, grey) / 255
    assert found.mean() == pytest.approx(128 / 255, rel=0.02)
    assert found.std() == pytest.approx(math.sqrt(128 / 255 / 50), rel=0.05)
    found = corrupted("impulse_noise", 5, grey)
    assert [(found == value).mean() for value in (0, 255)] == pytest.approx([0.035] * 2, rel=0.15)
    assert set(np.unique(found)) == {0, 128, 255}


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_is_its_formula(images, severity):
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    x = images / 255.0
    mean = x.mean(axis=(1, 2), keepdims=True)
    expected = np.uint8(np.clip((x - mean) * factor + mean, 0, 1) * 255)
    assert differ(corrupted("contrast", severity, images), expected) <= 1


def test_brightness_is_that_of_hsv(images):
    few = images[:1, ::4, ::4].copy()
    few[0, 0, 0] = 0  # black has no ratios
    found = corrupted("brightness", 5, few)
    for pixel, result in zip(few.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255.0))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
        assert differ(result, np.uint8(np.array(expected) * 255)) <= 1


@pytest.mark.parametrize("severity", [1, 5])
def test_pixelate_is_pillows_box_filter(images, severity):
    size = int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    found = corrupted("pixelate", severity, images)
    for image, result in zip(images, found, strict=True):
        small = Image.fromarray(image).resize((size, size), Image.Resampling.BOX)
        assert differ(result, np.asarray(small.resize((32, 32), Image.Resampling.BOX))) <= 1


def opencv_disk(radius, deviation):
    reach = 8 if radius <= 8 else radius
    x, y = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    disk = np.array(x**2 + y**2 <= radius**2, np.float32)
    taps = (3, 3) if radius <= 8 else (5, 5)
    return cv2.GaussianBlur(disk / disk.sum(), taps, deviation)


def test_defocus_blur_is_opencvs(images):
    for disk in ((0.3, 0.4), (1.5, 0.1), (6, 0.5), (10, 0.5)):
        np.testing.assert_allclose(disk_kernel(*disk), opencv_disk(*disk), atol=1e-6)
    found = corrupted("defocus_blur", 4, images)
    kernel = opencv_disk(1, 0.2)
    for image, result in zip(images, found, strict=True):
        blurred = cv2.filter2D(image / 255.0, -1, kernel)
        assert differ(result, np.uint8(np.clip(blurred, 0, 1) * 255)) <= 1


def test_jpeg_is_pillows(images):
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "JPEG", quality=58)
    expected = np.asarray(Image.open(file))
    np.testing.assert_array_equal(corrupted("jpeg_compression", 3, images)[0], expected)


def test_zoom_blur_is_the_mean_of_scipys_zooms(images):
    def zoomed(x, factor):
        side = math.ceil(32 / factor)
        top = (32 - side) // 2
        part = x[top : top + side, top : top + side]
        large = scipy.ndimage.zoom(part, (factor, factor, 1), order=1)
        trim = (len(large) - 32) // 2
        return large[trim : trim + 32, trim : trim + 32]

    x = images[0] / 255.0
    factors = np.arange(1, 1.16, 0.01)
    expected = (x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1)
    found = corrupted("zoom_blur", 3, images[:1])[0]
    assert differ(found, np.uint8(np.clip(expected, 0, 1) * 255)) <= 1


@pytest.mark.parametrize("mode, truncate", [("nearest", 4), ("reflect", 3)])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0, 40.0])
def test_gaussian_is_scipys(mode, truncate, sigma):
    line = np.random.default_rng(0).normal(size=12)
    expected = scipy.ndimage.gaussian_filter1d(line, sigma, mode=mode, truncate=truncate)
    found = resampling.gaussian(12, sigma, truncate, mode) @ line
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_streaks_are_a_sum_of_shifted_pixels(images):
    x = images[:2] / 255.0
    for degrees in (0.0, 30.0, -90.0):
        found = resampling.streaks(jnp.float32(x), 6, 2.0, jnp.full(2, degrees))
        weights = np.exp(-(np.arange(13) ** 2) / 8)
        expected = np.zeros_like(x)
        for tap, weight in enumerate(weights / weights.sum()):
            down = math.ceil(tap * math.sin(math.radians(degrees)) - 0.5)
            right = math.ceil(tap * math.cos(math.radians(degrees)) - 0.5)
            row = np.clip(np.arange(32) + down, 0, 31)[:, None]
            expected += weight * x[:, row, np.clip(np.arange(32) + right, 0, 31)]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("edge, mode", [(True, "reflect"), (False, "mirror")])
def test_sampling_is_scipys(images, edge, mode):
    x = images[:1].astype(np.float32)
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(-9, 40, (2, 1, 32, 32))
    found = resampling.sample(x, jnp.float32(rows), jnp.float32(columns), edge)
    for channel in range(3):
        expected = scipy.ndimage.map_coordinates(
            x[0, ..., channel], [rows[0], columns[0]], order=1, mode=mode
        )
        np.testing.assert_allclose(found[0, ..., channel], expected, atol=0.02)


def test_scattered_pixels_are_copied_in_the_published_order(images):
    found = np.asarray(resampling.scattered(jnp.float32(images[:1, :10, :10]), keys_of(1), 2, 2))[0]
    expected = images[0, :10, :10].copy()
    moves = jax.random.randint(keys_of(1)[0], (2 * 6 * 6, 2), -2, 2)
    places = [(h, w) for _ in range(2) for h in range(8, 2, -1) for w in range(8, 2, -1)]
    for (h, w), (down, right) in zip(places, np.asarray(moves), strict=True):
        expected[h, w] = expected[h + down, w + right]
    np.testing.assert_array_equal(found, expected)
    assert (expected != images[0, :10, :10]).any()


def test_plasma_is_a_cloud_from_0_to_1():
    found = np.asarray(resampling.plasma(keys_of(3), 32, 2.0))
    assert found.shape == (3, 32, 32) and found.min() == 0 and found.max() == 1
    rough = np.asarray(resampling.plasma(keys_of(3), 32, 1.2))
    steps = [np.abs(np.diff(field, axis=1)).mean() for field in (found, rough)]
    assert steps[0] < 0.5 * steps[1]  # the faster the noise shrinks the smoother
    assert np.abs(found[0] - found[1]).mean() > 0.02


@pytest.mark.parametrize("severity", [0, 6])
def test_severity_is_from_1_to_5(images, severity):
    with pytest.raises(ValueError, match="severity must be from 1 to 5"):
        corrupt("fog", severity, keys_of(4), images)


def test_run_is_judged_under_all_of_them(digits_run, monkeypatch):
    chosen = ("contrast", "impulse_noise")
    monkeypatch.setattr("flaxcls.insight.corrupted.CORRUPTIONS", chosen)
    result = corrupt_run(digits_run, examples=100, seed=1)
    assert result["clean"] > 0.9 and result["count"] == 100
    assert tuple(result["corruptions"]) == chosen
    accuracies = result["corruptions"]["contrast"]
    assert len(accuracies) == 5 and result["clean"] >= accuracies[0] > accuracies[4]
    assert result["mean"] == pytest.approx(np.mean([*result["corruptions"].values()]))
    assert corrupt_run(digits_run, examples=100, seed=1) == result
    with pytest.raises(ConfigError, match="--examples must be at least 1, got 0"):
        flaxcls.corrupt(digits_run, examples=0)


@pytest.mark.torture
def test_command_prints_all_fifteen_of_grey_images(digits_run, run_main):
    arguments = (f"--run={digits_run}", "--corruptions", "--examples=30")
    result = run_main(*arguments, module="flaxcls.attack")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[3:-1]] == [*CORRUPTIONS]
    assert all(line.count("%") == 6 for line in lines[3:-1])
    assert lines[-1].startswith("mean corruption accuracy ")
