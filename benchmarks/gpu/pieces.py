"""Times pieces of a training step alone, stem and attention beside what XLA makes of them.

    python benchmarks/gpu/pieces.py [--tiny]

The stem of an ImageNet ResNet is that of 256 images of 224 pixels in bfloat16: its convolution with
the kernel's gradient, and max-pool's gradient. Attention, with its gradient, is that of a ViT-B/16
on 256 images, bfloat16 too; also with the product before it, as one that is cut into queries, keys
and values or as three. The augmentations, normalising included, have 1,024 uint8 images of 160
pixels. Milliseconds, the median of five rounds of ten calls. The last line is the result as JSON.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    result = stem(*((2, 16) if tiny else (256, 112)))
    print(json.dumps(result), flush=True)
    result |= attentions(*((2, 17) if tiny else (256, 197)))
    print(json.dumps(result), flush=True)
    result |= projected_attentions(*((2, 17) if tiny else (256, 197)))
    print(json.dumps(result), flush=True)
    result |= augmentations(*((8, 32) if tiny else (1024, 160)))
    print(json.dumps(result))


def stem(batch: int, size: int) -> dict[str, float]:
    """Of [batch, size, size, 64] features, which the convolution makes of images twice as large."""
    key = jax.random.key(0)
    images = jax.random.normal(key, (batch, 2 * size, 2 * size, 3), jnp.bfloat16)
    features = jax.random.normal(key, (batch, size, size, 64), jnp.bfloat16)
    pooled = features[:, : size // 2, : size // 2]
    kernel = 0.1 * jax.random.normal(key, (7, 7, 3, 64), jnp.bfloat16)
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    options = {**numbers, "lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}

    def convolution(by: Callable) -> Callable:
        return lambda images, kernel: by(images, kernel, (2, 2), ((3, 3), (3, 3)), **options)

    def max_pool(features: jax.Array) -> jax.Array:
        return nn.max_pool(features, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

    def kernel_gradient(convolve: Callable) -> Callable:
        """Of both outputs something is needed, so that neither is left out."""

        def both(images: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
            outputs, pullback = jax.vjp(functools.partial(convolve, images), kernel)
            return outputs.mean(), pullback(cotangent)

        return both

    def gradient(pool: Callable) -> Callable:
        return lambda features, cotangent: jax.vjp(pool, features)[1](cotangent)

    xla, flaxcls = map(convolution, (jax.lax.conv_general_dilated, recipes.convolve))
    return {
        "convolution_xla": milliseconds(kernel_gradient(xla), images, kernel, features),
        "convolution_flaxcls": milliseconds(kernel_gradient(flaxcls), images, kernel, features),
        "max_pool_xla": milliseconds(gradient(max_pool), features, pooled),
        "max_pool_flaxcls": milliseconds(gradient(recipes.overlapping_max_pool), features, pooled),
    }


def attentions(batch: int, tokens: int) -> dict[str, float]:
    """Of 12 heads of 64."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (batch, tokens, 12, 64), jnp.bfloat16) for key in keys]
    return {
        "attention_xla": milliseconds(with_gradients(jax.nn.dot_product_attention), *arrays),
        "attention_flaxcls": milliseconds(with_gradients(recipes.attention), *arrays),
    }


def projected_attentions(batch: int, tokens: int) -> dict[str, float]:
    """Of 12 heads of 64, with the products of their queries, keys and values and their gradients.

    cuDNN takes dense arrays: what is cut is copied, and the gradients are put together again.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    tokens_in, gradient = jax.random.normal(keys[0], (2, batch, tokens, 768), jnp.bfloat16)
    kernel = 0.02 * jax.random.normal(keys[1], (768, 3 * 768), jnp.bfloat16)
    bias = jax.random.normal(keys[2], (3 * 768,), jnp.bfloat16)

    def one(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
        return jnp.split(x @ kernel + bias, 3, axis=-1)

    def three(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
        parts = zip(jnp.split(kernel, 3, axis=-1), jnp.split(bias, 3), strict=True)
        return [x @ kernel + bias for kernel, bias in parts]

    def attend(project: Callable, *inputs: jax.Array) -> jax.Array:
        heads = (x.reshape(batch, tokens, 12, 64) for x in project(*inputs))
        return recipes.attention(*heads).reshape(tokens_in.shape)

    by_one, by_three = (with_gradients(functools.partial(attend, by)) for by in (one, three))
    inputs = tokens_in, kernel, bias, gradient
    return {
        "attention_of_one_product": milliseconds(by_one, *inputs),
        "attention_of_three_products": milliseconds(by_three, *inputs),
    }


def with_gradients(function: Callable) -> Callable:
    """The function of three arrays, and its gradients for a cotangent, which comes fourth."""

    def both(*inputs: jax.Array) -> Any:
        output, pullback = jax.vjp(function, *inputs[:3])
        return output, pullback(inputs[3])

    return both


def augmentations(batch: int, size: int) -> dict[str, float]:
    """Each alone, and the three of imagenet_resnet50_a3 together."""
    key = jax.random.key(0)
    examples = {
        "image": jax.random.randint(key, (batch, size, size, 3), 0, 256).astype(jnp.uint8),
        "label": jax.nn.one_hot(jnp.arange(batch) % 1000, 1000),
        "index": jnp.arange(batch),
        "epoch": jnp.zeros(batch, jnp.int32),
    }
    flip, rand_augment = {"name": "flip"}, {"name": "rand_augment", "magnitude": 6}
    mix = {"name": "mix", "mixup_alpha": 0.1, "cutmix_alpha": 1.0}
    pipelines = {
        "normalize": (),
        "flip": (flip,),
        "pad_crop": ({"name": "pad_crop", "padding": 4},),
        "mix": (mix,),
        "trivial_augment": ({"name": "trivial_augment"},),
        "rand_augment": (rand_augment,),
        "a3": (flip, rand_augment, mix),
    }
    return {
        name: milliseconds(recipes.augmentation(specs), key, examples)
        for name, specs in pipelines.items()
    }


def milliseconds(function: Callable, *arguments: Any) -> float:
    """The time of a call, compiled; the first call is not counted."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            outputs = function(*arguments)
        jax.block_until_ready(outputs)
        rounds.append(1e3 * (time.perf_counter() - start) / 10)
    return statistics.median(rounds)


if __name__ == "__main__":
    main()
