"""Attention over packed documents in Triton; definition in ops/varlen_attention.py.

T tokens, N heads of q, G of k and v, D of each. Launches, and what each moves:

    attention_forward   o and lse of a tile of queries of a head      2TND + 2TGD, 4TN bytes
    attention_dq        dQ of such a tile, and Δ                      4TND + 2TGD, 8TN bytes
    attention_dkdv      dK and dV of a tile of keys of a key head     2TND + 4TGD, 8TN bytes

in elements, and float32 sums of rows. Tiles are cut from each document by itself, and meet those
keys or queries of it that some of theirs see: nothing of size T² is made, no product is of two
documents, and what a document gives has the same bits wherever it stands and whatever stands
beside it. Two launches compute P and dS twice, 7 products for 5; they need no atomics, so equal
runs give equal bits, and dK and dV are summed over a group where they are made. q, k, v and dO are
read twice for that: backward moves 6TND + 6TGD, of which 4TND + 4TGD is the least.

The host reads no value of cu_seqlens on a GPU, which would wait for all that was launched: a
program finds its document by itself (`_place`), in a grid for T/tile + documents tiles, of which
one a document at most is empty. So a wrong list is told of where it is on the CPU only; on a GPU
it gives wrong numbers, and nothing outside of the tensors.

Heads of other sizes than powers of two are padded in registers and shared memory, with zeros that
are not loaded: D = 96 costs the products of 128.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton

from trimpot.kernels.dispatch import WIDEST_HEAD
from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import varlen_attention as definition
from trimpot.kernels.ops.varlen_attention import boundaries
from trimpot.kernels.proof.cases import Case, Direction, Maker, Sizes
from trimpot.kernels.triton.attention_kernels import (
    attention_dkdv,
    attention_dq,
    attention_forward,
)
from trimpot.kernels.triton.launch import architecture, check, launch

OP = "varlen_attention"

Tile = tuple[int, int, int, int]
"""Queries, keys, stages (tiles on their way), threads."""

TILES: dict[str, dict[tuple[int, int], tuple[Tile, Tile, Tile]]] = {
    "sm_80": {
        (2, 64): ((128, 128, 3, 256), (64, 64, 2, 256), (32, 64, 2, 256)),
        (2, 128): ((128, 64, 3, 256), (64, 64, 2, 256), (64, 64, 2, 256)),
        (2, 256): ((64, 32, 2, 256), (64, 32, 2, 256), (32, 32, 2, 256)),
        (4, 64): ((32, 32, 2, 256), (32, 32, 2, 256), (32, 32, 2, 256)),
        (4, 128): ((32, 32, 2, 256), (16, 16, 2, 256), (16, 16, 1, 128)),
        (4, 256): ((16, 16, 1, 256), (16, 16, 1, 256), (16, 16, 1, 256)),
    },
    "sm_89": {
        (2, 64): ((128, 64, 2, 256), (64, 64, 2, 256), (32, 64, 2, 256)),
        (2, 128): ((128, 64, 2, 256), (64, 64, 2, 256), (64, 64, 2, 256)),
        (2, 256): ((32, 32, 2, 256), (32, 32, 1, 256), (32, 32, 1, 256)),
        (4, 64): ((32, 32, 2, 256), (32, 32, 2, 256), (32, 32, 2, 256)),
        (4, 128): ((32, 32, 2, 256), (16, 16, 2, 256), (16, 16, 1, 128)),
        (4, 256): ((16, 16, 1, 256), (16, 16, 1, 256), (16, 16, 1, 256)),
    },
    "sm_90": {
        (2, 64): ((128, 128, 3, 256), (128, 64, 3, 256), (64, 128, 3, 256)),
        (2, 128): ((128, 64, 3, 256), (128, 64, 2, 256), (32, 128, 3, 256)),
        (2, 256): ((64, 64, 2, 256), (128, 32, 2, 256), (32, 32, 2, 256)),
        (4, 64): ((64, 32, 2, 256), (32, 32, 2, 256), (32, 32, 2, 256)),
        (4, 128): ((16, 16, 2, 256), (16, 16, 2, 256), (16, 16, 1, 128)),
        (4, 256): ((16, 16, 1, 256), (16, 16, 1, 256), (16, 16, 1, 256)),
    },
    "sm_100": {
        (2, 64): ((128, 64, 2, 256), (64, 64, 2, 256), (64, 64, 2, 256)),
        (2, 128): ((128, 64, 2, 256), (128, 64, 2, 256), (32, 64, 2, 256)),
        (2, 256): ((64, 64, 2, 256), (64, 32, 2, 256), (32, 32, 2, 256)),
        (4, 64): ((64, 32, 2, 256), (32, 32, 2, 256), (32, 32, 2, 256)),
        (4, 128): ((16, 16, 2, 256), (16, 16, 2, 256), (16, 16, 1, 128)),
        (4, 256): ((16, 16, 1, 256), (16, 16, 1, 256), (16, 16, 1, 256)),
    },
    "gfx942": {
        (2, 64): ((64, 64, 2, 256), (128, 64, 2, 256), (16, 64, 2, 256)),
        (2, 128): ((64, 64, 2, 256), (64, 64, 2, 256), (16, 64, 2, 256)),
        (2, 256): ((128, 32, 2, 256), (64, 32, 2, 256), (16, 32, 2, 256)),
        (4, 64): ((64, 32, 2, 256), (64, 32, 2, 256), (32, 32, 2, 256)),
        (4, 128): ((32, 32, 2, 256), (32, 32, 2, 256), (16, 32, 2, 256)),
        (4, 256): ((32, 16, 2, 256), (16, 16, 1, 256), (16, 16, 2, 256)),
    },
}
"""By GPU, and by an element's bytes and the columns of a head (64 stands for less), for the three
kernels: of those compiled, large ones that keep all they hold in registers (except float32 of 256
columns, see proof/limits.py). sm_89 stands for all with 99 KiB of shared memory a program, and has
the others' tiles that fit there. They have not been timed."""


