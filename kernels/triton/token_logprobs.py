"""Log-probabilities of given tokens in Triton; definition in ops/token_logprobs.py, method and
traffic in vocabulary.py.

Forward reads the logits of a chunk once; backward reads them once, made again by the vendor's
product, and writes their gradient in place. A row that is ignored is not read.

Backward takes softmax(u) as exp(u − lse) with the lse that forward kept. Its rounding, half a unit
in the last place, is that of any one logit of its size; a sum of its own would be free of it, and
would read each row twice.
"""

from __future__ import annotations

from typing import Any

import torch

from trimpot.kernels.ops import logits
from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check
from trimpot.kernels.triton.vocabulary import Head, row_logprob, row_logprob_gradient

OP = "token_logprobs"


def forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (logp [M], lse [M]), both 0 at ignored tokens."""
    check(OP, h, weight)
    head = Head(h, weight, labels, ignore_index)
    logp, lse = (torch.empty(labels.shape, dtype=torch.float32, device=h.device) for _ in range(2))
    for rows, z in head.chunks():
        head.launch(row_logprob, rows, z, (logp, lse), (), softcap=softcap, temperature=temperature)
    return logp, lse


def backward(
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
    """→ (dh [M, H] or empty, dW [V, H] or empty)."""
    check(OP, g, h, weight, lse)
    head = Head(h, weight, labels, ignore_index, need_dh, need_dw)
    g, lse = g.to(torch.float32).contiguous(), lse.contiguous()
    for rows, z in head.chunks():
        head.launch(
            row_logprob_gradient, rows, z, (g, lse), (1 / temperature,),
            softcap=softcap, temperature=temperature,
        )  # fmt: skip
        head.take(rows, z)
    return head.gradients()


def proof_cases() -> list[Case]:
    large, small = {"M": 2048, "V": 128256, "H": 4096}, {"M": 8, "V": 20000, "H": 32}

    def forwards(make: Maker, n: Sizes, softcap: float, temperature: float) -> dict[str, Any]:
        labels = make.integers(0, n["V"], n["M"])
        labels[::4] = -100
        return {
            "h": make.normal(n["M"], n["H"]),
            "weight": make.normal(n["V"], n["H"], scale=2 * n["H"] ** -0.5),
            "labels": labels, "ignore_index": -100, "softcap": softcap, "temperature": temperature,
        }  # fmt: skip

    def backwards(
        make: Maker, n: Sizes, softcap: float, temperature: float, need_dw: bool
    ) -> dict[str, Any]:
        given = forwards(make, n, softcap, temperature)
        u = logits.logits(given["h"], given["weight"], softcap) / temperature
        g = make.normal(n["M"], dtype=torch.float32)
        return {"g": g, **given, "lse": u.logsumexp(1), "need_dh": True, "need_dw": need_dw}

    def moved(n: Sizes, size: int, trained: float, ignored: float, each: int) -> float:
        """A row's logits so many times over, and `each` bytes; a quarter is ignored. The vendor's
        products are not in it."""
        times = 0.75 * trained + 0.25 * ignored
        return n["M"] * (times * n["V"] * size + each)

    return [
        Case(
            OP, "forward", lambda make, n: forwards(make, n, 0.0, 1.0), large, small,
            budget=lambda n, size: moved(n, size, 1, 0, 16), wide_loads=True,
        ),
        Case(
            OP, "forward", lambda make, n: forwards(make, n, 30.0, 0.7), large,
            small | {"V": 20011}, budget=lambda n, size: moved(n, size, 1, 0, 16), wide_loads=True,
            variant="soft cap",
        ),
        Case(
            OP, "backward", lambda make, n: backwards(make, n, 0.0, 1.0, False), large, small,
            budget=lambda n, size: moved(n, size, 2, 1, 16), wide_loads=True,
        ),
        Case(
            OP, "backward", lambda make, n: backwards(make, n, 30.0, 0.7, True), large,
            small | {"V": 20011}, budget=lambda n, size: moved(n, size, 2, 1, 16), wide_loads=True,
            variant="soft cap, trained head",
        ),
    ]  # fmt: skip
