from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from flaxcls.augment.geometry import Affine, Flip, PadCrop, Rotation, affine_matrix
from flaxcls.augment.ops import WARPS, warp
from flaxcls.errors import ConfigError

KEY = jax.random.key(0)


def rotate(images, degrees, fill):
    return warp(images, WARPS["rotate"](images.shape[1:3], degrees), "bilinear", fill)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_pad_crop_takes_every_window_of_the_padded_image_equally_often(make_batch, mode):
    count, padding, height, width = 2500, 2, 7, 5
    image = np.random.default_rng(1).integers(1, 256, (height, width, 3)).astype(np.uint8)
    batch = make_batch(images=np.repeat(image[None], count, axis=0))
    crops = np.asarray(jax.jit(PadCrop(padding=padding, mode=mode))(KEY, batch)["image"])

    sides = ((padding, padding), (padding, padding), (0, 0))
    padded = np.pad(image, sides, mode="constant" if mode == "zeros" else "reflect")
    offsets = range(2 * padding + 1)
    windows = {
        padded[top : top + height, left : left + width].tobytes(): (top, left)
        for top in offsets
        for left in offsets
    }
    seen = Counter(windows[crop.tobytes()] for crop in crops)
    expected = count / len(windows)
    chi_square = sum((seen[place] - expected) ** 2 / expected for place in windows.values())
    assert chi_square < 52  # the 99.9 % point for 24 degrees of freedom


def test_pad_crop_refuses_a_padding_as_large_as_the_image(make_batch):
    with pytest.raises(ConfigError, match="smaller than the 8 x 8 image, got 8"):
        PadCrop(padding=8)(KEY, make_batch())


def test_random_flip_mirrors_half_of_the_images(make_batch):
    batch = make_batch(1000, 4, 3)
    images, result = np.asarray(batch["image"]), np.asarray(Flip()(KEY, batch)["image"])
    flipped = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (result == images).all(axis=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert 0.45 < flipped.mean() < 0.55


def test_alternating_flip_mirrors_each_example_in_every_second_epoch(make_batch):
    batch = make_batch(1000, 4, 3)
    images = np.asarray(batch["image"])
    flip = jax.jit(Flip(mode="alternating"))
    flipped = []
    for epoch in range(4):
        this_epoch = {**batch, "epoch": jnp.full(1000, epoch, jnp.int32)}
        result = np.asarray(flip(jax.random.key(epoch), this_epoch)["image"])
        flipped.append((result == images[:, :, ::-1]).all(axis=(1, 2, 3)))
        assert (flipped[-1] | (result == images).all(axis=(1, 2, 3))).all()
    assert 0.45 < flipped[0].mean() < 0.55
    assert (flipped[0] != flipped[1]).all()
    assert (flipped[0] == flipped[2]).all() and (flipped[1] == flipped[3]).all()
    # Neighbours in the data set are independent.
    assert 0.45 < (flipped[0][1:] == flipped[0][:-1]).mean() < 0.55


def test_alternating_flip_takes_the_epoch_of_each_example(make_batch):
    images = np.asarray(make_batch(1, 4, 3)["image"]).repeat(2, axis=0)
    batch = {**make_batch(images=images), "index": jnp.zeros(2, int), "epoch": jnp.arange(2)}
    first, second = np.asarray(Flip(mode="alternating")(KEY, batch)["image"])
    np.testing.assert_array_equal(first, second[:, ::-1])


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 14, 1)])
def test_rotation_equals_scipy_bilinear(shape):
    degrees = np.array([0, 7.5, -33, 90, 123, -180], np.float32)
    images = np.random.default_rng(2).uniform(0, 255, (6, *shape)).astype(np.float32)
    centre = (np.array(shape[:2]) - 1) / 2
    expected = np.empty_like(images, dtype=np.float64)
    for image, angle, result in zip(
        images, np.deg2rad(degrees, dtype=float), expected, strict=True
    ):
        matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for channel in range(shape[2]):
            result[..., channel] = ndimage.affine_transform(
                image[..., channel].astype(float),
                matrix,
                centre - matrix @ centre,
                order=1,
                mode="grid-constant",
                cval=50,
            )
    result = rotate(jnp.asarray(images), jnp.asarray(degrees), 50.0)
    np.testing.assert_allclose(result, expected, atol=0.02)


def test_rotation_by_quarter_turns_is_exact_and_counter_clockwise(make_batch):
    images = make_batch(3)["image"]
    result = rotate(images, jnp.array([90.0, 180.0, -90.0]), 0.0)
    for turns, image, turned in zip([1, 2, -1], images, result, strict=True):
        np.testing.assert_array_equal(turned, np.rot90(image, turns))


def test_rotation_looks_like_that_of_pillow():
    image_module = pytest.importorskip("PIL.Image")
    y, x = np.mgrid[:32, :32] / 31
    smooth = (255 * np.stack([x, y, (1 + np.sin(6 * x * y)) / 2], axis=-1)).astype(np.uint8)
    expected = image_module.fromarray(smooth).rotate(20, image_module.BILINEAR)
    result = rotate(jnp.asarray(smooth)[None], jnp.array([20.0]), 0.0)[0]
    centre = np.hypot(x - 0.5, y - 0.5) < 0.48
    difference = np.abs(np.asarray(expected, int) - np.asarray(result, int))[centre]
    assert difference.max() <= 2


