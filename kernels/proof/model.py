"""Rung 6: what compiled code and counted traffic imply on a named GPU. A model, not a measurement.

Ideal time of a case: the larger of budget/bandwidth and FLOPs/peak. The window is ideal time over
modelled time, with all that the code does overlapping (bound_high) and nothing of it (bound_low):

    high:  max(bytes/bandwidth/f, flops/peak, instructions/issue rate)   f: share of the bandwidth
    low:   bytes/bandwidth/f + flops/peak + instructions/issue rate         that loads in flight
           + LAUNCH_S per launch                                            can fill, ≤ 1

f comes from Little's law: a processor holds as many programs as its registers, shared memory and
threads allow (and the grid gives it), each with the loads of one pass of its code in flight, for
500 (high) or 900 ns (low) until they arrive. Instructions count once a program: loops that run
longer are undercounted, which only the low bound's sum makes up for.

Data sheets: A100 80GB SXM, H100 SXM, B200, MI300X; dense rates without sparsity, boost clocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trimpot.kernels.proof.sass import Code

LAUNCH_S = 2e-6
LATENCY_S = {"high": 500e-9, "low": 900e-9}


@dataclass(frozen=True)
class Gpu:
    name: str
    bandwidth: float
    """Bytes per second of device memory."""
    tensor_flops: float
    """Per second, bf16 and fp16, dense."""
    fp32_flops: float
    """Per second, of dots of float32."""
    processors: int
    clock: float
    """Hz"""
    registers: int
    """32-bit, of a processor."""
    shared_bytes: int
    threads: int
    lanes: int
    """Of a warp; four are issued each clock."""


GPUS = {
    "sm_80": Gpu("A100", 2.04e12, 312e12, 19.5e12, 108, 1.41e9, 65536, 164 << 10, 2048, 32),
    "sm_90": Gpu("H100", 3.35e12, 989e12, 67e12, 132, 1.83e9, 65536, 228 << 10, 2048, 32),
    "sm_100": Gpu("B200", 8.0e12, 2250e12, 75e12, 148, 1.85e9, 65536, 228 << 10, 2048, 32),
    "gfx942": Gpu("MI300X", 5.3e12, 1307e12, 163e12, 304, 2.1e9, 131072, 64 << 10, 2048, 64),
}


@dataclass(frozen=True)
class Work:
    """One launch: its code, its programs, the bytes that it moves and its FLOPs."""

    code: Code
    programs: int
    moved: float
    flops: float


def window(
    gpu: Gpu, works: Sequence[Work], budget: float, flops: float, dtype: str
) -> tuple[float, float]:
    """(bound_low, bound_high): shares of the roofline, 0 to 1, for launches one after another."""
    peak = gpu.fp32_flops if dtype == "fp32" else gpu.tensor_flops
    ideal = max(budget / gpu.bandwidth, flops / peak)
    best, worst = 0.0, LAUNCH_S * len(works)
    for work in works:
        issue = _issue_seconds(gpu, work)
        best += max(_memory_seconds(gpu, work, "high"), work.flops / peak, issue)
        worst += _memory_seconds(gpu, work, "low") + work.flops / peak + issue
    return min(ideal / worst, 1.0), min(ideal / best, 1.0)


def resident(gpu: Gpu, code: Code) -> int:
    """Programs that one processor holds at once."""
    per_thread = max(8 * math.ceil(code.registers / 8), 16)
    limits = [gpu.registers // (per_thread * code.threads), gpu.threads // code.threads, 32]
    if code.shared_bytes:
        limits.append(gpu.shared_bytes // code.shared_bytes)
    return max(min(limits), 1)


def _memory_seconds(gpu: Gpu, work: Work, bound: str) -> float:
    in_flight = work.code.threads * sum(b * n for b, n in work.code.load_bits.items()) / 8
    programs = min(resident(gpu, work.code), math.ceil(work.programs / gpu.processors))
    busy = min(work.programs, gpu.processors)
    reach = busy * programs * in_flight / LATENCY_S[bound]
    return work.moved / min(gpu.bandwidth, reach or gpu.bandwidth)


def _issue_seconds(gpu: Gpu, work: Work) -> float:
    """Four warps of a processor issue one instruction each, every clock."""
    warps = work.programs * work.code.threads / gpu.lanes
    return warps * work.code.instructions / (4 * gpu.processors * gpu.clock)
