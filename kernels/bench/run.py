"""`trimpot bench kernels`: check, then time, each op at each shape against each peer → rows.

What is wrong is not timed: its row says what is wrong and has no ratio. What is not there (an op,
a backend, a peer) is a row, or a note, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimpot.kernels.bench.attention import attention_case
from trimpot.kernels.bench.case import DTYPES, Case, Variant, dtype_name
from trimpot.kernels.bench.check import LOW
from trimpot.kernels.bench.environment import environment
from trimpot.kernels.bench.linears import cross_entropy_case, logprobs_case, lora_case
from trimpot.kernels.bench.measure import Runner, interleave, peak_memory, runner_of
from trimpot.kernels.bench.peers import Foreign, check_names, missing, torch_variant, variants
from trimpot.kernels.bench.roofline import Roofline, measure_roofline
from trimpot.kernels.bench.shapes import Call, calls, find_shape
from trimpot.kernels.bench.stats import paired_ratio, spread, verdict
from trimpot.kernels.bench.streams import adamw_case, glu_case, norm_case, rope_case
from trimpot.kernels.bench.truth import Ours, Row, Truth, prepare, refused, untimed
from trimpot.kernels.bench.work import BACKWARD, BOTH, FORWARD, STEP
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.heap import keep_freed_memory

MAKE: dict[str, Callable[[Call, int, str, torch.dtype], Case]] = {
    "lora_linear": lora_case,
    "linear_cross_entropy": cross_entropy_case,
    "token_logprobs": logprobs_case,
    "add_rms_norm": norm_case,
    "rope": rope_case,
    "varlen_attention": attention_case,
    "swiglu": glu_case,
    "geglu": glu_case,
    "adamw_step": adamw_case,
}
MODES = (FORWARD, BACKWARD, BOTH)
LEAST_MEMORY = 4 << 20


@dataclass(frozen=True)
class Options:
    ops: Sequence[str]
    shapes: Sequence[str]
    modes: Sequence[str] = (FORWARD, BACKWARD)
    dtypes: Sequence[str] = ("fp32",)
    peers: Sequence[str] = ("torch",)
    backends: Sequence[str] = ("auto",)
    device: str = "cpu"
    threads: int = 1
    repeats: int = 5
    tokens: int | None = None
    """Instead of the shape's own."""
    foreign: Foreign = field(default_factory=dict)


