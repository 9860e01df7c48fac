"""Slices of TPUs that a step can be compiled for on a machine that has none."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from flaxcls.errors import ConfigError, did_you_mean, one_line

LOCAL = "local"  # the machine's own devices
# XLA would compile for one of these without it, but it chooses kernels by timing them, and JAX has
# no count of FLOPs and bytes then (jax 0.10.2).
_GPUS = re.compile(r"(a|b|h|gb|gh)\d{2,3}|l4|l40s?|t4|v100|gpu|cuda|rocm|mi\d+x?")
# All slices of v5e and v6e (docs.cloud.google.com/tpu/docs/v5e and /v6e).
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


class Generation(NamedTuple):
    """Of TPUs.

    Attributes:
      shapes: of its slices; None: those that the compiler takes.
      most: chips in a slice.
      example: of a shape.
      options: of the compiler's description.
    """

    shapes: tuple[str, ...] | None
    most: int
    example: str
    options: dict[str, str] = {}


GENERATIONS = {
    # Its two cores are one device, as JAX has them on a machine with one.
    "v4": Generation(None, 4096, "2x2x1", {"chip_config_name": "megacore"}),
    "v5e": Generation(_FLAT, 256, "2x2"),
    "v5p": Generation(None, 6144, "2x2x1"),
    "v6e": Generation(_FLAT, 256, "2x2"),
}


def check(topology: str) -> None:
    """ConfigError, in one sentence, for a name that is no slice or needs what isn't installed."""
    kind, _, shape = topology.partition(":")
    if topology == LOCAL:
        return
    if _GPUS.fullmatch(kind.lower()):
        raise ConfigError(
            f"--topology={topology}: a step for GPUs can be planned only where there is one, with "
            f"--topology={LOCAL}"
        )
    if kind not in GENERATIONS:
        known = did_you_mean(kind, (*GENERATIONS, LOCAL))
        raise ConfigError(f"--topology={topology}: there is no kind of chip {kind!r}{known}")
    generation = GENERATIONS[kind]
    sides = shape.split("x")
    is_shape = all(side.isdecimal() and int(side) for side in sides)
    if not is_shape or len(sides) != len(generation.example.split("x")):
        raise ConfigError(
            f"--topology={topology} must name a slice, such as {kind}:{generation.example}"
        )
    if generation.shapes and shape not in generation.shapes:
        raise ConfigError(
            f"--topology={topology}: {kind} has no slice of {shape} chips, but "
            f"{', '.join(generation.shapes)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={topology} needs the compiler for TPUs: pip install 'flaxcls[plan]' "
            "(Linux on x86-64)"
        )


def devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a slice such as "v5e:2x2" or "v5p:2x2x1"; ConfigError if there is none such."""
    check(topology)
    kind, _, shape = topology.partition(":")
    generation = GENERATIONS[kind]
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **generation.options).devices
    except (RuntimeError, OSError) as error:
        raise ConfigError(_why_not(topology, one_line(error))) from error
    if len(found) > generation.most:
        raise ConfigError(
            f"--topology={topology}: a slice of {kind} has at most {generation.most:,} chips, "
            f"not {len(found):,}"
        )
    return found


def libtpu_version() -> str | None:
    """Of the compiler for TPUs; None where it isn't installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not(topology: str, reason: str) -> str:
    if "lockfile" in reason:
        return (
            "another process has the compiler for TPUs: wait for it, or set "
            "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        )
    if "INVALID_ARGUMENT" in reason:
        kind, _, shape = topology.partition(":")
        example = GENERATIONS[kind].example
        return f"--topology={topology}: {kind} has no slice of {shape} chips, as it has {example}"
    return f"--topology={topology}: the compiler for TPUs doesn't start: {reason}"
