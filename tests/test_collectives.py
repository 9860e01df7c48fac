"""What goes between devices in a step: the gradient, a few times, whatever their number."""

import functools

import jax
import pytest

from flaxcls import build
from flaxcls.perf import hlo
from flaxcls.perf.hlo_text import Module
from flaxcls.training.data import RunData
from flaxcls.training.program import Program, make_update

# On images so large that a device's activations have more bytes than a layer's kernel, as in real
# networks. XLA may else find it cheaper to send the activations than to gather a split kernel.
NETWORKS = {
    "resnet": {"name": "wrn", "depth": 10, "width": 2, "batch_norm_group": 8},
    "vit": {"name": "vit", "patch": 4, "width": 64, "depth": 1, "heads": 2},
}
# Of the small vectors: running statistics, and the sums of metrics.
FEW = 6000  # bytes


@functools.cache
def program_of(make_config, network, devices, fsdp, **changes):
    """The program of a step on 8 examples a device, in each part, and its experiment."""
    fields = {f"model__{name}": value for name, value in NETWORKS[network].items()}
    config = make_config(model__widths=None, data__image_shape=(16, 16, 3), **fields, **changes)
    config.batch_size = 8 * devices * config.gradient_accumulation
    config.mesh.fsdp = devices if fsdp else 1
    config.augment = ({"name": "flip"}, {"name": "mixup"})
    experiment = build.make_experiment(config, build.mesh(config, jax.devices()[:devices]))
    return Program(experiment, RunData.unread(experiment)), experiment


def sent(lowered):
    """By kind, how many collectives a step does and their bytes."""
    # Spared is only what LLVM does with the HLO.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    module = Module(lowered.compile(options).as_text())
    return {kind: (count, size) for kind, count, size in hlo.collectives(module)}


def size(shapes, split=False):
    """The bytes of arrays, or of those alone that are split over devices."""
    leaves = jax.tree.leaves(shapes)
    return sum(
        4 * leaf.size for leaf in leaves if not split or not leaf.sharding.is_fully_replicated
    )


@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "fsdp"])
@pytest.mark.parametrize("network", NETWORKS)
def test_devices_send_their_gradient_and_as_much_of_it_however_many(tiny_config, network, fsdp):
    few, many = (
        sent(program_of(tiny_config, network, devices, fsdp)[0].lower()) for devices in (2, 8)
    )
    assert few == many
    program, _ = program_of(tiny_config, network, 8, fsdp)
    parameters, *_ = program.step_arguments()
    parameters = parameters.params
    count, summed = many.pop("all-reduce")
    assert size(parameters) < summed < size(parameters) + FEW
    if not fsdp:
        assert count == 2 and not many  # floats and integers, each all at once
        return
    # What is split is gathered for the forward pass, and once more for the backward pass.
    split = size(parameters, split=True)
    gathers, gathered = many.pop("all-gather")
    assert split > size(parameters) / 2 and split <= gathered <= 2 * split and not many
    assert count + gathers <= 30


def test_nothing_but_the_gradient_is_summed_in_the_loop_over_parts(tiny_config):
    """XLA for TPUs and GPUs moves such sums out of the loop; XLA for CPUs leaves them there."""
    program, experiment = program_of(tiny_config, "resnet", 4, False, gradient_accumulation=3)
    update = make_update(experiment, program.metadata, "tpu")
    step = jax.jit(update, out_shardings=program.shardings)
    found = sent(step.lower(*program.step_arguments()))
    parameters = size(program.shapes.params)
    assert found.keys() == {"all-reduce"}
    assert 3 * parameters < found["all-reduce"][1] < 3 * parameters + FEW
