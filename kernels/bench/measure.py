"""Time and memory of variants of one call: warmed up, interleaved, in one process.

On a CPU the clock is `perf_counter` around the call. On a GPU it is events, behind a spin that
keeps the device busy until all launches are queued (else a short kernel shows the launch's
20 µs), and after a write that throws its L2 cache out.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimpot.kernels.bench.case import Case, Tensors, Variant, copied, leaf, with_leaves

ENOUGH_S = 0.02
"""A sample shorter than this is repeated inside: the clock and the scheduler are not finer."""
MOST_INNER = 200
L2_BYTES = 256 << 20
"""More than the L2 cache of any GPU (B200: 126 MB)."""
SPIN_CYCLES = 1_000_000
"""Half a millisecond of a GPU at 2 GHz: time for a dozen launches."""


@dataclass
class Runner:
    """A variant with its prepared tensors: one call is forward, and backward if there is one."""

    variant: Variant
    tensors: Tensors
    leaves: tuple[str, ...]
    upstream: tuple[torch.Tensor, ...] = ()
    device: str = "cpu"
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)

    def forward(self) -> tuple[torch.Tensor, ...]:
        if self.leaves:
            return self.variant.run(self.tensors)
        with torch.no_grad():
            return self.variant.run(self.tensors)

    def backward(self, outs: tuple[torch.Tensor, ...]) -> None:
        """Its gradients are freed at once."""
        leaves = [leaf(self.tensors, name) for name in self.leaves]
        torch.autograd.grad(outs, leaves, self.upstream)

    def both(self) -> None:
        outs = self.forward()
        if self.leaves:
            self.backward(outs)


def runner_of(
    variant: Variant, case: Case, upstream: tuple[torch.Tensor, ...], device: str, backward: bool
) -> Runner:
    """Without `backward` nothing is recorded: forward as in evaluation."""
    leaves = case.leaves if backward else ()
    inputs = copied(case.inputs) if case.in_place else case.inputs
    tensors = with_leaves(variant.prepare(inputs), leaves)
    runner = Runner(variant, tensors, leaves, upstream, device)
    if leaves:
        outs = runner.forward()
        cast = [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)]
        runner.upstream = tuple(cast)
    return runner


def interleave(runners: Sequence[Runner], repeats: int) -> None:
    """Fill each runner's times, seconds per call: every round runs each, in turning order."""
    clock = _cuda_sample if runners[0].device == "cuda" else _cpu_sample
    slowest = 0.0
    for runner in runners:  # the second call: the first one compiles, packs weights, faults pages
        clock(runner, 1)
        slowest = max(slowest, sum(clock(runner, 1)))
    inner = max(1, min(MOST_INNER, math.ceil(ENOUGH_S / max(slowest, 1e-7))))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(repeats):
            turn = repeat % len(runners)
            for runner in [*runners[turn:], *runners[:turn]]:
                forward_s, backward_s = clock(runner, inner)
                runner.forward_s.append(forward_s / inner)
                runner.backward_s.append(backward_s / inner)
    finally:
        if collecting:
            gc.enable()


def _cpu_sample(runner: Runner, inner: int) -> tuple[float, float]:
    forward_s = backward_s = 0.0
    for _ in range(inner):
        start = time.perf_counter()
        outs = runner.forward()
        middle = time.perf_counter()
        if runner.leaves:
            runner.backward(outs)
        del outs
        end = time.perf_counter()
        forward_s += middle - start
        backward_s += end - middle
    return forward_s, backward_s


def _cuda_sample(runner: Runner, inner: int) -> tuple[float, float]:
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    forward_ms = backward_ms = 0.0
    for _ in range(inner):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        flush.zero_()
        torch.cuda._sleep(SPIN_CYCLES)
        marks[0].record()
        outs = runner.forward()
        marks[1].record()
        if runner.leaves:
            runner.backward(outs)
        marks[2].record()
        torch.cuda.synchronize()
        forward_ms += marks[0].elapsed_time(marks[1])
        backward_ms += marks[1].elapsed_time(marks[2])
    return forward_ms / 1e3, backward_ms / 1e3


def peak_memory(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that one warm call takes above what is there before it; None where none can say.

    On a CPU resident memory is asked, so that what C++ allocates counts too. What a kernel keeps
    from an earlier call does not.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not reset_peak(trim=True):
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def reset_peak(trim: bool) -> bool:
    """Start VmHWM anew from what is resident; whether that can be done here.

    `trim` gives freed memory back to the kernel before: glibc keeps small freed blocks resident,
    which would hide the peak of a call that takes them again.
    """
    try:
        if trim:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def peak_status(was_reset: bool) -> int:
    """Peak resident bytes of this process: since `reset_peak`, or since it began."""
    if was_reset:
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
