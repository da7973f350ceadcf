"""What is proven of each Triton kernel: the registry that every rung of the ladder reads.

A module `kernels/triton/<op>.py` joins by one function:

    def proof_cases() -> list[Case]: ...

A Case says how `forward` or `backward` of that module is called, at which sizes, and what that may
cost. It names no kernel and no launch: the tools call the wrapper itself,

- rung 3, interpreter: at `small` sizes on the CPU, against `kernels/ops/<op>.py` in float64;
- rung 4, compile: at `large` sizes on torch's meta device, with launches recorded instead of run
  (wrappers must launch through `kernels/triton/launch.py: launch`, allocate by `torch.empty` on
  their inputs' device, and never read a tensor's values on the host);
- rung 5, traffic: at `small` sizes, bytes counted against `budget`;
- rung 6, model: `budget`, `flops` at `large` sizes and the compiled code;
- rung 7, GPU: at `large` sizes, correct first, then timed.

    Case(
        op="swiglu",
        direction="forward",
        arguments=lambda make, n: {"gate": make.normal(n["M"], n["N"]),
                                   "up": make.normal(n["M"], n["N"])},
        large={"M": 8192, "N": 14336},
        small={"M": 32, "N": 1024},
        budget=lambda n, size: 3 * n["M"] * n["N"] * size,
        wide_loads=True,
    )

Sizes are those that decide the launch: production tiles, few of them in `small`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trimpot.kernels.ops.implementation import implementation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What a row calls a dtype."""

Sizes = Mapping[str, int]
Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a case: `dtype` is the case's working one, `device` may be meta."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator
    """On the CPU, so that the values are the same on every device."""

    def normal(
        self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Normal values with standard deviation `scale`, in `dtype` (the case's unless said)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        drawn = torch.randn(shape, generator=self.generator) * scale
        return drawn.to(dtype=dtype or self.dtype, device=self.device)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        """Uniform whole numbers low ≤ i < high."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def values(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        """These very values; on meta their shape alone."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Not filled: for what the op writes (see Case.in_place)."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def maker(dtype: str, device: str = "cpu", seed: int = 0) -> Maker:
    generator = torch.Generator().manual_seed(seed)
    return Maker(DTYPES[dtype], torch.device(device), generator)


def _no_flops(_: Sizes) -> float:
    return 0.0


@dataclass(frozen=True)
class Case:
    """One way of calling one direction of one op; see the file's head."""

    op: str
    direction: Direction
    arguments: Callable[[Maker, Sizes], dict[str, Any]]
    """Keyword arguments of the op's `forward` or `backward`. Whatever derives from other arguments
    (rstd, lse) is computed by plain torch, which works on meta too."""
    large: Sizes
    small: Sizes
    budget: Callable[[Sizes, int], float]
    """Bytes that must cross the memory bus at these sizes and this element size (bytes)."""
    flops: Callable[[Sizes], float] = _no_flops
    """Of matrix products only; a multiplication and an addition count as two."""
    has_dot: bool = False
    """Tensor-core instructions must appear."""
    wide_loads: bool = False
    """A streaming kernel: three quarters of the bits that it loads must come 128 at a time (the
    rest is what a row has one of, and short tables)."""
    in_place: tuple[str, ...] = ()
    """Arguments that the op writes into: they are results, before what it returns."""
    variant: str = ""
    """Tells apart cases of one direction: "frozen", "r256"."""
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")


def call(case: Case, backend: str, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """Runs the case's function of `backend`; every tensor it gives back or wrote, flat."""
    function = getattr(implementation(case.op, backend), case.direction)
    returned = function(**arguments)
    written = [arguments[name] for name in case.in_place]
    return [t for t in _flat([*written, returned]) if t.numel()]


def identity(case: Case, dtype: str) -> dict[str, str]:
    """By which rows of different rungs are matched."""
    return {
        "op": case.op, "direction": case.direction, "variant": case.variant, "dtype": dtype,
    }  # fmt: skip


def attempted(
    case: Case, dtype: str, row_of: Callable[[Case, str], dict[str, Any]]
) -> dict[str, Any]:
    """The case's row; of a case that raises, one that says so: the others shall have theirs."""
    try:
        return {**identity(case, dtype), **row_of(case, dtype)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {**identity(case, dtype), "failed": f"{type(error).__name__}: {lines[-1].strip()}"}


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _flat(part)]
    return []


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, floating tensors (also those in lists) as float64 copies."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value.clone()
        return type(value)(widen(v) for v in value) if isinstance(value, (list, tuple)) else value

    return {name: widen(value) for name, value in arguments.items()}


@functools.cache
def named() -> tuple[str, ...]:
    """Ops whose Triton module states cases; read from the files, without importing triton."""
    folder = Path(__file__).parent.parent
    return tuple(
        path.stem
        for path in sorted((folder / "triton").glob("*.py"))
        if (folder / "ops" / path.name).exists()
        and "\ndef proof_cases() ->" in path.read_text(encoding="utf-8")
    )


def cases(wanted: tuple[str, ...] | None = None) -> list[Case]:
    """All cases, or those of the `wanted` ops. Imports triton."""
    return [
        case
        for op in (named() if wanted is None else wanted)
        for case in implementation(op, "triton").proof_cases()
    ]
