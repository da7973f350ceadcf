"""token_logprobs in C++, a chunk of tokens at a time. Signatures as in ops/token_logprobs.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimpot.kernels.cpp import gemm
from trimpot.kernels.cpp.head import Head, softmax_loss
from trimpot.kernels.ops import token_logprobs as definition
from trimpot.kernels.ops.logits import trained


@dataclass(frozen=True)
class TokenLogprobs:
    """`arithmetic`: fp32 | int16, or auto for the fastest that low precision permits."""

    arithmetic: str = "auto"

    def forward(
        self,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: int,
        softcap: float,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ (logp [M], lse [M]), fp32."""
        if softcap and temperature != 1:  # two scalings: the loss kernel has one
            return definition.forward(h, weight, labels, ignore_index, softcap, temperature)
        head = Head(definition.OP, h, weight, self.arithmetic, frozen=not weight.requires_grad)
        logp, lse = torch.zeros(h.shape[0]), torch.zeros(h.shape[0])
        rows = trained(labels, ignore_index)
        if rows is not None:
            h, labels = h[rows], labels[rows]
        for cut, _, z in head.logits(_cooled(h, temperature)):
            at = cut if rows is None else rows[cut]
            loss, lse[at] = softmax_loss(
                z, labels[cut], None, ignore_index, 0.0, 0.0, softcap, False
            )
            logp[at] = -loss
        return logp, lse

    def backward(
        self,
        g: torch.Tensor,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        lse: torch.Tensor,
        ignore_index: int,
        softcap: float,
        temperature: float,
        need_dh: bool,
        need_dw: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ (dh, dw), empty where they are not needed: of −g weighted cross-entropy."""
        if softcap and temperature != 1:
            return definition.backward(
                g, h, weight, labels, lse, ignore_index, softcap, temperature, need_dh, need_dw
            )
        head = Head(definition.OP, h, weight, self.arithmetic, frozen=not need_dw)
        rows = trained(labels, ignore_index)
        h_all = h
        if rows is not None:
            g, h, labels = g[rows], h[rows], labels[rows]
        dh = torch.empty(h.shape if need_dh else 0)
        dw = torch.zeros(weight.shape if need_dw else 0)
        down = -g.float() / temperature
        for cut, part, z in head.logits(_cooled(h, temperature)):
            softmax_loss(z, labels[cut], down[cut], ignore_index, 0.0, 0.0, softcap, True)
            if need_dh:
                head.input_gradient(z, dh[cut])
            if need_dw:
                head.weight_gradient(z, part if temperature == 1 else gemm.single(h[cut]), dw)
        if rows is not None and need_dh:
            dh = torch.zeros(h_all.shape).index_copy_(0, rows, dh)
        return dh.to(h.dtype), dw.to(weight.dtype)


def _cooled(h: torch.Tensor, temperature: float) -> torch.Tensor:
    """h / temperature in fp32: dividing H items a token and not V logits."""
    return h if temperature == 1 else h.float() / temperature


variant = TokenLogprobs
_default = TokenLogprobs()
forward, backward = _default.forward, _default.backward
