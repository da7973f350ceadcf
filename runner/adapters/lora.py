"""LoRA (Hu et al. 2021): y = x Wᵀ + scale · (dropout(x) Aᵀ) Bᵀ, W frozen.

M tokens, K = d_in, N = d_out, R = rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimpot.kernels.ops.lora_linear import lora_linear
from trimpot.kernels.ops.opmath import in_working_type
from trimpot.kernels.ops.philox import draw_seeds, dropped
from trimpot.runner.adapters.nf4_linear import Nf4Linear, frozen_weights
from trimpot.runner.config import AdapterSection
from trimpot.runner.errors import PlanError

OFF = "off"
LINEARS = (nn.Linear, Nf4Linear)


class LoraLinear(nn.Module):
    """A frozen linear layer and its update. Parameter names are those of PEFT.

    `backend` of the op lora_linear computes it; off: torch's own layers and autograd. Dropout has
    the same masks in all of them: they come of seeds that torch's generator draws in forward.
    """

    def __init__(self, base: nn.Linear | Nf4Linear, adapter: AdapterSection, seed: int, name: str):
        super().__init__()
        self.base_layer = base
        self.rank = adapter.lora_rank
        self.scale = adapter.lora_alpha / adapter.lora_rank
        self.dropout = adapter.lora_dropout
        self.backend = OFF
        like = base if isinstance(base, Nf4Linear) else base.weight
        options = {"dtype": like.dtype, "device": like.device}
        d_out, d_in = base.out_features, base.in_features
        a_RK = torch.empty(adapter.lora_rank, d_in)
        # Uniform(±1/√K), as PEFT has it (kaiming with a = √5); its own generator for each
        # layer, so that adding a target module changes no other layer's start.
        bound = 1 / math.sqrt(d_in)
        a_RK.uniform_(-bound, bound, generator=torch.Generator().manual_seed(_mix(seed, name)))
        self.lora_A = nn.Parameter(a_RK.to(**options))
        self.lora_B = nn.Parameter(torch.zeros(d_out, adapter.lora_rank, **options))

    def forward(self, x: torch.Tensor, siblings: Sequence[LoraLinear] = ()) -> Any:
        """x [..., K] → [..., N]; with siblings, which share x, the list of all their outputs."""
        if self.backend == OFF or self.scale == 0:
            return [layer.plain(x) for layer in (self, *siblings)] if siblings else self.plain(x)
        layers = (self, *siblings)
        x = in_working_type(x)
        with frozen_weights([layer.base_layer for layer in layers], x.dtype) as weights:
            ys = lora_linear(
                x,
                weights,
                [layer.lora_A for layer in layers],
                [layer.lora_B for layer in layers],
                [layer.scale for layer in layers],
                biases=[layer.base_layer.bias for layer in layers],
                dropout=self.dropout if self.training else 0.0,
                backend=self.backend,
            )
        return ys if siblings else ys[0]

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale == 0:  # x + 0 · update
            return self.base_layer(x)
        kept = x
        if self.dropout and self.training:
            rows, seed = x.reshape(-1, x.shape[-1]), int(draw_seeds(1))
            kept = dropped(rows, 0, seed, self.dropout).view(x.shape)
        update = nn.functional.linear(nn.functional.linear(kept, self.lora_A), self.lora_B)
        return torch.add(self.base_layer(x), update, alpha=self.scale)

    def joins(self, other: LoraLinear) -> bool:
        """Whether the two can be one call of the op, where they share x."""
        return (
            OFF != self.backend == other.backend
            and self.rank == other.rank
            and self.dropout == other.dropout
        )

    def merged_weight(self) -> torch.Tensor:
        """W + scale · B A → [N, K] in W's dtype; the product and the sum in float64. Of a plain
        layer: NF4 is dequantised first (quantized.py)."""
        update_NK = self.lora_B.double() @ self.lora_A.double()
        assert isinstance(self.base_layer, nn.Linear)
        weight_NK = self.base_layer.weight
        return (weight_NK.double() + self.scale * update_NK).to(weight_NK.dtype)


def project(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of linear layers that share x; the adapted ones among them in one op."""
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    if len(adapted) < 2 or not all(adapted[0].joins(layer) for layer in adapted[1:]):
        return [layer(x) for layer in layers]
    joint = iter(adapted[0](x, siblings=adapted[1:]))
    return [next(joint) if isinstance(layer, LoraLinear) else layer(x) for layer in layers]


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
        assert isinstance(base, LINEARS)
        setattr(model.get_submodule(parent), child, LoraLinear(base, adapter, seed, name))
    return names


def target_layers(model: nn.Module, adapter: AdapterSection) -> list[str]:
    """Names of the linear layers that the adapter goes on. Raises PlanError if there are none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [n for n, m in model.named_modules() if isinstance(m, LINEARS) and m is not head]
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
        merged = layer.merged_weight()
        assert isinstance(layer.base_layer, nn.Linear)
        with torch.no_grad():
            layer.base_layer.weight.copy_(merged)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
