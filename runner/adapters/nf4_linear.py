"""A frozen linear layer whose weight is held in 4 bits (QLoRA, Dettmers et al. 2023).

The weight is dequantised into the type of the input for each call, and freed with it: autograd
keeps the packed one, and dequantises again in backward. Where activation checkpointing recomputes
the layer, what recomputation has dequantised serves backward too. K = d_in, N = d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from trimpot.kernels.ops.nf4 import Nf4, dequantise
from trimpot.kernels.ops.opmath import in_working_type
from trimpot.runner.fused.remake import had_again, to_keep

PARTS = ("packed", "absmax", "nested_absmax", "nested_map")


class Nf4Linear(nn.Module):
    """y = x Ŵᵀ + bias. `dtype`: of the model around it."""

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_map: torch.Tensor

    def __init__(self, weight: Nf4, bias: nn.Parameter | None, dtype: torch.dtype, backend: str):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias, self.dtype, self.backend = bias, dtype, backend
        self.recomputed = False
        self.offset = weight.offset
        for name in PARTS:
            self.register_buffer(name, getattr(weight, name))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def held(self) -> Nf4:
        parts = {name: getattr(self, name) for name in PARTS}
        return Nf4(**parts, offset=self.offset, shape=(self.out_features, self.in_features))

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """Ŵ [N, K], new with each call."""
        return dequantise(self.held, dtype, self.backend)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] → [..., N]"""
        x = in_working_type(x)
        with frozen_weights([self], x.dtype) as (weight,):
            return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves go through, changes of type do not: DeepSpeed calls `bfloat16()` on its model, and
        scales in bf16 would be other weights."""
        parts = dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)
        for name, part in parts.items():
            assert part is not None
            self._buffers[name] = part.to(fn(part.new_empty(0)).device)
        return self


class _Rebuild(NamedTuple):
    """In place of a weight, or a view of it, that autograd would keep."""

    layer: Nf4Linear
    like: torch.Tensor
    """Without memory, of the type and strides."""
    at: int

    def __call__(self) -> torch.Tensor:
        whole = self.layer.dequantised(self.like.dtype)
        return whole.as_strided(self.like.shape, self.like.stride(), self.at)


@contextmanager
def frozen_weights(layers: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """The weights of nn.Linear and Nf4Linear layers, the latter in `dtype`. What is computed with
    them inside, autograd does not keep them for."""
    weights: list[Any] = [
        layer.dequantised(dtype) if isinstance(layer, Nf4Linear) else layer.weight
        for layer in layers
    ]
    # Under activation checkpointing the hooks that drop and recompute must stay the inner ones.
    made = {
        weight.untyped_storage().data_ptr(): layer
        for layer, weight in zip(layers, weights, strict=True)
        if isinstance(layer, Nf4Linear) and not layer.recomputed
    }
    if not made or not torch.is_grad_enabled():
        yield weights
        return

    def pack(saved: torch.Tensor) -> Any:
        layer = made.get(saved.untyped_storage().data_ptr())
        if layer is None:
            return to_keep(saved)
        like = torch.empty_strided(saved.shape, saved.stride(), dtype=saved.dtype, device="meta")
        return _Rebuild(layer, like, int(saved.storage_offset()))

    def unpack(kept: Any) -> torch.Tensor:
        return kept() if isinstance(kept, _Rebuild) else had_again(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield weights


def nf4_layers(model: nn.Module) -> dict[str, Nf4Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Nf4Linear)}
