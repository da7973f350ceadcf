"""lora_linear in Triton: a base product with the low-rank update in its accumulator.

M tokens, K = d_in, N_j = d_out of sibling j, R = rank; formulas in ops/lora_linear.py. Launches:

    shrink     S_j of all siblings, from one read of x                             MK
    base       Y_j of all siblings: x W_jᵀ + bias_j + s_j S_j B_jᵀ                 MK + KN + MN
    gradients  dS_j and dB_j, from one read of dY_j                                MN
    outer      dA_j of all siblings, from one read of x                            MK
    dx         Σ_j dY_j W_j + D_j ⊙ (dS_j A_j)                                     MN + KN + MK

which is 3MN + 4MK + 2KN elements. `gradients` holds 256 columns at a time (128 in float32) and
leaves one partial dS for each 256, in the working dtype, and one partial dB, in float32, for each
stretch of 1,024 rows; `outer` leaves one dA a stretch. A second launch adds them up in a fixed
order: equal runs give equal bits. At M = 8192, K = N = 4096 and rank 16 that costs 3 % of all (4 %
in float32). It grows with the rank: above 32 (16 in float32) dS and dB come from a read of dY
each, by the kernels of S and dA, 4MN in all.

Rows are cut into blocks that have one adapter each: a table of (adapter, first row, rows), made on
the host from the segments, says which; −1 is none. Dropout's 1 / (1 − p) multiplies products, not
x: one rounding less. Ranks are padded to 16 or more for tensor cores, in registers only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton

from trimpot.kernels.errors import BackendError
from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check, launch, processors
from trimpot.kernels.triton.layout import as_rows
from trimpot.kernels.triton.lora_kernels import (
    lora_base,
    lora_dx,
    lora_gradients,
    lora_outer,
    lora_shrink,
    lora_sum,
)
from trimpot.kernels.triton.philox import limit
from trimpot.kernels.triton.segments import Segments, blocks, bounds, stretches

Tensors = list[torch.Tensor]

SIBLINGS = 4
"""At most, of one call."""
ONE_PASS_RANK = {2: 32, 4: 16}
"""By bytes of an element: up to this padded rank dS and dB come from one read of dY. Above, the
partial sums cost more than a read, and the operands (in float32 each in two parts) spill."""
STRETCH = 64
"""Rows for each rank of each sibling, if there are so many, that leave one partial sum: it is as
much as 6 % of what was read."""


def forward(
    x: torch.Tensor,
    weights: Tensors,
    biases: Tensors,
    a: Tensors,
    b: Tensors,
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: torch.Tensor,
    segments: torch.Tensor,
) -> tuple[Tensors, Tensors]:
    """→ ys [M, N_j], ss [M, R] in x's dtype."""
    call = _Call(x, weights, a, b, scales, dropouts, seeds, segments)
    ss = [call.empty(x.shape[0], call.rank) for _ in a]
    call.shrink(call.x, call.a, ss, call.multipliers, call.dropout)
    return call.base(biases, ss), ss


def backward(
    dys: Tensors,
    x: torch.Tensor,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    ss: Tensors,
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: torch.Tensor,
    segments: torch.Tensor,
    need_dx: bool,
) -> tuple[torch.Tensor, Tensors, Tensors]:
    """→ dx (empty where it is not needed), dA_j, dB_j in the dtypes of A_j and B_j."""
    call = _Call(x, weights, a, b, scales, dropouts, seeds, segments)
    dys = [as_rows(dy) for dy in dys]
    ds = call.empty(len(a), x.shape[0], call.rank)
    dbs = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in b]
    das = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in a]
    for j, (dy, s) in enumerate(zip(dys, ss, strict=True)):
        if call.padded <= ONE_PASS_RANK[x.element_size()]:
            call.gradients(j, dy, s.contiguous(), ds[j], dbs[j])
        else:
            call.two_passes(j, dy, s.contiguous(), ds[j], dbs[j])
    call.outer(ds, call.x, das, call.multipliers, call.dropout)
    dx = call.empty(*x.shape) if need_dx else call.empty(0)
    if need_dx:
        call.input_gradient(dys, ds, dx)
    return dx, das, dbs


