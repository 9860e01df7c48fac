"""What accelerators can do at most, as their makers publish it."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The published peaks of a chip, which is one device of JAX.

    Attributes:
      name: as it is known, such as "v5e".
      peak_tflops: 10**12 FLOP/s in bfloat16, multiplied and added in matrices without zeros
        (NVIDIA's figures "with sparsity" are twice these).
      hbm_gb: of its memory, in what makers call a GB there: 2**30 bytes, of which programs get a
        little less (15.75 of a v5e's 16, by libtpu 0.0.52).
      hbm_gbps: 10**9 bytes/s of that memory.
      source: where the figures are published.
    """

    name: str
    peak_tflops: float
    hbm_gb: float
    hbm_gbps: float
    source: str

    @property
    def peak_flops(self) -> float:
        """FLOP/s."""
        return 1e12 * self.peak_tflops

    @property
    def hbm_bytes(self) -> float:
        return 2**30 * self.hbm_gb

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes/s."""
        return 1e9 * self.hbm_gbps


_TPUS = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_A100_40 = Chip("a100-40gb", 312, 40, 1555, _NVIDIA + "a100/")

# By `jax.Device.device_kind`, whole: cards of one name on other boards (PCIe, NVL) are slower.
CHIPS = {
    "TPU v4": Chip("v4", 275, 32, 1228, _TPUS + "v4"),
    "TPU v5 lite": Chip("v5e", 197, 16, 819, _TPUS + "v5e"),
    "TPU v5": Chip("v5p", 459, 95, 2765, _TPUS + "v5p"),
    "TPU v6 lite": Chip("v6e", 918, 32, 1640, _TPUS + "v6e"),
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-PCIE-40GB": _A100_40,
    "NVIDIA A100-SXM4-80GB": Chip("a100-80gb", 312, 80, 2039, _NVIDIA + "a100/"),
    "NVIDIA H100 80GB HBM3": Chip("h100", 989, 80, 3350, _NVIDIA + "h100/"),
    "NVIDIA B200": Chip("b200", 2250, 180, 7700, _NVIDIA + "hgx/"),
    "NVIDIA H200": Chip("h200", 989, 141, 4800, _NVIDIA + "h200/"),
}


def find(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for what is not in the table, such as a CPU."""
    return CHIPS.get(device_kind)
