"""What it costs to survive: the step of a recipe with its guards and without, in pairs in one run.

    TFDS_DATA_DIR=DIR python tests/baselines/compare_guards.py [--rounds=6] [--steps=10]
        [--config=configs/cifar10_resnet18.py] [--config.batch_size=...]

A round is some steps and a checkpoint that is waited for. With the guards, updates that are not
sound are left out, the watchdog gets a sign of life and signals are looked at after every step,
seconds are accounted for, and the checkpoint has a manifest; without, none of that.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import optax

from flaxcls import build, cli, manifest, step
from flaxcls.checkpoint import Checkpoints
from flaxcls.goodput import Goodput
from flaxcls.processes import StopRequest
from flaxcls.trainer import Trainer, mesh_for
from flaxcls.watchdog import Watchdog


def without_guards():
    """Makes `sound` the constant True, so that XLA drops what hangs on it."""
    norm, calls = optax.tree.norm, []

    def norm_of_gradient(tree):
        calls.append(tree)
        return norm(tree) if len(calls) % 4 == 1 else 0.0  # then updates, parameters, statistics

    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(optax.tree, "norm", norm_of_gradient))
    patches.enter_context(mock.patch.object(step.jnp, "isfinite", lambda x: True))
    return patches


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/cifar10_resnet18.py")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    options, rest = parser.parse_known_args()
    config = cli.load_config(options.config, cli.split_overrides(rest)[0])
    mesh, plan = mesh_for(config), build.plan(config)

    guarded, plain = Trainer(config, plan, mesh), Trainer(config, plan, mesh)
    guarded.compile()
    with without_guards():
        plain.compile()
    seconds = {guarded: [], plain: []}
    facts = {"progress": {"best": {}}}

    def round_of(trainer, name, number):
        state, clock = trainer.init(), Goodput()
        batches = trainer.batches(0, options.steps)
        with (
            Checkpoints(Path(folder) / name) as checkpoints,
            Watchdog(600) as watchdog,
            StopRequest() as asked,
        ):
            began = time.perf_counter()
            for index in range(options.steps):
                if trainer is plain:
                    state = trainer.update(state, next(batches))
                    continue
                with clock.spending("data_wait"):
                    batch = next(batches)
                state = trainer.update(state, batch)
                watchdog.alive(index)
                asked()
            write = manifest.write if trainer is guarded else lambda *_: 0
            with mock.patch.object(manifest, "write", write):
                checkpoints.save(number, state, facts)
                checkpoints.wait()
            return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder, guarded, plain:
        for number in range(options.rounds + 1):
            pair = [(guarded, "guarded"), (plain, "plain")]
            for trainer, name in pair if number % 2 else pair[::-1]:
                seconds[trainer].append(round_of(trainer, name, number))
    ratios = [a / b for a, b in zip(seconds[guarded][1:], seconds[plain][1:], strict=True)]
    print(f"a step takes {statistics.median(seconds[plain][1:]) / options.steps:.3f} s without")
    print(
        f"with the guards {statistics.median(ratios):.4f} times as long "
        f"({min(ratios):.4f} to {max(ratios):.4f}, {options.rounds} pairs of {options.steps} steps)"
    )


if __name__ == "__main__":
    main()
