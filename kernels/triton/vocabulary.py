"""Softmax over the vocabulary, for linear_cross_entropy.py and token_logprobs.py.

C rows of a chunk, V vocabulary, H hidden; logits come as `u = z·height`, or with a soft cap c as
`u = t·height`, t = tanh(z/c), where height holds c and one over the temperature. Then, with w, ε
and ζ of ops/linear_cross_entropy.py,

    lse = log Σ_V exp u;  dz = w (softmax(u)·(1 + 2 ζ lse) − (1 − ε) 1_y − ε/V) (1 − t²)

The products z = h Wᵀ, dz W and dzᵀ h are the vendor's, a chunk of rows at a time; all between them
is one launch a chunk, in which a program owns a row: it reads the row once for lse (and the mean
that smoothing asks for), reads it again and writes dz over it. Nothing depends on the order in
which programs run, so equal runs give equal bits.

Traffic in elements of the working type, a row: V for lse alone, 2V for dz from a known lse, 2V for
both (V read, V written) if the second read comes from the L2 cache, 3V if it doesn't. The second
pass walks backwards to meet what was read last, and of programs with 512 threads and 41 to 64
registers two fit on a processor: the 264 rows that an H100 has in flight are within its 50 MB up to
V = 94,000 in 16 bits. The budgets count 2V, the least. torch's way moves about 38V, one pass an
operation, most of them over float32, which counts twice.

Logits that never leave the chip would move less: the products write z and read dz twice, which with
the above is 5V. On an H100 at H = 4096, V = 128,256 in bf16 that is 0.38 µs a row, beside 2.1 µs
for two products at full rate (data sheet). It would cost a third product, 1.1 µs, since the softmax
must be known before dz, and products written by us where the vendor's are at their best.

The rows of z are padded to 128 bytes: every load is 128 bits wide for any V.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from trimpot.kernels.ops import logits
from trimpot.kernels.triton.arithmetic import tanh
from trimpot.kernels.triton.launch import launch

BLOCK = 4096
THREADS = 512
PADDING = 64
"""Columns; 128 bytes of a 16-bit type."""


@triton.jit
def _capped(z, height, cap_inverse, CAPPED: tl.constexpr):
    """u and t; without a cap t is 0, so that 1 − t² is 1."""
    if CAPPED:
        t = tanh(z * cap_inverse)
        u = t * height
    else:
        t = 0.0
        u = z * height
    return u, t


@triton.jit
def _load(Z, start, stride, BLOCK: tl.constexpr):
    """Logits of a block, and their columns. Past the vocabulary, in the padding, they are
    anything."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(Z + column, mask=column < stride, other=0.0), column


