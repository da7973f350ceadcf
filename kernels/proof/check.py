"""Rungs 3 and 5: a case is run once, on small sizes, interpreted; what it gives and what it moved.

    TRITON_INTERPRET=1 python -m trimpot.kernels.proof.check [OP ...]      # rows as JSON

Right means, of each tensor that the op gives back or writes: its error against float64 is, in norm,
at most twice that of plain torch in the same dtype plus half an ulp, which rounding the exact
result alone may cost; no element's is above four times torch's largest and half an ulp of the
largest value. The largest error of some thousand elements is luck: 2.2 times torch's with one CPU's
BLAS was under twice with those of others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from trimpot.kernels.proof.cases import Case, Sizes, attempted, call, cases, in_float64, maker


def comparisons(
    case: Case, dtype: str, sizes: Sizes, device: str = "cpu", run: Any = None
) -> list[dict[str, Any]]:
    """One entry for each result: its error, torch's, what is allowed, whether it has torch's dtype
    and shape (same), and whether it is right.

    `run(arguments)` gives the results to judge: those of the Triton backend, if it is not given.
    """
    make = maker(dtype, device)
    arguments = case.arguments(make, sizes)
    exact = call(case, "torch", in_float64(arguments))
    plain = call(case, "torch", copied(arguments))
    ours = run(copied(arguments)) if run else call(case, "triton", copied(arguments))
    assert len(ours) == len(exact) == len(plain), f"{case.op}: not as many results as torch gives"
    return [judged(*three) for three in zip(ours, plain, exact, strict=True)]


def judged(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    """The 2 × rule on one tensor; error, torch_error and allowed are those of the stricter part."""
    half_ulp = torch.finfo(ours.dtype).eps / 2
    norm = exact.norm().item() or 1.0
    parts = [(_distance(t, exact) / norm, _largest(t, exact)) for t in (ours, plain)]
    limits = (2 * parts[1][0] + half_ulp, 4 * parts[1][1] + half_ulp * exact.abs().max().item())
    at = max((0, 1), key=lambda i: parts[0][i] / max(limits[i], sys.float_info.min))
    same = ours.dtype == plain.dtype and ours.shape == plain.shape
    return {
        "error": parts[0][at],
        "torch_error": parts[1][at],
        "allowed": limits[at],
        "same": same,
        "right": bool(same and all(e <= a for e, a in zip(parts[0], limits, strict=True))),
    }  # a NaN is not ≤


def _distance(values: torch.Tensor, exact: torch.Tensor) -> float:
    return (values.double() - exact).norm().item()


def _largest(values: torch.Tensor, exact: torch.Tensor) -> float:
    return (values.double() - exact).abs().max().item()


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that an op may write into."""

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone()
        return type(value)(map(copy, value)) if isinstance(value, (list, tuple)) else value

    return {name: copy(value) for name, value in arguments.items()}


def interpreted_row(case: Case, dtype: str) -> dict[str, Any]:
    """What a row says of the case under the interpreter: errors, bytes by kernel, ratio to the
    budget, faults."""
    from trimpot.kernels.proof.traffic import Counted, counting

    counts: list[Counted] = []

    def run(arguments: dict[str, Any]) -> list[torch.Tensor]:
        with counting() as launches:
            results = call(case, "triton", arguments)
        counts.extend(launches)
        return results

    results = comparisons(case, dtype, case.small, run=run)
    kernels: dict[str, dict[str, int]] = {}
    for launch in counts:
        kernel = kernels.setdefault(launch.kernel, {"bytes": 0, "total_bytes": 0, "flops": 0})
        kernel["bytes"] += launch.unique_bytes
        kernel["total_bytes"] += launch.total_bytes
        kernel["flops"] += launch.flops
    size = maker(dtype).dtype.itemsize
    moved = sum(kernel["bytes"] for kernel in kernels.values())
    return {
        "wide_loads": case.wide_loads,
        "results": results,
        "right": all(result["right"] for result in results),
        "traffic_ratio": moved / case.budget(case.small, size),
        "kernels": kernels,
        "faults": [fault for launch in counts for fault in launch.faults],
    }


def main(wanted: list[str]) -> None:
    """Writes the rows of the `wanted` ops, or of all."""
    rows = [
        attempted(case, dtype, interpreted_row)
        for case in cases(tuple(wanted) or None)
        for dtype in case.dtypes
    ]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
