"""Counts what makes devices wait in every recipe's training step, for step_counts.json.

    python tests/golden/update_step_counts.py [FILE [RECIPE...]]

writes step_counts.json, which changes only on purpose, or another file. Of the step compiled for 4
CPU devices ("cpu") that holds how many collectives of each kind, branches, loops and transfers to
the host there are; of the step that is meant for GPUs ("gpu"), which can't be compiled without one,
the branches, loops and transfers of its StableHLO. What is not there is not listed. "work" is that
of the step for CPUs on each device: its HLO operators, the FLOPs and bytes that XLA counts, and the
bytes that go between devices. Another version of JAX may make other numbers.

The recipes get made-up images, 8 a device, at most 32 pixels wide and of 10 classes. With the sizes
and the 1,000 classes of ImageNet the counts of imagenet_resnet18 are the same, and those of
imagenet_resnet50_a3 but for one more loop on CPUs (jax 0.10.2).
"""

import collections
import json
import os
import re
import runpy
import sys
from pathlib import Path

DEVICES = 4
ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("step_counts.json")

COMPILED = {  # HLO instructions by what they are counted as
    **{
        kind: rf" {kind}(?:-start)?\("
        for kind in (
            "all-reduce",
            "all-gather",
            "reduce-scatter",
            "collective-permute",
            "all-to-all",
            "infeed",
            "outfeed",
            "send",
            "recv",
        )
    },
    "conditional": r" conditional\(",
    "while": r" while\(",
    "callback": r'custom_call_target="[^"]*callback',
}


def recipes():
    """The name and the config of every recipe, of folder.py as it is on a GPU and on a CPU."""
    from flaxcls.config import recipes

    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem == "folder":
            yield "folder, gpu", folder(path, "resnet18")
            yield "folder, cpu", folder(path, "quick")
        else:
            yield path.stem, recipes.load_recipe(str(path), []).config


def folder(path, network):
    """The recipe for folders as its `adapt` completes it for some thousand small pictures."""
    recipe = runpy.run_path(str(path))
    config = recipe["get_config"]()
    config.batch_size = DEVICES * 8
    config.init_from = config.finetune.freeze = None
    config.crop.name = "random_resized_crop"  # the pictures of a folder have many sizes
    if network == "quick":
        config.model.name, config.model.widths = network, (32, 128, 256)
        recipe["_use_muon"](config)
    recipe["_fill_in"](config, network, 32, 20)
    return config


def with_fake_data(config):
    """The config on small made-up images, few at a time."""
    channels = 1 if config.data.name in ("digits", "idx") else 3
    side = {"digits": 8, "idx": 28}.get(config.data.name, 32)
    given = {name: config.data[name] for name in ("mean", "std")}
    for field in config.data:
        config.data[field] = None
    config.data.update(given)
    config.data.name, config.data.train_split, config.data.eval_split = "fake", "train", "test"
    config.data.num_classes, config.data.num_examples = 10, 64
    if config.image_size is not None or config.crop.name:
        config.image_size, config.eval.image_size = side, None
        config.data.image_shape = (side + 8, side + 8, channels)
    else:
        config.data.image_shape = (side, side, channels)
    config.batch_size = DEVICES * 8 * config.gradient_accumulation
    config.eval.batch_size = None
    if config.model.batch_norm_group:
        config.model.batch_norm_group = 8  # as many groups as devices
    return config


def counted(numbers):
    return {name: number for name, number in sorted(numbers.items()) if number}


def count_compiled(text):
    """What an HLO module has of COMPILED."""
    return counted({name: len(re.findall(pattern, text)) for name, pattern in COMPILED.items()})


def work(compiled, text):
    """What a step does on a device, which its counts say nothing of."""
    from flaxcls.perf import hlo
    from flaxcls.perf.flops import xla_flops
    from flaxcls.perf.hlo_text import Module

    return {
        "operators": len(re.findall(r"^ +(?:ROOT )?%?[\w.\-]+ = ", text, re.MULTILINE)),
        "flops": round(xla_flops(compiled, text)),
        "bytes": round(compiled.cost_analysis()["bytes accessed"]),
        "bytes between devices": sum(each.bytes for each in hlo.collectives(Module(text))),
    }


def count_lowered(module):
    """Branches, loops and transfers in a StableHLO module; a callback has failed to lower."""
    from jaxlib.mlir import ir

    counts = collections.Counter()

    def visit(operation):
        name = operation.name.removeprefix("stablehlo.")
        if name in ("case", "if"):
            # What is for one platform or another is decided already: one branch, or a constant.
            index = str(operation.operands[0].owner).partition("(")[0]
            decided = "stablehlo.constant" in index
            counts["conditional"] += len(operation.regions) > 1 and not decided
        elif name in ("while", "infeed", "outfeed", "send", "recv"):
            counts[name] += 1
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return counted(counts)


def step_counts(config):
    """{"cpu": counts, "gpu": counts, "work": amounts} of a config's training step."""
    import jax

    from flaxcls import build
    from flaxcls.runtime import onednn, sharding
    from flaxcls.training.program import Program, make_update

    onednn.version = lambda: None  # counted are XLA's convolutions, wherever oneDNN is installed
    build.check(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    experiment = build.make_experiment(config, mesh)
    with Program.open(experiment) as program:
        # Spared is only what LLVM does with the HLO.
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = program.lower().compile(options)

        update = make_update(experiment, program.metadata, "gpu", program.head_only)
        traced = jax.jit(update, donate_argnums=0, out_shardings=program.shardings).trace(
            *program.step_arguments()
        )
    lowered = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    text = compiled.as_text()
    counts = {"cpu": count_compiled(text), "gpu": count_lowered(lowered)}
    return {**counts, "work": work(compiled, text)}


def main(file=FILE, *names):
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax

    from flaxcls.runtime import sharding

    sharding.set_up_devices(DEVICES, DEVICES)
    counts = {
        name: step_counts(with_fake_data(config))
        for name, config in recipes()
        if name in names or not names
    }
    version = ".".join(jax.__version__.split(".")[:2])
    Path(file).write_text(json.dumps({"jax": version, "recipes": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
