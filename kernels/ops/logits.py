"""What losses on top of the vocabulary share: z = h Wᵀ a few rows at a time, and its soft cap.

C rows of a chunk, V vocabulary, H hidden. The logits of all tokens, M × V, are never there: a chunk
of them is made, used and forgotten. Logits are rounded to the type of h, as any matrix product of
that type; the softmax is float32 (of float64: itself).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops.opmath import opmath

CHUNK_BYTES = 48 << 20
"""Of one chunk's float32 logits on a CPU: 256 rows at V = 49,152, enough for the matrix product."""
GPU_ROWS = 1024
"""W is read once a chunk; from about a thousand rows on, a GPU's product is bound by arithmetic."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    if device.type != "cpu":
        return GPU_ROWS
    return max(CHUNK_BYTES // (4 * max(vocabulary, 1)), 16)


def chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `rows`, of nearly equal length."""
    most = chunk_rows(vocabulary, device)
    length = -(-rows // max(-(-rows // most), 1))
    for first in range(0, rows, max(length, 1)):
        yield slice(first, min(first + length, rows))


def logits(h_CH: torch.Tensor, weight_VH: torch.Tensor, softcap: float) -> torch.Tensor:
    """z [C, V] in opmath: h Wᵀ, or c·tanh(h Wᵀ / c)."""
    z = (h_CH @ weight_VH.T).to(opmath(h_CH.dtype))
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def through_softcap(dz: torch.Tensor, capped: torch.Tensor, softcap: float) -> torch.Tensor:
    """dz · (1 − (z/c)²), in place: the gradient before the cap, of what comes after it."""
    return dz.addcmul_(dz, (capped / softcap).square_(), value=-1)


def trained(labels: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Numbers of the rows whose label counts, or None if all rows should be looked at: on a GPU
    the host would have to wait to know how many there are."""
    if labels.device.type != "cpu":
        return None
    counts = labels != ignore_index
    return None if bool(counts.all()) else counts.nonzero().squeeze(1)


def counted(h_CH: torch.Tensor, labels_C: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """h for dW = dzᵀ h of rows that `trained` did not choose: zeros where the label does not
    count, since there a NaN of h times dz = 0 would be a NaN."""
    return h_CH.where((labels_C != ignore_index)[:, None], 0)


def check(op: str, h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    fits = weight.dim() == 2 and h.dim() >= 1 and h.shape[-1] == weight.shape[1]
    if not fits or labels.shape != h.shape[:-1]:
        raise KernelError(
            f"{op}: h is {tuple(h.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}; [..., H], [V, H] and [...] are wanted"
        )
    if labels.dtype != torch.int64:
        raise KernelError(f"{op}: labels are {labels.dtype}; torch.int64 is wanted")
