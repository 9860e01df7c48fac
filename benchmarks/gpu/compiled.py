"""Compiles a workload's training step for an H100 on a machine without one, and counts its traffic.

    python benchmarks/gpu/compiled.py NAME [FIELD=VALUE ...] [--text=FILE]

Needs `pip install 'jax[cuda13]'` and no GPU. It times nothing, so that XLA does not choose kernels
by their times either: which product or convolution is computed how differs from what a card gets,
what is fused, transposed and copied is as there. A line for each kind of kernel, by XLA's name:
bytes that they read and write in a step, and how many there are. --text keeps the program.
"""

import argparse
import collections
import os
import re

# Both are read when JAX starts; the first takes a driver for granted.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import recipes  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

# As JAX describes the device of a machine that has one; fields of XLA's device_description.proto.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 19 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the config")
    parser.add_argument("--text", help="a file for the compiled program")
    options = parser.parse_args()
    try:
        described = {"target_config": H100, "topology": "1x1x1"}
        topology = topologies.get_topology_desc(platform="cuda", **described)
    except (NotImplementedError, RuntimeError) as error:
        parser.error(f"XLA for NVIDIA GPUs is missing (pip install 'jax[cuda13]'): {error}")
    workload, [device] = WORKLOADS[options.name], topology.devices
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
