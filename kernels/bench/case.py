"""What one benched call is: its tensors, ours and the peers as programs over them, its work.

A program takes the tensors by name and gives a tuple of outputs, through autograd where there is
a backward. Ours, the peers and the float64 definition are all programs over the same tensors, so
that one piece of code runs, checks and times them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trimpot.kernels.bench.shapes import Call
from trimpot.kernels.bench.work import Work

Tensors = dict[str, Any]
"""By name: tensors, and lists of tensors where an op takes lists."""
Program = Callable[[Tensors], tuple[torch.Tensor, ...]]
Outcome = dict[str, torch.Tensor]
"""Outputs ("out 0") and gradients ("d x") of one run, detached."""


@dataclass(frozen=True)
class Variant:
    """A program, and what is done to the tensors once before it: casts, modules around them."""

    name: str
    run: Program
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors


@dataclass(frozen=True)
class Case:
    call: Call
    dtype: torch.dtype
    inputs: Tensors
    leaves: tuple[str, ...]
    """Names of the inputs that get a gradient; "a.1" is the second of the list "a"."""
    torch_form: Program
    """As torch users write it; in float64 it is the definition that everybody is measured by."""
    ours: Callable[[str], Program]
    """The public op with a backend. Raises BackendError where that one is not to be had."""
    work: Mapping[str, Work]
    exact: Callable[[Tensors, tuple[torch.Tensor, ...]], Outcome] | None = None
    """Instead of `torch_form` where that is too large in float64: (inputs, upstream) → outcome."""
    in_place: bool = False
    """The program changes its inputs, as an optimizer does; outcomes then come from copies."""
    peers: Mapping[str, Variant] = field(default_factory=dict)
    """Peers besides `torch_form`, by name."""

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(self.work)


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Source:
    """Random tensors of one case: seeded, drawn in float32 on the CPU, then cast."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=self._generator).mul_(scale)
        return values.to(self.device, self.dtype)

    def weight(self, rows: int, columns: int) -> torch.Tensor:
        """A frozen weight: values that bfloat16 holds, as those of most released checkpoints are.

        bf16x3 then needs two products for three.
        """
        values = torch.randn(rows, columns, generator=self._generator).div_(math.sqrt(columns))
        return values.bfloat16().to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)


def opmath(x: torch.Tensor) -> torch.Tensor:
    """float32 of a 16-bit tensor, else as it is: what transformers' `.float()` is there for."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating tensors in `dtype` (copies), integers as they are."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().to(dtype, copy=True)
        return value

    return {name: one(value) for name, value in tensors.items()}


def copied(tensors: Tensors) -> Tensors:
    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    return {name: one(value) for name, value in tensors.items()}


def leaf(tensors: Tensors, name: str) -> torch.Tensor:
    base, _, index = name.partition(".")
    return tensors[base][int(index)] if index else tensors[base]


def with_leaves(tensors: Tensors, leaves: tuple[str, ...]) -> Tensors:
    """The same storage under new leaves that ask for gradients; a module's parameters stay."""
    fresh = {k: list(v) if isinstance(v, list) else v for k, v in tensors.items()}
    for name in leaves:
        base, _, index = name.partition(".")
        given = leaf(tensors, name)
        wanted = given if given.requires_grad else given.detach().requires_grad_(True)
        if index:
            fresh[base][int(index)] = wanted
        else:
            fresh[base] = wanted
    return fresh


def upstream_like(outs: tuple[torch.Tensor, ...], scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """A gradient for each output: random of unit variance; 1 for a scalar."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.ones_like(out)
        if out.ndim == 0
        else torch.randn(out.shape, generator=generator).mul_(scale).to(out.device, out.dtype)
        for out in outs
    )


def outcome_of(
    variant: Variant, case: Case, inputs: Tensors, upstream: tuple[torch.Tensor, ...] | None
) -> Outcome:
    """Run once, forward and backward, on what `inputs` hold."""
    tensors = variant.prepare(copied(inputs) if case.in_place else inputs)
    tensors = with_leaves(tensors, case.leaves)
    outs = variant.run(tensors)
    found = {f"out {i}": out.detach() for i, out in enumerate(outs)}
    if case.leaves:
        grads = [] if upstream is None else [
            u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)
        ]  # fmt: skip
        leaves = [leaf(tensors, name) for name in case.leaves]
        given = torch.autograd.grad(outs, leaves, grads or None)
        found |= {f"d {name}": g.detach() for name, g in zip(case.leaves, given, strict=True)}
    return found
