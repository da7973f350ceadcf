"""The least that one step of `trimpot bench step` must do, op by op, in a Llama-like model: with
LoRA on all linear layers, whose base is frozen, or with all weights trained."""

from __future__ import annotations

from collections.abc import Sequence

from trimpot.kernels.bench.work import (
    BOTH,
    Work,
    adamw_work,
    attention_work,
    cross_entropy_work,
    glu_work,
    linear_work,
    lora_work,
    norm_work,
    rope_work,
)
from trimpot.runner.bench_workloads import Method
from trimpot.runner.plan.facts import ModelFacts
from trimpot.runner.plan.kernels import GATED

ITEM = 4
"""Bytes: activations, and weights as the peer reads them, are float32."""
NORMS = 2
"""Of a layer; the model's last one comes to them."""


def step_work(facts: ModelFacts, documents: Sequence[int], method: Method) -> dict[str, Work]:
    """{op: all of its calls in a step}, by the names of the shares. `documents`: their tokens."""
    tokens = sum(documents)
    h, i, d = facts.hidden, facts.intermediate, facts.head_dim
    q, kv = facts.heads * d, facts.kv_heads * d
    linears = [(h, q + 2 * kv, 3), (q, h, 1), (h, 2 * i, 2), (i, h, 1)]
    adapted = [lora_work(tokens, k, n, siblings, ITEM)[BOTH] for k, n, siblings in linears]
    trained = [linear_work(tokens, k, n, ITEM)[BOTH] for k, n, _ in linears]
    lora = method == "lora"
    each = {
        "lora_linear" if lora else "GEMM (torch)": sum(adapted if lora else trained, Work(0, 0)),
        "varlen_attention": attention_work(documents, facts.heads, facts.kv_heads, d, ITEM)[BOTH],
        "rope": rope_work(tokens, facts.heads + facts.kv_heads, d, ITEM)[BOTH],
    }
    if facts.activation in GATED:
        each[GATED[facts.activation]] = glu_work(tokens, i, ITEM)[BOTH]
    found = {op: work * facts.layers for op, work in each.items()}
    found["add_rms_norm"] = norm_work(tokens, h, ITEM)[BOTH] * (NORMS * facts.layers + 1)
    head = cross_entropy_work(tokens, h, facts.vocab, ITEM, frozen=lora)
    found["linear_cross_entropy"] = head[BOTH]
    if not lora:
        found["adamw_step"] = adamw_work(facts.parameters, ITEM)
    return found
