"""The kernels of varlen_attention.py. What they compute and in which order: its head.

Positions (query i, key j) count within a document. Of 16-bit types the exponent is in units of
log₂: a multiplication, a subtraction and exp2 are two instructions. Of float32 the difference comes
first and then its exp, as torch has it: beside s = 20 the rounding of s·log₂e is 2e-6 of p.

What a program keeps is read again for each tile if it is float32 (`at >> 30` is 0, which compilers
don't know): read before the loop, it would lie in registers in the two parts of tf32x3, 256 of a
thread for 32 rows of 128 columns.
"""

# pyright: reportGeneralTypeIssues=false
# (To pyright, Triton's ranges can't be iterated over.)

from __future__ import annotations

import triton
import triton.language as tl

from trimpot.kernels.triton.arithmetic import dot, short_tanh, stages, tanh

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SEARCH = tl.constexpr(256)
"""Documents that are looked through at once."""


@triton.jit
def _place(CUTS, slot, documents, tokens, BLOCK: tl.constexpr):
    """(first token of the slot's document, its tokens, where in it the tile begins, whether the
    tile is there, whether the document is one: not so for what follows the last).

    Document d has the slots from cuts[d] // BLOCK + d on, of which at most one stays empty. What
    is not between 0 and `tokens`, or falls, gives empty tiles and nothing outside of the tensors.
    """
    document = 0
    for at in range(0, documents, SEARCH):
        d = at + tl.arange(0, SEARCH)
        ends = tl.load(CUTS + 1 + d, mask=d < documents, other=0).to(tl.int32)
        document += tl.sum(((d < documents) & (ends // BLOCK + d + 1 <= slot)).to(tl.int32))  # type: ignore
    first = tl.load(CUTS + document).to(tl.int32)
    last = tl.load(CUTS + document + 1, mask=document < documents, other=tokens).to(tl.int32)
    start = (slot - (first // BLOCK + document)) * BLOCK
    there = (first >= 0) & (last <= tokens) & (start >= 0) & (start < last - first)
    return first.to(tl.int64), last - first, start, there, document < documents


@triton.jit
def _tile(X, step, start, length, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """X[start … start + ROWS, 0 … WIDTH]; 0 past `length` and past WIDTH."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = X + (tl.zeros((), tl.int64) + start) * step + (row[:, None] * step + column[None, :])
    mask = (start + row < length)[:, None]
    if WIDTH < COLUMNS:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _store(X, x, step, start, length, WIDTH: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = X + (tl.zeros((), tl.int64) + start) * step + (row[:, None] * step + column[None, :])
    mask = (start + row < length)[:, None] & (column < WIDTH)[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def _exponent(x, NATURAL: tl.constexpr):
    """x in the exponent's units."""
    return x if NATURAL else x * LOG2_E


@triton.jit
def _capped(s, scale, cap, CAPPED: tl.constexpr, NATURAL: tl.constexpr, EXACT: tl.constexpr):
    """(s, its factor to the exponent's units, the slope that a soft cap leaves). lse is EXACT;
    beside gradients of 16 bits 6e-6 of P, at a cap of 50, are nothing."""
    slope = 1.0
    if CAPPED:
        s *= scale / cap
        s = tanh(s) if EXACT else short_tanh(s)
        slope = 1.0 - s * s
        scale = cap
    return s, _exponent(scale, NATURAL), slope


@triton.jit
def _power(x, NATURAL: tl.constexpr):
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def _lse(top, total, NATURAL: tl.constexpr):
    return top + tl.log(total) if NATURAL else (top + tl.log2(total)) * LN_2


@triton.jit
def _seen(query, key, window, WINDOWED: tl.constexpr):
    seen = key <= query
    if WINDOWED:
        seen = seen & (query - key < window)
    return seen


@triton.jit
def _keys_of(start, length, window, is_document, WINDOWED: tl.constexpr, QUERIES: tl.constexpr,
             KEYS: tl.constexpr):  # fmt: skip
    """Where the keys of a tile of queries begin and end."""
    end = tl.where(is_document, tl.minimum(start + QUERIES, length), 0)
    begin = 0
    if WINDOWED:
        begin = tl.minimum(tl.maximum(start - window + 1, 0) // KEYS * KEYS, end)
    return begin, end


@triton.jit
def _at_an_edge(query, key, window, WINDOWED: tl.constexpr, QUERIES: tl.constexpr,
                KEYS: tl.constexpr):  # fmt: skip
    """Whether some query of the tile does not see some key of the tile."""
    edge = query < key + KEYS - 1
    if WINDOWED:
        edge = edge | (query + QUERIES > key + window)
    return edge


@triton.jit
def attention_forward(
    Q, K, V, OUT, LSE, CUTS, documents, tokens, heads, group, scale, cap, window, sign,
    q_step, q_head, k_step, k_head, v_step, v_head, o_step, o_head,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o and lse of a tile of queries of one head; scale is not negative, `sign` is what it was."""
    program = tl.program_id(0)
    slots = tl.num_programs(0) // heads
    head = program % heads
    first, length, start, there, is_document = _place(
        CUTS, slots - 1 - program // heads, documents, tokens, QUERIES
    )
    if there:
        Q += first * q_step + head * q_head
        K += first * k_step + head // group * k_head
        V += first * v_step + head // group * v_head
        q = _tile(Q, q_step, start, length, WIDTH, QUERIES, COLUMNS)
        q = (q * sign).to(q.dtype)
        NATURAL: tl.constexpr = q.dtype == tl.float32
        query = start + tl.arange(0, QUERIES)
        acc = _zeros(QUERIES, COLUMNS)
        top = tl.full((QUERIES,), -1e30, tl.float32)  # −inf − −inf would be NaN
        total = tl.zeros((QUERIES,), tl.float32)
        begin, end = _keys_of(start, length, window, is_document, WINDOWED, QUERIES, KEYS)
        for at in tl.range(begin, end, KEYS, num_stages=stages(STAGES)):
            k = _tile(K, k_step, at, length, WIDTH, KEYS, COLUMNS)
            v = _tile(V, v_step, at, length, WIDTH, KEYS, COLUMNS)
            if NATURAL:
                q = _tile(Q, q_step, start + (at >> 30), length, WIDTH, QUERIES, COLUMNS) * sign
            s, factor, _ = _capped(
                dot(q, tl.trans(k), _zeros(QUERIES, KEYS)),
                scale,
                cap,
                CAPPED,
                NATURAL,
                tl.constexpr(True),
            )
            if _at_an_edge(start, at, window, WINDOWED, QUERIES, KEYS):
                key = at + tl.arange(0, KEYS)
                seen = _seen(query[:, None], key[None, :], window, WINDOWED)
                s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * factor)
            p = _power(s * factor - higher[:, None], NATURAL)
            fade = _power(top - higher, NATURAL)
            total = total * fade + tl.sum(p, 1)
            acc = dot(p.to(v.dtype), v, acc * fade[:, None])
            top = higher
        total = tl.where(is_document, total, 1.0)
        lse = tl.where(is_document, _lse(top, total, NATURAL), 0.0)
        OUT += first * o_step + head * o_head
        _store(OUT, acc / total[:, None], o_step, start, length, WIDTH, QUERIES, COLUMNS)
        query = start + tl.arange(0, QUERIES)
        LSE += head.to(tl.int64) * tokens + first
        tl.store(LSE + query, lse, mask=query < length)


@triton.jit
def attention_dq(
    Q, K, V, OUT, DO, DQ, LSE, DELTA, CUTS, documents, tokens, heads, group, scale, cap, window,
    q_step, q_head, k_step, k_head, v_step, v_head, o_step, o_head, do_step, do_head,
    dq_step, dq_head,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries of one head, and Δ, which attention_dkdv reads."""
    program = tl.program_id(0)
    slots = tl.num_programs(0) // heads
    head = program % heads
    first, length, start, there, is_document = _place(
        CUTS, slots - 1 - program // heads, documents, tokens, QUERIES
    )
    if there:
        Q += first * q_step + head * q_head
        K += first * k_step + head // group * k_head
        V += first * v_step + head // group * v_head
        OUT += first * o_step + head * o_head
        DO += first * do_step + head * do_head
        q = _tile(Q, q_step, start, length, WIDTH, QUERIES, COLUMNS)
        do = _tile(DO, do_step, start, length, WIDTH, QUERIES, COLUMNS)
        o = _tile(OUT, o_step, start, length, WIDTH, QUERIES, COLUMNS)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        query = start + tl.arange(0, QUERIES)
        at = head.to(tl.int64) * tokens + first + query
        tl.store(DELTA + at, delta, mask=query < length)
        lse = tl.load(LSE + at, mask=query < length, other=float("inf"))
        NATURAL: tl.constexpr = q.dtype == tl.float32
        lse = _exponent(lse, NATURAL)
        dq = _zeros(QUERIES, COLUMNS)
        begin, end = _keys_of(start, length, window, is_document, WINDOWED, QUERIES, KEYS)
        for at in tl.range(begin, end, KEYS, num_stages=stages(STAGES)):
            k = _tile(K, k_step, at, length, WIDTH, KEYS, COLUMNS)
            v = _tile(V, v_step, at, length, WIDTH, KEYS, COLUMNS)
            if NATURAL:
                q = _tile(Q, q_step, start + (at >> 30), length, WIDTH, QUERIES, COLUMNS)
                do = _tile(DO, do_step, start + (at >> 30), length, WIDTH, QUERIES, COLUMNS)
            s, factor, slope = _capped(
                dot(q, tl.trans(k), _zeros(QUERIES, KEYS)),
                scale,
                cap,
                CAPPED,
                NATURAL,
                NATURAL,
            )
            p = _power(s * factor - lse[:, None], NATURAL)
            if _at_an_edge(start, at, window, WINDOWED, QUERIES, KEYS):
                key = at + tl.arange(0, KEYS)
                p = tl.where(_seen(query[:, None], key[None, :], window, WINDOWED), p, 0.0)
            if CAPPED:  # before the next product: slope and p would both be kept for it
                p *= slope
            dp = dot(do, tl.trans(v), _zeros(QUERIES, KEYS))
            ds = p * (dp - delta[:, None])  # type: ignore
            dq = dot(ds.to(k.dtype), k, dq)
        DQ += first * dq_step + head * dq_head
        _store(DQ, dq * scale, dq_step, start, length, WIDTH, QUERIES, COLUMNS)


@triton.jit
def attention_dkdv(
    Q, K, V, DO, DK, DV, LSE, DELTA, CUTS, documents, tokens, heads, group, scale, cap, window,
    q_step, q_head, k_step, k_head, v_step, v_head, do_step, do_head, dk_step, dk_head,
    dv_step, dv_head,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, summed over the query heads of its group in their order."""
    program = tl.program_id(0)
    kv_heads = heads // group
    kv_head = program % kv_heads
    first, length, start, there, is_document = _place(
        CUTS, program // kv_heads, documents, tokens, KEYS
    )
    if there:
        K += first * k_step + kv_head * k_head
        V += first * v_step + kv_head * v_head
        k = _tile(K, k_step, start, length, WIDTH, KEYS, COLUMNS)
        v = _tile(V, v_step, start, length, WIDTH, KEYS, COLUMNS)
        dk, dv = _zeros(KEYS, COLUMNS), _zeros(KEYS, COLUMNS)
        end = tl.where(is_document, length, 0)
        if WINDOWED:
            end = tl.minimum(end, start + KEYS - 1 + window)
        begin = tl.minimum(start // QUERIES * QUERIES, end)
        tiles = tl.cdiv(end - begin, QUERIES)
        NATURAL: tl.constexpr = k.dtype == tl.float32
        key = start + tl.arange(0, KEYS)
        for step in tl.range(0, tiles * group, num_stages=stages(STAGES)):
            head = kv_head * group + step // tiles
            at = begin + step % tiles * QUERIES
            query = at + tl.arange(0, QUERIES)
            q = _tile(
                Q + first * q_step + head * q_head, q_step, at, length, WIDTH, QUERIES, COLUMNS,
            )  # fmt: skip
            do = _tile(
                DO + first * do_step + head * do_head, do_step, at, length, WIDTH, QUERIES,
                COLUMNS,
            )  # fmt: skip
            row = head.to(tl.int64) * tokens + first
            inside = query < length
            lse = _exponent(tl.load(LSE + row + query, mask=inside, other=float("inf")), NATURAL)
            s, factor, slope = _capped(
                dot(k, tl.trans(q), _zeros(KEYS, QUERIES)),
                scale,
                cap,
                CAPPED,
                NATURAL,
                NATURAL,
            )
            p = _power(s * factor - lse[None, :], NATURAL)
            if _at_an_edge(at, start, window, WINDOWED, QUERIES, KEYS):
                p = tl.where(_seen(query[None, :], key[:, None], window, WINDOWED), p, 0.0)
            dv = dot(p.to(do.dtype), do, dv)
            if CAPPED:
                p *= slope
            dp = dot(v, tl.trans(do), _zeros(KEYS, QUERIES))
            delta = tl.load(DELTA + row + query, mask=inside, other=0.0)
            ds = p * (dp - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk)
        DK += first * dk_step + kv_head * dk_head
        DV += first * dv_step + kv_head * dv_head
        _store(DK, dk * scale, dk_step, start, length, WIDTH, KEYS, COLUMNS)
        _store(DV, dv, dv_step, start, length, WIDTH, KEYS, COLUMNS)
