"""The ceilings of this device, measured on the spot: torch's GEMM rate, and its copy rate.

Attainable FLOP/s = min(peak GEMM, bandwidth × FLOP per byte) (Williams et al. 2009). The GEMM is
torch's in the row's dtype: a kernel on another unit of the processor (int16 on a CPU) may pass it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trimpot.kernels.bench.case import dtype_name
from trimpot.kernels.bench.work import Work

GEMM_N = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Larger than the caches."""
TRIES = 5


@dataclass(frozen=True)
class Roofline:
    gemm_flops: dict[str, float]
    """FLOP/s by dtype's name."""
    copy_bytes: float
    """Bytes per second, read and written ones together."""

    def told(self) -> dict[str, Any]:
        """For JSON: {"gemm_tflops": {dtype: …}, "copy_gbs"}."""
        return {
            "gemm_tflops": {k: round(v / 1e12, 4) for k, v in self.gemm_flops.items()},
            "copy_gbs": round(self.copy_bytes / 1e9, 2),
        }

    def attainable(self, work: Work, dtype: torch.dtype) -> float:
        """FLOP/s that the device permits at this work's FLOP per byte.

        Elementwise work is done in float32 whatever the dtype, whose GEMM may be the slower one.
        """
        peak = max(self.gemm_flops[dtype_name(dtype)], self.gemm_flops["fp32"])
        return min(peak, self.copy_bytes * work.flops / work.bytes)


def measure_roofline(device: str, dtypes: list[torch.dtype]) -> Roofline:
    n = GEMM_N[device]
    gemm: dict[str, float] = {}
    for dtype in dict.fromkeys([torch.float32, *dtypes]):
        a = torch.randn(n, n, device=device).to(dtype)
        out = torch.empty_like(a)
        gemm[dtype_name(dtype)] = 2 * n**3 / _best(lambda a=a, out=out: torch.mm(a, a, out=out))
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source))
    return Roofline(gemm, 2 * COPY_BYTES[device] / seconds)


def _best(run: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(TRIES + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
