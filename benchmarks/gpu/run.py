"""Checks flaxcls on an accelerator, then times it beside PyTorch. One command, no network.

    python benchmarks/gpu/run.py --out=DIR [--only=REGEX] [--data=DIR] [--limit=300] [--tiny]

Correctness comes first, then the times: flaxcls and its peer one after the other, on the same card
and batch, each in a process of its own. Every part has a time limit, of at most --limit seconds,
and fails alone. --only runs the parts whose names it matches. --data is where TFDS keeps cifar10;
without it nothing is trained to an accuracy. --tiny is for machines without an accelerator: all
parts at sizes whose times mean nothing.

DIR, a new folder, gets results.json, which is complete after every part, and what each part has
printed. A short table is printed last. The exit code is 1 if a part failed. The peer needs torch,
torchvision and, for ViTs, timm; it is timed as torch.compile has it by default and, `_graphs`, with
CUDA graphs (its mode reduce-overhead).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from correctness import SETTINGS
from workloads import WORKLOADS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TESTS = (
    *(f"tests/augment/test_augment_{name}.py" for name in ("geometry", "mixing", "ops")),
    *(f"tests/test_{name}.py" for name in ("losses", "metrics", "optim")),
    "tests/models/test_layers.py",
)


class Part(NamedTuple):
    """One command of the kit; its last line is its result as JSON.

    Those that time nothing share the device: `alone` is false.
    """

    name: str
    command: tuple[str, ...]
    limit: int  # seconds
    alone: bool = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="seconds a part may take")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out = options.out.absolute()
    try:
        options.out.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"--out={options.out} is there already: give a new folder")
    chosen = [part for part in parts(options) if re.search(options.only, part.name)]
    results: dict[str, Any] = {}

    def carry_out(part: Part) -> None:
        part = part._replace(limit=min(part.limit, options.limit))
        results[part.name] = run(part, options.out)
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    # Not all at once: XLA chooses kernels by timing them, and waits long on a crowded device.
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(carry_out, [part for part in chosen if not part.alone]))
    for part in chosen:
        if part.alone:
            carry_out(part)
    print("\n".join(table(results)))
    return int(any(result["status"] != "ok" for result in results.values()))


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """All parts in the order in which they are worth having."""
    size = ("--tiny",) if options.tiny else ()
    brief = ("--rounds=2",) if options.tiny else ()

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(HERE / f"{name}.py"), *arguments, *size)

    yield Part("about", script("about"), 60, alone=False)
    yield Part("commands", script("correctness", "commands"), 200, alone=False)
    yield Part("against_cpu", script("correctness", "against_cpu"), 300, alone=False)
    yield Part("attention", script("correctness", "attention"), 60, alone=False)
    for setting in SETTINGS:
        folder = f"--folder={options.out / 'runs' / setting}"
        command = script("correctness", "resume", f"--setting={setting}", folder)
        yield Part(f"resume_{setting}", command, 300, alone=False)
    if not options.tiny:
        command = (sys.executable, str(HERE / "tests.py"), *TESTS)
        yield Part("tests", command, 200, alone=False)
    for name, workload in WORKLOADS.items():
        trace = f"--trace={options.out / 'traces' / name}"
        yield Part(f"flaxcls_{name}", script("flaxcls_step", name, trace, *brief), 240)
        if workload.peer:
            yield Part(f"torch_{name}", script("torch_step", name, *brief), 240)
            graphs = script("torch_step", name, "--mode=reduce-overhead", *brief)
            yield Part(f"torch_{name}_graphs", graphs, 240)
    yield Part("pieces", script("pieces"), 120)
    if options.data:
        for recipe in ("cifar10_quick", "cifar10_airbench94"):
            command = script("accuracy", recipe, f"--data={options.data}")
            yield Part(recipe, command, 300)
            # With the compiled programs that the first one has left.
            yield Part(f"{recipe}_again", (*command, "--seed=1"), 300)


def run(part: Part, out: Path) -> dict[str, Any]:
    """Runs a part within its limit: its status, seconds and result."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment["PYTHONUNBUFFERED"] = "1"
    if not part.alone:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    log, start = out / f"{part.name}.log", time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(part.limit) == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with what it has started
            process.wait()
            status = f"stopped after {part.limit} s"
    result: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - start}
    lines = log.read_text(errors="replace").strip().splitlines()
    try:
        result["result"] = json.loads(lines[-1])
    except (IndexError, ValueError):
        result["says"] = "\n".join(lines[-12:])[-2000:]
        if status == "ok":
            result["status"] = "no result"
    print(f"{part.name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
    return result


def table(results: dict[str, Any]) -> Iterator[str]:
    """The figures of all parts, a line each."""
    for name, part in results.items():
        result = part.get("result") or {"says": part.get("says", "")[-300:]}
        short = {}
        for key, value in result.items():
            if isinstance(value, float):
                value = float(f"{value:.4g}")
            if not isinstance(value, list) and key not in ("kernels", "versions", "nvidia_smi"):
                short[key] = value
        yield f"{name} [{part['status']}, {part['seconds']:.0f} s] {json.dumps(short)}"
        if "kernels" in result:
            kernels = result["kernels"]
            yield f"  {kernels['milliseconds']:.2f} ms in {kernels['launches']:.0f} kernels a step"
            for kind, (milliseconds, launches) in kernels["kinds"].items():
                yield f"  {milliseconds:8.3f} ms {launches:5.0f} x {kind}"
            for milliseconds, launches, kernel, operation in kernels["top"]:
                yield f"  {milliseconds:8.3f} ms {launches:5.0f} x {kernel[:70]} {operation}"


if __name__ == "__main__":
    sys.exit(main())
