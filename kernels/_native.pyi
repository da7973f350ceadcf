"""The extension's door, as csrc/bindings.cpp defines it. Only kernels/native.py imports it."""

import numpy as np
from numpy.typing import NDArray

interface: int

def cpu_features() -> list[str]: ...
def hash_variants() -> list[str]: ...
def pack(lengths: NDArray[np.int64], capacity: int, bins: NDArray[np.int64]) -> int: ...
def hash_documents(
    tokens: NDArray[np.int32],
    offsets: NDArray[np.int64],
    seed: int,
    hashes: NDArray[np.uint64],
    variant: str,
) -> None: ...
