"""Decoder layers whose residual additions go with the norm that follows them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimpot.kernels.cpp.residual import added
from trimpot.runner.fused.remake import Remaking, pays


class Parts(nn.Module if TYPE_CHECKING else object):
    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any
    mlp: Any
    remakes_products: bool


def remaking(blocks: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A layer's forward: its blocks, with activations made again in backward where that pays."""

    @functools.wraps(blocks)
    def forward(self: Parts, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not pays(self):
            return blocks(self, hidden_states, **kwargs)
        with Remaking(self.remakes_products):
            return blocks(self, hidden_states, **kwargs)

    return forward


class PreNormLayer(Parts):
    """Llama's: a norm before attention and one before the feed-forward layer."""

    @remaking
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # By position: DeepSpeed sees only such inputs, and gives parameters back by them.
        output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        normed, residual = self.post_attention_layernorm(output, hidden_states)
        return added(residual, self.mlp(normed))


class SandwichLayer(Parts):
    """Gemma 2's and 3's: norms before and after both."""

    @remaking
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        output = self.post_attention_layernorm(output)
        normed, residual = self.pre_feedforward_layernorm(output, hidden_states)
        return added(residual, self.post_feedforward_layernorm(self.mlp(normed)))
