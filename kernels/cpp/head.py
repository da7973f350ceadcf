"""The head's product on the CPU: logits of a chunk of tokens, and a chunk's gradient times W.

On a pack of the weight (int16: csrc/gemm.h, bf16x3: csrc/split.h), fp32 by torch, or torch's
product of 16-bit operands, whichever `rates` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp import gemm, rates, tensors

CHUNK_BYTES = 32 << 20
"""Of a chunk's fp32 logits: 154 rows at V = 49,152. Its integer copy takes half as much again."""
UNSPLIT = 256
"""Of the sums over V: longer ones MKL cuts among its threads, and their number decides the bits.
It costs 7 % of that product at V = 49,152, H = 576."""


def chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of whole tiles, nearly equal in length."""
    most = max(CHUNK_BYTES // (4 * max(vocabulary, 1)), gemm.TILE_ROWS)
    length = -(-rows // max(-(-rows // most), 1))
    length = max(-(-length // gemm.TILE_ROWS) * gemm.TILE_ROWS, 1)
    for first in range(0, rows, length):
        yield slice(first, min(first + length, rows))


class Head:
    """W [V, H] as `op` uses it in one call, with h. `frozen`: a pack of it may be kept."""

    def __init__(
        self, op: str, h: torch.Tensor, weight: torch.Tensor, arithmetic: str, frozen: bool
    ):
        tensors.check(op, h)
        kind = _arithmetic(arithmetic, h.dtype, weight)
        self.weight, self.group = gemm.readable(weight), None
        self.form: Any = rates.PACKED.get(kind)
        if self.form is not None:
            make = self.form.pack_weights
            self.group = gemm.packed([weight], make) if frozen else make([weight])
        if not self.group:
            self.weight = self.weight.to(h.dtype if kind == "torch" else torch.float32)

    def logits(self, h: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(rows, h of them in fp32, fp32 logits of them), chunk by chunk, in one buffer."""
        buffer = torch.empty(0)
        for rows in chunks(h.shape[0], self.weight.shape[0]):
            part = gemm.readable(h[rows])
            if not buffer.numel():
                buffer = tensors.empty((part.shape[0], self.weight.shape[0]))
            z = buffer[: part.shape[0]]
            if self.group:
                quantised = self.form.quantise_input(part, self.group)
                self.form.forward(quantised, self.group.packs[0], z, None, None)
            elif self.weight.dtype == torch.float32:
                torch.mm(part.float(), self.weight.T, out=z)
            else:
                z.copy_(part.to(self.weight.dtype) @ self.weight.T)
            yield rows, gemm.single(part), z

    def input_gradient(self, dz: torch.Tensor, out: torch.Tensor) -> None:
        """out [rows, H] fp32 = dz W."""
        if self.group:
            quantised = self.form.quantise_gradient(dz, self.group.packs[0])
            self.form.gradient(quantised, self.group.packs[0], out, False, None)
        elif self.weight.dtype != torch.float32:
            out.copy_(dz.to(self.weight.dtype) @ self.weight)
        elif dz.shape[0] < gemm.TILE_ROWS:  # whose sums MKL cuts up in any case
            gemm.gradient_fp32(dz, self.weight, out, False, None)
        else:
            out.zero_()
            for first in range(0, self.weight.shape[0], UNSPLIT):
                part = slice(first, first + UNSPLIT)
                out.addmm_(dz[:, part], self.weight[part])

    def weight_gradient(self, dz: torch.Tensor, h: torch.Tensor, out: torch.Tensor) -> None:
        """out [V, H] fp32 += dzᵀ h, of fp32 h."""
        if self.group or self.weight.dtype == torch.float32:
            out.addmm_(dz.T, h)
        else:
            out += dz.T.to(self.weight.dtype) @ h.to(self.weight.dtype)


def _arithmetic(wanted: str, dtype: torch.dtype, weight: torch.Tensor) -> str:
    """int16, fp32, or torch for its product of 16-bit operands."""
    if dtype == torch.float32 and not rates.PACKED.keys() & set(rates.permitted(wanted, dtype)):
        return "fp32"  # by MKL: at the few rows of a chunk 1.3 to 1.8 times as fast as our tiles
    vocabulary, hidden = weight.shape
    return rates.choose(wanted, dtype, hidden, vocabulary)


def softmax_loss(
    z: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (loss, lse), each [rows] fp32; z becomes its gradient where that is asked for."""
    rows, columns = z.shape
    loss, lse = torch.empty(rows), torch.empty(rows)
    labels = labels.contiguous()
    if token_weights is not None:
        token_weights = token_weights.float().contiguous()
    native.extension().softmax_loss(
        z.data_ptr(),
        z.stride(0),
        rows,
        columns,
        labels.data_ptr(),
        0 if token_weights is None else token_weights.data_ptr(),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        loss.data_ptr(),
        lse.data_ptr(),
        gradient,
    )
    return loss, lse
