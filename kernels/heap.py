"""Freed memory stays with the process that trains on a CPU.

A step asks for the same large blocks as the step before. glibc gives them back to the kernel when
they are freed, and every page of the next one is faulted in and cleared anew: a LoRA step of
SmolLM-135M's shape over 2,048 tokens took 1.17 times as long, ours and transformers' alike (one
thread, `trimpot bench step --shape S`), for 5 % less memory at its peak.

In glibc's heap the holes of large tensors are lost to them (csrc/pool.h says why): at S 2.5 GB of
it were resident for 2.0 in use. So results of our CPU kernels come out of a pool of their own, and
the heap has what is small, what torch makes, and the packs of weights, which stay.

Where layers are recomputed it costs more memory: what each leaves for backward lies between the
holes of what it gave back, which the next one's blocks do not fit into. SmolLM2-135M over 1,500
tokens peaked at 1.63 GB, and at 1.24 with large blocks given back, in 1.16 times the CPU time; one
of three workers on a row of 32,765 at 5.5 and 2.6 GB, in 700 and 721 s.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
_KEEP = (
    (_MMAP_MAX, 0),  # no block of its own for what is large
    (_TRIM_THRESHOLD, 2**31 - 1),
    (_TOP_PAD, 64 << 20),
    # Arenas of other threads are of at most 64 MiB, and what is larger would be mapped after all.
    (_ARENA_MAX, 1),
)
_GIVE_BACK = (
    (_MMAP_MAX, 65536),  # glibc's own number
    (_MMAP_THRESHOLD, 1 << 20),  # once said, it does not grow with what is freed, up to 32 MiB
    (_TRIM_THRESHOLD, 1 << 20),
    (_TOP_PAD, 0),
)


class _Pool:
    on = False


def pooled() -> bool:
    """Whether large results of kernels are to come out of a pool of their own (csrc/pool.h)."""
    return _Pool.on


def keep_freed_memory() -> bool:
    """Whether the C library took it: glibc does. To be called before other threads allocate."""
    _Pool.on = True
    return _set(_KEEP)


def give_back_freed_memory() -> bool:
    """The opposite, for blocks of 1 MiB and more: each is the kernel's again once it is freed."""
    _Pool.on = False
    return _set(_GIVE_BACK)


def _set(settings: tuple[tuple[int, int], ...]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)
