import jax
import numpy as np
import pytest
from scipy import stats

from flaxcls.augment.noise import Cutout, GaussianBlur, RandomErasing, SaltAndPepper
from flaxcls.errors import ConfigError

KEY = jax.random.key(0)


def boxes(holes):
    """Top, left, height and width of the one rectangle in every [H, W] of booleans."""
    found = []
    for hole in holes:
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        top, left = rows[0], columns[0]
        height, width = rows[-1] - top + 1, columns[-1] - left + 1
        assert hole.sum() == height * width, "not a filled rectangle"
        found.append((top, left, height, width))
    return np.array(found)


def test_salt_and_pepper_hits_its_fraction_of_whole_pixels_half_and_half(make_batch):
    images = np.full((50, 20, 30, 3), 100, np.uint8)
    result = np.asarray(SaltAndPepper(fraction=0.2)(KEY, make_batch(images=images))["image"])
    assert set(np.unique(result)) == {0, 100, 255}
    assert (result == result[..., :1]).all()
    assert abs((result == 255).mean() - 0.1) < 0.01
    assert abs((result == 0).mean() - 0.1) < 0.01


@pytest.mark.parametrize("size", [1, 4, 5])
def test_cutout_zeroes_a_square_centred_on_any_pixel_and_cut_at_the_border(make_batch, size):
    count, height, width = 3000, 6, 9
    batch = make_batch(images=np.full((count, height, width, 3), 9, np.uint8))
    result = np.asarray(jax.jit(Cutout(size=size))(KEY, batch)["image"])
    assert (result == result[..., :1]).all() and set(np.unique(result)) == {0, 9}

    expected = {}
    for row in range(height):
        for column in range(width):
            mask = np.full((height, width), 9, np.uint8)
            top, left = row - size // 2, column - size // 2
            mask[max(top, 0) : top + size, max(left, 0) : left + size] = 0
            expected[mask.tobytes()] = expected.get(mask.tobytes(), 0) + 1
    masks, seen = np.unique(result[..., 0].reshape(count, -1), axis=0, return_counts=True)
    assert {mask.tobytes() for mask in masks} == set(expected)
    wanted = np.array([expected[mask.tobytes()] for mask in masks]) * count / (height * width)
    if len(wanted) > 1:
        assert stats.chisquare(seen, wanted).pvalue > 1e-3


def torchvision_boxes(count, height, width, area, aspect):
    """The sizes that torchvision's RandomErasing.get_params draws, in plain NumPy."""
    random = np.random.default_rng(0)
    sizes = []
    for _ in range(count):
        for _ in range(10):
            pixels = height * width * random.uniform(*area)
            ratio = np.exp(random.uniform(*np.log(aspect)))
            tall, wide = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
            if tall < height and wide < width:
                sizes.append((tall, wide))
                break
        else:
            sizes.append((0, 0))
    return np.array(sizes)


@pytest.mark.parametrize("area, aspect", [((0.02, 1 / 3), (0.3, 3.3)), ((0.3, 0.9), (1.0, 3.0))])
def test_random_erasing_has_the_area_and_aspect_of_torchvision(make_batch, area, aspect):
    count, height, width = 3000, 24, 32
    erase = jax.jit(RandomErasing(probability=1.0, area=area, aspect=aspect, fill=7))
    batch = make_batch(images=np.full((count, height, width, 3), 9, np.uint8))
    result = np.asarray(erase(KEY, batch)["image"])
    assert (result == result[..., :1]).all() and set(np.unique(result)) == {7, 9}
    holes = result[..., 0] == 7
    erased = holes.any(axis=(1, 2))
    top, left, tall, wide = boxes(holes[erased]).T

    sizes = torchvision_boxes(count, height, width, area, aspect)
    expected = sizes[sizes[:, 0] > 0]
    assert abs(erased.mean() - len(expected) / count) < 0.03
    assert stats.ks_2samp(tall * wide, expected.prod(axis=1)).pvalue > 1e-3
    assert stats.ks_2samp(tall / wide, expected[:, 0] / expected[:, 1]).pvalue > 1e-3
    # The place is uniform among those where the box fits, both ends included.
    for start, room in ((top, height - tall), (left, width - wide)):
        assert start.min() == 0 and (start == room).any()
        spread = (start + np.random.default_rng(1).uniform(size=len(start))) / (room + 1)
        assert stats.kstest(spread, "uniform").pvalue > 1e-3


def test_random_erasing_erases_with_its_probability(make_batch):
    batch = make_batch(images=np.full((1000, 8, 8, 1), 9, np.uint8))
    erase = jax.jit(RandomErasing(probability=0.3, area=(0.1, 0.3)))
    erased = (np.asarray(erase(KEY, batch)["image"]) == 0).any(axis=(1, 2, 3))
    assert 0.26 < erased.mean() < 0.34


def test_random_erasing_fills_with_standard_normal_noise(make_batch):
    images = np.full((200, 16, 16, 3), 9, np.float32)
    erase = RandomErasing(probability=1.0, area=(0.3, 0.3), aspect=(1.0, 1.0), fill="noise")
    result = np.asarray(jax.jit(erase)(KEY, make_batch(images=images))["image"])
    noise = result[result != 9]
    assert abs(noise.size / result.size - 81 / 256) < 1e-6  # a 9 x 9 box in every image
    assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_random_erasing_that_never_fits_leaves_the_image(make_batch):
    batch = make_batch()
    erase = jax.jit(RandomErasing(probability=1.0, area=(1.0, 1.0)))
    np.testing.assert_array_equal(erase(KEY, batch)["image"], batch["image"])


def test_gaussian_blur_blurs_its_share_with_sigmas_uniform_in_the_range(make_batch):
    # A line shows the kernel: its peak, 1 / (sqrt(2 pi) sigma), falls with sigma.
    images = np.zeros((1000, 3, 31, 1), np.float32)
    images[:, :, 15] = 200
    op = GaussianBlur(sigma=(1.0, 3.0), probability=0.6)
    peaks = np.asarray(jax.jit(op)(KEY, make_batch(images=images))["image"])[:, 1, 15, 0] / 200
    blurred = peaks < 1
    assert stats.binomtest(int(blurred.sum()), 1000, 0.6).pvalue > 1e-3
    sigma = 1 / (np.sqrt(2 * np.pi) * peaks[blurred])
    assert stats.kstest(sigma, stats.uniform(1, 2).cdf).pvalue > 1e-3


def test_gaussian_blur_refuses_a_range_reversed():
    with pytest.raises(ConfigError, match=r"`sigma` of `gaussian_blur` must be \(low, high\)"):
        GaussianBlur(sigma=(2.0, 0.1))
