"""In which type an op computes, and in which type operands of different types meet."""

from __future__ import annotations

import torch


def opmath(dtype: torch.dtype) -> torch.dtype:
    """float32 for bf16 and fp16, else the type itself: what is stored is rounded once."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def promoted(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All in the widest of their types, as torch's own arithmetic has it: under autocast a float32
    residual stream meets bf16 branches."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def in_working_type(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in autocast's type where that is on: what a matrix product would do with it."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensor
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def as_given(device: torch.device) -> torch.autocast:
    """Inside, products are of the type of their operands: `in_working_type` has seen to autocast,
    and backends read memory as the type that they asked for."""
    return torch.autocast(device.type, enabled=False)
