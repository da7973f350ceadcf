"""Gated feed-forward layers: gate and up as one product, and the gating as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimpot.kernels.ops.geglu import geglu
from trimpot.kernels.ops.swiglu import swiglu
from trimpot.runner.adapters.lora import project
from trimpot.runner.fused.remake import produced, remember

GATES: dict[str, Callable[..., torch.Tensor]] = {"swiglu": swiglu, "geglu": geglu}
OFF = "off"


class FusedMLP(nn.Module if TYPE_CHECKING else object):
    """down(act(gate(x)) · up(x)). B batch, T tokens, H hidden, I intermediate."""

    gate_op: str
    gate_backend: str
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: Any
    act_fn: Any

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        layers = [self.gate_proj, self.up_proj]
        (gate_BTI, up_BTI), again = produced(lambda x: project(layers, x), x_BTH)
        gated_BTI = self._gated(gate_BTI, up_BTI)
        remember(gated_BTI, lambda: self._gated(*(make() for make in again)))
        return self.down_proj(gated_BTI)

    def _gated(self, gate_BTI: torch.Tensor, up_BTI: torch.Tensor) -> torch.Tensor:
        if self.gate_backend == OFF:
            return self.act_fn(gate_BTI) * up_BTI
        return GATES[self.gate_op](gate_BTI, up_BTI, self.gate_backend)


@torch.no_grad()
def gate_op(activation: nn.Module) -> str | None:
    """The op that gates with this activation, told by its values."""
    x = torch.linspace(-8, 8, 257, dtype=torch.float64)
    found = activation(x)
    if torch.allclose(found, nn.functional.silu(x), atol=1e-9):
        return "swiglu"
    if torch.allclose(found, nn.functional.gelu(x, approximate="tanh"), atol=1e-9):
        return "geglu"
    return None
