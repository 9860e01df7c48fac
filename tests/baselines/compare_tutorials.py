"""The tutorials' programs on CPU and flaxcls' recipes of the same networks, in turns in one run.

    TFDS_DATA_DIR=DIR python tests/baselines/compare_tutorials.py
        [--torch=PYTHON] [--keras=PYTHON] [--rounds=3] [--images=15000] [--only=REGEX]

PYTHON is an interpreter that has PyTorch, torchvision and PIL, or Keras, TensorFlow and JAX; what
is not given is left out. flaxcls is timed by `bench train`, the real loop with its input, ResNet-18
by `bench step`, as its peer's batches are in memory. Printed are images/s, median and range of the
rounds, and the median of the rounds' ratios.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from flaxcls import data
from flaxcls.data.decode import decode

HERE = Path(__file__).parent
PAIRS = {  # peer: (the program, its interpreter's flag, Keras' backend, flaxcls' command)
    "Keras on TensorFlow, 32-64-64": ("keras_cnn", "keras", "tensorflow", "cifar10_keras_cnn"),
    "Keras on JAX, 32-64-64": ("keras_cnn", "keras", "jax", "cifar10_keras_cnn"),
    "Keras on TensorFlow, 32-64": ("keras_small", "keras", "tensorflow", "cifar10_keras_small"),
    "Keras on JAX, 32-64": ("keras_small", "keras", "jax", "cifar10_keras_small"),
    "PyTorch, ConvNet": ("torch_convnet", "torch", None, "cifar10_convnet"),
    "PyTorch, ResNet-18": ("torch_resnet18", "torch", None, "cifar10_resnet18"),
}


def peer_rate(python, program, backend, images):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    command = [python, HERE / "tutorials.py", program, images]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def own_rate(config, images, folder):
    # As many steps as the peer's epoch has, in two log stretches; the first is not counted.
    is_step = config == "cifar10_resnet18"
    steps = 4 if is_step else images // {"cifar10_convnet": 100}.get(config, 32)
    report = Path(folder) / "figures.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "flaxcls.bench", "step" if is_step else "train"]
    command += [f"--config={config}", f"--steps={steps}", "--rounds=1", f"--json={report}"]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(report.read_text())["figures"]["rate"]["value"]


def describe(rates):
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", metavar="PYTHON")
    parser.add_argument("--keras", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--only", default="", help="regular expression for the peers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = data.open_source("cifar10", split=f"train[:{arguments.images}]")
        path = Path(folder) / "images.npz"
        pixels = [decode(source[index].image, 3) for index in range(len(source))]
        np.savez(path, image=np.stack(pixels), label=source.labels())
        for name, (program, flag, backend, config) in PAIRS.items():
            python = getattr(arguments, flag)
            if not python or not re.search(arguments.only, name):
                continue
            pairs = [
                (
                    own_rate(config, arguments.images, folder),
                    peer_rate(python, program, backend, path),
                )
                for _ in range(arguments.rounds)
            ]
            own, peer = zip(*pairs, strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"| {name} | {describe(own)} | {describe(peer)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
