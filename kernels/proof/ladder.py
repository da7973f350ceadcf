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


def _quiet(_: str) -> None:
    pass


def dry_rows(
    wanted: Sequence[str] = (), say: Say = _quiet, targets: Sequence[str] = TARGETS
) -> list[Row]:
    """One row for each case, dtype and target; of the `wanted` ops, or of all.

    op, direction, variant, dtype, target; registers of the hungriest kernel, spills of all,
    shared_bytes of the largest, mma (names of tensor-core instructions), traffic_ratio (bytes
    moved over the budget), bound_low and bound_high (shares of the roofline, from the model), and
    complaints (what limits.py forbids, as text).
    Raises KernelError for results that are wrong and code that does not compile, BackendError
    where Triton is missing.
    """
    names = known(wanted)
    counted, compiled = rows_of(names, dict.fromkeys(targets, EVERY), say)
    if broken := broken_rows(counted, compiled):
        more = f" (and {len(broken) - 1} more)" if broken[1:] else ""
        raise KernelError(f"{broken[0]}{more}")
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


def broken_rows(counted: Sequence[Row], compiled: Sequence[Row]) -> list[str]:
    """Of what can't be modelled: a line for each row whose results are wrong or that is no code."""
    judged = [(row, limits.of_counted(row)) for row in counted]
    judged += [(row, limits.of_compiled(row)) for row in compiled]
    return [
        f"{limits.named(row)}: {complaints[kind]}"
        for row, complaints in judged
        for kind in ("wrong", "fault", "compile")
        if kind in limits.unexcused(row, complaints)
    ]


def dry_row(compiled: Row, counted: Row) -> Row:
    """One case on one target, of its rows of rungs 4 and 5."""
    codes = [launch["code"] for launch in compiled["launches"]]
    names = sorted({name for code in codes for name in code["tensor_core"]})
    low, high = modelled(compiled, counted)
    complaints = (
        limits.unexcused(counted, limits.of_counted(counted))
        | limits.unexcused(compiled, limits.of_compiled(compiled))
        | limits.unexcused(compiled, limits.of_window(low, high))
    )
    return {
        **{part: compiled[part] for part in ("op", "direction", "variant", "dtype", "target")},
        "registers": max(code["registers"] for code in codes),
        "spills": sum(code["spills"] for code in codes),
        "shared_bytes": max(code["shared_bytes"] for code in codes),
        "mma": ", ".join(names) or None,
        "traffic_ratio": round(counted["traffic_ratio"], 4),
        "bound_low": round(low, 4),
        "bound_high": round(high, 4),
        "complaints": [f"{limits.named(compiled)}: {text}" for text in complaints.values()],
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
