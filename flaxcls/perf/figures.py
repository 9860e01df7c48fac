"""Measured figures: how they are taken, said and stored."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from flaxcls.errors import OutputError
from flaxcls.runs import run_folder
from flaxcls.runtime.output import printable, write_result

Figures = dict[str, dict[str, Any]]  # by name {"value": number, "unit": str}, maybe "rounds"


class Effort(NamedTuple):
    """How much is measured: `rounds` of `steps` steps; one round more comes first and warms up."""

    steps: int
    rounds: int


def rates_of(work: Callable[[], int], rounds: int) -> list[float]:
    """Examples/s of every round of `work`, which returns their number."""
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - start))
    return rates[1:]  # the first round warms up


def print_rates(rates: Sequence[float], devices: int = 1) -> None:
    """The rounds, their median and spread and, where there are several, the share of a device."""
    median = statistics.median(rates)
    write_result("images/s: " + ", ".join(f"{rate:,.0f}" for rate in rates))
    write_result(
        f"median {median:,.0f} images/s, {min(rates):,.0f} to {max(rates):,.0f}"
        + (f"; {median / devices:,.0f} on each of {devices} devices" if devices > 1 else "")
    )


def figure(value: float | Sequence[float], unit: str) -> dict[str, Any]:
    """A figure, or the median of those of the rounds and all of them."""
    if isinstance(value, Sequence):
        return {"value": statistics.median(value), "unit": unit, "rounds": list(value)}
    return {"value": value, "unit": unit}


def write_json(path: Path, benchmark: str, flags: dict[str, Any], **content: Any) -> None:
    """Writes what was measured and what explains it: the flags, date, versions and device.

    OutputError where that fails.
    """
    content = {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "flags": flags,
        **content,
        **run_folder.surroundings(),
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise OutputError(
            f"--json={printable(path)} can't be written: {error.strerror or error}"
        ) from error


def host_peak() -> float:
    """The most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def device_peak(mesh: Mesh) -> float | None:
    """The most memory that has been in use on one of this process's devices, in MiB.

    None where they do not count it, as CPUs don't.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(peaks) / 2**20 if peaks else None


def print_memory(mesh: Mesh) -> Figures:
    """Both peaks."""
    host, device = host_peak(), device_peak(mesh)
    text = f"peak memory: {host:,.0f} MiB of the host"
    figures = {"peak_memory_host": figure(host, "MiB")}
    if device is not None:
        text += f", {device:,.0f} MiB of a device"
        figures["peak_memory_device"] = figure(device, "MiB")
    write_result(text)
    return figures