@triton.jit
def _join(
    z, column, at_label, highest, total, summed, vocabulary, height, cap_inverse,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A block's logits in the running statistics. One exp for an element: of
    exp(old maximum − new) and exp(u − new) one is 1."""
    u, _ = _capped(z.to(tl.float32), height, cap_inverse, CAPPED)
    inside = column < vocabulary
    if SMOOTHED:
        summed += tl.where(inside, u - at_label, 0.0)
    u = tl.where(inside, u, float("-inf"))
    rise = u - highest
    e = tl.exp(-tl.abs(rise))
    total = tl.where(rise > 0, total * e + 1.0, total + e)
    return tl.maximum(highest, u), total, summed


@triton.jit
def _statistics(
    Z, at_label, stride, vocabulary, height, cap_inverse,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """max u, Σ exp(u − max) and, if SMOOTHED, mean_V (u − u at the label). Each lane keeps a
    maximum and sums of its own. A thread loads 32 bytes before it uses any of them, which are two
    blocks of 16 bits."""
    highest = tl.full((BLOCK,), -3.4e38, tl.float32)  # −inf − −inf would be NaN
    total = tl.zeros((BLOCK,), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    TWO: tl.constexpr = Z.dtype.element_ty.primitive_bitwidth == 16
    STEP: tl.constexpr = 2 * BLOCK if TWO else BLOCK
    for start in tl.range(0, vocabulary, STEP, loop_unroll_factor=1 if TWO else 2):  # type: ignore
        z, column = _load(Z, start, stride, BLOCK)
        if TWO:
            next_z, next_column = _load(Z, start + BLOCK, stride, BLOCK)
        highest, total, summed = _join(
            z, column, at_label, highest, total, summed, vocabulary, height, cap_inverse, SMOOTHED,
            CAPPED,
        )  # fmt: skip
        if TWO:
            highest, total, summed = _join(
                next_z, next_column, at_label, highest, total, summed, vocabulary, height,
                cap_inverse, SMOOTHED, CAPPED,
            )  # fmt: skip
    top = tl.max(highest)
    return top, tl.sum(total * tl.exp(highest - top)), tl.sum(summed) / vocabulary


@triton.jit
def _at_label(Z, label, vocabulary, height, cap_inverse, CAPPED: tl.constexpr):
    """u at the label; to be called before anything is written over the row."""
    fits = (label >= 0) & (label < vocabulary)
    u, _ = _capped(
        tl.load(Z + label, mask=fits, other=0.0).to(tl.float32), height, cap_inverse, CAPPED
    )
    return tl.where(fits, u, float("nan"))


@triton.jit
def _write_gradient(
    Z, label, shift, weight, factor, smoothing, stride, vocabulary, height, cap_inverse,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz over z, from the row's end to its start. softmax(u) is exp(u − lse), or exp(u − max) by a
    sum that is in `factor`: at u = 10⁴ the rounding of lse alone is 5e-4 of each."""
    everywhere = weight * (smoothing / vocabulary)
    at_label = everywhere + weight * (1.0 - smoothing)
    slope = weight * factor
    WIDE: tl.constexpr = BLOCK * 32 // Z.dtype.element_ty.primitive_bitwidth
    blocks = tl.cdiv(vocabulary, WIDE)
    for step in tl.range(0, blocks, loop_unroll_factor=2):  # type: ignore
        z, column = _load(Z, (blocks - 1 - step) * WIDE, stride, WIDE)
        u, t = _capped(z.to(tl.float32), height, cap_inverse, CAPPED)
        hot = tl.where(column == label.to(tl.int32), at_label, everywhere)
        dz = tl.exp(u - shift) * slope - hot
        if CAPPED:
            dz *= 1.0 - t * t
        tl.store(Z + column, dz.to(Z.dtype.element_ty), mask=column < stride)


@triton.jit
def _clear(Z, stride, BLOCK: tl.constexpr):
    for start in range(0, stride, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(Z + column, tl.zeros((BLOCK,), Z.dtype.element_ty), mask=column < stride)


@triton.jit
def row_loss(
    Z, LABELS, WEIGHTS, LOSS, stride, vocabulary, ignore_index, smoothing, z_loss, height,
    cap_inverse, HAS_WEIGHTS: tl.constexpr, SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
    NEED_DZ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each row and, over its logits, the gradient of the summed loss. u less its
    maximum comes first: beside a large lse a small loss would have no digits left."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride
    label = tl.load(LABELS + row)
    if label == ignore_index:
        tl.store(LOSS + row, 0.0)
        if NEED_DZ:
            _clear(Z, stride, BLOCK)
    else:
        at_label = _at_label(Z, label, vocabulary, height, cap_inverse, CAPPED)
        top, total, mean = _statistics(
            Z, at_label, stride, vocabulary, height, cap_inverse, SMOOTHED, CAPPED, BLOCK
        )
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(WEIGHTS + row)
        log_total = tl.log(total)
        lse = top + log_total
        loss = log_total - (at_label - top) + z_loss * lse * lse
        if SMOOTHED:
            loss -= smoothing * mean
        tl.store(LOSS + row, loss * weight)
        if NEED_DZ:
            top = tl.where(at_label == at_label, top, at_label)  # NaN for a label out of range
            factor = (1.0 + 2.0 * z_loss * lse) / total
            _write_gradient(
                Z, label, top, weight, factor, smoothing, stride, vocabulary, height, cap_inverse,
                CAPPED, BLOCK,
            )  # fmt: skip


@triton.jit
def row_logprob(
    Z, LABELS, LOGP, LSE, stride, vocabulary, ignore_index, height, cap_inverse,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride
    label = tl.load(LABELS + row)
    if label == ignore_index:
        tl.store(LOGP + row, 0.0)
        tl.store(LSE + row, 0.0)
    else:
        at_label = _at_label(Z, label, vocabulary, height, cap_inverse, CAPPED)
        top, total, _ = _statistics(
            Z, at_label, stride, vocabulary, height, cap_inverse, tl.constexpr(False), CAPPED, BLOCK
        )
        log_total = tl.log(total)
        tl.store(LOGP + row, at_label - top - log_total)
        tl.store(LSE + row, top + log_total)


@triton.jit
def row_logprob_gradient(
    Z, LABELS, G, LSE, stride, vocabulary, ignore_index, temperature_inverse, height, cap_inverse,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Z += row * stride
    label = tl.load(LABELS + row)
    if label == ignore_index:
        _clear(Z, stride, BLOCK)
    else:
        weight = -tl.load(G + row) * temperature_inverse
        _write_gradient(
            Z, label, tl.load(LSE + row), weight, 1.0, 0.0, stride, vocabulary, height, cap_inverse,
            CAPPED, BLOCK,
        )  # fmt: skip


class Head:
    """h, W and the gradients of both, a chunk of rows at a time:

    for rows, z in head.chunks():  # z [C, V + padding] = h[rows] Wᵀ
        head.launch(kernel, rows, z, ...)
        head.take(rows, z)  # z is dz now
    dh, dw = head.gradients()
    """

    def __init__(
        self,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int,
        need_dh: bool = False,
        need_dw: bool = False,
    ) -> None:
        self.h, self.weight, self.matrix = h, weight, weight.to(h.dtype)
        self.labels, self.ignore_index = labels.contiguous(), ignore_index
        self.need_dh, self.need_dw = need_dh, need_dw
        self.dh = torch.empty(h.shape if need_dh else 0, dtype=h.dtype, device=h.device)
        self.dw: torch.Tensor | None = None

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows and their logits, which have the same memory each time."""
        h, V = self.h, self.weight.shape[0]
        stride = triton.cdiv(V, PADDING) * PADDING
        memory = None
        for rows in logits.chunks(h.shape[0], V, h.device):
            count = rows.stop - rows.start
            if memory is None:  # the first chunk is the longest
                memory = torch.empty((count, stride), dtype=h.dtype, device=h.device)
            z = memory[:count]
            torch.mm(h[rows], self.matrix.T, out=z[:, :V])
            yield rows, z

    def launch(
        self,
        kernel: object,
        rows: slice,
        z: torch.Tensor,
        tensors_M: tuple[torch.Tensor, ...],
        numbers: tuple[float, ...],
        *,
        softcap: float,
        temperature: float = 1.0,
        **flags: bool,
    ) -> None:
        """`kernel` on the rows of z, with what it wants after LABELS and after ignore_index."""
        launch(
            kernel, (z.shape[0],), z, self.labels[rows], *(t[rows] for t in tensors_M),
            z.stride(0), self.weight.shape[0], self.ignore_index, *numbers,
            (softcap or 1.0) / temperature, 1 / softcap if softcap else 0.0,
            CAPPED=softcap > 0, **flags, BLOCK=BLOCK, threads=THREADS,
        )  # fmt: skip

    def take(self, rows: slice, dz: torch.Tensor) -> None:
        dz = dz[:, : self.weight.shape[0]]
        if self.need_dh:
            torch.mm(dz, self.matrix, out=self.dh[rows])
        if not self.need_dw:
            return
        part = logits.counted(self.h[rows], self.labels[rows], self.ignore_index)
        product = torch.mm(dz.T, part)
        if self.dw is None:
            self.dw = product.to(torch.float32)
        else:
            self.dw.add_(product)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """→ (dh [M, H] or empty, dW [V, H] or empty)."""
        if self.dw is None:
            return self.dh, self.weight.new_zeros(self.weight.shape if self.need_dw else 0)
        return self.dh, self.dw.to(self.weight.dtype)
