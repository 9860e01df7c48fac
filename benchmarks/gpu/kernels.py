"""Where a step's time goes: the kernels of a profile that `jax.profiler.trace` has written."""

import collections
import re
from pathlib import Path
from typing import Any

import jax

# Kinds of kernels, the first whose words a name has.
KINDS = {
    "convolution or product": r"xmma|cutlass|nvjet|cudnn|gemm|conv|nhwc|nchw",
    "reduction": r"reduce",
    "copy": r"copy|memcpy|memset|transpose",
    "other fusion": r"fusion|wrapped",
}


def table(folder: str, steps: int, most: int = 30) -> dict[str, Any]:
    """The kernels that take the most time.

    Returns {"milliseconds": a step's time in kernels, "launches": a step's, "kinds": both by KINDS,
    "top": rows of [milliseconds a step, launches a step, kernel, operation of XLA]}.
    The profile of a CPU has no kernels: there, its threads' operations are counted.
    """
    (path,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    device = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    seconds, launches, operations = collections.Counter(), collections.Counter(), {}
    for plane in device or planes:
        for line in plane.lines:
            if device and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if not device and "hlo_op" not in stats:
                    continue
                seconds[event.name] += event.duration_ns / 1e9
                launches[event.name] += 1
                operations.setdefault(event.name, str(stats.get("hlo_op", "")))
    kinds = {}
    for name, spent in seconds.items():
        kind = next((k for k, words in KINDS.items() if re.search(words, name.lower())), "rest")
        total, count = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = total + 1e3 * spent / steps, count + launches[name] / steps
    return {
        "milliseconds": 1e3 * seconds.total() / steps,
        "launches": launches.total() / steps,
        "kinds": kinds,
        "top": [
            [1e3 * spent / steps, launches[name] / steps, name[:120], operations[name][:60]]
            for name, spent in seconds.most_common(most)
        ],
    }
