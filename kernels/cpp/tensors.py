"""How tensors reach the elementwise kernels of the extension: as addresses, a number for the type,
and rows of items that stand side by side."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from trimpot.kernels import native
from trimpot.kernels.errors import KernelError
from trimpot.kernels.heap import pooled

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of csrc/type.h."""
BLOCKS = 256
"""Most partial sums of a reduction over rows …"""
ROWS_PER_BLOCK = 32
"""… and least rows of one: their traffic is 3 % of the rows' then."""

LARGE = 256 << 10
"""Bytes from which on a tensor's memory is the pool's, where there is one."""


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As torch.empty, from the pool if it is large."""
    count = math.prod(shape)
    if count * dtype.itemsize >= LARGE and pooled():
        block = native.extension().pool_block(count * dtype.itemsize)
        if block is not None:
            return torch.frombuffer(block, dtype=dtype).view(shape)
    return torch.empty(shape, dtype=dtype)


class Scratch(threading.local):
    """Memory that each thread's calls leave to its next one, where no pool keeps it: fetched from
    the system and cleared by it each time it would be a tenth of the time at 2,048 x 576."""

    held = torch.empty(0)

    def take(self, items: int, dtype: torch.dtype) -> torch.Tensor:
        """[items] or more, always of one dtype."""
        if pooled():
            return empty((items,), dtype)
        if self.held.numel() < items:
            self.held = empty((items,), dtype)
        return self.held


def check(op: str, tensor: torch.Tensor, *others: torch.Tensor | None) -> int:
    """The number of the tensors' type. Raises KernelError unless the extension can run on all."""
    for other in (tensor, *others):
        if other is None:
            continue
        if other.device.type != "cpu":
            raise KernelError(
                f"{op}: a tensor is on {other.device}; backend cpp computes on the CPU; use auto"
            )
        if other.dtype != tensor.dtype:
            raise KernelError(
                f"{op}: types are {tensor.dtype} and {other.dtype}; backend cpp wants one"
            )
    if tensor.dtype not in TYPES:
        raise KernelError(
            f"{op}: backend cpp takes float32, bfloat16 and float16, not {tensor.dtype}; use torch"
        )
    return TYPES[tensor.dtype]


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., N] → [M, N] whose items stand side by side: a view where there is one, else a copy."""
    columns = tensor.shape[-1]
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), columns)
    return rows if rows.stride(-1) == 1 or columns <= 1 else rows.contiguous()


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def as_float(tensor: torch.Tensor) -> torch.Tensor:
    """A small operand (a norm's weight) in float32 without gaps."""
    return tensor.to(torch.float32).contiguous()


def block_count(rows: int) -> int:
    """Blocks of a reduction over rows. It follows from the rows alone, so the sum does too."""
    return min(BLOCKS, -(-rows // ROWS_PER_BLOCK))
