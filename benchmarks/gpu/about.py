"""What the figures come from: the card, its driver and the versions of all that computes."""

import importlib.metadata
import json
import platform
import subprocess

import jax

PACKAGES = (
    *("flaxcls", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax"),
    *("orbax-checkpoint", "numpy", "torch", "torchvision", "triton", "nvidia-cudnn-cu13"),
)


def main() -> None:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        card = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
    except FileNotFoundError:
        card = None
    device = jax.devices()[0]
    about = {"card": card, "device": device.device_kind, "platform": device.platform}
    print(json.dumps({**about, "versions": versions}))


if __name__ == "__main__":
    main()
