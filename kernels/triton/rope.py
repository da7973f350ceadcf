"""Rotary embedding of q and k in one launch, with an RMS norm per head before it where models have
one, in Triton; definition in ops/rope.py.

The first Dr of D dimensions are rotated, as halves x₁, x₂ of Dr/2; the rest passes:

    y₁ = x₁·cos − x₂·sin,  y₂ = x₂·cos + x₁·sin

With a weight (q/k norm) x is n = x·rstd·(offset + w) first, rstd = (mean_D x² + eps)^−½. Backward
rotates dy by −angle to dn; with x̂ = x·rstd and g = dn·(offset + w):

    dx = rstd·(g − x̂·mean_D(g·x̂)),  dw = Σ_{B,T,H} dn·x̂

A program takes all heads of a token, of q or of k; each element is read once and written once.
Arithmetic is float32. dw: one partial sum a program, added up in a second pass in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check, launch, processors
from trimpot.kernels.triton.layout import sum_rows

TILE = 1024
"""Elements of one part (x₁, x₂ or the rest) that a program holds at once."""
TOKENS_PER_PARTIAL = 32


@triton.jit
def _load(
    X,
    rows,
    mask,
    ROTATED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """x₁, x₂ [rows, HALF] and the unrotated rest [rows, REST] of the rows that start at `rows`, in
    float32. Without a rest (REST = 0) x₁ stands in its place."""
    half = tl.arange(0, HALF)
    in_half = mask[:, None] & (half < ROTATED // 2)[None, :]
    at = X + rows[:, None] + half[None, :]
    x1 = tl.load(at, mask=in_half, other=0.0).to(tl.float32)
    x2 = tl.load(at + ROTATED // 2, mask=in_half, other=0.0).to(tl.float32)
    x3 = x1
    if REST > 0:
        rest = tl.arange(0, REST) + ROTATED
        in_rest = mask[:, None] & (rest < WIDTH)[None, :]
        at = X + rows[:, None] + rest[None, :]
        x3 = tl.load(at, mask=in_rest, other=0.0).to(tl.float32)
    return x1, x2, x3


@triton.jit
def _store(
    Y, rows, mask, y1, y2, y3,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    half = tl.arange(0, HALF)
    in_half = mask[:, None] & (half < ROTATED // 2)[None, :]
    at = Y + rows[:, None] + half[None, :]
    tl.store(at, y1.to(Y.dtype.element_ty), mask=in_half)
    tl.store(at + ROTATED // 2, y2.to(Y.dtype.element_ty), mask=in_half)
    if REST > 0:
        rest = tl.arange(0, REST) + ROTATED
        in_rest = mask[:, None] & (rest < WIDTH)[None, :]
        tl.store(Y + rows[:, None] + rest[None, :], y3.to(Y.dtype.element_ty), mask=in_rest)


@triton.jit
def _weight(
    W, offset, ROTATED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr
):
    """offset + weight, as x₁, x₂ and the rest, each [1, …]"""
    half = tl.arange(0, HALF)
    inside = half < ROTATED // 2
    w1 = tl.load(W + half, mask=inside, other=0.0).to(tl.float32) + offset
    w2 = tl.load(W + ROTATED // 2 + half, mask=inside, other=0.0).to(tl.float32) + offset
    w3 = w1
    if REST > 0:
        rest = tl.arange(0, REST) + ROTATED
        w3 = tl.load(W + rest, mask=rest < WIDTH, other=0.0).to(tl.float32) + offset
    return w1[None, :], w2[None, :], w3[None, :]


@triton.jit
def _dot(a1, a2, a3, b1, b2, b3, REST: tl.constexpr):
    """Σ over the dimensions of a row → [rows]"""
    total = tl.sum(a1 * b1 + a2 * b2, 1)
    if REST > 0:
        total += tl.sum(a3 * b3, 1)
    return total


@triton.jit
def _table(
    COS,
    SIN,
    sequence,
    time,
    sequence_stride,
    time_stride,
    HALF: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """cos and sin of one token, [1, HALF] float32"""
    half = tl.arange(0, HALF)
    at = sequence * sequence_stride + time * time_stride + half
    cos = tl.load(COS + at, mask=half < ROTATED // 2, other=0.0).to(tl.float32)
    sin = tl.load(SIN + at, mask=half < ROTATED // 2, other=0.0).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def _forward_heads(
    X, Y, W, RSTD, start, head_stride, heads, token, cos, sin, eps, offset,
    NORM: tl.constexpr, HEADS: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token, `start` elements into X."""
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = head < heads
        x1, x2, x3 = _load(X, start + head * head_stride, mask, ROTATED, WIDTH, HALF, REST)
        if NORM:
            mean = _dot(x1, x2, x3, x1, x2, x3, REST) / WIDTH
            rstd = 1.0 / tl.sqrt_rn(mean + eps)
            tl.store(RSTD + token * heads + head, rstd, mask=mask)
            w1, w2, w3 = _weight(W, offset, ROTATED, WIDTH, HALF, REST)
            x1 = x1 * rstd[:, None] * w1
            x2 = x2 * rstd[:, None] * w2
            x3 = x3 * rstd[:, None] * w3
        out = (token * heads + head) * WIDTH
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
        _store(Y, out, mask, y1, y2, x3, ROTATED, WIDTH, HALF, REST)


