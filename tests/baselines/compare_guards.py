"""What it costs to survive: the step of a recipe with its guards and without, in pairs in one run.

    TFDS_DATA_DIR=DIR python tests/baselines/compare_guards.py [--pairs=60]
        [--config=configs/cifar10_resnet18.py] [--config.batch_size=...]

With the guards, updates that are not finite or too large are skipped, the watchdog gets a sign of
life and signals are checked after every step, and seconds are accounted for; without, none of that.
What the manifest of a checkpoint takes is said in seconds.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import optax

from flaxcls import build, cli
from flaxcls.core import step
from flaxcls.runs import manifest
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.goodput import Goodput
from flaxcls.runtime.stop_request import StopRequest
from flaxcls.runtime.watchdog import Watchdog
from flaxcls.training.program import Program


def without_guards():
    """Makes `sound` the constant True, and what hangs on it unconditional."""
    patches = contextlib.ExitStack()
    norm, calls = optax.tree.norm, []

    def norm_of_gradient(tree):
        calls.append(tree)
        return norm(tree) if len(calls) % 2 else 0.0  # then that of the statistics

    patches.enter_context(mock.patch.object(optax.tree, "norm", norm_of_gradient))
    update = mock.patch.object(step, "_if", lambda sound, update, tree, platform: update(tree))
    patches.enter_context(update)
    patches.enter_context(mock.patch.object(step, "_where", lambda sound, new, old: new))
    return patches


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/cifar10_resnet18.py")
    parser.add_argument("--pairs", type=int, default=60)
    options, rest = parser.parse_known_args()
    config = cli.load_config(options.config, cli.split_overrides(rest)[0])
    mesh = build.mesh(config)
    experiment = build.make_experiment(config, mesh)

    guarded, plain = Program.open(experiment), Program.open(experiment)
    guarded.compile()
    with without_guards():
        plain.compile()
    seconds = {guarded: [], plain: []}
    states = {program: program.init() for program in seconds}
    batches = {program: program.batches(0, options.pairs + 2) for program in seconds}
    clock = Goodput()
    with guarded, plain, Watchdog(600) as watchdog, StopRequest() as asked:
        for number in range(options.pairs + 2):
            for program in (guarded, plain) if number % 2 else (plain, guarded):
                began = time.perf_counter()
                if program is plain:
                    states[program] = program.update(states[program], next(batches[program]))
                else:
                    with clock.spending("data_wait"):
                        batch = next(batches[program])
                    states[program] = program.update(states[program], batch)
                    watchdog.alive(number)
                    asked()
                seconds[program].append(time.perf_counter() - began)
    ratios = sorted(a / b for a, b in zip(seconds[guarded][2:], seconds[plain][2:], strict=True))
    # The 95 % interval of a median, by the sign test.
    low = max(0, int((len(ratios) - 1.96 * len(ratios) ** 0.5) / 2))
    print(f"a step takes {statistics.median(seconds[plain][2:]):.3f} s without the guards")
    print(
        f"with them {statistics.median(ratios):.4f} times as long "
        f"(95 %: {ratios[low]:.4f} to {ratios[-1 - low]:.4f}, {len(ratios)} pairs of steps)"
    )

    written, write = [], manifest.write

    def timed(*arguments):
        began = time.perf_counter()
        size = write(*arguments)
        written.append(time.perf_counter() - began)
        return size

    facts = {"progress": {"best": {}}}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(manifest, "write", timed),
        Checkpoints(Path(folder) / "checkpoints") as checkpoints,
    ):
        for number in range(5):
            checkpoints.save(number, states[guarded], facts)
            checkpoints.wait()
    print(f"a manifest takes {statistics.median(written):.3f} s, in the background, a checkpoint")


if __name__ == "__main__":
    main()