def family(architecture: str) -> str:
    """Whose tiles a GPU takes."""
    if architecture.startswith("gfx"):
        return "gfx942"
    number = int(architecture.removeprefix("sm_"))
    if number in (80, 87):
        return "sm_80"
    if 90 <= number < 120:
        return "sm_90" if number < 100 else "sm_100"
    return "sm_89"


def tile(kernel: Any, architecture: str, size: int, columns: int) -> Tile:
    of_kernels = TILES[family(architecture)][size, max(columns, 64)]
    return of_kernels[(attention_forward, attention_dq, attention_dkdv).index(kernel)]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (o, lse)"""
    call = _Call(q, k, v, cu_seqlens, window, softcap)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    # The largest q·k has the largest score only if scale > 0: q takes its sign.
    sign = float((scale > 0) - (scale < 0))
    call.launch(attention_forward, (call.q, call.k, call.v, o), (lse,), abs(scale) or 1.0, sign)
    return o, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ (dq, dk, dv)"""
    check(OP, do, o, lse)
    call = _Call(q, k, v, cu_seqlens, window, softcap)
    do, o, lse = _by_row(do), _by_row(o), lse.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call.launch(attention_dq, (call.q, call.k, call.v, o, do, dq), (lse, delta), scale)
    call.launch(attention_dkdv, (call.q, call.k, call.v, do, dk, dv), (lse, delta), scale)
    return dq, dk, dv


def _by_row(x_TND: torch.Tensor) -> torch.Tensor:
    """With D side by side."""
    return x_TND if x_TND.stride(2) == 1 or x_TND.shape[2] <= 1 else x_TND.contiguous()


class _Call:
    """Operands of one call, and its launches."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        window: int,
        softcap: float,
    ) -> None:
        check(OP, q, k, v)
        if q.shape[2] > WIDEST_HEAD:
            raise KernelError(
                f"varlen_attention: heads are {q.shape[2]} wide; backend triton takes up to "
                f"{WIDEST_HEAD}; use torch"
            )
        if cu_seqlens.device.type == "cpu":
            boundaries(cu_seqlens, q.shape[0])
        self.q, self.k, self.v = (_by_row(x) for x in (q, k, v))
        self.cuts = cu_seqlens.to(q.device, non_blocking=True).contiguous()
        self.window, self.softcap = window, softcap
        self.tokens, self.heads, self.width = q.shape
        self.columns = max(triton.next_power_of_2(self.width), 16)

    def launch(
        self,
        kernel: Any,
        tensors: Sequence[torch.Tensor],
        sums: Sequence[torch.Tensor],
        scale: float,
        *more: float,
    ) -> None:
        """`kernel` on what has tokens and heads, and on rows' sums."""
        by_key = kernel is attention_dkdv
        queries, keys, stages, threads = tile(
            kernel, architecture(self.q.device), self.q.element_size(), self.columns
        )
        documents, kv_heads = self.cuts.shape[0] - 1, self.k.shape[1]
        slots = self.tokens // (keys if by_key else queries) + documents + 1
        launch(
            kernel, (slots * (kv_heads if by_key else self.heads),),
            *tensors, *sums, self.cuts, documents, self.tokens, self.heads, self.heads // kv_heads,
            scale, self.softcap or 1.0, self.window, *more,
            *itertools.chain.from_iterable(x.stride()[:2] for x in tensors),
            WINDOWED=self.window > 0, CAPPED=self.softcap > 0, WIDTH=self.width,
            QUERIES=queries, KEYS=keys, COLUMNS=self.columns, STAGES=stages, threads=threads,
            # Products apart, fused or not: float32's difference of s and lse is of two that were
            # rounded alike.
            enable_fp_fusion=self.q.element_size() == 2,
        )  # fmt: skip


