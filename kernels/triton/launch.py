"""The one door through which wrappers launch Triton kernels.

A wrapper (`forward`, `backward` of `kernels/triton/<op>.py`) calls `check` once on its tensors and
`launch(kernel, grid, ...)` for each kernel. Under `recording()` nothing runs: the launches are
kept, so that the proof tools compile exactly what a GPU would be given, from tensors on the
`meta` device, which have a shape and no memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.driver import driver

from trimpot.kernels.errors import BackendError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: positional `args`, and constexprs and compile options in `meta`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    def options(self, warp_size: int) -> dict[str, Any]:
        """`meta` as Triton takes it on a GPU whose warps have that many lanes."""
        meta = dict(self.meta)
        if threads := meta.pop("threads", None):
            meta["num_warps"] = max(threads // warp_size, 1)
        return meta


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are put into the list that this gives, and not run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check(op: str, *tensors: torch.Tensor | None) -> None:
    """Raises BackendError unless Triton can run `op` on these tensors: device and dtype."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise BackendError(
                f"{op}: triton takes bfloat16, float16 and float32, not {tensor.dtype}; "
                "use backend torch"
            )
        on_gpu = tensor.device.type == "cuda"  # ROCm says cuda too
        if not (on_gpu or interpreted() or (_recorded is not None and tensor.is_meta)):
            raise BackendError(
                f"{op}: triton was asked for on {tensor.device.type}, it runs on a GPU; use "
                "backend cpp or torch (or set TRITON_INTERPRET=1 to run it slowly on the CPU)"
            )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Runs `kernel[grid](*args, **meta)` on the device of its first tensor; an empty grid does
    nothing, since CUDA refuses it.

    `threads` may stand for num_warps: as many lanes on AMD, whose warps are twice as wide. fma is
    allowed unless `enable_fp_fusion=False` is said.
    """
    if 0 in grid:
        return
    meta.setdefault("enable_fp_fusion", True)  # said always: triton's own default is to change
    one = Launch(kernel, grid, args, meta)
    if _recorded is not None:
        _recorded.append(one)
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type != "cuda":
        kernel[grid](*args, **one.options(32))
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **one.options(torch.cuda.get_device_properties(device).warp_size))


def architecture(device: torch.device) -> str:
    """Of a GPU, as compilers name it: "sm_90", "gfx942". Where nothing is run: of the GPU that
    kernels are compiled for without it (proof/compile.py), or an H100's."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return properties.gcnArchName.split(":")[0]
        return f"sm_{properties.major}{properties.minor}"
    target = getattr(driver._active, "target", None)
    if target is None:
        return "sm_90"
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's 132 where nothing is run."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132
