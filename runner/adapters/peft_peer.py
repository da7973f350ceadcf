"""PEFT as a peer: whole models and single linears with its adapters, for `trimpot bench`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimpot.kernels.bench.case import Case, Tensors, Variant
from trimpot.kernels.bench.shapes import RANK


def add_peft(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """The model under PEFT's LoRA on all its linear layers, as its documentation has it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # a float is as good
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{our name of an adapter's weight: PEFT's parameter}."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            plain = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            found[plain] = parameter
    return found


def linear_variant(case: Case) -> Variant | None:
    """PEFT's own module around each sibling of a LoRA linear; None for other ops."""
    if case.call.op != "lora_linear":
        return None
    return Variant("peft", _run, _modules)


class _Siblings(nn.Module):
    def __init__(self, weights: list[torch.Tensor]):
        super().__init__()
        self.linears = nn.ModuleList(_linear(weight) for weight in weights)


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _modules(tensors: Tensors) -> Tensors:
    from peft import LoraConfig, get_peft_model

    names = [f"linears.{j}" for j in range(len(tensors["weights"]))]
    config = LoraConfig(r=RANK, lora_alpha=RANK * tensors["scales"][0], target_modules=names)
    wrapped: Any = get_peft_model(_Siblings(tensors["weights"]), config)  # pyright: ignore
    layers = list(wrapped.base_model.model.linears)
    with torch.no_grad():
        for j, layer in enumerate(layers):
            layer.lora_A["default"].weight.copy_(tensors["a"][j])
            layer.lora_B["default"].weight.copy_(tensors["b"][j])
    return {
        **tensors,
        "a": [layer.lora_A["default"].weight for layer in layers],
        "b": [layer.lora_B["default"].weight for layer in layers],
        "layers": layers,
    }


def _run(tensors: Tensors) -> tuple[torch.Tensor, ...]:
    return tuple(layer(tensors["x"]) for layer in tensors["layers"])
