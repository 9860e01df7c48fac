"""Whether flaxcls computes on the accelerator what it should; nothing here needs data.

    python benchmarks/gpu/correctness.py commands|against_cpu|attention|resume [--tiny]
        [--folder=DIR] [--setting=NAME]

commands     the commands that a user starts with: train digits_cnn, evaluate, predict.
against_cpu  one update of ResNet-20, computed here and on the CPU from the same state: how far the
             parameters' change is from the CPU's in float32, relative, in several precisions.
attention    that of a ViT in bfloat16 against float32's, relative, and whether it repeats bitwise.
resume       a run that is killed and then resumed, against one that is left alone: whether every
             array of the last checkpoint is bitwise the same.

The last line is the result as JSON.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# For `resume`: variables of the environment by setting. Runs keep XLA's choices of kernels in their
# folders (docs/run_folder.md). Without JAX's cache these are all that a resumed run has of the
# programs before; with `no_choices` it has nothing.
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
SETTINGS = {
    "cache": {},
    "run_folder": NO_CACHE,
    "deterministic": {**NO_CACHE, "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"},
    "no_choices": NO_CACHE,
}
RECIPE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 32
    config.duration = "60 steps"
    config.log_every = "5 steps"
    config.eval.every = "20 steps"
    config.checkpoint.every = "10 steps"
    config.checkpoint.keep = 100
    config.ema_decay = 0.9
    config.augment = ({"name": "pad_crop", "padding": 4}, {"name": "flip"})
    config.data.name = "fake"
    config.data.image_shape = (64, 64, 3)
    config.data.num_classes = 10
    config.data.num_examples = 1024
    config.model.name = "resnet18"
    config.model.width = 16
    config.optimizer.momentum = 0.9
    return config
"""
TINY = ("--config.data.image_shape=(16, 16, 3)", "--config.model.width=4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("commands", "against_cpu", "attention", "resume"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--setting", choices=SETTINGS, default="cache")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if options.what == "commands":
        result = commands(folder, options.tiny)
    elif options.what == "against_cpu":
        result = against_cpu(options.tiny)
    elif options.what == "attention":
        result = attention(options.tiny)
    else:
        result = resume(folder, options.setting, options.tiny)
    print(json.dumps(result))


def commands(folder: Path, tiny: bool) -> dict[str, Any]:
    """Trains digits_cnn by the documented command, then evaluates it and classifies a picture."""
    import cv2
    from sklearn.datasets import load_digits

    picture = folder / "digit.png"
    cv2.imwrite(str(picture), (load_digits().images[0] * 255 / 16).astype("uint8"))
    run = folder / "run"
    train = ["flaxcls.main", "--config=configs/digits_cnn.py", f"--workdir={run}"]
    if tiny:
        train.append("--config.duration=20 steps")
    seconds, outputs = {}, {}
    for name, command in (
        ("train", train),
        ("evaluate", ["flaxcls.evaluate", f"--run={run}"]),
        ("predict", ["flaxcls.predict", f"--run={run}", str(picture), "--format=jsonl"]),
    ):
        start = time.perf_counter()
        process = start_module(*command)
        outputs[name], errors = process.communicate()
        seconds[name] = time.perf_counter() - start
        print(outputs[name], errors, sep="\n", flush=True)
        if process.returncode:
            return {"failed": name, "exit_code": process.returncode, "says": errors[-2000:]}
    summary = json.loads((run / "summary.json").read_text())
    return {
        "seconds": seconds,
        "accuracy": summary["eval"]["accuracy"],
        "steps": summary["step"],
        "images_per_second": summary["images_per_second"],
        "goodput": summary["goodput"],
        "device": json.loads((run / "config.json").read_text())["device"],
        "predicted": json.loads(outputs["predict"])["predictions"][0],
    }


def against_cpu(tiny: bool) -> dict[str, Any]:
    """How far one update here is from the CPU's in float32, as ||here - cpu|| / ||cpu - before||.

    JAX's default precision lets float32 convolutions and products use TensorFloat-32.
    """
    import jax
    import recipes
    from workloads import Workload

    workload = Workload("cifar10_resnet20", 32, 10, 4 if tiny else 64, steps=1, gmacs=0)
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    before = loss = None

    def update(device: jax.Device, dtype: str, precision: str) -> tuple[Any, float]:
        nonlocal before
        config = recipes.made_up_config(
            workload, **{"model.dtype": dtype, "optimizer.weight_decay": 0.0}
        )
        with jax.default_matmul_precision(precision), jax.default_device(device):
            mesh = recipes.mesh_of_one(device)
            with recipes.program(config, mesh) as program:
                if before is None:
                    before = jax.device_get(program.init())
                state = jax.device_put(before, program.shardings)
                state = program.update(state, program.batch(0))
                state, metrics = program.take_metrics(state)
                return jax.device_get(state.params), metrics["loss"]

    reference, loss = update(cpu, "float32", "highest")
    distances = {"cpu_loss": loss}
    for dtype, precision in (
        ("float32", "highest"),
        ("float32", "default"),
        ("bfloat16", "default"),
    ):
        params, loss = update(here, dtype, precision)
        distance = _norm(params, reference) / _norm(reference, before.params)
        distances[f"{dtype}_{precision}"] = {"update": distance, "loss": loss}
    return distances


