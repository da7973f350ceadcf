"""Rungs 3 and 5: a case is run once, on small sizes, interpreted; what it gives and what it moved.

    TRITON_INTERPRET=1 python -m trimpot.kernels.proof.check [OP ...]      # rows as JSON

Right means: error against float64 ≤ 2 × the error of plain torch in the same dtype, plus half an
ulp of the largest value, which rounding the exact result alone may cost. Errors are the largest of
all elements, for each tensor that the op gives back or writes.
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
    """The 2 × rule on one tensor."""
    error, plain_error = _error(ours, exact), _error(plain, exact)
    half_ulp = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    allowed = 2 * plain_error + half_ulp
    same = ours.dtype == plain.dtype and ours.shape == plain.shape
    return {
        "error": error,
        "torch_error": plain_error,
        "allowed": allowed,
        "same": same,
        "right": bool(same and error <= allowed),  # a NaN is not ≤
    }


def _error(values: torch.Tensor, exact: torch.Tensor) -> float:
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