class _Call:
    """Operands of one call, and its launches."""

    def __init__(
        self,
        x: torch.Tensor,
        weights: Tensors,
        a: Tensors,
        b: Tensors,
        scales: Sequence[float],
        dropouts: Sequence[float],
        seeds: torch.Tensor,
        segments: torch.Tensor,
    ) -> None:
        check("lora_linear", x, *weights, *a, *b)
        if len(weights) > SIBLINGS:
            raise BackendError(
                f"lora_linear: triton takes up to {SIBLINGS} siblings, not {len(weights)}; call it "
                "once for each few, or use backend torch"
            )
        self.x = as_rows(x)
        self.weights = [w.to(x.dtype).contiguous() for w in weights]
        self.a, self.b = ([p.to(x.dtype).contiguous() for p in group] for group in (a, b))
        self.adapters, self.rank, self.depth = a[0].shape
        self.padded = max(triton.next_power_of_2(self.rank), 16)
        self.widths = [w.shape[0] for w in weights]
        self.segments: Segments = tuple(map(tuple, segments.tolist()))
        self.dropout = any(dropouts)
        self.low = x.element_size() == 2
        self.scales, self.multipliers, self.limits = _constants(
            tuple(scales), tuple(dropouts), x.device
        )
        self.seeds = (
            seeds.to(x.device, non_blocking=True).contiguous() if self.dropout else self.limits
        )

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device)

    def blocks(self, size: int) -> torch.Tensor:
        return blocks(self.segments, self.adapters, self.x.shape[0], size, self.x.device)

    def stretches(
        self, columns: int, tile: int, count: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows cut so that each processor has a program, and the bounds of adapters."""
        rows = self.x.shape[0] * triton.cdiv(columns, tile) // processors(self.x.device)
        size = triton.cdiv(max(rows, STRETCH * self.padded * count), 64) * 64
        return stretches(self.segments, self.adapters, self.x.shape[0], size, self.x.device)

    def shrink(
        self, x: torch.Tensor, ps: Tensors, ss: Tensors, factors: torch.Tensor, dropout: bool
    ) -> None:
        """S_j = factor (keep ⊙ x) P_jᵀ, with P_j [n, R, depth] (of any strides)."""
        depth, size = x.shape[1], x.element_size()
        together = max((256 if self.low else 128) // self.padded, 1)  # more would spill
        block_m = next((m for m in (64, 32) if x.shape[0] >= m * processors(x.device)), 16)
        for first in range(0, len(ps), together):
            group = slice(first, first + together)
            count = len(ps[group])
            few = count * self.padded <= (64 if self.low else 16)
            block_k = (256 if few else 128) // size
            table = self.blocks(block_m)
            launch(
                lora_shrink, (table.shape[0],),
                x, *_four(ps[group]), *_four(ss[group]), table,
                self.seeds[first:], self.limits, factors[first * self.adapters :],
                x.stride(0), depth, self.rank, self.adapters, *ps[0].stride()[1:],
                COUNT=count, DROPOUT=dropout, ALIGNED=depth % block_k == 0,
                BLOCK_M=block_m, BLOCK_K=block_k, RANK=self.padded, STAGES=4,
                threads=256 if count * self.padded > 64 else 128,
            )  # fmt: skip

    def base(self, biases: Tensors, ss: Tensors) -> Tensors:
        ys = [self.empty(self.x.shape[0], n) for n in self.widths]
        has_bias = any(bias.numel() for bias in biases)
        given = [
            bias if bias.numel() or not has_bias else self.empty(n).zero_()
            for bias, n in zip(biases, self.widths, strict=True)
        ]
        tile = self._tile()
        table = self.blocks(tile["BLOCK_M"])
        starts = [0]
        for n in self.widths:
            starts.append(starts[-1] + triton.cdiv(n, tile["BLOCK_N"]))
        tiles = starts.pop()
        launch(
            lora_base, (table.shape[0] * tiles,),
            self.x, *_four(self.weights), *_four(given), *_four(ss), *_four(self.b), *_four(ys),
            table, self.scales, self.x.stride(0), self.depth, self.rank, self.adapters,
            *_four(self.widths), *(starts + [tiles] * SIBLINGS)[1:SIBLINGS], table.shape[0], tiles,
            COUNT=len(ys), HAS_BIAS=has_bias, ALIGNED=self.depth % tile["BLOCK_K"] == 0, **tile,
        )  # fmt: skip
        return ys

    def gradients(
        self, j: int, dy: torch.Tensor, s: torch.Tensor, ds: torch.Tensor, db: torch.Tensor
    ) -> None:
        """dS_j and dB_j from one read of dY_j."""
        rows, columns = dy.shape
        width = 256 if self.low else 128
        tiles = triton.cdiv(columns, width)
        table, parts = self.stretches(columns, width)
        several = self.empty(tiles, rows, self.rank) if tiles > 1 else ds
        partials = torch.empty(
            (table.shape[0], columns, self.rank), dtype=torch.float32, device=dy.device
        )
        launch(
            lora_gradients, (tiles, table.shape[0]),
            dy, self.b[j], s, several, partials, table, self.scales[j * self.adapters :],
            dy.stride(0), rows, columns, self.rank,
            ROWS=64 if self.low else 32, COLUMNS=width, RANK=self.padded, STAGES=3, threads=256,
        )  # fmt: skip
        if tiles > 1:
            _sum(several, ds, bounds(tiles, dy.device), 1, rows * self.rank, 0, 1)
        _sum(partials, db, parts, 1, columns * self.rank, 0, 1)

    def two_passes(
        self, j: int, dy: torch.Tensor, s: torch.Tensor, ds: torch.Tensor, db: torch.Tensor
    ) -> None:
        """dS_j and dB_j from a read of dY_j each."""
        scales = self.scales[j * self.adapters :]
        self.shrink(dy, [self.b[j].mT], [ds], scales, False)
        self.outer(s[None], dy, [db.mT], scales, False)

    def outer(
        self, s: torch.Tensor, v: torch.Tensor, outs: Tensors, factors: torch.Tensor, dropout: bool
    ) -> None:
        """out_j = factor S_jᵀ (keep ⊙ V) for each adapter."""
        rows, columns = v.shape
        count, block_n = len(outs), 128
        most = (128 if self.low else 64) // triton.next_power_of_2(count)
        rank_block = min(self.padded, most)
        table, parts = self.stretches(columns, block_n, count)
        stretches = table.shape[0]
        partials = torch.empty(
            (count, stretches, self.rank, columns), dtype=torch.float32, device=v.device
        )
        launch(
            lora_outer,
            (triton.cdiv(columns, block_n), stretches, triton.cdiv(self.rank, rank_block)),
            s, v, partials, table, self.seeds, self.limits, factors,
            v.stride(0), rows, columns, self.rank, self.adapters, stretches,
            COUNT=count, DROPOUT=dropout, BLOCK_M=64 if self.low else 32, BLOCK_N=block_n,
            RANK_BLOCK=rank_block, STAGES=3,
            threads=128 if self.low and count * rank_block <= 64 else 256,
        )  # fmt: skip
        for part, out in zip(partials, outs, strict=True):
            _sum(part, out, parts, self.rank, columns, *out.stride()[1:])

    def input_gradient(self, dys: Tensors, ds: torch.Tensor, dx: torch.Tensor) -> None:
        tile = self._tile()
        if self.dropout:
            tile["RANK_BLOCK"] = 16  # beside a mask and two accumulators more would spill
        table = self.blocks(tile["BLOCK_M"])
        tiles = triton.cdiv(self.depth, tile["BLOCK_N"])
        aligned = all(n % tile["BLOCK_K"] == 0 for n in self.widths)
        launch(
            lora_dx, (table.shape[0] * tiles,),
            *_four(dys), *_four(self.weights), *_four(self.a), ds, dx, table, self.seeds,
            self.limits, self.multipliers, *_four([dy.stride(0) for dy in dys]),
            *_four(self.widths), dx.shape[0], self.depth, self.rank, self.adapters,
            table.shape[0], tiles,
            COUNT=len(dys), DROPOUT=self.dropout, ALIGNED=aligned, **tile,
        )  # fmt: skip

    def _tile(self) -> dict[str, int]:
        """Constants of the two large products."""
        rank = {"RANK": self.padded, "RANK_BLOCK": min(self.padded, 32)}
        if self.low:
            sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 3, "threads": 256}
        else:
            sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "STAGES": 3, "threads": 256}
        return {**sizes, **rank, "GROUP": 8}


def _four(items: Sequence[Any]) -> list[Any]:
    """As many as the kernels have arguments: the first stands in for those that are not there."""
    return [*items, *[items[0]] * (SIBLINGS - len(items))]


def _sum(
    partials: torch.Tensor, out: torch.Tensor, bounds: torch.Tensor, rank: int, columns: int,
    rank_step: int, column_step: int,
) -> None:  # fmt: skip
    """Adds up the partials of each adapter in the order of their rows."""
    block = 256
    launch(
        lora_sum, (triton.cdiv(rank * columns, block), bounds.shape[0] - 1),
        partials, out, bounds, rank, columns, rank_step, column_step,
        ROWS=8, BLOCK=block, threads=128,
    )  # fmt: skip


@functools.lru_cache(64)
def _constants(
    scales: tuple[float, ...], dropouts: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales and 1 / (1 − p), float32 [J · n], and limits of Philox words, int64 [n]."""
    multipliers = [1 / (1 - p) for p in dropouts] * (len(scales) // len(dropouts))
    return (
        torch.tensor(scales, dtype=torch.float32).to(device),
        torch.tensor(multipliers, dtype=torch.float32).to(device),
        torch.tensor([limit(p) for p in dropouts], dtype=torch.int64).to(device),
    )


def proof_cases() -> list[Case]:
    large = {"M": 8192, "K": 4096, "N": 4096, "J": 1, "R": 16, "p": 0, "bias": 0}
    # q, k and v of which k and v have a quarter of the heads
    siblings = {"J": 3, "p": 10, "bias": 1}
    forwards = [
        ("", {}, {"M": 256, "K": 512, "N": 512}),
        ("siblings", siblings, {"M": 256, "K": 256, "N": 256}),
        ("r256", {"R": 256}, {"M": 128, "K": 256, "N": 256}),
    ]
    # Partial sums weigh here what they do at the large sizes.
    backwards = [
        ("", {}, {"M": 1024, "K": 1024, "N": 512}),
        ("siblings", siblings, {"M": 1536, "K": 256, "N": 128}),
        ("r256", {"R": 256}, {"M": 128, "K": 256, "N": 256}),
    ]
    return [
        *(
            Case(
                "lora_linear", "forward", _forward_case, large | sizes, large | sizes | small,
                budget=_forward_budget, flops=_forward_flops, has_dot=True, variant=variant,
            )
            for variant, sizes, small in forwards
        ),
        *(
            Case(
                "lora_linear", "backward", _backward_case, large | sizes, large | sizes | small,
                budget=_backward_budget, flops=_backward_flops, has_dot=True, variant=variant,
            )
            for variant, sizes, small in backwards
        ),
    ]  # fmt: skip


def _widths(n: Sizes) -> list[int]:
    """Columns of the siblings: N, then quarters of it."""
    return [n["N"] if j == 0 else n["N"] // 4 for j in range(n["J"])]


def _case(make: Maker, n: Sizes) -> dict[str, Any]:
    """What both directions are given."""
    M, K, R, widths = n["M"], n["K"], n["R"], _widths(n)
    return {
        "x": make.normal(M, K),
        "weights": [make.normal(N, K, scale=K**-0.5) for N in widths],
        "a": [make.normal(1, R, K, scale=K**-0.5) for _ in widths],
        "b": [make.normal(1, N, R, scale=0.1) for N in widths],
        "scales": [2.0 / (1 + j) for j in range(len(widths))],
        "dropouts": [n["p"] / 100],
        "seeds": make.integers(0, 2**62, len(widths), 1),
        "segments": torch.tensor([[0, 0, M]], dtype=torch.int32),  # read on the host
    }


def _forward_case(make: Maker, n: Sizes) -> dict[str, Any]:
    biases = [make.normal(N) if n["bias"] else make.empty(0) for N in _widths(n)]
    return {**_case(make, n), "biases": biases}


def _backward_case(make: Maker, n: Sizes) -> dict[str, Any]:
    return {
        **_case(make, n),
        "dys": [make.normal(n["M"], N) for N in _widths(n)],
        "ss": [make.normal(n["M"], n["R"]) for _ in _widths(n)],
        "need_dx": True,
    }


def _forward_budget(n: Sizes, size: int) -> float:
    """MN + 2MK + KN; S written and read; A and B."""
    M, K, N, S, factors = _elements(n)
    return size * (M * N + 2 * M * K + K * N + 2 * S + factors)


def _backward_budget(n: Sizes, size: int) -> float:
    """2MN + 2MK + KN; S read, dS written and read twice; A, B, dA and dB. Where dS and dB read dY
    each: MN more, and one partial sum of dA and dB, float32, written and read."""
    M, K, N, S, factors = _elements(n)
    once = size * (2 * M * N + 2 * M * K + K * N + 4 * S + 2 * factors)
    return once if n["R"] <= ONE_PASS_RANK[size] else once + size * M * N + 8 * factors


def _elements(n: Sizes) -> tuple[int, int, int, int, int]:
    """M, K, N of all siblings, and how many elements S and the adapters have."""
    M, K, N = n["M"], n["K"], sum(_widths(n))
    return M, K, N, n["J"] * M * n["R"], n["R"] * (n["J"] * K + N)


def _forward_flops(n: Sizes) -> float:
    M, K, N, S, _ = _elements(n)
    return 2.0 * M * K * N + 2.0 * S * K + 2.0 * M * N * n["R"]


def _backward_flops(n: Sizes) -> float:
    M, K, N, S, _ = _elements(n)
    return 2.0 * M * K * N + 4.0 * S * K + 4.0 * M * N * n["R"]
