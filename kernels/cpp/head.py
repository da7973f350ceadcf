"""The head's product on the CPU: logits of a chunk of tokens, and a chunk's gradient times W.

int16 on the integer pack of the weight (csrc/gemm.h), or fp32 by torch, whichever `rates` says.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp import gemm, rates, tensors

CHUNK_BYTES = 32 << 20
"""Of a chunk's fp32 logits: 154 rows at V = 49,152. Its integer copy takes half as much again."""


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
        self.weight = gemm.readable(weight)
        vocabulary, hidden = weight.shape
        self.group = None
        if rates.choose(arithmetic, h.dtype, hidden, vocabulary) == "int16":
            self.group = gemm.packed([weight]) if frozen else gemm.pack_weights([weight])
        elif self.weight.dtype != torch.float32:
            self.weight = self.weight.float()

    def logits(self, h: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(rows, h of them in fp32, fp32 logits of them), chunk by chunk, in one buffer."""
        buffer = torch.empty(0)
        for rows in chunks(h.shape[0], self.weight.shape[0]):
            part = gemm.readable(h[rows])
            if not buffer.numel():
                buffer = torch.empty(part.shape[0], self.weight.shape[0])
            z = buffer[: part.shape[0]]
            if self.group:
                quantised = gemm.quantise_input(part, self.group)
                gemm.forward(quantised, self.group.packs[0], z, None, None)
            else:
                torch.mm(part.float(), self.weight.T, out=z)
            yield rows, gemm.single(part), z

    def input_gradient(self, dz: torch.Tensor, out: torch.Tensor) -> None:
        """out [rows, H] fp32 = dz W."""
        if self.group:
            quantised = gemm.quantise_gradient(dz, self.group.packs[0])
            gemm.gradient(quantised, self.group.packs[0], out, False, None)
        else:
            torch.mm(dz, self.weight, out=out)


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
