"""LoRA (Hu et al. 2021): y = x Wᵀ + scale · (dropout(x) Aᵀ) Bᵀ, W frozen.

M tokens, K = d_in, N = d_out, R = rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from trimpot.runner.config import AdapterSection
from trimpot.runner.errors import PlanError


class LoraLinear(nn.Module):
    """A frozen linear layer and its update. Parameter names are those of PEFT."""

    def __init__(self, base: nn.Linear, adapter: AdapterSection, seed: int, name: str):
        super().__init__()
        self.base_layer = base
        self.scale = adapter.lora_alpha / adapter.lora_rank
        self.dropout = adapter.lora_dropout
        options = {"dtype": base.weight.dtype, "device": base.weight.device}
        d_out, d_in = base.out_features, base.in_features
        a_RK = torch.empty(adapter.lora_rank, d_in)
        # Uniform(±1/√K), as PEFT has it (kaiming with a = √5); its own generator for each
        # layer, so that adding a target module changes no other layer's start.
        bound = 1 / math.sqrt(d_in)
        a_RK.uniform_(-bound, bound, generator=torch.Generator().manual_seed(_mix(seed, name)))
        self.lora_A = nn.Parameter(a_RK.to(**options))
        self.lora_B = nn.Parameter(torch.zeros(d_out, adapter.lora_rank, **options))

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        """x [..., K] → [..., N]."""
        dropped_MK = nn.functional.dropout(x_MK, self.dropout, self.training)
        update_MN = nn.functional.linear(nn.functional.linear(dropped_MK, self.lora_A), self.lora_B)
        return torch.add(self.base_layer(x_MK), update_MN, alpha=self.scale)

    def merged_weight(self) -> torch.Tensor:
        """W + scale · B A → [N, K] in W's dtype; the product and the sum in float64."""
        update_NK = self.lora_B.double() @ self.lora_A.double()
        weight_NK = self.base_layer.weight
        return (weight_NK.double() + self.scale * update_NK).to(weight_NK.dtype)


def _mix(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def add_lora(
    model: nn.Module, adapter: AdapterSection, seed: int, names: Sequence[str] | None = None
) -> list[str]:
    """Freeze the model and put an adapter on each target layer, in place → their names.

    `names`: whole names of the layers, where they are known already.
    """
    model.requires_grad_(False)
    names = target_layers(model, adapter) if names is None else list(names)
    for name in names:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        setattr(model.get_submodule(parent), child, LoraLinear(base, adapter, seed, name))
    return names


def target_layers(model: nn.Module, adapter: AdapterSection) -> list[str]:
    """Names of the linear layers that the adapter goes on. Raises PlanError if there are none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if adapter.target_modules == "all-linear":
        if not linears:
            raise PlanError(
                f"{type(model).__name__} has no torch.nn.Linear layer for LoRA; "
                "set method: full or freeze"
            )
        return linears
    wanted = set(adapter.target_modules)
    names = [name for name in linears if name.rsplit(".", 1)[-1] in wanted]
    missing = wanted - {name.rsplit(".", 1)[-1] for name in names}
    if missing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise PlanError(
            f"adapter.target_modules names {', '.join(sorted(missing))}, which the model has not; "
            f"its linear layers: {', '.join(known)}"
        )
    return names


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base does: x + 0 · update is x, bit for bit."""
    scales = {layer: layer.scale for layer in lora_layers(model).values()}
    for layer in scales:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in scales.items():
            layer.scale = scale


def merge_lora(model: nn.Module) -> None:
    """Replace each adapted layer by a plain one with the merged weight, in place."""
    for name, layer in lora_layers(model).items():
        with torch.no_grad():
            layer.base_layer.weight.copy_(layer.merged_weight())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
