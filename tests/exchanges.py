"""Attention of rows that are split over workers, for each number of heads that can be:
`torchrun … exchanges.py`. Every worker holds what it gets against attention over the whole row."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from trimpot.kernels.ops.varlen_attention import varlen_attention
from trimpot.runner.fused.exchange import Workers, to_heads, to_tokens

HEADS = {2: [(2, 1), (4, 2), (6, 3), (12, 4)], 4: [(4, 1), (4, 4), (8, 2), (12, 6), (12, 3)]}
"""{workers: [(heads of q, of k and v)]}; (6, 3) and (12, 6) have neither as many as the other
nor a multiple of it."""
TOKENS, WIDTH = 24, 8
CUTS = torch.tensor([0, 5, 6, 21, 23])  # the last token belongs to no document


def attended(
    rows: list[torch.Tensor], workers: Workers | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(o, gradients of q, k, v) under a loss that weighs every item of o; of own tokens."""
    *qkv, weight = (x.clone().requires_grad_() for x in rows)
    q, k, v = qkv if workers is None else to_heads(*qkv, workers)
    o, _ = varlen_attention(q, k, v, CUTS, window=4, backend="torch")
    o = o if workers is None else to_tokens(o, workers)
    (o * weight).sum().backward()
    return o.detach(), [x.grad for x in qkv if x.grad is not None]


def check(workers: Workers, heads: int, kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(heads * 100 + kv_heads)
    shapes = [(TOKENS, n, WIDTH) for n in (heads, kv_heads, kv_heads, heads)]
    whole = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    o, gradients = attended(whole, None)
    each = TOKENS // workers.size
    own = slice(workers.rank * each, (workers.rank + 1) * each)
    got, got_gradients = attended([x[own] for x in whole], workers)
    assert len(got_gradients) == len(gradients) == 3
    for a, b in zip([got, *got_gradients], [o, *gradients], strict=True):
        torch.testing.assert_close(a, b[own], rtol=1e-12, atol=1e-12)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), dist.get_world_size()
    for size, cases in HEADS.items():
        groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
        workers = Workers(groups[rank // size], size, rank % size)
        for heads, kv_heads in cases:
            check(workers, heads, kv_heads)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