def attention(tiny: bool) -> dict[str, Any]:
    """Of output and gradients ||bfloat16 - float32|| / ||float32||, and whether they repeat."""
    import jax
    import jax.numpy as jnp
    import recipes

    keys = jax.random.split(jax.random.key(0), 4)
    shape = (2 if tiny else 64, 197, 12, 64)
    inputs = [2 * jax.random.normal(key, shape, jnp.bfloat16) for key in keys]

    @jax.jit
    def both(*inputs: jax.Array) -> list[jax.Array]:
        output, pullback = jax.vjp(recipes.attention, *inputs[:3])
        return [output, *pullback(inputs[3])]

    with jax.default_matmul_precision("highest"):
        exact = both(*(x.astype(jnp.float32) for x in inputs))
    first, *others = ([jax.device_get(y) for y in both(*inputs)] for _ in range(8))
    return {
        "distances": [_norm(y, x) / _norm(x, 0 * x) for x, y in zip(exact, first, strict=True)],
        "repeats": all(
            (x == y).all() for again in others for x, y in zip(first, again, strict=True)
        ),
        "by_cudnn": "cudnn" in both.lower(*inputs).as_text(),
    }


def _norm(first: Any, second: Any) -> float:
    """The L2 norm of the difference of two trees of arrays."""
    import jax
    import numpy as np

    squares = jax.tree.map(
        lambda x, y: np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2),
        first,
        second,
    )
    return float(np.sqrt(sum(jax.tree.leaves(squares))))


def resume(folder: Path, setting: str, tiny: bool) -> dict[str, Any]:
    """Kills a run and resumes it, and compares its last checkpoint with that of one left alone.

    The run that is killed compiles first, which on a GPU leaves its choices of kernels in its
    folder. The one left alone, which may have to have the same ones, and the resumed one come then,
    together.
    """
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE)

    def start(name: str) -> subprocess.Popen:
        environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), **SETTINGS[setting]}
        arguments = [f"--config={recipe}", f"--workdir={folder / name}", *(TINY if tiny else ())]
        return start_module("flaxcls.main", *arguments, environment=environment)

    started = time.perf_counter()
    process = start("killed")
    while process.poll() is None and not (folder / "killed" / "checkpoints" / "20").exists():
        time.sleep(0.02)
    process.kill()
    finish(process)
    result = {"setting": setting, "seconds_to_step_20": time.perf_counter() - started}
    if process.returncode != -signal.SIGKILL:
        return {**result, "says": f"exit code {process.returncode} before it was killed"}
    choices = folder / "killed" / "autotuning"
    result["choices"] = [path.name for path in choices.glob("*")]
    if setting == "run_folder" and choices.exists():
        shutil.copytree(choices, folder / "whole" / "autotuning")
    elif setting in ("deterministic", "no_choices"):
        shutil.rmtree(choices, ignore_errors=True)
    processes = [start("killed"), start("whole")]
    if any([finish(process) for process in processes]):
        return {**result, "says": "a run failed"}
    arrays = [saved_arrays(folder / name) for name in ("whole", "killed")]
    return {**result, **differences(*arrays)}


def saved_arrays(run: Path) -> dict[str, Any]:
    """All arrays of the newest checkpoint by path."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    path = (run / "checkpoints" / str(step) / "state").resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Whether two checkpoints are bitwise the same, else how many arrays differ and by how much."""
    import numpy as np

    if first.keys() != second.keys():
        return {"same": False, "says": "they do not hold the same arrays"}
    pairs = [(np.asarray(first[name]), np.asarray(second[name])) for name in first]
    different = [(x, y) for x, y in pairs if not np.array_equal(x, y)]
    largest = max((float(np.max(np.abs(x - y))) for x, y in different), default=0.0)
    return {
        "same": not different,
        "arrays": len(pairs),
        "different": len(different),
        "largest_difference": largest,
    }


def start_module(
    module: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """`python -m MODULE ARGUMENTS` in the checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> int:
    """Waits for a run, prints what it has said, and returns its exit code."""
    output, errors = process.communicate()
    print(output, errors, sep="\n", flush=True)
    return process.returncode


if __name__ == "__main__":
    main()
