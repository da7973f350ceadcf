"""The least that each op must do: floating-point operations, and bytes moved once each. No torch.

M tokens, K = d_in, N = d_out (all siblings together), R = rank, H hidden, V vocabulary; `size` is
of an item in bytes. A LoRA linear's traffic is kernels.md's bound: 2MN + 3MK + 2KN elements,
forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimpot.kernels.bench.shapes import RANK

FORWARD, BACKWARD, BOTH, STEP = "fwd", "bwd", "fwd+bwd", "step"


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(times * self.flops, times * self.bytes)


def _modes(forward: Work, backward: Work) -> dict[str, Work]:
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def lora_work(m: int, k: int, n: int, siblings: int, size: int) -> dict[str, Work]:
    base = 2 * m * k * n
    skinny = 2 * m * RANK * (siblings * k + n)
    return _modes(
        Work(base + skinny, size * (m * k + k * n + m * n)),
        Work(base + 2 * skinny, size * (2 * m * k + k * n + m * n)),
    )


def linear_work(m: int, k: int, n: int, size: int) -> dict[str, Work]:
    """Of a trained weight: backward has the weight's gradient to make, too."""
    once = Work(2 * m * k * n, size * (m * k + k * n + m * n))
    return _modes(once, once * 2)


def cross_entropy_work(m: int, h: int, v: int, size: int, frozen: bool = True) -> dict[str, Work]:
    """With a frozen head the gradient is ready after forward: the two are no parts of a step."""
    once, gradients = m * h + v * h, m * h + (0 if frozen else v * h)
    return {
        FORWARD: Work(2 * m * h * v, size * once),
        BOTH: Work((4 if frozen else 6) * m * h * v, size * (once + gradients)),
    }


def attention_work(
    documents: Sequence[int], heads: int, kv_heads: int, head_dim: int, size: int
) -> dict[str, Work]:
    """Causal, within documents of so many tokens. Backward is 5 products for 2, reads q, k, v, o,
    do and writes three gradients."""
    pairs = sum(n * (n + 1) // 2 for n in documents)
    flops = 4 * pairs * heads * head_dim
    moved = 2 * sum(documents) * (heads + kv_heads) * head_dim * size
    return _modes(Work(flops, moved), Work(2.5 * flops, 2 * moved))


def norm_work(m: int, h: int, size: int) -> dict[str, Work]:
    """Forward reads x and the residual, writes their sum and y; backward reads both gradients and
    the sum, writes one gradient."""
    return _modes(Work(6 * m * h, 4 * m * h * size), Work(9 * m * h, 4 * m * h * size))


def adamw_work(count: int, size: int) -> Work:
    """Reads weight, gradient and two moments, writes all but the gradient."""
    return Work(16 * count, 7 * count * size)


def rope_work(m: int, heads: int, head_dim: int, size: int) -> dict[str, Work]:
    """`heads`: of q and k together."""
    n = m * heads * head_dim
    each = Work(3 * n, 2 * n * size + m * head_dim * size)
    return _modes(each, each)


def glu_work(m: int, width: int, size: int) -> dict[str, Work]:
    n = m * width
    return _modes(Work(6 * n, 3 * n * size), Work(12 * n, 5 * n * size))
