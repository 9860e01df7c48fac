"""Rewrites the tables of docs/benchmarks.md that need no peer, each by the commands above it.

    python benchmarks/tables.py [startup] [steps] [plans] [--page=docs/benchmarks.md]

without a name all of them, one after the other: an hour or so on two cores, on which nothing else
should run. `plans` needs the compiler for TPUs, `pip install 'flaxcls[plan]'`. A table stands
between two comments, `<!-- table NAME -->` and `<!-- end of table -->`, and is written when all of
its rows are measured.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FAKE_CIFAR10 = (
    "--config.data.name=fake",
    "--config.data.num_examples=50000",
    "--config.data.num_classes=10",
    "--config.data.image_shape=(32, 32, 3)",
)
FAKE_IMAGENET = (
    "--config.data.name=fake",
    "--config.data.num_examples=1024",
    "--config.data.num_classes=1000",
    "--config.data.image_shape=(256, 256, 3)",
    "--config.batch_size=32",
)
STAGES = ("imported", "checked", "read", "initialised", "compiled", "first_step")


class Table(NamedTuple):
    """A table that commands fill, one a row; each writes its figures by --json.

    Attributes:
      command: the module and arguments of all rows.
      rows: what each adds, by its name in the first column.
      columns: headings, after the first one.
      cells: of a row, from the JSON of its command.
    """

    command: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    cells: Callable[[dict[str, Any]], Sequence[str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TABLES))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    if unknown := set(options.names) - TABLES.keys():
        parser.error(f"there is no table {', '.join(sorted(unknown))}, but {', '.join(TABLES)}")
    for name in options.names or TABLES:
        text = replaced(options.page.read_text(), name, filled(TABLES[name]))
        options.page.write_text(text)
    return 0


def replaced(page: str, name: str, table: str) -> str:
    """A page with another table of that name; ValueError if it has none."""
    begin, end = f"<!-- table {name} -->\n", "<!-- end of table -->"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the page has no {begin.strip()} ... {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def filled(table: Table) -> str:
    """The table, with what it was measured by and on above it; runs its commands."""
    load = os.getloadavg()[0]
    commands, rows, measured = [], [], {}
    for name, arguments in table.rows.items():
        command = ("python", "-m", *table.command, *arguments)
        print(shlex.join(command), flush=True)
        measured = carried_out(command)
        commands.append(shlex.join(command))
        rows.append([name, *table.cells(measured)])
    heading = ["", *table.columns]
    return "\n".join(
        [
            f"{surroundings(measured)}. Load when it began: {load:.1f}.",
            "",
            *(f"    {command}" for command in commands),
            "",
            *(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)),
            "",
        ]
    )


def carried_out(command: Sequence[str]) -> dict[str, Any]:
    """Runs a command of this interpreter; its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "figures.json"
        subprocess.run([sys.executable, *command[1:], f"--json={report}"], cwd=ROOT, check=True)
        return json.loads(report.read_text())


def surroundings(measured: Mapping[str, Any]) -> str:
    """The machine, versions, commit and day of a result."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    machine = found[1] if found else platform.processor() or platform.machine()
    versions = {**measured["versions"], "libtpu": measured.get("libtpu")}
    named = [f"{package} {version}" for package, version in versions.items() if version]
    cores, commit = len(os.sched_getaffinity(0)), measured["commit"] or "unknown"
    return f"{cores} x {machine}; {', '.join(named)}; commit {commit[:12]}; {measured['date'][:10]}"


def startup_cells(measured: dict[str, Any]) -> list[str]:
    figures = measured["figures"]
    return [
        " / ".join(f"{figures[f'{stage}_{kind}']['value']:.2f}" for kind in ("cold", "warm"))
        for stage in STAGES
    ]


def step_cells(measured: dict[str, Any]) -> list[str]:
    figures = measured["figures"]
    rates = figures["rate"]["rounds"]
    value = {name: figure["value"] for name, figure in figures.items()}
    return [
        f"{value['rate']:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
        three_digits(value["step"]),
        f"{value['input_wait']:.2g}",
        f"{value['flops_per_image']:.3g}" if "flops_per_image" in value else "-",
        f"{value['compilation']:.1f}",
        f"{value['peak_memory_host']:,.0f}",
    ]


def three_digits(number: float) -> str:
    """Such as 1,720, 45.3 or 0.082."""
    return f"{float(f'{number:.3g}'):,g}"


def plan_cells(measured: dict[str, Any]) -> list[str]:
    [plan] = measured["plans"]
    variant = plan["variants"][0]
    if not variant["fits"]:
        return ["does not fit", *["-"] * 7]
    figures = {name: figure["value"] for name, figure in variant["steps"][0].items()}
    sent = [name.partition(":")[0] for name in figures if name.endswith(": count")]
    return [
        f"{figures['batch_size'] / figures['chips']:,.0f}",
        f"{figures['memory: peak'] / 2**30:.2f}",
        f"{figures['flops'] / 1e9:.3g}",
        f"{figures['memory traffic'] / 1e6:,.0f}",
        f"{figures['bytes_accessed'] / 1e6:,.0f}",
        ", ".join(f"{figures[f'{kind}: count']:.0f} {kind}" for kind in sent) or "nothing",
        f"{figures['roofline_rate_per_chip']:,.0f}",
        f"{figures['compilation']:.0f}",
    ]


def recipe(name: str, *arguments: str) -> tuple[str, ...]:
    return (f"--config={name}", *arguments)


def planned(name: str, topology: str, *arguments: str) -> tuple[str, ...]:
    return recipe(name, f"--topology={topology}", "--batch_per_chip=128", *arguments)


TABLES = {
    "startup": Table(
        ("flaxcls.bench", "startup", "--rounds=3"),
        {
            "`digits_mlp`": recipe("digits_mlp"),
            "`digits_cnn`": recipe("digits_cnn"),
            "`cifar10_quick`": recipe("cifar10_quick", *FAKE_CIFAR10),
            "`imagenet_resnet50`, batch 32": recipe("imagenet_resnet50", *FAKE_IMAGENET),
        },
        ("imported", "checked", "data read", "initialised", "compiled", "first step made"),
        startup_cells,
    ),
    "steps": Table(
        ("flaxcls.bench", "step", "--fake"),
        {
            f"`{name}`": recipe(name)
            for name in (
                "digits_mlp",
                "digits_cnn",
                "cifar10_keras_cnn",
                "cifar10_convnet",
                "cifar10_quick",
                "cifar10_resnet20",
                "cifar10_vgg16_bn",
            )
        },
        ("images/s", "ms a step", "of it waiting for input", "GFLOP an image", "s to compile",
         "MiB of the host"),
        step_cells,
    ),
    "plans": Table(
        ("flaxcls.plan",),
        {
            "`imagenet_resnet50` on v5e:2x2": planned("imagenet_resnet50", "v5e:2x2"),
            "`imagenet_resnet50`, BatchNorm over a chip on v5e:2x2": planned(
                "imagenet_resnet50", "v5e:2x2", "--config.model.batch_norm_group=128"
            ),
            "`imagenet_resnet50_a3` on v5e:2x2": planned("imagenet_resnet50_a3", "v5e:2x2"),
            "`imagenet_vit_s16` on v6e:2x2": planned("imagenet_vit_s16", "v6e:2x2"),
        },
        ("images a chip", "GiB at the peak", "GFLOP an image", "MB to and from HBM", "MB by XLA",
         "sent", "images/s a chip at most", "s to compile"),
        plan_cells,
    ),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
