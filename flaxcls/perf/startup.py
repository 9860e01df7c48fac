"""How long it takes from the command to the first step, by real processes."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaxcls.errors import ConfigError, FlaxclsError
from flaxcls.files import read_json
from flaxcls.perf.figures import Figures, figure
from flaxcls.perf.temporary import at_signal, temporary_folder
from flaxcls.runs.goodput import STAGES
from flaxcls.runtime.output import write_result

_POLL = 0.02  # seconds
_PATIENCE = 300  # seconds, for a run that was asked to end


def bench_startup(recipe: str, overrides: Sequence[str], rounds: int) -> Figures:
    """Starts `flaxcls.main` with an empty cache of compiled programs, and again with a full one.

    Each round is two fresh processes, the first with an empty cache. The times are what the run
    itself notes in goodput.json, in seconds since its process began. It logs after the first step,
    which writes the file, and is then asked to end.
    """
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with temporary_folder() as cache:
            environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # the run has its own, in there
            for kind in ("cold", "warm"):
                starts[kind].append(_start(recipe, overrides, environment))
    write_result(f"{'seconds from the start until it had':36}" + f"{'cold':>8}{'warm':>8}")
    figures = {}
    for stage in STAGES:
        medians = []
        for kind, rows in starts.items():
            seconds = [row[stage] for row in rows]
            figures[f"{stage}_{kind}"] = figure(seconds, "s")
            medians.append(statistics.median(seconds))
        write_result(f"{_WORDS[stage]:36}" + "".join(f"{second:8.2f}" for second in medians))
    return figures


_WORDS = {
    "imported": "imported the code, read the recipe",
    "checked": "checked the config, found the data",
    "read": "read the data",
    "initialised": "initialised the state",
    "compiled": "compiled the training step",
    "first_step": "made the first step",
}


def _start(
    recipe: str, overrides: Sequence[str], environment: Mapping[str, str]
) -> dict[str, float]:
    """The stages of one process."""
    with temporary_folder() as folder:
        workdir = folder / "run"
        command = [sys.executable, "-m", "flaxcls.main", f"--config={recipe}"]
        command += [f"--config.{override}" for override in overrides]
        command += [f"--workdir={workdir}", "--config.log_every=1 steps"]
        with (folder / "errors").open("w+") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )
            with at_signal(process.kill):
                try:
                    stages = _wait(process, workdir / "goodput.json")
                finally:
                    _end(process)
            if stages is None:
                errors.seek(0)
                kind = ConfigError if process.returncode == 2 else FlaxclsError
                said = errors.read().strip().splitlines()[-1:] or ["it said nothing"]
                raise kind(f"the run ended before its first step: {said[0]}")
    return stages


def _wait(process: subprocess.Popen, path: Path) -> dict[str, float] | None:
    """What the run notes of its start once it has made a step; None if it ends without one."""
    while True:
        ended = process.poll() is not None
        start = (read_json(path) or {}).get("start", {})
        if "first_step" in start:
            return start
        if ended:
            return None
        time.sleep(_POLL)


def _end(process: subprocess.Popen) -> None:
    """Asks a run to end, which ends its workers as well, and sees that it does."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