def bench(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """→ {"environment", "roofline", "notes", "rows"}. Raises KernelError for unknown names."""
    planned = [
        (call, DTYPES[dtype])
        for shape in options.shapes
        for op in options.ops
        for call in calls(op, find_shape(shape))
        for dtype in _known(options.dtypes, tuple(DTYPES), "dtype")
    ]
    _known(options.modes, MODES, "mode")
    check_names(options.peers)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("device cuda was asked for, and torch sees no GPU; use --device cpu")
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()  # for all sides: the kernel's page faults are no part of an op
    left_out = missing(options.peers, options.foreign)
    for why in left_out.values():
        say(why)
    roofline = measure_roofline(options.device, [DTYPES[name] for name in options.dtypes])
    rows: list[Row] = []
    for number, (call, dtype) in enumerate(planned, 1):
        say(f"{number}/{len(planned)}: {call.op} {call.shape.name} {call.case} {dtype_name(dtype)}")
        peers = [name for name in options.peers if name not in left_out]
        rows += bench_call(call, dtype, options, peers, roofline)
    return {
        "environment": environment(options.device),
        "roofline": roofline.told(),
        "notes": list(left_out.values()),
        "rows": rows,
    }


def _known(names: Sequence[str], known: Sequence[str], what: str) -> Sequence[str]:
    if unknown := [name for name in names if name not in known]:
        raise KernelError(f"there is no {what} {unknown[0]!r} to bench; {', '.join(known)}")
    return names


def bench_call(
    call: Call, dtype: torch.dtype, options: Options, peers: Sequence[str], roofline: Roofline
) -> list[Row]:
    """All rows of one call in one dtype."""
    tokens = options.tokens or call.shape.tokens
    case = MAKE[call.op](call, tokens, options.device, dtype)
    base: Row = {
        "op": call.op,
        "shape": call.shape.name,
        "case": call.case,
        "dtype": dtype_name(dtype),
        "device": options.device,
        "threads": options.threads,
        "tokens": tokens,
    }
    truth = Truth(case)
    ready: list[Ours] = []
    rows: list[Row] = []
    for wanted in options.backends:
        found = prepare(case, wanted, truth)
        if isinstance(found, Ours) and found.judgement.right:
            ready.append(found)
            continue
        modes = _asked(case, options.modes)
        rows.append(base | refused(",".join(modes), wanted, ",".join(peers), found))
    others = variants(case, peers, options.foreign)
    if _any_low(ready) and "torch" in peers and dtype is torch.float32 and case.leaves:
        others.append(torch_variant(case, torch.bfloat16))
    if not ready:
        return rows
    errors = {peer.name: truth.error_of_peer(peer) for peer in others}
    for peer in list(others):
        # Liger's kernels run in an interpreter on a CPU: an oracle, nothing to be timed.
        if isinstance(errors[peer.name], str) or (peer.name, options.device) == ("liger", "cpu"):
            others.remove(peer)
            rows += [base | untimed(each, peer.name, errors[peer.name]) for each in ready]
    timed = _timed(case, ready, others, errors, truth, options, roofline)
    return rows + [base | row for row in timed]


def _any_low(ready: Sequence[Ours]) -> bool:
    return any(each.backend.endswith(tuple(LOW)) for each in ready)


def _asked(case: Case, modes: Sequence[str]) -> list[str]:
    """The modes of this case that rows are made of; forward and backward also give their sum."""
    if STEP in case.work:
        return [STEP]
    wanted = set(modes)
    if {FORWARD, BACKWARD} <= wanted or (BACKWARD in wanted and BACKWARD not in case.work):
        wanted.add(BOTH)
    return [mode for mode in case.modes if mode in wanted]


def _groups(case: Case, modes: Sequence[str]) -> list[tuple[bool, list[str]]]:
    """(with backward?, modes) of each series of timings that the modes need."""
    asked = _asked(case, modes)
    if BACKWARD in case.work:
        return [(asked != [FORWARD], asked)] if asked else []
    whole = [mode for mode in asked if mode == BOTH]
    alone = [mode for mode in asked if mode != BOTH]
    return [(False, alone)] * bool(alone) + [(True, whole)] * bool(whole)


def _timed(
    case: Case,
    ready: Sequence[Ours],
    others: Sequence[Variant],
    errors: Mapping[str, float | str],
    truth: Truth,
    options: Options,
    roofline: Roofline,
) -> list[Row]:
    rows: list[Row] = []
    for backward, modes in _groups(case, options.modes):
        every = [*(each.variant for each in ready), *others]
        runners = [runner_of(v, case, truth.upstream, options.device, backward) for v in every]
        interleave(runners, options.repeats)
        memory = [peak_memory(runner.both, options.device) for runner in runners]
        for mode in modes:
            whole = mode in (BOTH, STEP)
            for i, mine in enumerate(ready):
                for j, peer in enumerate(others, len(ready)):
                    row = _row(case, mode, mine, runners[i], peer, runners[j], roofline)
                    row["peer_error"] = errors[peer.name]
                    row["memory_ratio"] = _ratio(memory[i], memory[j]) if whole else None
                    row["memory_bytes"] = memory[i] if whole else None
                    row["peer_memory_bytes"] = memory[j] if whole else None
                    rows.append(row)
    return rows


def _ratio(mine: int | None, its: int | None) -> float | None:
    """None where the peer's peak is so small that pages and allocators decide."""
    return round(mine / its, 4) if mine is not None and its and its >= LEAST_MEMORY else None


def _times(runner: Runner, mode: str) -> list[float]:
    match mode:
        case "bwd":
            return runner.backward_s
        case "fwd+bwd":
            return [a + b for a, b in zip(runner.forward_s, runner.backward_s, strict=True)]
        case _:
            return runner.forward_s


def _row(
    case: Case,
    mode: str,
    mine: Ours,
    runner: Runner,
    peer: Variant,
    other: Runner,
    roofline: Roofline,
) -> Row:
    ours_s, peer_s = _times(runner, mode), _times(other, mode)
    ratio = paired_ratio(ours_s, peer_s)
    work, seconds = case.work[mode], spread(ours_s).p50
    rate = work.flops / seconds
    return {
        "mode": mode,
        "wanted": mine.wanted,
        "backend": mine.backend,
        "peer": peer.name,
        **ratio.rounded(),
        "verdict": verdict(ratio),
        "why": "",
        "tflops": round(rate / 1e12, 5),
        "least_bytes": int(work.bytes),
        "bandwidth_gbs": round(work.bytes / seconds / 1e9, 3),
        "flops": int(work.flops),
        "roofline_percent": round(100 * rate / roofline.attainable(work, case.dtype), 1),
        "error": mine.judgement.error,
        "within_tolerance": True,
        "seconds": seconds,
        "peer_seconds": spread(peer_s).p50,
    }
