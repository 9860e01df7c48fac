"""Vision transformers: what the comparison with timm does not see."""

import jax
import numpy as np

from flaxcls import models
from flaxcls.models import vit

SMALL = {"patch": 4, "width": 16, "depth": 1, "heads": 2}


def test_sincos2d_is_sines_and_cosines_of_the_column_then_of_the_row():
    table = vit.sincos2d(rows=2, columns=3, width=8)
    expected = [np.sin([2, 2e-4]), np.cos([2, 2e-4]), np.sin([1, 1e-4]), np.cos([1, 1e-4])]
    assert table.shape == (6, 8)
    np.testing.assert_allclose(table[1 * 3 + 2], np.concatenate(expected), rtol=1e-6)


def test_fixed_positions_are_those_that_a_learned_embedding_could_have():
    image = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    fixed = models.build("vit", num_classes=3, posemb="sincos2d", **SMALL)
    learned = models.build("vit", num_classes=3, no_embed_class=True, **SMALL)
    init = jax.jit(lambda key: fixed.init(key, image, train=False))
    params = init(jax.random.key(1))["params"]
    assert "pos_embed" not in params
    given = {**params, "pos_embed": vit.sincos2d(rows=2, columns=3, width=16)[None]}
    logits, expected = jax.jit(
        lambda: (
            fixed.apply({"params": params}, image, train=False),
            learned.apply({"params": given}, image, train=False),
        )
    )()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
