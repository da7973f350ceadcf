"""Output layer and cross-entropy in Triton; definition in ops/linear_cross_entropy.py, method and
traffic in vocabulary.py.

One launch a chunk makes of its logits the losses and, in place, their gradient: token weight,
smoothing, z-loss and soft cap are in it. A row that is ignored is not read; its dz is 0.
"""

from __future__ import annotations

import torch

from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check
from trimpot.kernels.triton.vocabulary import Head, row_loss

OP = "linear_cross_entropy"


def forward(
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
    """→ (loss, dh [M, H] or empty, dW [V, H] or empty)."""
    check(OP, h, weight)
    head = Head(h, weight, labels, ignore_index, need_dh, need_dw)
    losses = torch.empty(labels.shape, dtype=torch.float32, device=h.device)
    # Not read where there are none, but a kernel wants a pointer.
    weights = losses if token_weights is None else token_weights.to(torch.float32).contiguous()
    for rows, z in head.chunks():
        head.launch(
            row_loss, rows, z, (weights, losses), (label_smoothing, z_loss), softcap=softcap,
            HAS_WEIGHTS=token_weights is not None, SMOOTHED=label_smoothing > 0,
            NEED_DZ=need_dh or need_dw,
        )  # fmt: skip
        if need_dh or need_dw:
            head.take(rows, z)
    return losses.sum(dtype=torch.float64).float(), *head.gradients()


def proof_cases() -> list[Case]:
    large, small = {"M": 2048, "V": 128256, "H": 4096}, {"M": 8, "V": 20000, "H": 32}

    def arguments(make: Maker, n: Sizes, need_dh: bool = True) -> dict[str, object]:
        return {
            "h": make.normal(n["M"], n["H"]),
            "weight": make.normal(n["V"], n["H"], scale=2 * n["H"] ** -0.5),
            "labels": make.integers(0, n["V"], n["M"]),
            "token_weights": None, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0,
            "softcap": 0.0, "need_dh": need_dh, "need_dw": False,
        }  # fmt: skip

    def all_terms(make: Maker, n: Sizes) -> dict[str, object]:
        given = arguments(make, n)
        labels = make.integers(0, n["V"], n["M"])
        labels[::4] = -100
        weights = make.normal(n["M"], dtype=torch.float32).square()
        return given | {
            "labels": labels, "token_weights": weights, "label_smoothing": 0.1, "z_loss": 1e-3,
            "softcap": 30.0, "need_dw": True,
        }  # fmt: skip

    def moved(n: Sizes, size: int, times: float, each: int) -> float:
        """The logits `times` over, and `each` bytes a row. The vendor's products are not in it."""
        return n["M"] * (times * n["V"] * size + each)

    return [
        Case(
            OP, "forward", arguments, large, small,
            budget=lambda n, size: moved(n, size, 2, 12), wide_loads=True,
        ),
        Case(
            OP, "forward", lambda make, n: arguments(make, n, need_dh=False), large, small,
            budget=lambda n, size: moved(n, size, 1, 12), wide_loads=True, variant="no gradient",
        ),
        Case(
            OP, "forward", all_terms, large, small | {"V": 20011},
            budget=lambda n, size: moved(n, size, (2 * 3 + 1) / 4, 15), wide_loads=True,
            variant="all terms",
        ),
    ]  # fmt: skip
