"""Cases of attention: one causal document, and eight packed ones of different lengths.

T tokens, N heads of q, G of k and v, D of each.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch.nn import functional

from trimpot.kernels.bench import ours
from trimpot.kernels.bench.case import Case, Source, Tensors
from trimpot.kernels.bench.shapes import Call
from trimpot.kernels.bench.work import attention_work

SHARES = {"causal": (1,), "packed": (16, 11, 3, 1, 14, 7, 9, 3)}
"""Of the documents in the tokens."""


def attention_case(call: Call, tokens: int, device: str, dtype: torch.dtype) -> Case:
    source = Source(device, dtype)
    heads, kv, d = call.shape.heads, call.shape.kv_heads, call.width
    whole = sum(SHARES[call.case])
    ends = [tokens * share // whole for share in itertools.accumulate(SHARES[call.case])]
    inputs: Tensors = {
        "q": source.normal(tokens, heads, d),
        "k": source.normal(tokens, kv, d),
        "v": source.normal(tokens, kv, d),
        "cu_seqlens": torch.tensor([0, *ends], device=device),
    }
    lengths = [b - a for a, b in itertools.pairwise([0, *ends])]
    work = attention_work(lengths, heads, kv, d, dtype.itemsize)
    program = functools.partial(ours.program, call.op)
    return Case(call, dtype, inputs, ("q", "k", "v"), attention_torch, program, work)


def attention_torch(t: Tensors) -> tuple[torch.Tensor, ...]:
    """torch's sdpa, a document at a time: with a mask over all of them it takes several times
    as long."""
    cuts = t["cu_seqlens"].tolist()
    q_BNTD, k_BNTD, v_BNTD = (t[name].transpose(0, 1)[None] for name in "qkv")
    outs = [
        functional.scaled_dot_product_attention(
            *(x[:, :, a:b] for x in (q_BNTD, k_BNTD, v_BNTD)), is_causal=True, enable_gqa=True
        )
        for a, b in itertools.pairwise(cuts)
    ]
    return (torch.cat(outs, 2)[0].transpose(0, 1),)
