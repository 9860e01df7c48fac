"""Compares the streaming input with Flax's ImageNet example and torchvision, in pairs in one run.

    python tests/baselines/compare_input.py --data_dir=TFDS_DIR [--prepared_dir=DIR] [--rounds=7]

needs imagenet2012 in TFDS_DIR (some pictures are enough) and tensorflow, torch and torchvision in
the environment; what is not installed is skipped. Every pipeline runs in a process of its own,
one after the other in every round, the others being stopped; a round counts some hundred images.
"""

import argparse
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 64
HERE = Path(__file__).parent


def flaxcls_batches(data_dir, name="imagenet2012", *overrides):
    """The batches of the recipe imagenet_resnet50, as its training loop gets them."""
    from flaxcls import cli
    from flaxcls.build import inputs
    from flaxcls.data import open_source

    recipe = HERE.parent.parent / "configs/imagenet_resnet50.py"
    config = cli.load_config(str(recipe), [f"batch_size={BATCH}", f"data.name={name}", *overrides])
    source = open_source(config.data.name, "train", data_dir=data_dir)
    return inputs.training(config, source, inputs.Sizes((0,), (224,))).batches(0, 10**6)


def make(kind, arguments):
    """The batches of a pipeline by name."""
    sys.path.insert(0, str(HERE))
    if kind == "flax example":
        import tf_input

        return tf_input.batches(arguments[0], BATCH)
    if kind == "torchvision":
        import torchvision_input

        return torchvision_input.batches(arguments[0], BATCH)
    return iter(flaxcls_batches(*arguments))


def serve(kind, arguments):
    """Counts the batches of so many seconds, for every line on standard input."""
    batches = make(kind, arguments)
    for _ in range(4):  # fills the buffers
        next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < float(line):
            next(batches)
            count += 1
        print(count * BATCH / (time.perf_counter() - begin), flush=True)


class Pipeline:
    """A pipeline in a process of its own, which works only while it is measured."""

    def __init__(self, kind, *arguments):
        command = [sys.executable, __file__, "--serve", kind, *map(str, arguments)]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.works = self._process.stdout.readline() == "ready\n"
        self.stop(signal.SIGSTOP)

    def stop(self, number):
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def measure(self, seconds):
        """Images/s over so many seconds, what had been read ahead being consumed first."""
        self.stop(signal.SIGCONT)
        for duration in (seconds / 2, seconds):
            self._process.stdin.write(f"{duration}\n")
            self._process.stdin.flush()
            rate = float(self._process.stdout.readline())
        self.stop(signal.SIGSTOP)
        return rate


def write_baselines_data(data_dir, folder):
    """The same pictures as a TFRECORD file and as a folder a class."""
    from tensorflow_datasets.proto import tf_example_pb2

    from flaxcls.data import open_source

    source = open_source("imagenet2012", "train", data_dir=data_dir)
    with (folder / "records").open("wb") as records:
        for index in range(len(source)):
            data, label = source[index]
            if data[:2] != b"\xff\xd8":  # the example's pipeline reads JPEG only
                continue
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(data)
            example.features.feature["label"].int64_list.value.append(label)
            record = example.SerializeToString()
            head = struct.pack("<Q", len(record))
            records.write(head + _checksum(head) + record + _checksum(record))
            picture = folder / "pictures" / f"{label:04}" / f"{index}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(data)


def _checksum(data):
    """TFRECORD's masked CRC-32C."""
    import google_crc32c

    value = google_crc32c.value(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def main():
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--prepared_dir")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_baselines_data(flags.data_dir, Path(folder))
        pipelines = {
            "flax example": Pipeline("flax example", f"{folder}/records"),
            "torchvision": Pipeline("torchvision", f"{folder}/pictures"),
            "flaxcls": Pipeline("flaxcls", flags.data_dir),
        }
        if flags.prepared_dir:
            name = next(path.name for path in Path(flags.prepared_dir).iterdir() if path.is_dir())
            pipelines["flaxcls, prepared"] = Pipeline("flaxcls", flags.prepared_dir, name)
        rates = {name: [] for name, pipeline in pipelines.items() if pipeline.works}
        for _ in range(flags.rounds):
            for name in rates:
                rates[name].append(pipelines[name].measure(flags.seconds))
        for pipeline in pipelines.values():
            pipeline.stop(signal.SIGKILL)
    for name, row in rates.items():
        print(f"{name:20} median {statistics.median(row):6.0f} images/s", end="")
        for baseline in ("flax example", "torchvision"):
            if baseline in rates and name != baseline:
                ratios = sorted(a / b for a, b in zip(row, rates[baseline], strict=True))
                print(
                    f", {statistics.median(ratios):.2f} times {baseline} "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    end="",
                )
        print()
    for name in pipelines.keys() - rates.keys():
        print(f"{name}: could not be started here")


if __name__ == "__main__":
    main()
