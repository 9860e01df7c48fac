"""Compiles the ResNet-50 of the flax ImageNet example for TPUs, to compare with `flaxcls.plan`.

    python tests/baselines/flax_resnet50.py [--topology=v5e:2x2] [--batch_per_chip=128]

The network, the loss and the update are those of the example (google/flax, examples/imagenet, its
configuration for TPUs: bfloat16, SGD with Nesterov's momentum, L2 in the loss), written anew for
`jit` over a sharded batch, so that BatchNorm is over all of it. Needs libtpu and no TPU. Printed
are bytes an image by XLA's count and to and from HBM, the roofline, temporaries, collectives and
the seconds that compiling took.
"""

import argparse
import functools
import os
import time

from flaxcls.plan import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from flaxcls.perf import devices as known_devices  # noqa: E402
from flaxcls.perf import hlo  # noqa: E402
from flaxcls.perf.hlo_text import Module  # noqa: E402
from flaxcls.perf.roofline import roofline  # noqa: E402
from flaxcls.perf.traffic import traffic  # noqa: E402
from flaxcls.runtime import topologies  # noqa: E402


class Bottleneck(nn.Module):
    filters: int
    strides: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=jnp.bfloat16
        )
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), (self.strides, self.strides))(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.filters, (1, 1), (self.strides, self.strides))(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), (2, 2), [(3, 3)] * 2, use_bias=False, dtype=jnp.bfloat16)(x)
        norm = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=jnp.bfloat16)
        x = nn.max_pool(nn.relu(norm(x)), (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000, dtype=jnp.bfloat16)(x.mean((1, 2))).astype(jnp.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch_per_chip", type=int, default=128)
    options = parser.parse_args()
    devices = np.array(topologies.devices(options.topology))
    mesh = Mesh(devices, "data")
    sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    network, optimizer = ResNet50(), optax.sgd(0.1, 0.9, nesterov=True)

    def update(state, images, labels):
        def loss(params):
            logits, new = network.apply(
                {"params": params, "batch_stats": state["batch_stats"]},
                images,
                mutable=["batch_stats"],
            )
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            squares = sum((x**2).sum() for x in jax.tree.leaves(params) if x.ndim > 1)
            return entropy + 0.5e-4 * squares, (new["batch_stats"], logits)

        (value, (stats, logits)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        changes, momentum = optimizer.update(gradient, state["momentum"], state["params"])
        params = optax.apply_updates(state["params"], changes)
        metrics = {"loss": value, "accuracy": (logits.argmax(-1) == labels).mean()}
        return {"params": params, "batch_stats": stats, "momentum": momentum}, metrics

    count = options.batch_per_chip * len(devices)

    def init():
        variables = network.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3), jnp.bfloat16))
        return {**variables, "momentum": optimizer.init(variables["params"])}

    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), jax.eval_shape(init)
    )
    images = jax.ShapeDtypeStruct((count, 224, 224, 3), jnp.bfloat16, sharding=sharded)
    labels = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=sharded)
    began = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=0).lower(state, images, labels).compile()
    seconds = time.perf_counter() - began
    module, cost = Module(compiled.as_text()), compiled.cost_analysis()
    moved = sum(one.read + one.written for one in traffic(module))
    chip = known_devices.find(devices[0].device_kind)
    bound = roofline(module, chip, cost["flops"])
    sent = {each.kind: each.count for each in hlo.collectives(module)}
    print(
        f"{cost['bytes accessed'] / options.batch_per_chip / 1e6:.0f} MB an image by XLA, "
        f"{moved / options.batch_per_chip / 1e6:.0f} to and from HBM, "
        f"{cost['flops'] / options.batch_per_chip / 1e9:.1f} GFLOP, "
        f"{1e3 * bound.seconds:.1f} ms a step at least, "
        f"{compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB of temporaries, "
        f"{sent}, compiled in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
