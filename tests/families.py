"""Small models of each family that is known, for tests, and how two of them are held together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn import functional

from trimpot.kernels import native
from trimpot.runner.adapters.lora import add_lora, lora_layers
from trimpot.runner.config import AdapterSection
from trimpot.runner.fused.swap import NOUNS, Table
from trimpot.runner.tasks.causal_lm import token_loss_sum

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"sliding_window": 5}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}
BACKENDS = ["torch", *(["cpp"] if native.state().available else [])]
ADAPTER = AdapterSection(lora_rank=4, lora_alpha=8.0)
ATTENTION = {"gemma2": "eager"}
"""Only eager attention caps Gemma 2's scores."""


def build(family: str, **changes: Any) -> Any:
    name, own = CONFIGS[family]
    kind = f"{name}TextConfig" if family == "gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**{**COMMON, **own, **changes})
    config._attn_implementation = ATTENTION.get(family, "sdpa")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # as initialised, norms are 1 and biases 0: nothing would show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.train()


def with_lora(model: Any) -> Any:
    add_lora(model, ADAPTER, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model


def table(backend: str) -> Table:
    return {op: {"backend": backend, "why": "a test"} for op in (*NOUNS, "adamw_step")}


def outcome(model: Any, loss: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    value = loss(model)
    value.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    return [value.detach(), *(p.grad for p in trained if p.grad is not None)]


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [
        float((a.double() - e).norm() / e.norm().clamp_min(1e-9))
        for a, e in zip(found, exact, strict=True)
    ]


def assert_two_fold(found: Any, plain: Any, exact: Any) -> None:
    """Loss by itself, gradients together: single ones of plain torch may be right by luck."""
    mine, peer = distance(found, exact), distance(plain, exact)
    assert mine[0] <= 2 * peer[0] + 1e-6
    assert sum(mine[1:]) <= 2 * sum(peer[1:]), (sum(mine[1:]), sum(peer[1:]))


def wide(model: Any) -> Any:
    """The model in float64."""
    return copy.deepcopy(model).double()


def batch() -> dict[str, torch.Tensor]:
    """Two rows of 17 tokens, the second one padded on the right; some labels are not trained."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, COMMON["vocab_size"], (2, 17), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(model: Any) -> torch.Tensor:
    """transformers' logits, torch's cross-entropy."""
    given = batch()
    labels = given.pop("labels")[:, 1:]
    logits = model(**given).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def our_loss(model: Any) -> torch.Tensor:
    return token_loss_sum(model, batch())
