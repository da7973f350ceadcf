"""Weights that changed where nothing changes them: found by their hashes, every so many steps.

Two things must hold between any two steps, whatever the run learns. Frozen weights are what they
were at the start; each worker compares its own with itself, so that a flipped bit names its worker
even where there is no other. Trained weights that every worker has whole (all of them up to ZeRO
stage 2) are equal everywhere; the workers compare, and the minority is suspect. Two workers that
differ are both suspect. At stage 3 a trained weight is held once: nothing is there to compare.

Weights that a CPU has packed (kernels/cpp) are compared as their file has them: a bit that flips in
the pack itself is not seen.

From stage 1 on, each update hands the trained weights out anew by whoever holds their masters. A
copy that was damaged before is good again then; a damaged master is every worker's.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from trimpot.kernels.mapped import give_back_pages, pages_are_away
from trimpot.kernels.ops.content_hash import hash_documents
from trimpot.runner import engine as engines
from trimpot.runner.engine import Engine
from trimpot.runner.errors import CorruptionError

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2⁶⁴ / golden ratio, as int64: its multiples are spread evenly."""
CHUNK_WORDS = 1 << 24
"""Hashed at a time on a GPU: 0.4 GB of int64 meanwhile."""


class Replicas:
    """Every worker makes one before its first step, and all call `check` at the same steps."""

    def __init__(self, engine: Engine):
        stage3 = engine.zero_stage == 3
        every = [*engine.module.parameters(), *engine.module.buffers()]
        trained = {id(p) for p in engine.names.values()}
        held = [x for x in every if id(x) not in trained]
        self.frozen: list[torch.Tensor] = [getattr(x, "ds_tensor", x) for x in held]
        self.trained: list[torch.Tensor] = [] if stage3 else list(engine.names.values())
        self.bytes = sum(x.numel() * x.element_size() for x in (*self.frozen, *self.trained))
        self.start = fingerprint(self.frozen)

    def check(self, step: int) -> dict[str, Any]:
        """Whether all is as it must be → {step, bytes, seconds}, of this worker. Raises
        CorruptionError on all workers."""
        began = time.perf_counter()
        same = fingerprint(self.frozen) == self.start
        told = engines.texts(f"{fingerprint(self.trained)} {same}")
        found = [text.split() for text in told]
        changed = tuple(rank for rank, (_, same) in enumerate(found) if same != "True")
        if changed:
            raise CorruptionError(
                f"frozen weights of {_workers(changed)} changed before the end of step {step}: "
                "take that memory for faulty, and go on from the newest checkpoint",
                changed,
            )
        if suspects := odd_ones([value for value, _ in found]):
            raise CorruptionError(
                f"the trained weights of {_workers(suspects)} "
                f"{'differ' if len(suspects) < len(found) else 'differ from one another'} "
                f"at the end of step {step}, where all must hold the same: "
                "take that memory for faulty, and go on from the newest checkpoint",
                suspects,
            )
        return {"step": step, "bytes": self.bytes, "seconds": time.perf_counter() - began}


def odd_ones(values: list[str]) -> tuple[int, ...]:
    """Ranks whose value is not that of more than half; all of them where no value is."""
    (most, count), *others = Counter(values).most_common()
    if not others:
        return ()
    if 2 * count <= len(values):
        return tuple(range(len(values)))
    return tuple(rank for rank, value in enumerate(values) if value != most)


def _workers(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"worker {ranks[0]}"
    return f"workers {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """16 hex digits of what the tensors hold, bit by bit, in their order and division."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        away = not tensor.is_cuda and pages_are_away(tensor)
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words, rest = raw[: len(raw) // 4 * 4].view(torch.int32), raw[len(raw) // 4 * 4 :]
        value = weighted_sum(words) if words.is_cuda else _xxh64(words)
        found.update(value.to_bytes(8, "little") + bytes(rest.tolist()))
        if away:  # as they were: packed weights are read here, and by nobody else
            give_back_pages(tensor)
    return found.hexdigest()


def _xxh64(words: torch.Tensor) -> int:
    array = words.numpy()
    return int(hash_documents(array, np.array([0, len(array)]))[0])


def weighted_sum(words: torch.Tensor) -> int:
    """Σ wᵢ · (i · GOLDEN | 1) mod 2⁶⁴ over int32 words: where they are, at the speed of memory.

    The factors are odd, hence invertible: no change within one word leaves the sum as it was.
    """
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS].to(torch.int64)
        at = torch.arange(start, start + len(chunk), dtype=torch.int64, device=words.device)
        total += (chunk * (at * GOLDEN | 1)).sum()
    return int(total) % (1 << 64)