@triton.jit
def rope_forward(
    Q, K, COS, SIN, Q_OUT, K_OUT, Q_WEIGHT, K_WEIGHT, Q_RSTD, K_RSTD,
    q_sequence, q_time, q_head, k_sequence, k_time, k_head, table_sequence, table_time,
    times, q_heads, k_heads, eps, offset,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program: one token; its q if the second number is 0, else its k (not both in turn: the one's
    registers are free for the other). q_sequence, q_time, q_head: strides; likewise k's."""
    token = tl.program_id(0).to(tl.int64)
    sequence, time = token // times, token % times
    cos, sin = _table(COS, SIN, sequence, time, table_sequence, table_time, HALF, ROTATED)
    if tl.program_id(1) == 0:
        _forward_heads(
            Q, Q_OUT, Q_WEIGHT, Q_RSTD, sequence * q_sequence + time * q_time, q_head, q_heads,
            token, cos, sin, eps, offset, Q_NORM, Q_BLOCK, ROTATED, WIDTH, HALF, REST,
        )  # fmt: skip
    else:
        _forward_heads(
            K, K_OUT, K_WEIGHT, K_RSTD, sequence * k_sequence + time * k_time, k_head, k_heads,
            token, cos, sin, eps, offset, K_NORM, K_BLOCK, ROTATED, WIDTH, HALF, REST,
        )  # fmt: skip


@triton.jit
def _backward_tokens(
    DY, X, DX, W, RSTD, PARTIALS, COS, SIN, dy_sequence, dy_time, dy_head, x_sequence, x_time,
    x_head, table_sequence, table_time, tokens, times, heads, tokens_per_program, offset,
    NORM: tl.constexpr, NEED_DW: tl.constexpr, HEADS: tl.constexpr, ROTATED: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program's tokens, of q or of k, and its partial sum of dw."""
    program = tl.program_id(0).to(tl.int64)
    dw1 = tl.zeros((HALF,), tl.float32)
    dw2 = tl.zeros((HALF,), tl.float32)
    dw3 = tl.zeros((REST if REST > 0 else HALF,), tl.float32)
    start = program * tokens_per_program
    for token in range(start, tl.minimum(start + tokens_per_program, tokens)):
        sequence, time = token // times, token % times
        cos, sin = _table(COS, SIN, sequence, time, table_sequence, table_time, HALF, ROTATED)
        for first in range(0, heads, HEADS):
            head = first + tl.arange(0, HEADS)
            mask = head < heads
            at = sequence * dy_sequence + time * dy_time + head * dy_head
            dy1, dy2, d3 = _load(DY, at, mask, ROTATED, WIDTH, HALF, REST)
            d1 = dy1 * cos + dy2 * sin
            d2 = dy2 * cos - dy1 * sin
            if NORM:
                at = sequence * x_sequence + time * x_time + head * x_head
                x1, x2, x3 = _load(X, at, mask, ROTATED, WIDTH, HALF, REST)
                rstd = tl.load(RSTD + token * heads + head, mask=mask, other=0.0)[:, None]
                x1, x2, x3 = x1 * rstd, x2 * rstd, x3 * rstd
                if NEED_DW:
                    dw1 += tl.sum(d1 * x1, 0)
                    dw2 += tl.sum(d2 * x2, 0)
                    if REST > 0:
                        dw3 += tl.sum(d3 * x3, 0)
                w1, w2, w3 = _weight(W, offset, ROTATED, WIDTH, HALF, REST)
                d1, d2, d3 = d1 * w1, d2 * w2, d3 * w3
                mean = (_dot(d1, d2, d3, x1, x2, x3, REST) / WIDTH)[:, None]
                d1 = rstd * (d1 - x1 * mean)
                d2 = rstd * (d2 - x2 * mean)
                d3 = rstd * (d3 - x3 * mean)
            out = (token * heads + head) * WIDTH
            _store(DX, out, mask, d1, d2, d3, ROTATED, WIDTH, HALF, REST)
    if NORM and NEED_DW:
        row = program + tl.zeros((1,), tl.int64)
        _store(
            PARTIALS, row * WIDTH, row >= 0, dw1[None, :], dw2[None, :], dw3[None, :],
            ROTATED, WIDTH, HALF, REST,
        )  # fmt: skip


@triton.jit
def rope_backward(
    DQ, DK, Q, K, COS, SIN, DQ_OUT, DK_OUT, Q_WEIGHT, K_WEIGHT, Q_RSTD, K_RSTD,
    Q_PARTIALS, K_PARTIALS,
    dq_sequence, dq_time, dq_head, dk_sequence, dk_time, dk_head,
    q_sequence, q_time, q_head, k_sequence, k_time, k_head, table_sequence, table_time,
    tokens, times, q_heads, k_heads, tokens_per_program, offset,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, NEED_DW: tl.constexpr, Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Program: `tokens_per_program` tokens; their q if the second number is 0, else their k."""
    if tl.program_id(1) == 0:
        _backward_tokens(
            DQ, Q, DQ_OUT, Q_WEIGHT, Q_RSTD, Q_PARTIALS, COS, SIN,
            dq_sequence, dq_time, dq_head, q_sequence, q_time, q_head, table_sequence, table_time,
            tokens, times, q_heads, tokens_per_program, offset,
            Q_NORM, NEED_DW, Q_BLOCK, ROTATED, WIDTH, HALF, REST,
        )  # fmt: skip
    else:
        _backward_tokens(
            DK, K, DK_OUT, K_WEIGHT, K_RSTD, K_PARTIALS, COS, SIN,
            dk_sequence, dk_time, dk_head, k_sequence, k_time, k_head, table_sequence, table_time,
            tokens, times, k_heads, tokens_per_program, offset,
            K_NORM, NEED_DW, K_BLOCK, ROTATED, WIDTH, HALF, REST,
        )  # fmt: skip


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check("rope", q, k, cos, sin, q_weight, k_weight)
    q, k, (cos, sin) = _unit_stride(q), _unit_stride(k), _alike(cos, sin)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_rstd, k_rstd = _rstd(q, q_weight), _rstd(k, k_weight)
    launch(
        rope_forward,
        (q.shape[0] * q.shape[1], 2),
        q, k, cos, sin, q_out, k_out, *_given(q, q_weight, k_weight), q_rstd, k_rstd,
        *q.stride()[:3], *k.stride()[:3], *_table_strides(cos),
        q.shape[1], q.shape[2], k.shape[2], eps, offset,
        **_norms(q_weight, k_weight), **_blocks(q, k, cos, _tile(q_weight, k_weight)),
    )  # fmt: skip
    return q_out, k_out, q_rstd, k_rstd


def backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    offset: float,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check("rope", dq, dk, q, k, cos, sin, q_weight, k_weight)
    dq, dk, (cos, sin) = _unit_stride(dq), _unit_stride(dk), _alike(cos, sin)
    q = dq if q is None else _unit_stride(q)  # not read without its norm
    k = dk if k is None else _unit_stride(k)
    tokens = dq.shape[0] * dq.shape[1]
    sums = need_dw and not (q_weight is None and k_weight is None)
    per_program = (
        max(triton.cdiv(tokens, 4 * processors(dq.device)), TOKENS_PER_PARTIAL) if sums else 1
    )
    programs = triton.cdiv(tokens, per_program)
    dq_in, dk_in = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dq, dk))
    q_partials, k_partials = (
        torch.empty(
            (programs if sums and w is not None else 0, dq.shape[3]),
            dtype=torch.float32, device=dq.device,
        )
        for w in (q_weight, k_weight)
    )  # fmt: skip
    launch(
        rope_backward,
        (programs, 2),
        dq, dk, q, k, cos, sin, dq_in, dk_in, *_given(dq, q_weight, k_weight), q_rstd, k_rstd,
        q_partials, k_partials,
        *dq.stride()[:3], *dk.stride()[:3], *q.stride()[:3], *k.stride()[:3], *_table_strides(cos),
        tokens, dq.shape[1], dq.shape[2], dk.shape[2], per_program, offset,
        NEED_DW=sums, **_norms(q_weight, k_weight),
        **_blocks(dq, dk, cos, _tile(q_weight, k_weight)),
    )  # fmt: skip
    dw = [
        dq.new_empty(0) if w is None or not need_dw else sum_rows(partials, w.dtype)
        for w, partials in ((q_weight, q_partials), (k_weight, k_partials))
    ]
    return dq_in, dk_in, dw[0], dw[1]


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables with the same strides, the last of them 1."""
    if cos.stride() == sin.stride() and cos.stride(-1) == 1:
        return cos, sin
    return cos.contiguous(), sin.contiguous()


def _table_strides(cos: torch.Tensor) -> tuple[int, int]:
    """Of a sequence (0 where all share one table) and of a token."""
    return (cos.stride(0) if cos.shape[0] > 1 else 0), cos.stride(1)


def _rstd(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    shape = (0,) if weight is None else x.shape[:-1]
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _given(stand_in: torch.Tensor, *weights: torch.Tensor | None) -> list[torch.Tensor]:
    """The weights; a pointer that is never read in the place of one that is not there."""
    return [stand_in if w is None else w.contiguous() for w in weights]


def _norms(q_weight: torch.Tensor | None, k_weight: torch.Tensor | None) -> dict[str, bool]:
    return {"Q_NORM": q_weight is not None, "K_NORM": k_weight is not None}


def _tile(q_weight: torch.Tensor | None, k_weight: torch.Tensor | None) -> int:
    """Half of it with a norm, which holds two tensors: 200 registers a thread otherwise."""
    return TILE if q_weight is None and k_weight is None else TILE // 2


def _blocks(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, tile: int) -> dict[str, int]:
    """Constants of the launch: what is rotated, and how many heads are held at once."""
    width, rotated = q.shape[3], 2 * cos.shape[-1]
    half = triton.next_power_of_2(rotated // 2)
    rest = triton.next_power_of_2(width - rotated) if width > rotated else 0
    most = max(tile // max(half, rest), 1)
    q_block, k_block = (min(triton.next_power_of_2(x.shape[2]), most) for x in (q, k))
    threads = min(max(min(q_block, k_block) * half // 8, 32), 128)  # 8 bf16 are a 128-bit load
    return {
        "Q_BLOCK": q_block, "K_BLOCK": k_block, "ROTATED": rotated, "WIDTH": width, "HALF": half,
        "REST": rest, "threads": threads,
    }  # fmt: skip


def proof_cases() -> list[Case]:
    large = {"B": 4, "T": 2048, "Q": 32, "K": 8, "D": 128, "R": 128}
    small = {"B": 2, "T": 32, "Q": 16, "K": 4, "D": 128, "R": 128}
    partly = {"D": 80, "R": 32}

    def heads(make: Maker, n: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        shapes = ((n["B"], n["T"], n[h], n["D"]) for h in "QK")
        q, k = (make.normal(*shape) for shape in shapes)
        return q, k

    def table(make: Maker, n: Sizes) -> dict[str, torch.Tensor]:
        angle = make.normal(1, n["T"], n["R"] // 2, scale=3.0, dtype=torch.float32)
        return {"cos": angle.cos(), "sin": angle.sin()}

    def weights(make: Maker, n: Sizes, normed: bool) -> dict[str, torch.Tensor | None]:
        return {f"{x}_weight": make.normal(n["D"]) if normed else None for x in "qk"}

    def forwards(make: Maker, n: Sizes, normed: bool) -> dict[str, object]:
        q, k = heads(make, n)
        given = {"q": q, "k": k, **table(make, n), **weights(make, n, normed)}
        return {**given, "eps": 1e-6, "offset": 0.0}

    def backwards(make: Maker, n: Sizes, normed: bool, need_dw: bool) -> dict[str, object]:
        (dq, dk), (q, k) = heads(make, n), heads(make, n)
        rstd = [(x.float().square().mean(-1) + 1e-6).rsqrt() for x in (q, k)]
        if not normed:
            q, k, rstd = None, None, [make.empty(0, dtype=torch.float32)] * 2
        given = {"dq": dq, "dk": dk, "q": q, "k": k, **table(make, n), **weights(make, n, normed)}
        return {
            **given, "q_rstd": rstd[0], "k_rstd": rstd[1], "offset": 0.0, "need_dw": need_dw,
        }  # fmt: skip

    def moved(n: Sizes, size: int, tensors: int, normed: bool = False) -> float:
        """`tensors` times q and k, the tables, and rstd."""
        rows = n["B"] * n["T"] * (n["Q"] + n["K"])
        return tensors * rows * n["D"] * size + 4 * n["T"] * n["R"] + 4 * rows * normed

    def case(direction, arguments, tensors, normed=False, sizes=None, variant=""):
        return Case(
            "rope", direction, arguments, large | (sizes or {}), small | (sizes or {}),
            budget=lambda n, size: moved(n, size, tensors, normed), variant=variant,
            wide_loads=not sizes,  # heads of 80 are cut into pieces of 16 and 48
        )  # fmt: skip

    return [
        case("forward", lambda make, n: forwards(make, n, False), 2),
        case("forward", lambda make, n: forwards(make, n, True), 2, True, variant="normed"),
        case("forward", lambda make, n: forwards(make, n, False), 2, False, partly, "partial"),
        case("backward", lambda make, n: backwards(make, n, False, False), 2),
        case("backward", lambda make, n: backwards(make, n, True, True), 3, True, variant="normed"),
        case(
            "backward", lambda make, n: backwards(make, n, True, False), 3, True, partly,
            "normed, frozen, partial",
        ),
    ]  # fmt: skip
