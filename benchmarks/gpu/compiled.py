"""Compiles a workload's training step for an H100 on a machine without one, and counts its traffic.

    python benchmarks/gpu/compiled.py NAME [FIELD=VALUE ...] [--text=FILE]

Needs `pip install 'flaxcls[cuda]'` and no GPU. It times nothing, so XLA does not choose kernels
by their times either: which product or convolution is computed how differs from what a card gets,
what is fused, transposed and copied is as there. A line for each kind of kernel, by XLA's name:
bytes that they read and write in a step, and how many there are. --text keeps the program.
"""

import argparse
import collections
import os
import re

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of a driver; read when JAX starts

import recipes  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

from flaxcls.errors import ConfigError  # noqa: E402
from flaxcls.runtime import topologies  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the config")
    parser.add_argument("--text", help="a file for the compiled program")
    options = parser.parse_args()
    try:
        [device] = topologies.devices("h100:1")
    except ConfigError as error:
        parser.error(str(error))
    workload = WORKLOADS[options.name]
    text = recipes.compiled_step(workload, options.overrides, device).as_text()
    if options.text:
        with open(options.text, "w") as file:
            file.write(text)
    moved, kernels = collections.Counter(), collections.Counter()
    for name, size in recipes.kernels(text):
        kind = re.sub(r"[.\d]+$", "", name)
        moved[kind] += size
        kernels[kind] += 1
    print(f"{moved.total() / 1e9:8.2f} GB {kernels.total():5} kernels a step")
    for kind, size in moved.most_common():
        if size >= 1e7:
            print(f"{size / 1e9:8.2f} GB {kernels[kind]:5} x {kind}")


if __name__ == "__main__":
    main()
