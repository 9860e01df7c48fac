"""Vision transformers: what the comparison with timm does not see."""

import jax
import jax.numpy as jnp
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


def test_uniform_drop_path_reaches_the_first_block():
    image = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))

    def change(**options):
        """How far logits in training are from those in evaluation."""
        network = models.build("vit", num_classes=3, drop_path=0.9, **options, **SMALL)
        variables = network.init(jax.random.key(1), image, train=False)
        rngs = {"dropout": jax.random.key(2)}
        trained = network.apply(variables, image, train=True, rngs=rngs)
        return abs(trained - network.apply(variables, image, train=False)).max()

    assert change() == 0  # its only block is the first
    assert change(drop_path_uniform=True) > 1e-3


def test_layer_before_the_head_is_what_is_pooled():
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    network = models.build("vit", num_classes=3, pre_logits=True, **SMALL)
    variables = network.init(jax.random.key(1), image, train=False)
    pooled = models.features(network, variables, image)["pooled"]
    assert abs(pooled).max() < 1
    head = variables["params"]["head"]
    logits = network.apply(variables, image, train=False)
    np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"], atol=1e-6)


def test_positions_added_by_a_product_are_those_added_by_a_sum():
    keys = jax.random.split(jax.random.key(0), 3)
    x, gradient = (jax.random.normal(key, (33, 5, 16), jnp.bfloat16) for key in keys[:2])
    positions = jax.random.normal(keys[2], (1, 5, 16), jnp.bfloat16)
    actual, pullback = jax.vjp(vit._add_by_product, x, positions)
    np.testing.assert_array_equal(actual, x + positions)
    of_x, of_positions = pullback(gradient)
    np.testing.assert_array_equal(of_x, gradient)
    expected = np.float64(gradient).sum(0, keepdims=True)
    np.testing.assert_allclose(np.float64(of_positions), expected, rtol=0.01, atol=0.05)


def test_positions_are_added_by_a_product_on_gpus_in_half_precision_alone():
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def has_product(dtype, platform):
        network = models.build("vit", num_classes=3, dtype=dtype, **SMALL)
        shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), image)
        traced = jax.jit(lambda *x: network.apply(*x, train=False)).trace(shapes, image)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return "(tensor<2x1xbf16>, tensor<1x80xbf16>) -> tensor<2x80xbf16>" in text  # 5 tokens

    assert has_product("bfloat16", "cuda") and has_product("bfloat16", "rocm")
    assert not has_product("bfloat16", "cpu") and not has_product("bfloat16", "tpu")
    assert not has_product("float32", "cuda")
