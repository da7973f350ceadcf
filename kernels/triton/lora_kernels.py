"""The kernels of lora_linear.py. What they compute and in which order: its head.

M tokens, K = d_in, N_j = d_out of sibling j, R = rank, padded to RANK. A kernel's table has a row
(adapter, first row, rows) for each block of rows. Four siblings have arguments; COUNT are there.
"""

# pyright: reportGeneralTypeIssues=false
# (To pyright, Triton's ranges can't be iterated over.)

from __future__ import annotations

import triton
import triton.language as tl

from trimpot.kernels.triton.arithmetic import dot, stages
from trimpot.kernels.triton.philox import keep_mask, kept


@triton.jit
def _pick(sibling, p0, p1, p2, p3):
    return tl.where(
        sibling == 0, p0, tl.where(sibling == 1, p1, tl.where(sibling == 2, p2, p3))
    )  # fmt: skip


@triton.jit
def _block(TABLE, block, ROWS: tl.constexpr):
    """The block's adapter (0 for none), its rows (int64), which of them it has, and which of them
    have an adapter."""
    adapter = tl.load(TABLE + 3 * block)
    first = tl.load(TABLE + 3 * block + 1)
    count = tl.load(TABLE + 3 * block + 2)
    local = tl.arange(0, ROWS)
    adapted = local < tl.where(adapter < 0, 0, count)
    return tl.maximum(adapter, 0), first.to(tl.int64) + local, local < count, adapted


@triton.jit
def _tile(blocks, tiles, GROUP: tl.constexpr):
    """(row block, column tile) of a program: GROUP row blocks share the columns that the L2 cache
    holds."""
    program = tl.program_id(0)
    first = program // (GROUP * tiles) * GROUP
    height = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * tiles)
    return first + within % height, within // height


