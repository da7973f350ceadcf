"""transformers in float64: its norms and attention round to float32 on their way, which a yardstick
must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional


def keep_float64(patch: pytest.MonkeyPatch) -> None:
    """From now on `.float()`, `.to(torch.float32)` and `softmax(…, dtype=…)` leave float64 as it
    is."""
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, functional.softmax

    def keep(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64 and args[:1] == (torch.float32,):
            return tensor
        return to(tensor, *args, **kwargs)

    def as_wide(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(x, *args, **kwargs)

    patch.setattr(torch.Tensor, "to", keep)
    patch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else single(t))
    patch.setattr(functional, "softmax", as_wide)
