"""The proof ladder of the Triton kernels, rungs 3 to 7, for `trimpot bench kernels` and the tests.

`dry_rows` needs no GPU: it interprets every case (right by the 2 × rule? what does it move?),
compiles it for GPUs that are not here, and models what both imply. Triton either interprets or
compiles, for the life of a process, and remembers one target at a time: each of these runs in a
process of its own. `prove` is for a real GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.proof import cases, limits
from trimpot.kernels.proof.limits import TARGETS

Say = Callable[[str], None]
Row = dict[str, Any]

EVERY = tuple(cases.DTYPES)
NUMBERS = (
    "registers", "spills", "shared_bytes", "mma", "traffic_ratio", "bound_low", "bound_high",
)  # fmt: skip
"""What a dry row says beside its name."""


def _quiet(_: str) -> None:
    pass


def dry_rows(
    wanted: Sequence[str] = (), say: Say = _quiet, targets: Sequence[str] = TARGETS
) -> list[Row]:
    """One row for each case, dtype and target; of the `wanted` ops, or of all.

    op, direction, variant, dtype, target; registers of the hungriest kernel, spills of all,
    shared_bytes of the largest, mma (names of tensor-core instructions), traffic_ratio (bytes
    moved over the budget), bound_low and bound_high (shares of the roofline, from the model), and
    complaints (what limits.py forbids, as text). What does not compile has no registers, and what
    is wrong no ratio and no model. Raises BackendError where Triton is missing, KernelError for
    an op that has no Triton kernels.
    """
    names = known(wanted)
    counted, compiled = rows_of(names, dict.fromkeys(targets, EVERY), say)
    by_case = {limits.key(row): row for row in counted}
    return [dry_row(row, by_case[limits.key(row)]) for row in compiled]


def known(wanted: Sequence[str]) -> list[str]:
    """The ops to prove. Raises BackendError without triton, KernelError for a name without
    kernels."""
    if importlib.util.find_spec("triton") is None:
        raise BackendError("triton is not installed; pip install trimpot[gpu]")
    for name in wanted:
        if name not in cases.named():
            raise KernelError(f"{name!r} has no Triton kernels; {', '.join(cases.named())} have")
    return list(wanted or cases.named())


def rows_of(
    wanted: Sequence[str], dtypes: Mapping[str, Sequence[str]], say: Say = _quiet
) -> tuple[list[Row], list[Row]]:
    """(rows of rungs 3 and 5, rows of rung 4), the latter for each target with its `dtypes`. As
    many processes at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        counted = pool.submit(interpreted_rows, wanted, say)
        compiled = [pool.submit(compiled_rows, wanted, t, of, say) for t, of in dtypes.items()]
        return counted.result(), [row for rows in compiled for row in rows.result()]


def interpreted_rows(wanted: Sequence[str], say: Say = _quiet) -> list[Row]:
    """Rungs 3 and 5; see check.py."""
    say(f"interpreting {', '.join(wanted)}")
    return _rows("check", wanted, interpret=True)


def compiled_rows(
    wanted: Sequence[str], target: str, dtypes: Sequence[str] = EVERY, say: Say = _quiet
) -> list[Row]:
    """Rung 4; see compile.py."""
    say(f"compiling for {target}")
    return _rows("compile", [target, ",".join(dtypes), *wanted], interpret=False)


def _rows(tool: str, arguments: Sequence[str], interpret: bool) -> list[Row]:
    """What `python -m trimpot.kernels.proof.<tool>` writes. One thread: the arrays are small."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", f"trimpot.kernels.proof.{tool}", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise KernelError(
            f"proving failed: {last}; `{' '.join(['python', *command[1:]])}` shows all of it"
        )
    return json.loads(done.stdout)


def dry_row(compiled: Row, counted: Row) -> Row:
    """One case on one target, of its rows of rungs 4 and 5."""
    measured = limits.unexcused(counted, limits.of_counted(counted))
    complaints = measured | limits.unexcused(compiled, limits.of_compiled(compiled))
    row: Row = {part: compiled[part] for part in ("op", "direction", "variant", "dtype", "target")}
    row |= dict.fromkeys(NUMBERS)
    if "failed" not in compiled:
        row |= _of_code([launch["code"] for launch in compiled["launches"]])
    if not {"wrong", "fault", "compile"} & complaints.keys():
        low, high = modelled(compiled, counted)
        complaints |= limits.unexcused(compiled, limits.of_window(low, high))
        row["traffic_ratio"] = round(counted["traffic_ratio"], 4)
        row["bound_low"], row["bound_high"] = round(low, 4), round(high, 4)
    name = limits.named(compiled)
    return row | {"complaints": [f"{name}: {text}" for text in complaints.values()]}


def _of_code(codes: Sequence[Row]) -> Row:
    names = sorted({name for code in codes for name in code["tensor_core"]})
    return {
        "registers": max(code["registers"] for code in codes),
        "spills": sum(code["spills"] for code in codes),
        "shared_bytes": max(code["shared_bytes"] for code in codes),
        "mma": ", ".join(names) or None,
    }


def modelled(compiled: Row, counted: Row) -> tuple[float, float]:
    """The model's window at the large sizes. Each kernel is taken to move and to compute the same
    shares of all that it had at the small ones."""
    from trimpot.kernels.proof.model import GPUS, Work, window
    from trimpot.kernels.proof.sass import Code

    kernels, launches = counted["kernels"], compiled["launches"]
    bytes_all = sum(kernel["bytes"] for kernel in kernels.values())
    flops_all = sum(kernel["flops"] for kernel in kernels.values()) or 1
    names = [launch["code"]["name"] for launch in launches]
    works = []
    for name, launch in zip(names, launches, strict=True):
        kernel, alike = kernels[name], names.count(name)
        moved = compiled["budget"] * counted["traffic_ratio"] * kernel["bytes"] / bytes_all
        flops = compiled["flops"] * kernel["flops"] / flops_all
        code = Code.from_dict(launch["code"])
        works.append(Work(code, launch["programs"], moved / alike, flops / alike))
    gpu = GPUS[compiled["target"]]
    return window(gpu, works, compiled["budget"], compiled["flops"], compiled["dtype"])


def prove(wanted: Sequence[str] = (), say: Say = _quiet) -> list[Row]:
    """Rung 7, on this machine's GPU: a row for each case and dtype of the `wanted` ops, or of all;
    see gpu.py. Raises BackendError without a GPU."""
    names = known(wanted)
    if not torch.cuda.is_available():
        raise BackendError(
            "--prove runs the kernels on a GPU, and torch sees none here; --dry proves them as far "
            "as that goes without one"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendError("TRITON_INTERPRET is set, so kernels are not compiled; unset it")
    from trimpot.kernels.proof import gpu

    return gpu.proven(names, say)