@triton.jit
def _product(
    acc, LEFT, RIGHT, left_step, right_step, depth, row_inside, column_inside,
    ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc + left · right: the first tiles are at [rows, BLOCK_K] and [BLOCK_K, columns], the next
    are BLOCK_K steps further."""
    for first in tl.range(0, depth, BLOCK_K, num_stages=stages(STAGES)):
        if ALIGNED:
            left = tl.load(LEFT, mask=row_inside[:, None], other=0.0)
            right = tl.load(RIGHT, mask=column_inside[None, :], other=0.0)
        else:
            inside = first + tl.arange(0, BLOCK_K) < depth
            left = tl.load(LEFT, mask=row_inside[:, None] & inside[None, :], other=0.0)
            right = tl.load(RIGHT, mask=inside[:, None] & column_inside[None, :], other=0.0)
        acc = dot(left, right, acc)
        LEFT += BLOCK_K * left_step
        RIGHT += BLOCK_K * right_step
    return acc


@triton.jit
def _low_rank(
    S, P, row, row_inside, column, column_inside, rank, rank_step, column_step,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """S[rows] · P[rank, columns], from the adapter's P."""
    acc = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for first in tl.range(0, RANK, RANK_BLOCK):
        r = first + tl.arange(0, RANK_BLOCK)
        left = tl.load(
            S + row[:, None] * rank + r[None, :],
            mask=row_inside[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            P + r[:, None] * rank_step + column[None, :] * column_step,
            mask=(r < rank)[:, None] & column_inside[None, :], other=0.0,
        )  # fmt: skip
        acc = dot(left, right, acc)
    return acc


@triton.jit
def lora_shrink(
    X, P0, P1, P2, P3, S0, S1, S2, S3, TABLE, SEEDS, LIMITS, FACTORS,
    x_stride, depth, rank, adapters, rank_step, depth_step,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S_j = factor_j (keep_j ⊙ x) P_jᵀ, P_j [n, rank, depth] by its steps; 0 without an adapter."""
    adapter, row, inside, adapted = _block(TABLE, tl.program_id(0), BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, RANK)
    at = adapter.to(tl.int64) * rank * depth
    p_at = at + k[:, None].to(tl.int64) * depth_step + r[None, :] * rank_step
    ps, ss = (P0, P1, P2, P3), (S0, S1, S2, S3)
    accs = ()
    for _ in tl.static_range(COUNT):
        accs += (tl.zeros((BLOCK_M, RANK), tl.float32),)
    X += row[:, None] * x_stride + k[None, :]
    for first in tl.range(0, depth, BLOCK_K, num_stages=stages(STAGES)):
        if ALIGNED:
            x = tl.load(X, mask=adapted[:, None], other=0.0)
            p_mask = (r < rank)[None, :]
        else:
            x = tl.load(X, mask=adapted[:, None] & (first + k < depth)[None, :], other=0.0)
            p_mask = (first + k < depth)[:, None] & (r < rank)[None, :]
        summed = ()
        for j in tl.static_range(COUNT):
            p = tl.load(ps[j] + p_at, mask=p_mask, other=0.0)
            read = x
            if DROPOUT:
                # first >> 30 is 0; loaded before the loop, a seed has 20 round keys in registers
                seed = tl.load(SEEDS + j * adapters + adapter + (first >> 30))
                keep = keep_mask(seed, tl.load(LIMITS + adapter), row, first, BLOCK_K)
                read = kept(x, keep)
            summed += (dot(read, p, accs[j]),)
        accs = summed
        X += BLOCK_K
        p_at += BLOCK_K * depth_step
    for j in tl.static_range(COUNT):
        s = accs[j] * tl.load(FACTORS + j * adapters + adapter)
        tl.store(
            ss[j] + row[:, None] * rank + r[None, :], s.to(ss[j].dtype.element_ty),
            mask=inside[:, None] & (r < rank)[None, :],
        )  # fmt: skip


@triton.jit
def lora_base(
    X, W0, W1, W2, W3, BIAS0, BIAS1, BIAS2, BIAS3, S0, S1, S2, S3, B0, B1, B2, B3, Y0, Y1, Y2, Y3,
    TABLE, SCALES, x_stride, depth, rank, adapters, n0, n1, n2, n3, t1, t2, t3, blocks, tiles,
    COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Y_j = x W_jᵀ + bias_j + scale_j S_j B_jᵀ; sibling j has n_j columns, its tiles start at
    t_j."""
    block, tile = _tile(blocks, tiles, GROUP)
    W, BIAS, S, B, Y, columns, scale_at = W0, BIAS0, S0, B0, Y0, n0, 0
    if COUNT > 1:
        j = (tile >= t1).to(tl.int32) + (tile >= t2).to(tl.int32) + (tile >= t3).to(tl.int32)
        W, BIAS = _pick(j, W0, W1, W2, W3), _pick(j, BIAS0, BIAS1, BIAS2, BIAS3)
        S, B, Y = _pick(j, S0, S1, S2, S3), _pick(j, B0, B1, B2, B3), _pick(j, Y0, Y1, Y2, Y3)
        columns, tile = _pick(j, n0, n1, n2, n3), tile - _pick(j, 0, t1, t2, t3)
        scale_at = j * adapters
    adapter, row, inside, adapted = _block(TABLE, block, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = column < columns
    acc = _low_rank(
        S, B + adapter.to(tl.int64) * columns * rank, row, adapted, column, column_inside,
        rank, 1, rank, RANK, RANK_BLOCK,
    )  # fmt: skip
    acc *= tl.load(SCALES + scale_at + adapter)
    k = tl.arange(0, BLOCK_K)
    acc = _product(
        acc, X + row[:, None] * x_stride + k[None, :],
        W + column[None, :].to(tl.int64) * depth + k[:, None],
        1, 1, depth, inside, column_inside, ALIGNED, BLOCK_K, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(BIAS + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        Y + row[:, None] * columns + column[None, :], acc.to(Y.dtype.element_ty),
        mask=inside[:, None] & column_inside[None, :],
    )  # fmt: skip


@triton.jit
def lora_gradients(
    DY, B, S, DS, DB, TABLE, SCALES, dy_stride, rows, columns, rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """scale dY B of COLUMNS columns → DS[tile, rows, rank], and scale dYᵀ S of a stretch of rows
    → DB[stretch, columns, rank]."""
    tile = tl.program_id(0)
    stretch = tl.program_id(1)
    adapter, first_row, _, _ = _block(TABLE, stretch, ROWS)
    count = tl.load(TABLE + 3 * stretch + 2)
    scale = tl.load(SCALES + adapter)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    b_at = column[:, None] * rank + r[None, :]
    b_mask = (column < columns)[:, None] & (r < rank)[None, :]
    b = tl.load(B + adapter.to(tl.int64) * columns * rank + b_at, mask=b_mask, other=0.0)
    db = tl.zeros((COLUMNS, RANK), tl.float32)
    DS += tile.to(tl.int64) * rows * rank
    for step in tl.range(0, count, ROWS, num_stages=stages(STAGES)):
        row = first_row + step
        inside = step + tl.arange(0, ROWS) < count
        dy = tl.load(
            DY + row[:, None] * dy_stride + column[None, :],
            mask=inside[:, None] & (column < columns)[None, :], other=0.0,
        )  # fmt: skip
        at = row[:, None] * rank + r[None, :]
        mask = inside[:, None] & (r < rank)[None, :]
        db = dot(tl.trans(dy), tl.load(S + at, mask=mask, other=0.0), db)
        ds = dot(dy, b, tl.zeros((ROWS, RANK), tl.float32)) * scale
        tl.store(DS + at, ds.to(DS.dtype.element_ty), mask=mask)
    tl.store(DB + stretch.to(tl.int64) * columns * rank + b_at, db * scale, mask=b_mask)


@triton.jit
def lora_outer(
    S, V, OUT, TABLE, SEEDS, LIMITS, FACTORS, v_stride, rows, columns, rank, adapters, stretches,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RANK_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """factor_j S_jᵀ (keep_j ⊙ V) of a stretch of rows → OUT[j, stretch, rank, columns]; S is
    [j, rows, rank]."""
    stretch = tl.program_id(1)
    adapter, first_row, _, _ = _block(TABLE, stretch, BLOCK_M)
    count = tl.load(TABLE + 3 * stretch + 2)
    first_column = tl.program_id(0) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    column_inside = column < columns
    r = tl.program_id(2) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    r_inside = r < rank
    accs = ()
    for _ in tl.static_range(COUNT):
        accs += (tl.zeros((RANK_BLOCK, BLOCK_N), tl.float32),)
    for step in tl.range(0, count, BLOCK_M, num_stages=stages(STAGES)):
        row = first_row + step
        inside = step + tl.arange(0, BLOCK_M) < count
        v = tl.load(
            V + row[:, None] * v_stride + column[None, :],
            mask=inside[:, None] & column_inside[None, :], other=0.0,
        )  # fmt: skip
        summed = ()
        for j in tl.static_range(COUNT):
            s = tl.load(
                S + (j * rows + row)[None, :] * rank + r[:, None],
                mask=inside[None, :] & r_inside[:, None], other=0.0,
            )  # fmt: skip
            read = v
            if DROPOUT:
                seed = tl.load(SEEDS + j * adapters + adapter + (step >> 30))  # as in lora_shrink
                keep = keep_mask(seed, tl.load(LIMITS + adapter), row, first_column, BLOCK_N)
                read = kept(v, keep)
            summed += (dot(s, read, accs[j]),)
        accs = summed
    for j in tl.static_range(COUNT):
        out = OUT + ((j * stretches + stretch).to(tl.int64) * rank + r[:, None]) * columns
        tl.store(
            out + column[None, :], accs[j] * tl.load(FACTORS + j * adapters + adapter),
            mask=r_inside[:, None] & column_inside[None, :],
        )  # fmt: skip


@triton.jit
def lora_dx(
    DY0, DY1, DY2, DY3, W0, W1, W2, W3, A0, A1, A2, A3, DS, DX, TABLE, SEEDS, LIMITS, FACTORS,
    stride0, stride1, stride2, stride3, n0, n1, n2, n3, rows, depth, rank, adapters, blocks, tiles,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ_j dY_j W_j + factor_j keep_j ⊙ (dS_j A_j). The masked products come first: only then is
    there room for two accumulators."""
    block, tile = _tile(blocks, tiles, GROUP)
    adapter, row, inside, adapted = _block(TABLE, block, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = column < depth
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.range(COUNT):  # a loop also here: three unrolled masks would spill
        A = _pick(j, A0, A1, A2, A3)
        if DROPOUT:
            seed = tl.load(SEEDS + j * adapters + adapter)
            keep = keep_mask(seed, tl.load(LIMITS + adapter), row, tile * BLOCK_N, BLOCK_N)
        part = _low_rank(
            DS, A + adapter.to(tl.int64) * rank * depth, row + j * rows, adapted,
            column, column_inside, rank, depth, 1, RANK, RANK_BLOCK,
        )  # fmt: skip
        if DROPOUT:
            part = kept(part, keep) * tl.load(FACTORS + j * adapters + adapter)
        acc += part
    k = tl.arange(0, BLOCK_K)
    for j in tl.range(COUNT):
        DY, W = _pick(j, DY0, DY1, DY2, DY3), _pick(j, W0, W1, W2, W3)
        stride, columns = _pick(j, stride0, stride1, stride2, stride3), _pick(j, n0, n1, n2, n3)
        acc = _product(
            acc, DY + row[:, None] * stride + k[None, :],
            W + k[:, None].to(tl.int64) * depth + column[None, :],
            1, depth, columns, inside, column_inside, ALIGNED, BLOCK_K, STAGES,
        )  # fmt: skip
    tl.store(
        DX + row[:, None] * depth + column[None, :], acc.to(DX.dtype.element_ty),
        mask=inside[:, None] & column_inside[None, :],
    )  # fmt: skip


@triton.jit
def lora_sum(
    PARTIALS, OUT, BOUNDS, rank, columns, rank_step, column_step,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ PARTIALS[bounds[i] … bounds[i + 1], rank, columns] → OUT[i], whose items have steps."""
    i = tl.program_id(1)
    items = rank * columns
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(BOUNDS + i + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.load(BOUNDS + i), last, ROWS):
        p = first + tl.arange(0, ROWS)
        mask = (p < last)[:, None] & (at < items)[None, :]
        part = tl.load(PARTIALS + p[:, None].to(tl.int64) * items + at[None, :], mask, other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    OUT += i.to(tl.int64) * items + at // columns * rank_step + at % columns * column_step
    tl.store(OUT, total.to(OUT.dtype.element_ty), mask=at < items)
