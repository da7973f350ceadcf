"""Rows cut by adapter: tables that tell the programs of a kernel which rows are whose.

A segment is (adapter, first row, rows). Tables are made on the host and kept for the next layers of
the step, which have the same segments: making one costs a copy to the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from trimpot.kernels.errors import BackendError

Segment = tuple[int, int, int]
Segments = tuple[Segment, ...]


@functools.lru_cache(64)
def bounds(count: int, device: torch.device) -> torch.Tensor:
    """Of one part that has `count` stretches."""
    return torch.tensor([0, count], dtype=torch.int32).to(device)


@functools.lru_cache(64)
def blocks(
    segments: Segments, adapters: int, rows: int, size: int, device: torch.device
) -> torch.Tensor:
    """int32 [blocks, 3]: (adapter, first row, rows) of blocks that cover all rows; adapter −1
    between segments."""
    whole: list[Segment] = []
    end = 0
    for adapter, first, count in _sorted(segments, adapters, rows):
        whole += [(-1, end, first - end), (adapter, first, count)]
        end = first + count
    whole.append((-1, end, rows - end))
    return _table(_cut(whole, size), device)


@functools.lru_cache(64)
def stretches(
    segments: Segments, adapters: int, rows: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The segments cut at `size` rows, adapter by adapter, and int32 [n + 1] bounds: stretches
    bounds[i] … bounds[i + 1] are adapter i's."""
    cut = _cut(sorted(_sorted(segments, adapters, rows)), size)
    ends = [sum(adapter < i for adapter, _, _ in cut) for i in range(adapters + 1)]
    return _table(cut, device), torch.tensor(ends, dtype=torch.int32).to(device)


def _sorted(segments: Segments, adapters: int, rows: int) -> list[Segment]:
    """By first row. What is outside of x would be written outside of it: BackendError."""
    ordered = sorted((s for s in segments if s[2]), key=lambda segment: segment[1])
    end = 0
    for adapter, first, count in ordered:
        if not (0 <= adapter < adapters and end <= first and 0 < count <= rows - first):
            raise BackendError(
                f"lora_linear: segment (adapter {adapter}, first row {first}, {count} rows) does "
                f"not fit: {adapters} adapters, {rows} rows, of which {end} have one already; "
                "segments that don't overlap are wanted"
            )
        end = first + count
    return ordered


def _cut(parts: Sequence[Segment], size: int) -> list[Segment]:
    return [
        (adapter, first + step, min(size, count - step))
        for adapter, first, count in parts
        for step in range(0, count, size)
    ]


def _table(blocks: list[Segment], device: torch.device) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int32).reshape(-1, 3).to(device)