def test_rotation_angles_are_uniform_in_their_range(make_batch):
    # A bright pixel on the left arm shows the angle by which it was moved.
    images = np.zeros((400, 41, 41, 1), np.float32)
    images[:, 19:22, 0:3] = 255
    rotation = jax.jit(Rotation(degrees=40))
    rotated = np.asarray(rotation(KEY, make_batch(images=images))["image"])[..., 0]
    y, x = np.mgrid[:41, :41] - 20
    mass = rotated.sum(axis=(1, 2))
    down, right = (rotated * y).sum(axis=(1, 2)) / mass, (rotated * x).sum(axis=(1, 2)) / mass
    angles = np.rad2deg(np.arctan2(down, -right))
    assert angles.min() > -41 and angles.max() < 41
    assert np.histogram(angles, bins=4, range=(-40, 40))[0].min() > 70


def test_rotation_fills_the_corners(make_batch):
    images = np.full((50, 16, 16, 3), 200, np.uint8)
    rotated = np.asarray(Rotation(degrees=180, fill=30)(KEY, make_batch(images=images))["image"])
    assert rotated.min() == 30 and rotated.max() == 200
    assert (rotated[:, 6:10, 6:10] == 200).all()


@pytest.mark.parametrize("shape", [(20, 30), (17, 17)])
def test_affine_matrix_equals_the_chain_of_its_steps(shape):
    """Against 3 x 3 matrices of pixel coordinates, multiplied and inverted in float64."""
    random = np.random.default_rng(4)
    degrees, shear = random.uniform(-180, 180, 5), random.uniform(-60, 60, 5)
    scale, shift = random.uniform(0.3, 3, 5), random.uniform(-9, 9, (5, 2))
    height, width = shape
    to_centre = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    expected = []
    for turn, lean, factor, (right, down) in zip(
        np.deg2rad(degrees), np.deg2rad(shear), scale, shift, strict=True
    ):
        bigger = np.diag([factor, factor, 1])
        sheared = np.array([[1, np.tan(lean), 0], [0, 1, 0], [0, 0, 1]])
        # The y axis points down: this turns counter-clockwise.
        cosine, sine = np.cos(turn), np.sin(turn)
        turned = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
        moved = np.array([[1, 0, right], [0, 1, down], [0, 0, 1]])
        forward = moved @ np.linalg.inv(to_centre) @ turned @ sheared @ bigger @ to_centre
        expected.append(np.linalg.inv(forward)[:2])
    result = affine_matrix(shape, degrees=degrees, shear=shear, scale=scale, shift=shift)
    np.testing.assert_allclose(result, expected, atol=3e-4)


def located(images, batch_size):
    """For each image with three bright dots on black the places (x, y) of their centres."""
    places = np.zeros((batch_size, 3, 2))
    for image, place in zip(np.asarray(images, float), places, strict=True):
        for channel in range(3):
            y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
            mass = image[..., channel]
            place[channel] = (mass * x).sum() / mass.sum(), (mass * y).sum() / mass.sum()
    return places


def test_affine_draws_each_part_in_its_range(make_batch):
    count, size = 300, 48
    images = np.zeros((count, size, size, 3), np.float32)
    for channel, (y, x) in enumerate([(23, 23), (23, 31), (31, 23)]):  # origin, x axis, y axis
        images[:, y : y + 2, x : x + 2, channel] = 200
    affine = Affine(degrees=30, translate=0.1, scale=(0.8, 1.25), shear=20)
    result = jax.jit(affine)(KEY, make_batch(images=images))["image"]
    origin, x_end, y_end = located(result, count).transpose(1, 0, 2)

    shift = (origin - size / 2) / size
    x_axis, y_axis = (x_end - origin) / 8, (y_end - origin) / 8
    degrees = np.rad2deg(np.arctan2(-x_axis[:, 1], x_axis[:, 0]))
    scale = np.linalg.norm(x_axis, axis=1)
    lean = (x_axis * y_axis).sum(axis=1) / scale**2
    shear = np.rad2deg(np.arctan(lean))
    drawn = [*shift.T, degrees, scale, shear]
    for values, (low, high) in zip(
        drawn, [(-0.1, 0.1), (-0.1, 0.1), (-30, 30), (0.8, 1.25), (-20, 20)], strict=True
    ):
        slack = 0.05 * (high - low)
        assert values.min() > low - slack and values.max() < high + slack
        assert np.histogram(values, bins=4, range=(low - slack, high + slack))[0].min() > 45
    assert np.abs(np.corrcoef(drawn) - np.eye(5)).max() < 0.2


def test_affine_without_any_range_or_with_one_reversed_is_an_error():
    with pytest.raises(ConfigError, match="at least one of `degrees`, `translate`, `scale`"):
        Affine()
    with pytest.raises(ConfigError, match=r"`scale` of `affine` must be \(low, high\)"):
        Affine(scale=(1.2, 0.8))
