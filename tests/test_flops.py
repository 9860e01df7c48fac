"""FLOPs that are read off compiled programs are XLA's own count."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from flaxcls.perf.flops import product_flops, xla_flops
from flaxcls.perf.hlo_text import Module


def compiled_text(function, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, compiled.as_text()


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (jnp.matmul, [(64, 96), (96, 32)], 2 * 64 * 96 * 32),
        (jnp.matmul, [(3, 64, 96), (3, 96, 32)], 2 * 3 * 64 * 96 * 32),
        (partial(jnp.einsum, "abcd,cde->abe"), [(2, 3, 4, 5), (4, 5, 6)], 2 * 6 * 20 * 6),
        (partial(jax.lax.scan, lambda x, w: (x @ w, 0)), [(8, 8), (5, 8, 8)], 5 * 2 * 8**3),
    ],
)
def test_products_are_counted(function, shapes, flops):
    _, text = compiled_text(function, *shapes)
    assert product_flops(Module(text)) == flops


CONVOLUTIONS = [
    {"window_strides": (1, 1), "padding": "SAME"},
    {"window_strides": (2, 2), "padding": "SAME"},
    {"window_strides": (2, 1), "padding": ((3, 2), (0, 1))},
    {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 3)},
    {"window_strides": (1, 1), "padding": ((1, 1), (2, 2)), "lhs_dilation": (2, 2)},
    {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("by", [None, 0, 1])  # forward, and the gradients of images and kernel
def test_convolutions_are_counted_as_xla_does(options, by):
    groups = options.get("feature_group_count", 1)

    def convolve(images, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, dimension_numbers=layout, **options)

    def gradient(images, kernel, cotangents):
        return jax.vjp(convolve, images, kernel)[1](cotangents)[by]

    shapes = [(4, 13, 11, 8), (3, 5, 8 // groups, 16)]
    if by is not None:
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        shapes.append(jax.eval_shape(convolve, *arguments).shape)
    compiled, text = compiled_text(convolve if by is None else gradient, *shapes)
    assert product_flops(Module(text)) == pytest.approx(xla_flops(compiled, text), rel=0.02)


# What XLA calls for a 3x3 convolution of stride 2, [4,32,32,8] -> [4,16,16,16], on an H100.
CUDNN = """
ENTRY %main (x: bf16[4,32,32,8], w: bf16[16,3,3,8], y: bf16[4,16,16,16]) -> RESULT {
  %x = bf16[4,32,32,8]{3,2,1,0} parameter(0)
  %w = bf16[16,3,3,8]{3,2,1,0} parameter(1)
  %y = bf16[4,16,16,16]{3,2,1,0} parameter(2)
  %called = (RESULT{3,2,1,0}, u8[0]{0}) custom-call(OPERANDS), \
window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_o01i->b01f, custom_call_target="TARGET"
}
"""


@pytest.mark.parametrize(
    ("target", "operands", "result"),
    [
        ("__cudnn$convForward", "%x, %w", "bf16[4,16,16,16]"),
        ("__cudnn$convBackwardInput", "%y, %w", "bf16[4,32,32,8]"),
        ("__cudnn$convBackwardFilter", "%x, %y", "bf16[16,3,3,8]"),
    ],
)
def test_calls_of_cudnn_have_the_flops_of_their_convolution(target, operands, result):
    text = CUDNN.replace("TARGET", target).replace("OPERANDS", operands)
    met = (16 * 3 - 1) ** 2  # the last pixel of the kernel meets padding once
    assert product_flops(Module(text.replace("RESULT", result))) == 2 * 4 * 8 * 16 * met


CUBLAS = """
ENTRY %main (a: f32[8,32,64], b: f32[8,64,16]) -> f32[8,32,16] {
  %a = f32[8,32,64]{2,1,0} parameter(0)
  %b = f32[8,64,16]{2,1,0} parameter(1)
  %c = (f32[8,32,16]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"]}}}
}
"""
ATTENTION = """
ENTRY %main (q: bf16[2,10,3,64], k: bf16[2,12,3,64], v: bf16[2,12,3,64]) -> bf16[2,3,10,64] {
  %q = bf16[2,10,3,64]{3,2,1,0} parameter(0)
  %k = bf16[2,12,3,64]{3,2,1,0} parameter(1)
  %v = bf16[2,12,3,64]{3,2,1,0} parameter(2)
  %y = (bf16[2,3,10,64]{3,1,2,0}, f32[2,3,10]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": \
{"fmha_scale": 0.125, "intermediate_tensor_shape": {"dimensions": ["2", "3", "10", "12"]}}}
}
"""


def test_calls_of_libraries_are_counted():
    assert product_flops(Module(CUBLAS)) == 2 * 8 * 32 * 64 * 16
    product = 2 * 2 * 3 * 10 * 12 * 64
    assert product_flops(Module(ATTENTION)) == 2 * product
    assert (
        product_flops(Module(ATTENTION.replace("fmhaSoftmax", "fmhaSoftmaxBackward")))
        == 5 * product
    )
