"""Plans a recipe on TPUs, GPUs or this machine by compiling its step: memory, work, time, cost.

    python -m flaxcls.plan --config=configs/NAME.py --topology=v5e:2x2[,h100:8,...]
                           [--config.x=y ...] [--tune] [--json=FILE]

Neither the data nor an accelerator is needed: `pip install 'flaxcls[plan]'` has the compiler for
TPUs, `flaxcls[cuda]` that for GPUs. A --topology is a slice of v4, v5e, v5p or v6e chips, a number
of a100, h100, h200 or b200 GPUs, or `local`: the devices of this machine.

Printed are the memory of a chip and what takes it, the FLOPs and the bytes that the step reads and
writes, the time of a step at the chip's published peaks (a roofline), the time and
chip-hours of the whole recipe, and what the chips send each other. Where a step does not fit, remat
and FSDP are tried, then smaller batches. --tune tries batches, remat and compiler options.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError

FLAGS = cli.common_flags("config")
flags.DEFINE_multi_string("topology", None, "Such as v5e:2x2, h100:8 or local.", flag_values=FLAGS)
flags.DEFINE_integer(
    "batch_per_chip", None, "Images a chip, not the recipe's.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_bool("tune", False, "Try batches, remat, compiler options.", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_examples", None, "Of data not on this machine.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer(
    "num_classes", None, "Of data not on this machine.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_string("json", None, "A file for all figures.", flag_values=FLAGS)

LOCAL = "local"
RECORDED = ("config", "topology", "batch_per_chip", "tune", "num_examples", "num_classes")
NO_DRIVER = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # is asked for, for GPUs that aren't there
# For chips that aren't there: JAX itself stays on the CPU, and libtpu asks neither a metadata
# server what machine this is nor other processes whether it may be loaded.
ENVIRONMENT = {
    **NO_DRIVER,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main(argv: Sequence[str]) -> None:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.config is None:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits_cnn.py")
    names = [name for text in FLAGS.topology or () for name in text.split(",") if name]
    if not names:
        raise ConfigError(f"--topology=NAME is missing, such as v5e:2x2, h100:8 or {LOCAL}")
    if (FLAGS.num_examples is None) != (FLAGS.num_classes is None):
        raise ConfigError("--num_examples and --num_classes go together")
    if FLAGS.json:
        cli.check_folder("json", FLAGS.json)
    if names != [LOCAL]:
        os.environ.update(NO_DRIVER if LOCAL in names else ENVIRONMENT)

    from flaxcls.runtime import topologies  # JAX, after the environment

    for name in names:
        topologies.check(name)
    config = cli.load_config(FLAGS.config, overrides)
    planned = [_plan(config, name) for name in names]
    if FLAGS.json:
        from flaxcls.perf.figures import write_json

        given = {name: FLAGS[name].value for name in RECORDED}
        libtpu = topologies.libtpu_version()
        write_json(Path(FLAGS.json), "plan", given, plans=planned, libtpu=libtpu)


def _plan(config: Any, topology: str) -> dict[str, Any]:
    """Plans a recipe for a slice and prints it; returns what the JSON has of it."""
    from flaxcls import build
    from flaxcls.perf.plan_report import report
    from flaxcls.perf.plan_search import Planner
    from flaxcls.runtime import topologies

    open_split = partial(
        build.source_or_description,
        num_examples=FLAGS.num_examples,
        num_classes=FLAGS.num_classes,
    )
    devices = None if topology == LOCAL else topologies.devices(topology)
    planner = Planner(config, devices, open_split, FLAGS.batch_per_chip)
    return {"topology": topology, **report(planner, topology, tune=FLAGS.tune)}


if __name__ == "__main__":
    cli.run(main)
