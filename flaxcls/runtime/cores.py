"""The cores of this machine."""

import os


def available_cores() -> int:
    """The cores that this process may use: what a container or SLURM grants, not what exists."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
