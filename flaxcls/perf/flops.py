"""The FLOPs of a compiled program: XLA's count or, where it gives none, read off its HLO text."""

import re
from collections.abc import Sequence
from math import prod

import jax

from flaxcls.perf.hlo_text import Instruction, Module, sides
from flaxcls.runtime import onednn

_TARGET = re.compile(r'custom_call_target="([^"]+)"')
# `lhs_contracting_dims={1}` of a dot, `"lhs_contracting_dimensions":["1"]` of a call of cuBLAS.
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s|ensions)"?[=:]\s*[{\[]([\d,\s"]*)[}\]]')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_BATCH_GROUPS = re.compile(r"batch_group_count=(\d+)")
# [B,heads,T,S], the weights that cuDNN's attention computes without writing them.
_WEIGHTS = re.compile(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([\d,\s"]*)\]')
# Of a kernel by Pallas, as it says itself.
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')


def xla_flops(compiled: jax.stages.Compiled, text: str) -> float:
    """Of one run on one device, as XLA counts them; 0 where it does not.

    Of what oneDNN computes XLA knows nothing; it is added here, from `compiled.as_text()`.
    """
    counted = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return counted + sum(onednn.flops(text)) if counted else 0.0


def product_flops(module: Module) -> int:
    """Of the matrix products, convolutions and attention's kernels of a compiled program.

    Products and sums; those of a convolution without those with the padding, as XLA counts them.
    What is inside of a loop counts as often as it runs, where the compiler knows that. For a
    program that was compiled for a GPU that isn't there, of which JAX has no count (0.12.0).
    """
    instructions = module.instructions(lambda call: True)
    return sum(times * _flops(instruction) for instruction, times in instructions)


def flops_of(operator: Instruction, module: Module) -> int:
    """As in `product_flops`, of one operator with all that is fused into it."""
    fused = operator.called if operator.opcode == "fusion" else ()
    inside = (one for called in fused for one in module.computations[called])
    return _flops(operator) + sum(flops_of(one, module) for one in inside)


def _flops(instruction: Instruction) -> int:
    found = instruction.opcode == "custom-call" and _TARGET.search(instruction.rest)
    target = found[1] if found else ""
    if instruction.opcode == "dot" or target.startswith("__cublas"):
        return _of_product(instruction)
    if instruction.opcode == "convolution" or target.startswith("__cudnn$conv"):
        return _of_convolution(instruction, target)
    if target.startswith("__cudnn$fmha"):
        return _of_attention(instruction, target)
    estimate = target == "tpu_custom_call" and _ESTIMATE.search(instruction.rest)
    return int(estimate[1]) if estimate else 0


def _of_product(instruction: Instruction) -> int:
    lhs = sides(instruction.operands[0])
    contracted = _CONTRACTED.search(instruction.rest)
    axes = _numbers(contracted[1]) if contracted else ()
    return 2 * prod(sides(instruction.shape)) * prod(lhs[axis] for axis in axes)


def _of_convolution(instruction: Instruction, target: str) -> int:
    """Of the convolution, or of its gradient by its images or its kernel, which has as many.

    The labels and the window of cuDNN's gradients are those of the convolution itself.
    """
    first, second = map(sides, instruction.operands[:2])
    result = sides(instruction.shape)
    if "BackwardInput" in target:
        images, kernel, maps = result, second, first
    elif "BackwardFilter" in target:
        images, kernel, maps = first, result, second
    else:
        images, kernel, maps = first, second, result
    images, kernel, maps = (
        dict(zip(labels, shape, strict=False))
        for labels, shape in zip(
            _LABELS.search(instruction.rest).groups(), (images, kernel, maps), strict=True
        )
    )
    window = _WINDOW.search(instruction.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    met = 1  # pairs of a pixel of the images and one of the kernel
    for axis in sorted(filter(str.isdecimal, images)):
        met *= _pairs(fields, int(axis), images[axis], kernel[axis], maps[axis])
    groups = _BATCH_GROUPS.search(instruction.rest)
    return 2 * images["b"] * kernel["i"] * maps["f"] * met // (int(groups[1]) if groups else 1)


def _pairs(fields: dict[str, str], axis: int, images: int, kernel: int, maps: int) -> int:
    """How many pixels of a kernel meet one of the images, over all places of an axis."""

    def field(name: str, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    stride, spread = int(field("stride", "1")), int(field("lhs_dilate", "1"))
    before, step = int(field("pad", "0_0").split("_")[0]), int(field("rhs_dilate", "1"))
    begins = range(-before, maps * stride - before, stride)
    met = (begin + i * step for begin in begins for i in range(kernel))
    return sum(at % spread == 0 and 0 <= at // spread < images for at in met)


def _of_attention(instruction: Instruction, target: str) -> int:
    """Two products forward; five in the gradient, which computes the weights again."""
    weights = _numbers(_WEIGHTS.search(instruction.rest)[1])
    products = 5 if target.endswith("Backward") else 2
    return products * 2 * prod(weights) * sides(instruction.operands[0])[-1]


def _numbers(text: str) -> Sequence[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
