"""What rungs 3 to 6 forbid, and the exceptions from that: each limit stands here and nowhere else.

`of_counted`, `of_compiled` and `of_window` judge one row of their rung; each gives what is wrong
with it, by kind: {"spills": "rope_forward spills 12"}. Nothing wrong is {}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
Complaints = dict[str, str]

MOST_TRAFFIC = 1.05
"""Bytes moved over the budget."""
MOST_READ_AGAIN = 1.3
"""Of a streaming kernel: bytes asked for by all programs over those that must cross the bus. The
0.3 is the norm's weight, which each program asks for again: 1.25 for two rows a program."""
LEAST_WIDE = 0.75
"""Of a streaming kernel's loaded bits: those that come 128 or more at a time."""
STREAMING_REGISTERS = 128
"""Of a streaming kernel, per thread: 512 threads of 128 fill a processor's 65,536."""
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
"""What a thread can have."""
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""What a program can have."""
TARGETS = tuple(REGISTERS)

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("linear_cross_entropy forward", "again"): (
        "1.50: the loss of a row is known after one pass over its logits and their gradient takes "
        "a second; 128,256 of them in bf16 are 250 KiB, as much as all registers of a processor, "
        "and come from the cache the second time"
    ),
    ("varlen_attention forward d256 softcap fp32", "spills"): (
        "142 on sm_90 and sm_100, 10 on sm_80 (bytes of stack and their instructions): operands of "
        "256 columns in the two parts of tf32x3, beside as wide a sum, at the smallest tile there "
        "is (16 queries, 16 keys); 16-bit types and heads of 128 have none"
    ),
    ("varlen_attention backward d256 softcap fp32", "spills"): (
        "1,518 on sm_90, 1,445 on sm_100, 959 on sm_80, of both kernels, at tiles of 16: as forward"
    ),
}
"""(how the rows' names begin, kind) → why that is allowed, with the measured number."""


def key(row: Row) -> tuple[str, ...]:
    """By which rows of different rungs are matched."""
    return tuple(row[part] for part in ("op", "direction", "variant", "dtype"))


def named(row: Row) -> str:
    """A row in words: its op, direction, variant, dtype and target, as far as it has them."""
    return " ".join(filter(None, (*key(row), row.get("target", ""))))


def excuse(row: Row, kind: str) -> tuple[str, str] | None:
    """The key of the exception that allows this."""
    name = f"{named(row)} "
    return next((e for e in EXCEPTIONS if e[1] == kind and name.startswith(f"{e[0]} ")), None)


def unexcused(row: Row, complaints: Complaints) -> Complaints:
    return {kind: text for kind, text in complaints.items() if excuse(row, kind) is None}


def off_by(result: Row) -> str:
    """Why one of check.py's results is not right."""
    if not result["same"]:
        return "has not the dtype and shape of torch's"
    return f"is off by {result['error']:.2e}, {result['allowed']:.2e} is allowed"


def of_counted(row: Row) -> Complaints:
    """Rungs 3 and 5."""
    if "failed" in row:
        return {"wrong": row["failed"]}
    found: Complaints = {}
    if off := [(i, r) for i, r in enumerate(row["results"]) if not r["right"]]:
        at, result = off[0]
        found["wrong"] = f"result {at} {off_by(result)}"
    if row["faults"]:
        found["fault"] = f"{row['faults'][0]} ({len(row['faults'])} in all)"
    if row["traffic_ratio"] > MOST_TRAFFIC:
        found["traffic"] = f"moves {row['traffic_ratio']:.3f} of the budget, not {MOST_TRAFFIC}"
    for name, kernel in row["kernels"].items():
        again = kernel["total_bytes"] / max(kernel["bytes"], 1)
        if row["wide_loads"] and again > MOST_READ_AGAIN:
            found["again"] = f"{name} asks {again:.2f} times for what it needs once"
    return found


def of_compiled(row: Row) -> Complaints:
    """Rung 4."""
    if "failed" in row:
        return {"compile": row["failed"]}
    found: Complaints = {}
    target = row["target"]
    registers = REGISTERS[target]
    if row["wide_loads"]:
        registers = min(registers, STREAMING_REGISTERS)
    for code in (launch["code"] for launch in row["launches"]):
        name = code["name"]
        if code["spills"]:
            found["spills"] = f"{name} spills {code['spills']}"
        if code["registers"] > registers:
            found["registers"] = f"{name} has {code['registers']} registers, not {registers}"
        if code["shared_bytes"] > SHARED_BYTES[target]:
            found["shared"] = (
                f"{name} has {code['shared_bytes']} B of shared memory, not {SHARED_BYTES[target]}"
            )
        if row["wide_loads"] and code["wide_share"] < LEAST_WIDE:
            found["wide"] = f"{name} loads {code['wide_share']:.0%} of its bits 128 at a time"
    if row["has_dot"] and not any(launch["code"]["tensor_core"] for launch in row["launches"]):
        found["mma"] = "no kernel has tensor-core instructions"
    return found


def of_window(low: float, high: float) -> Complaints:
    """Rung 6."""
    return {} if 0 < low <= high <= 1 else {"window": f"the model says {low} to {high}"}
