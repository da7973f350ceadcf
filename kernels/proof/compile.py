"""Rung 4: compiles recorded launches for GPUs that are not here, through the runtime's own path.

    python -m trimpot.kernels.proof.compile TARGET DTYPE,DTYPE… [OP ...]      # rows as JSON

Triton asks its driver which GPU there is; `on_target` answers for one that is only described.
What comes out is what the runtime would make on that GPU for the same arguments, down to the cache
key: integers divisible by 16 or equal to 1 are known to the compiler, pointers are taken as
16-byte aligned, as torch's allocations are.

TRITON_INTERPRET must not be set: an interpreting process can't compile.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

from trimpot.kernels.errors import BackendError
from trimpot.kernels.proof import sass
from trimpot.kernels.proof.cases import Case, attempted, call, cases, maker
from trimpot.kernels.triton.launch import Launch, interpreted, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class DescribedDriver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def on_target(name: str) -> Iterator[None]:
    """Inside, Triton compiles for TARGETS[name]."""
    if interpreted():
        raise BackendError("TRITON_INTERPRET is set, so kernels can't be compiled; unset it")
    before = driver._active
    driver.set_active(DescribedDriver(TARGETS[name]))  # type: ignore[arg-type]
    _forget_compiled()
    try:
        yield
    finally:
        driver._active = before
        _forget_compiled()


def _forget_compiled() -> None:
    """A kernel keeps what it compiled by the device's number, whatever the target was."""
    for function in list(triton.runtime.jit._triton_jit_function_registry.values()):
        function.device_caches.clear()


def recorded(case: Case, dtype: str) -> list[Launch]:
    """The launches that the case makes at its large sizes, from tensors without memory."""
    with recording() as launches:
        call(case, "triton", case.arguments(maker(dtype, "meta"), case.large))
    return launches


def compiled(launch: Launch) -> sass.Code:
    """The launch's kernel, compiled for the target in force and read."""
    args = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in launch.args]
    target: Any = driver.active.get_current_target()
    return sass.read(
        launch.kernel.warmup(*args, grid=launch.grid, **launch.options(target.warp_size))
    )


def compiled_row(case: Case, dtype: str) -> dict[str, Any]:
    """What a row says of the target in force: each launch's code and how many programs it has."""
    launches = [
        {"programs": math.prod(launch.grid), "code": compiled(launch).as_dict()}
        for launch in recorded(case, dtype)
    ]
    size = maker(dtype).dtype.itemsize
    return {
        "has_dot": case.has_dot,
        "wide_loads": case.wide_loads,
        "budget": case.budget(case.large, size),
        "flops": case.flops(case.large),
        "launches": launches,
    }


def main(target: str, dtypes: str, *wanted: str) -> None:
    """Writes a row for each case and dtype of the `wanted` ops, or of all."""
    with on_target(target):
        rows = [
            {"target": target, **attempted(case, dtype, compiled_row)}
            for case in cases(wanted or None)
            for dtype in case.dtypes
            if dtype in dtypes.split(",")
        ]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
