"""Rung 7: compiled kernels on the GPU that is here. Right first; only what is right gets a time.

Times are of Triton's `do_bench`: events around the call, the L2 cache written over before each,
launches queued behind that write, so short kernels do not show the launch itself. Ours and torch
take turns; the ratio is the median of the turns' own.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.testing

from trimpot.kernels.bench.roofline import Roofline, measure_roofline
from trimpot.kernels.dispatch import choose
from trimpot.kernels.proof.cases import DTYPES, Case, Sizes, call, cases, identity, maker
from trimpot.kernels.proof.check import comparisons, copied
from trimpot.kernels.proof.limits import off_by
from trimpot.kernels.vendor.flash import gpu_facts

Row = dict[str, Any]
DEVICE = "cuda"  # ROCm says cuda too
OURS = "triton"
TURNS = 5
TURN_MS = 40


def proven(ops: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """A row for each case, dtype and backend: identity, backend, gpu, right, why (not), results; of
    what is right also p20_s, p50_s, p80_s, bandwidth (of the budget; B/s), roofline (share of the
    measured one) and ratio (torch's time over the backend's)."""
    roofline = measure_roofline(DEVICE, list(DTYPES.values()))
    rows = []
    for case in cases(tuple(ops)):
        for dtype in case.dtypes:
            for backend in backends(case, dtype):
                row = proven_row(case, dtype, DEVICE, roofline, backend)
                say(_line(row))
                rows.append(row)
    return rows


def backends(case: Case, dtype: str) -> list[str]:
    """Ours, and before it what `auto` would take in its place."""
    facts: dict[str, Any] = {"dtype": str(DTYPES[dtype]).removeprefix("torch."), "device": DEVICE}
    if "D" in case.large:
        facts |= {"head_dim": case.large["D"], "softcap": case.large["softcap"]}
    best = choose(case.op, **facts, **gpu_facts(torch.device(DEVICE))).backend
    return [OURS] if best == OURS else [best, OURS]


def proven_row(case: Case, dtype: str, device: str, roofline: Roofline, backend: str = OURS) -> Row:
    row = {**identity(case, dtype), "backend": backend}
    row["gpu"] = torch.cuda.get_device_name(device)
    try:
        row |= correctness(case, dtype, device, backend)
        if row["right"]:
            row |= timing(case, dtype, device, roofline, backend)
    except Exception as error:  # a GPU is hired by the hour: one failure may not hide the rest
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        row |= {"right": False, "why": why, "results": []}
    return row


def correctness(case: Case, dtype: str, device: str, backend: str = OURS) -> Row:
    """{right, why, results}: the 2 × rule at small and large sizes, and equal bits twice."""
    results, why = [], []
    for name, sizes in (("small", case.small), ("large", case.large)):
        run = functools.partial(call, case, backend)
        judged = comparisons(case, dtype, sizes, device, run)
        results += [{"sizes": name, **result} for result in judged]
        why += [
            f"{name} result {number} {off_by(result)}"
            for number, result in enumerate(judged)
            if not result["right"]
        ]
        if not _repeats(case, dtype, sizes, device, backend):
            why.append(f"{name}: a second run gives other bits")
    return {"right": not why, "why": "; ".join(why), "results": results}


def _repeats(case: Case, dtype: str, sizes: Sizes, device: str, backend: str) -> bool:
    arguments = case.arguments(maker(dtype, device), sizes)
    first, second = (call(case, backend, copied(arguments)) for _ in range(2))
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def timing(case: Case, dtype: str, device: str, roofline: Roofline, backend: str = OURS) -> Row:
    make = maker(dtype, device)
    arguments = case.arguments(make, case.large)
    ours: list[float] = []
    ratios: list[float] = []
    for _ in range(TURNS):
        turn = _seconds(lambda: call(case, backend, arguments))
        torch_s = _seconds(lambda: call(case, "torch", arguments))
        ours += turn
        ratios.append(statistics.median(torch_s) / statistics.median(turn))
    p20_s, p50_s, p80_s = torch.tensor(ours).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    budget = case.budget(case.large, make.dtype.itemsize)
    by_flops_s = case.flops(case.large) / roofline.gemm_flops[dtype]
    return {
        "p20_s": p20_s,
        "p50_s": p50_s,
        "p80_s": p80_s,
        "bandwidth": budget / p50_s,
        "roofline": max(budget / roofline.copy_bytes, by_flops_s) / p50_s,
        "ratio": statistics.median(ratios),
    }


def _seconds(run: Callable[[], Any]) -> list[float]:
    times: Any = triton.testing.do_bench(run, warmup=10, rep=TURN_MS, return_mode="all")
    return [ms / 1e3 for ms in times]


def _line(row: Row) -> str:
    kind = ("op", "direction", "variant", "dtype", "backend")
    name = " ".join(filter(None, (row[key] for key in kind)))
    if not row["right"]:
        return f"{name}: WRONG, {row['why']}"
    return f"{name}: right, {row['p50_s'] * 1e6:.0f} us, {row['roofline']:.0%} of the roofline"
