"""Counter-based dropout: whether an item is kept depends on a seed and its place, on nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.3) with key
(seed low, seed high) and counter (column // 4, row low, row high, 0); item (row, column) takes
word column % 4. It is kept if the word is under min(2³² − 1, round((1 − p)·2³²)), and then scaled
by 1 / (1 − p). No mask is stored: whoever needs it makes the same bits again, on any backend, and
no matter how the width or the number of rows is cut into tiles.
"""

from __future__ import annotations

import torch

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def draw_seeds(siblings: int, adapters: int = 1) -> torch.Tensor:
    """Seeds int64 [J, n] from torch's generator, so that activation checkpointing, which puts
    its state back, recomputes with the same masks."""
    return torch.randint(2**62, (siblings, adapters), dtype=torch.int64)


def threshold(p: float) -> int:
    """Words under this are kept."""
    return min(LOW, round((1 - p) * 2**32))


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Four words, as int64 tensors within 0 … 2³² − 1, of four counter words of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return [c0, c1, c2, c3]


def _multiply(factor: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) 32 bits of factor · word. By halves: int64 would overflow."""
    low = factor * (word & 0xFFFF)
    high = factor * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def keep_mask(
    seed: int, p: float, first_row: int, rows: int, columns: int, device: torch.device
) -> torch.Tensor:
    """bool [rows, columns]: what is kept of rows first_row … of the whole input."""
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    group = torch.arange(-(-columns // 4), device=device)[None, :]
    shape = (rows, group.shape[1])
    counter = [
        group.expand(shape),
        (row & LOW).expand(shape),
        (row >> 32).expand(shape),
        torch.zeros(shape, dtype=torch.int64, device=device),
    ]
    words = torch.stack(philox(counter, (seed & LOW, (seed >> 32) & LOW)), dim=-1)
    return words.flatten(1)[:, :columns] < threshold(p)


def dropped(x: torch.Tensor, first_row: int, seed: int, p: float) -> torch.Tensor:
    """D · x for rows first_row … of the whole input; x itself at p = 0."""
    if not p:
        return x
    rows, columns = x.shape
    keep = keep_mask(seed, p, first_row, rows, columns, x.device)
    return torch.where(keep, x * (1 / (1 - p)), torch.zeros((), dtype=x.dtype, device=x.device))
