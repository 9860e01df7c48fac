"""The GPUs of this machine, without using them: each of several processes gets a share."""

import os
from collections.abc import Sequence
from pathlib import Path

from flaxcls.errors import ConfigError

_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def share_gpus(jobs: int) -> Sequence[dict[str, str]]:
    """What the environment of each of `jobs` processes needs so that no two have the same GPU.

    Nothing where there is one process, or no GPU of NVIDIA's. ConfigError where the GPUs are fewer.
    """
    gpus = visible_gpus()
    if jobs == 1 or not gpus:
        return [{}] * jobs
    if jobs > len(gpus):
        raise ConfigError(f"--jobs={jobs} is more than the GPUs, of which there are {len(gpus)}")
    ends = [number * len(gpus) // jobs for number in range(jobs + 1)]
    return [
        {_VISIBLE: ",".join(gpus[begin:end])} for begin, end in zip(ends, ends[1:], strict=False)
    ]


def visible_gpus() -> list[str]:
    """The numbers or names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has."""
    if (given := os.environ.get(_VISIBLE)) is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(len([*_DRIVER.glob("*")]))]
