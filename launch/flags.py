"""The environment of a training process on a GPU or TPU: few settings, each with its source.

Only what a published source recommends, or what was measured here, is set; everything else is left
to the defaults of JAX and XLA, which change for the better faster than lists of flags do. Flags of
the TPU compiler (--xla_tpu_*) belong into LIBTPU_INIT_ARGS: in XLA_FLAGS they abort the process.
"""

from collections.abc import Iterable
from dataclasses import dataclass

EFFORT_LEVELS = "https://openxla.org/xla/effort_levels"
FLAGS_GUIDANCE = "https://openxla.org/xla/flags_guidance"


@dataclass(frozen=True)
class Setting:
    """An environment variable, or one flag of those that hold several."""

    variable: str
    value: str
    reason: str
    source: str


H100 = (
    Setting(
        "JAX_OPTIMIZATION_LEVEL",
        "O1",
        "hides the gradients' all-reduce behind the backward pass (latency-hiding scheduler, "
        "pipelined and combined collectives); in place of a dozen of flags",
        EFFORT_LEVELS,
    ),
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.9",
        "the default, 0.75, leaves a quarter of the memory unused; the rest is for NCCL and cuDNN",
        "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance",
    ),
)

# For runs that shall end bitwise equal on the same GPUs; some kernels are slower.
DETERMINISTIC_GPU = (
    Setting(
        "XLA_FLAGS",
        "--xla_gpu_deterministic_ops=true",
        "scatters, reductions and convolutions by deterministic kernels, chosen deterministically",
        "https://openxla.org/xla/determinism",
    ),
)

TPU = {
    "v5e": (
        Setting(
            "LIBTPU_INIT_ARGS",
            "--xla_tpu_enable_async_collective_fusion=true",
            "needed by the next one",
            FLAGS_GUIDANCE,
        ),
        Setting(
            "LIBTPU_INIT_ARGS",
            "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true",
            "the gradients' all-reduce runs beside the backward pass; off by default",
            FLAGS_GUIDANCE,
        ),
    ),
    # Nothing that is published for image classifiers. A larger limit of VMEM for fused operators
    # (xla_tpu_scoped_vmem_limit_kib), which is set for language models, makes ViT-B/16 on v6e and
    # ResNet-50 on v5e move more to and from HBM (docs/benchmarks.md).
    "v5p": (),
    "v6e": (),
}


def environment(
    settings: Iterable[Setting], extra: Iterable[tuple[str, str]] = ()
) -> dict[str, str]:
    """The variables of `settings`, several flags of one variable joined, and those of the user.

    The user's XLA_FLAGS and LIBTPU_INIT_ARGS follow ours, so that they win; of other variables
    theirs replace ours.
    """
    variables: dict[str, str] = {}
    for setting in settings:
        _add(variables, setting.variable, setting.value)
    for name, value in extra:
        _add(variables, name, value)
    return variables


def _add(variables: dict[str, str], name: str, value: str) -> None:
    if name in variables and name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        value = f"{variables[name]} {value}"
    variables[name] = value
