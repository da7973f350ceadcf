"""linear_cross_entropy in C++: logits of a chunk, their loss and gradient in place, and its
product with W, before the next chunk. Signatures as in ops/linear_cross_entropy.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimpot.kernels.cpp.head import Head, softmax_loss
from trimpot.kernels.cpp.tensors import empty
from trimpot.kernels.ops.linear_cross_entropy import OP
from trimpot.kernels.ops.logits import trained


@dataclass(frozen=True)
class LinearCrossEntropy:
    """`arithmetic`: fp32 | int16, or auto for the fastest that low precision permits."""

    arithmetic: str = "auto"

    def forward(
        self,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        need_dh: bool,
        need_dw: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """→ (loss fp32, dh, dw)."""
        rows = trained(labels, ignore_index)
        if rows is not None:
            h_all, h, labels = h, h[rows], labels[rows]
            token_weights = None if token_weights is None else token_weights[rows]
        head = Head(OP, h, weight, self.arithmetic, frozen=not need_dw)
        dh = empty(h.shape if need_dh else (0,))
        dw = torch.zeros(weight.shape if need_dw else 0)
        total = torch.zeros((), dtype=torch.float64)
        for cut, part, z in head.logits(h):
            each = None if token_weights is None else token_weights[cut]
            loss, _ = softmax_loss(
                z, labels[cut], each, ignore_index, label_smoothing, z_loss, softcap,
                need_dh or need_dw,
            )  # fmt: skip
            total += loss.double().sum()
            if need_dh:
                head.input_gradient(z, dh[cut])
            if need_dw:
                head.weight_gradient(z, part, dw)
        if rows is not None and need_dh:
            dh = torch.zeros(h_all.shape).index_copy_(0, rows, dh)
        return total.float(), dh.to(h.dtype), dw.to(weight.dtype)


variant = LinearCrossEntropy
forward = LinearCrossEntropy().forward
