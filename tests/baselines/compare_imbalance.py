"""What each way of balancing classes does to the balanced accuracy of a recipe, over seeds.

    TFDS_DATA_DIR=DIR python tests/baselines/compare_imbalance.py --out=DIR [--config=cifar10_lt]
        [--seeds=3] [--only='plain,focal'] [--config.duration='10 epochs' ...]

prints a line a run and then, of each way, the mean and the standard deviation over the seeds.
{seed} in an override is the seed, so that the solar cells of `elpv-dataset`, as a folder with a
folder of each class, are divided differently by each:

    ... --config=folder --config.init_from=None --config.image_size=32 --config.duration='20 epochs'
        --config.data.path=ELPV --config.data.channels=1 --config.data.held_out=0.2
        --config.data.split_seed={seed}

The runs are in --out: the same command resumes what was interrupted and repeats nothing.
"""

import argparse
import statistics
from pathlib import Path

import flaxcls
from flaxcls import cli

WAYS = {
    "plain": (),
    "class weights": ("loss.class_weights=balanced",),
    "class-balanced weights": ("loss.class_weights=effective_number",),
    "balanced sampling": ("sampling=balanced",),
    "square-root sampling": ("sampling=square_root",),
    "focal": ("loss.name=focal",),
    "logit-adjusted": ("loss.name=logit_adjusted",),
}


def balanced_accuracy(config, way, seed, folder, overrides):
    """That of the last step of a run, and its seconds."""
    given = [text.replace("{seed}", str(seed)) for text in overrides]
    given += [f"seed={seed}", "checkpoint.best_metric=balanced_accuracy", *WAYS[way]]
    summary = flaxcls.train(config, folder, overrides=given)
    return summary["eval"]["balanced_accuracy"], summary["seconds"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="cifar10_lt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(WAYS))
    options, rest = parser.parse_known_args()
    overrides, unknown = cli.split_overrides(rest)
    if unknown:
        parser.error(f"unknown: {unknown}")
    ways = options.only.split(",")
    found = {way: [] for way in ways}
    for seed in range(options.seeds):  # so that all ways have the same seeds when it is stopped
        for way in ways:
            folder = options.out / f"{way.replace(' ', '-')}-{seed}"
            result, seconds = balanced_accuracy(options.config, way, seed, folder, overrides)
            found[way].append(100 * result)
            print(f"{way}, seed {seed}: {100 * result:.2f} % in {seconds:.0f} s", flush=True)
    print(f"| {options.config} {' '.join(overrides)} | balanced accuracy, n = {options.seeds} |")
    print("|---|---|")
    for way, results in found.items():
        deviation = f" (s.d. {statistics.stdev(results):.2f})" if len(results) > 1 else ""
        print(f"| {way} | {statistics.mean(results):.2f} %{deviation} |")


if __name__ == "__main__":
    main()
