"""Which arithmetic a matrix product takes on this CPU: the fastest one that is permitted.

Of 16-bit tensors it is measured, once a process and shape, on 448 rows of random data: what wins
depends on the processor (VNNI, bfloat16 units, whose BLAS) more than on anything that its name
tells. For float32 see `permitted`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from trimpot.kernels import native
from trimpot.kernels.cpp import gemm, int8, split
from trimpot.kernels.errors import BackendError

ARITHMETICS = ("auto", "fp32", "int16", "bf16x3", "int8")
PACKED: dict[str, Any] = {"int16": gemm, "bf16x3": split, "int8": int8}
"""Those that pack weights, and the module that does it."""
ROWS = 448
AHEAD = 1.05
"""By how much a later candidate must beat the first: a choice should not flip with the noise."""


def permitted(arithmetic: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Candidates, the preferred one first. auto leaves float32 tensors in fp32.

    For those there is one, not the faster of two: a run that goes on in another process must have
    the bits of one that was never stopped, and near a tie a measurement falls now this way, now
    that. It is tiles of our own, on AVX-512 at 0.81 to 0.91 of the rate of torch's product in
    lora_linear at S: MKL cuts sums by the number of its threads, and our bits are to be the same on
    any number. Below AVX2 they are too slow for that, and it is torch's.
    """
    if arithmetic not in ARITHMETICS:
        raise BackendError(f"cpu_gemm is {arithmetic!r}; one of {', '.join(ARITHMETICS)} is wanted")
    extension = native.extension()
    if arithmetic == "bf16x3" and not extension.gemm_fast_split():
        raise BackendError(
            "cpu_gemm is bf16x3, which wants AMX tiles of bfloat16; this processor has none: take "
            "int16, fp32 or auto"
        )
    if arithmetic in PACKED:
        return (arithmetic,)
    if arithmetic == "auto" and dtype != torch.float32:
        if extension.gemm_fast_split():
            return ("bf16x3", "torch")
        if extension.gemm_fast_int16():
            return ("int16", "torch")
    if dtype != torch.float32 and arithmetic == "fp32":
        return ("fp32",)  # torch's product would be of 16 bits
    if dtype != torch.float32:
        return ("fp32", "torch")
    return ("torch",) if extension.gemm_isa() == "generic" else ("fp32",)


def choose(arithmetic: str, dtype: torch.dtype, depth: int, outputs: int) -> str:
    """int16, bf16x3, fp32 or torch, for x [M, depth] Wᵀ with `outputs` rows of W."""
    candidates = permitted(arithmetic, dtype)
    if len(candidates) == 1 or not depth or not outputs:
        return candidates[0]
    return _fastest(candidates, dtype, depth, outputs, torch.get_num_threads())


@functools.cache
def _fastest(
    candidates: tuple[str, ...], dtype: torch.dtype, depth: int, outputs: int, threads: int
) -> str:
    seconds = measure(candidates, dtype, depth, outputs)
    first = candidates[0]
    best = min(candidates, key=lambda name: seconds[name])
    return best if seconds[first] > AHEAD * seconds[best] else first


def measure(
    candidates: tuple[str, ...], dtype: torch.dtype, depth: int, outputs: int, repeats: int = 3
) -> dict[str, float]:
    """Least seconds of each candidate's product, in turn so that drift meets all alike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, depth, generator=generator).to(dtype)
    weight = torch.randn(outputs, depth, generator=generator).to(dtype)
    runs = {name: _product(name, x, weight) for name in candidates}
    seconds = dict.fromkeys(candidates, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _product(name: str, x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    if name == "torch":
        return lambda: x @ weight.T
    out = torch.empty(x.shape[0], weight.shape[0])
    if name == "fp32":
        left, right = gemm.single(x), gemm.readable(weight)

        def run_fp32() -> object:
            gemm.forward_fp32(left, right, out, None, None)
            return out.to(x.dtype)

        return run_fp32
    form = PACKED[name]
    group = form.pack_weights([weight])

    def run_packed() -> object:
        form.forward(form.quantise_input(gemm.readable(x), group), group.packs[0], out, None, None)
        return out.to(x.dtype)

    return run_packed
