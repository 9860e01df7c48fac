"""Test-time augmentation: the views of images, and the mean over them."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.augment.views import VIEWS, mean_over_views, view_shapes
from flaxcls.config import user_code
from flaxcls.errors import ConfigError

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 9, 2)).astype(np.uint8)


def network(images):
    """Logits [B, 4] that differ with every pixel, its place, and images of several sizes."""
    x = jnp.asarray(images, jnp.float32).sum(axis=-1) / 255
    rows = jnp.cos(jnp.arange(x.shape[1])[:, None] + jnp.arange(4))
    columns = jnp.sin(jnp.arange(x.shape[2])[:, None] + 2.0 * jnp.arange(4))
    return jnp.einsum("bhw,hk,wk->bk", x**2, rows, columns)


def mirrored(images):
    return np.flip(images, axis=2)


def check(name, expected):
    mean = mean_over_views(name, network)(jnp.asarray(IMAGES))
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(mean, network(IMAGES), rtol=1e-3)


def test_flip_is_the_mean_of_an_image_and_its_mirror_image():
    check("flip", (network(IMAGES) + network(mirrored(IMAGES))) / 2)


def test_flip_shift_is_airbenchs():
    def moved(by):
        """By a pixel along both axes; the border is reflected, so that pixel -1 is pixel 1."""
        rows, columns = (np.arange(n) + by for n in IMAGES.shape[1:3])
        rows, columns = (
            np.where(i < 0, -i, np.where(i >= n, 2 * (n - 1) - i, i))
            for i, n in ((rows, 16), (columns, 9))
        )
        return IMAGES[:, rows][:, :, columns]

    def pair(images):
        return (network(images) + network(mirrored(images))) / 2

    check("flip_shift", pair(IMAGES) / 2 + pair(moved(-1)) / 4 + pair(moved(1)) / 4)


def test_crops_are_the_corners_and_the_centre():
    height, width = 14, 7
    crops = [
        IMAGES[:, top : top + height, left : left + width]
        for top, left in ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))
    ]
    assert view_shapes("ten_crop", (256, 256, 3)) == {(224, 224, 3)}
    check("five_crop", sum(map(network, crops)) / 5)
    check("ten_crop", sum(network(x) + network(mirrored(x)) for x in crops) / 10)


def test_all_keep_the_dtype_and_a_tree_is_averaged_leaf_by_leaf():
    for views in VIEWS.values():
        assert {view.dtype for _, view in views(jnp.asarray(IMAGES))} == {jnp.dtype(jnp.uint8)}
    both = mean_over_views("flip", lambda x: {"logits": network(x), "twice": 2 * network(x)})
    result = both(jnp.asarray(IMAGES))
    np.testing.assert_allclose(result["twice"], 2 * result["logits"], rtol=1e-6)
    assert mean_over_views(None, network) is network and view_shapes(None, (8, 8, 1)) == {(8, 8, 1)}


OWN = """
def brighter(images):
    return [(0.75, images), (0.25, images // 2)]

def unequal(images):
    return [(0.5, images), (0.25, images)]

def grey(images):
    return [(1.0, images[..., :1])]

def empty(images):
    return []

def bare(images):
    return [images]
"""


def test_ones_own_views_are_used_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "own_views.py").write_text(OWN)
    user_code.search(tmp_path)
    assert view_shapes("own_views:brighter", (16, 9, 2)) == {(16, 9, 2)}
    check("own_views:brighter", 0.75 * network(IMAGES) + 0.25 * network(IMAGES // 2))
    for name in ("unequal", "grey", "empty"):
        with pytest.raises(ConfigError, match=f"own_views:{name} must return pairs of a weight"):
            view_shapes(f"own_views:{name}", (16, 9, 2))
    with pytest.raises(ConfigError, match="own_views.py"):
        view_shapes("own_views:bare", (16, 9, 2))
    with pytest.raises(ConfigError, match="config.eval.tta is 'own_views:nosuch', but"):
        view_shapes("own_views:nosuch", (16, 9, 2))
    assert user_code.names({"eval": {"tta": "own_views:bare"}}) == {
        "config.eval.tta": "own_views:bare"
    }


def test_unknown_name_is_told_with_the_closest():
    with pytest.raises(ConfigError, match="config.eval.tta is 'flop', which is not known, .*flip"):
        view_shapes("flop", (8, 8, 1))
