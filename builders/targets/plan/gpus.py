"""The GPUs that a plan knows, as NVIDIA's datasheets give them: dense rates, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_triton.builders.targets.artefacts.memory import GIB, GPUS

GPUS_PER_MACHINE = 8
NETWORK = 50e9  # bytes/s of each GPU between machines: a 400 Gb/s port


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates in bytes/s and FLOP/s; link: to another GPU of the machine, one way.

    fp8_flops: None: the GPU has no FP8 arithmetic. has_nvlink: without it, GPUs reach each other over PCIe.
    """

    name: str
    memory_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    link_bytes_per_s: float
    has_nvlink: bool
    source: str

    @property
    def memory_bytes(self) -> int:
        """The GPU's whole memory."""
        return GPUS[self.name] * GIB

    def flops(self, precision: str) -> float:
        """FLOP/s of matrix products with weights of `precision`."""
        return self.fp8_flops if precision == "fp8" and self.fp8_flops is not None else self.bf16_flops

    @property
    def precision(self) -> str:
        """The precision that the GPU computes fastest."""
        return "bf16" if self.fp8_flops is None else "fp8"


PLANNED_GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 2.039e12, 312e12, None, 300e9, True, "A100 datasheet, SXM 80 GB"),
        Gpu("h100", 3.35e12, 989e12, 1979e12, 450e9, True, "H100 datasheet, SXM"),
        Gpu("h200", 4.8e12, 989e12, 1979e12, 450e9, True, "H200 datasheet, SXM"),
        Gpu("b200", 8.0e12, 2250e12, 4500e12, 900e9, True, "DGX B200 datasheet, an eighth of it"),
        Gpu("l40s", 0.864e12, 362e12, 733e12, 32e9, False, "L40S datasheet"),
        # GeForce: with sums in float32, which halves the rates that are advertised.
        Gpu("rtx4090", 1.008e12, 165e12, 330e12, 32e9, False, "Ada architecture paper, float32 sums"),
        Gpu("rtx5090", 1.792e12, 210e12, 419e12, 64e9, False, "RTX Blackwell architecture paper, float32 sums"),
    )
}
