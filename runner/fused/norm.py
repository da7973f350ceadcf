"""RMS norms on the op add_rms_norm, with the residual's addition where a layer hands it over."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimpot.kernels.ops.add_rms_norm import add_rms_norm, reference
from trimpot.runner.fused.remake import remember


@dataclass(frozen=True)
class NormKind:
    eps: float
    offset: float
    """Of the weight: 0, or 1 where it is stored less one."""


class FusedNorm(nn.Module if TYPE_CHECKING else object):
    norm: NormKind
    norm_backend: str
    weight: nn.Parameter

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The normed x; with a residual (the normed sum, the sum)."""
        y, s = add_rms_norm(
            hidden_states,
            residual,
            self.weight,
            self.norm.eps,
            self.norm.offset,
            self.norm_backend,
        )
        kept, weight = s.detach(), self.weight.detach().clone()  # ZeRO-3 takes weights away
        settings = (self.norm.eps, self.norm.offset, self.norm_backend)
        remember(y, lambda: add_rms_norm(kept, None, weight, *settings)[0])
        return y if residual is None else (y, s)


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """What RMS norm a module computes, or None: told by its numbers, whatever its class says.

    It is tried in float64 on random data with random weights, so a scale, a bias, a mean that is
    taken off or an eps in another place are seen.
    """
    own = dict(module.named_parameters(recurse=False))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if own.keys() != {"weight"} or next(module.children(), None) or not isinstance(eps, float):
        return None
    width = _width(module)
    if width is None:
        return None
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=draw).double() for n in (3, 1))
    x[0] *= eps**0.5  # where eps counts
    trial = copy.copy(module)
    trial._parameters = {"weight": nn.Parameter(weight[0])}
    found = trial(x)
    for offset in (0.0, 1.0):
        exact, _ = reference(x, None, weight[0], eps, offset)
        # Models compute their norms in float32, whatever they are given.
        if found.shape == exact.shape and (found.double() - exact).abs().max() < 1e-5:
            return NormKind(eps, offset)
    return None


def _width(module: nn.Module) -> int | None:
    weight: Any = module._parameters["weight"]
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 has partitioned it
    return int(shape[0]) if len(shape) == 1 else None
