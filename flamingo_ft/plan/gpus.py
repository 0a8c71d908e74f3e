"""GPUs that people train on, and what of their memory a training step can have."""

from __future__ import annotations

from dataclasses import dataclass

from flamingo_ft.formatting import GIB, MIB

from .memory import Plan

# Outside torch's allocator: the CUDA context with the loaded kernels of torch and bitsandbytes. Not measured here; users
# report 0.3 to 0.6 GiB by card and driver.
CONTEXT = 0.5 * GIB
FRAGMENTATION = 0.03  # of the peak: what the caching allocator holds beyond live tensors


@dataclass(frozen=True)
class Gpu:
    """A card: usable_gib as torch reports it, less than its name says; workspace in bytes, what cuBLAS takes through
    torch's allocator, twice: one handle in the forward and one in the backward thread (ATen/cuda/CublasHandlePool.cpp)."""

    name: str
    usable_gib: float
    workspace: int = 2 * (8 * MIB + 128 * 1024)

    def needed(self, plan: Plan) -> float:
        """Bytes of the card's memory that the plan takes."""
        return plan.peak * (1 + FRAGMENTATION) + self.workspace + CONTEXT

    def fits(self, plan: Plan) -> bool:
        return self.needed(plan) <= self.usable_gib * GIB


HOPPER_WORKSPACE = 2 * 32 * MIB

GPUS = (  # usable_gib: torch.cuda.get_device_properties(0).total_memory, as quoted in out-of-memory messages
    Gpu("T4 16 GB", 14.56),
    Gpu("L4 24 GB", 22.03),
    Gpu("RTX 3090 24 GB", 23.57),
    Gpu("RTX 4090 24 GB", 23.52),
    Gpu("A100 40 GB", 39.38),
    Gpu("A100 80 GB", 79.14),
    Gpu("H100 80 GB", 79.10, HOPPER_WORKSPACE),
    Gpu("H200 141 GB", 139.80, HOPPER_WORKSPACE),
)
