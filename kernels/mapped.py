"""Tensors that lie in a mapped file, as safetensors gives a checkpoint's: their pages may go.

A page of the file that nobody has written to comes back from it, or from the page cache, when it is
touched again. What has been written to is the process's own and stays. Linux tells the two apart
(kernel: Documentation/admin-guide/mm/pagemap.rst); elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import torch

PAGE = mmap.PAGESIZE
_DONTNEED = 4  # madvise(2)
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def give_back_pages(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's memory that are in the file alone from now on; 0 where they can't be.

    Nobody may write to it meanwhile. Only pages go that the tensor has for itself, and none where
    one of them has been written to: so whole tensors are kept or let go.
    """
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return 0
    begin, end = _extent(tensor)
    try:
        if begin >= end or not _in_a_file(begin, end) or _written_to(begin, end):
            return 0
        libc = ctypes.CDLL(None)
    except OSError:  # /proc is not there, or not to be read
        return 0
    done = libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)
    return 0 if done else end - begin


def pages_are_away(tensor: torch.Tensor) -> bool:
    """Whether less than half of the tensor's memory is here: its pages were given back."""
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return False
    begin, end = _extent(tensor)
    if begin >= end:
        return False
    try:
        pages = _pages(begin, end)
    except OSError:
        return False
    here = int((pages & _PRESENT).astype(bool).sum())
    return len(pages) == (end - begin) // PAGE and 2 * here < len(pages)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """(begin, end) of the pages that a contiguous tensor has for itself."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return -(-begin // PAGE) * PAGE, end // PAGE * PAGE


def _in_a_file(begin: int, end: int) -> bool:
    """Whether one mapping of a file holds all of [begin, end)."""
    with Path("/proc/self/maps").open("rb") as maps:
        for line in maps:  # address-address permissions offset device inode path
            first, _, rest = line.partition(b"-")
            last, *about = rest.split(maxsplit=5)
            if int(first, 16) <= begin < int(last, 16):
                return end <= int(last, 16) and about[3] != b"0"
    return False


def _written_to(begin: int, end: int) -> bool:
    """Whether a page of [begin, end) is no longer the file's. Pages that are away are."""
    pages = _pages(begin, end)
    if len(pages) != (end - begin) // PAGE:
        return True
    own = (pages & _PRESENT).astype(bool) & ~(pages & _OF_FILE).astype(bool)
    return bool((own | (pages & _SWAPPED).astype(bool)).any())


def _pages(begin: int, end: int) -> np.ndarray:
    """What pagemap says of each page of [begin, end) → uint64, maybe of fewer. Raises OSError."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(begin // PAGE * 8)
        return np.frombuffer(pagemap.read((end - begin) // PAGE * 8), np.uint64)
