import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage


@pytest.fixture
def make_batch():
    """A batch of random uint8 images, or of the given ones, with one-hot labels."""

    def make(count=8, height=8, width=8, channels=3, images=None, classes=5):
        if images is None:
            shape = (count, height, width, channels)
            images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        count = len(images)
        return {
            "image": jnp.asarray(images),
            "label": jnp.eye(classes)[jnp.arange(count) % classes],
            "index": jnp.arange(count, dtype=jnp.int32),
            "epoch": jnp.zeros(count, jnp.int32),
        }

    return make


@pytest.fixture
def all_optimizations():
    """Compiles as for users, which these tests otherwise do not (`quick_compilation`)."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def pillow():
    """Pillow's version of each op: `pillow(name, image, argument, nearest=False, fill=0)`."""
    pytest.importorskip("PIL")
    from PIL import Image, ImageEnhance, ImageOps

    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "color": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }
    corrections = {"invert": ImageOps.invert, "autocontrast": ImageOps.autocontrast}
    corrections["equalize"] = ImageOps.equalize
    coefficients = {
        "shear_x": lambda a: (1, a, 0, 0, 1, 0),
        "shear_y": lambda a: (1, 0, 0, a, 1, 0),
        "translate_x": lambda a: (1, 0, a, 0, 1, 0),
        "translate_y": lambda a: (1, 0, 0, 0, 1, a),
    }

    def apply(name, pixels, argument, nearest=False, fill=0):
        grey = pixels.shape[-1] == 1
        image = Image.fromarray(pixels[..., 0] if grey else pixels)
        resample = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
        outside = {"resample": resample, "fillcolor": fill if grey else (fill,) * 3}
        if name in enhancers:
            image = enhancers[name](image).enhance(argument)
        elif name in corrections:
            image = corrections[name](image)
        elif name == "posterize":
            # Pillow refuses to keep no bits.
            bits = int(argument)
            image = ImageOps.posterize(image, bits) if bits else image.point(lambda value: 0)
        elif name == "solarize":
            image = ImageOps.solarize(image, argument)
        elif name == "solarize_add":
            table = [min(255, value + int(argument)) for value in range(128)]
            image = image.point((table + list(range(128, 256))) * len(image.getbands()))
        elif name == "rotate":
            image = image.rotate(argument, **outside)
        elif name in coefficients:
            transform = Image.Transform.AFFINE
            image = image.transform(image.size, transform, coefficients[name](argument), **outside)
        else:
            assert name == "identity"
        result = np.asarray(image)
        return result[..., None] if grey else result

    return apply


@pytest.fixture(scope="session")
def assert_like_pillow(pillow):
    """Fails unless `result` is what Pillow makes of `image`, within what the ops promise."""

    def check(result, name, image, argument, nearest=False, fill=0):
        expected = pillow(name, image, argument, nearest, fill).astype(int)
        difference = np.asarray(result).astype(int) - expected
        message = f"{name} {argument}"
        if name == "autocontrast":
            # Pillow is one too dark where its floating point just misses a whole number.
            low, high = image.min(axis=(0, 1)).astype(int), image.max(axis=(0, 1)).astype(int)
            whole = (image - low) * 255 % np.maximum(high - low, 1) == 0
            assert np.isin(difference, (0, 1)).all() and whole[difference == 1].all(), message
        elif name not in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
            np.testing.assert_array_equal(difference, 0, err_msg=message)
        elif nearest:
            # Where two pixels are equally near, rounding decides.
            assert (difference == 0).mean() > 0.97, message
        else:
            # At the border Pillow cuts sharply.
            white = np.full_like(image[..., :1], 255)
            inside = pillow(name, white, argument, fill=0)[..., 0] == 255
            around = ndimage.binary_dilation(~inside) & ndimage.binary_dilation(inside)
            away = ~ndimage.binary_dilation(around) & ~np.pad(
                np.zeros(np.array(inside.shape) - 2, bool), 1, constant_values=True
            )
            assert np.abs(difference[away]).max(initial=0) <= 1, message
            np.testing.assert_array_equal(difference[away & ~inside], 0, err_msg=message)

    return check
