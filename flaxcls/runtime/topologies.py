"""TPUs and GPUs that a step can be compiled for on a machine that has none."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from flaxcls.errors import ConfigError, did_you_mean, one_line

LOCAL = "local"  # the machine's own devices
_OTHER_GPUS = re.compile(r"(a|b|h|gb|gh)\d{2,3}|l4|l40s?|t4|v100|gpu|cuda|rocm|mi\d+x?")
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


class Gpu(NamedTuple):
    """Of NVIDIA's, with SXM and eight in a host: what XLA chooses and tiles kernels by.

    Figures of OpenXLA's xla/backends/gpu/target_config/specs.

    Attributes:
      name: that JAX has for it.
      capability: the first number of its CUDA compute capability; the second is 0.
      cores: streaming multiprocessors.
      fpus_per_core: float32 units of each.
      clock_ghz: of these.
      memory, bandwidth: bytes, and bytes/s.
      l2_cache: bytes.
      shared_memory: bytes of a core; a block gets 1 KiB less.
    """

    name: str
    capability: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2_cache: int
    shared_memory: int

    def to_text(self) -> str:
        """As XLA reads it: a text protocol buffer, GpuTargetConfigProto."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} }}
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_block: 49152
              registers_per_block_limit: 65536
              registers_per_core_limit: 65536
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
        """


GPUS_PER_HOST = 8
_H100 = Gpu(
    "NVIDIA H100 80GB HBM3",
    capability=9,
    cores=132,
    fpus_per_core=128,
    clock_ghz=1.98,
    memory=84_942_979_072,
    bandwidth=3_352_320_000_000,
    l2_cache=50 * 2**20,
    shared_memory=228 * 2**10,
)
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        capability=8,
        cores=108,
        fpus_per_core=64,
        clock_ghz=1.41,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2_cache=40 * 2**20,
        shared_memory=164 * 2**10,
    ),
    "h100": _H100,
    "h200": _H100._replace(name="NVIDIA H200", memory=151_397_597_184, bandwidth=4_800_000_000_000),
    "b200": _H100._replace(
        name="NVIDIA B200",
        capability=10,
        cores=148,
        clock_ghz=1.965,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        l2_cache=132_644_864,
    ),
}


def check(topology: str) -> None:
    """ConfigError, in one sentence, for a name of no chips, or that needs what isn't installed."""
    kind, _, shape = topology.partition(":")
    if topology == LOCAL:
        return
    if kind in GENERATIONS:
        _check_slice(topology, kind, shape)
    elif kind in GPUS:
        _check_gpus(topology, kind, shape)
    elif kind.lower() not in GPUS and _OTHER_GPUS.fullmatch(kind.lower()):
        raise ConfigError(
            f"--topology={topology}: of GPUs that are not there {', '.join(GPUS)} can be planned "
            f"for, others where they are, with --topology={LOCAL}"
        )
    else:
        known = did_you_mean(kind, (*GENERATIONS, *GPUS, LOCAL))
        raise ConfigError(f"--topology={topology}: there is no kind of chip {kind!r}{known}")


def _check_slice(topology: str, kind: str, shape: str) -> None:
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


def _check_gpus(topology: str, kind: str, number: str) -> None:
    if not number.isdecimal() or not int(number):
        raise ConfigError(f"--topology={topology} must name a number of GPUs, such as {kind}:8")
    if int(number) > GPUS_PER_HOST and int(number) % GPUS_PER_HOST:
        raise ConfigError(
            f"--topology={topology}: {number} GPUs are not at most {GPUS_PER_HOST}, nor hosts of "
            f"{GPUS_PER_HOST} each"
        )
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        raise ConfigError(
            f"--topology={topology} needs XLA for NVIDIA GPUs: pip install 'flaxcls[cuda]' (Linux; "
            "neither a GPU nor its driver)"
        )


def devices(topology: str) -> Sequence[jax.Device]:
    """The chips of "v5e:2x2", "v5p:2x2x1" or "h100:8"; ConfigError if there are none such."""
    check(topology)
    kind, _, shape = topology.partition(":")
    if kind in GPUS:
        return _described(topology, "cuda", _gpu_options(GPUS[kind], int(shape)))
    generation = GENERATIONS[kind]
    found = _described(topology, "tpu", generation.options)
    if len(found) > generation.most:
        raise ConfigError(
            f"--topology={topology}: a slice of {kind} has at most {generation.most:,} chips, "
            f"not {len(found):,}"
        )
    return found


def _gpu_options(gpu: Gpu, number: int) -> dict[str, str]:
    each = min(number, GPUS_PER_HOST)
    return {"target_config": gpu.to_text(), "topology": f"1x{number // each}x{each}"}


def _described(topology: str, platform: str, options: Mapping[str, Any]) -> Sequence[jax.Device]:
    name = topology if platform == "tpu" else ""
    try:
        return topologies.get_topology_desc(name, platform=platform, **options).devices
    except (NotImplementedError, RuntimeError, OSError) as error:
        raise ConfigError(_why_not(topology, one_line(error))) from error


def compiler_options(devices: Sequence[jax.Device] | None) -> dict[str, str]:
    """Of XLA, by name: kernels for GPUs that aren't there can't be chosen by timing them."""
    is_gpu = devices is not None and devices[0].platform == "gpu"
    return {"xla_gpu_autotune_level": "0"} if is_gpu else {}


def compiler(topology: str) -> str:
    """What it is planned by, in words."""
    if topology.partition(":")[0] in GPUS:
        return "kernels not chosen by their times, as none of these is here"
    return f"libtpu {libtpu_version()}"


def libtpu_version() -> str | None:
    """Of the compiler for TPUs; None where it isn't installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not(topology: str, reason: str) -> str:
    if topology.partition(":")[0] in GPUS:
        return f"--topology={topology}: XLA for NVIDIA GPUs doesn't start: {reason}"
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