def proof_cases() -> list[Case]:
    llama = {"T": 8192, "N": 32, "G": 8, "D": 128, "window": 0, "softcap": 0}
    small = {"T": 400, "N": 4, "G": 1}
    phi = llama | {"G": 32, "D": 96, "window": 2048}
    gemma = llama | {"N": 16, "D": 256, "window": 4096, "softcap": 50}
    narrow = llama | {"N": 8, "G": 1, "D": 32}
    variants = [
        ("", llama, small, ("bf16", "fp16", "fp32")),
        ("d64", llama | {"D": 64}, small, ("bf16", "fp32")),
        ("d96 window", phi, small | {"G": 4, "window": 70}, ("bf16",)),
        ("d256 softcap", gemma, small | {"N": 2, "window": 110}, ("bf16", "fp32")),
        ("d32 of one key head", narrow, small | {"N": 8}, ("fp16",)),
    ]
    directions: list[tuple[Direction, Any, Any, Any]] = [
        ("forward", _forward_case, _forward_budget, _forward_flops),
        ("backward", _backward_case, _backward_budget, _backward_flops),
    ]
    return [
        Case(
            OP, direction, arguments, large, {**large, **few}, budget=budget, flops=flops,
            has_dot=True, variant=variant, dtypes=dtypes,
        )
        for direction, arguments, budget, flops in directions
        for variant, large, few, dtypes in variants
    ]  # fmt: skip


def _cuts(tokens: int) -> list[int]:
    """Documents of one token, of none, of a quarter and half of the tokens, and the rest."""
    return [0, 1, 1, 1 + tokens // 4, 1 + tokens // 4 + tokens // 2, tokens]


def _forward_case(make: Maker, n: Sizes) -> dict[str, Any]:
    return {
        "q": make.normal(n["T"], n["N"], n["D"], scale=1.5),
        "k": make.normal(n["T"], n["G"], n["D"]),
        "v": make.normal(n["T"], n["G"], n["D"]),
        "cu_seqlens": make.values(_cuts(n["T"]), torch.int32),
        "scale": n["D"] ** -0.5, "window": n["window"], "softcap": float(n["softcap"]),
    }  # fmt: skip


def _backward_case(make: Maker, n: Sizes) -> dict[str, Any]:
    given = _forward_case(make, n)
    do = make.normal(n["T"], n["N"], n["D"])
    if make.device.type == "meta":
        lse = make.empty(n["N"], n["T"], dtype=torch.float32)
        return {**given, "do": do, "o": make.empty(*do.shape), "lse": lse}
    o, lse = definition.forward(**given)
    return {**given, "do": do, "o": o, "lse": lse}


def _elements(n: Sizes) -> tuple[int, int, int]:
    """TND, TGD, TN"""
    rows = n["T"] * n["N"]
    return rows * n["D"], n["T"] * n["G"] * n["D"], rows


def _forward_budget(n: Sizes, size: int) -> float:
    """2TND + 2TGD; lse written."""
    q, k, rows = _elements(n)
    return size * (2 * q + 2 * k) + 4 * rows


def _backward_budget(n: Sizes, size: int) -> float:
    """6TND + 6TGD; lse read twice, Δ written and read."""
    q, k, rows = _elements(n)
    return size * (6 * q + 6 * k) + 16 * rows


def _pairs(n: Sizes) -> int:
    """Of a query and a key that it sees."""
    window = n["window"] or n["T"]
    lengths = [b - a for a, b in itertools.pairwise(_cuts(n["T"]))]
    before = [max(length - window, 0) for length in lengths]  # what the last query does not see
    return sum(x * (x + 1) // 2 - y * (y + 1) // 2 for x, y in zip(lengths, before, strict=True))


def _forward_flops(n: Sizes) -> float:
    """Two products."""
    return 4.0 * _pairs(n) * n["N"] * n["D"]


def _backward_flops(n: Sizes) -> float:
    """Five products, of which the launches make two twice."""
    return 10.0 * _pairs(n) * n["N"] * n["D"]
