"""Small Triton kernels, y = 3x and close to it, most with one planted bug; and a product a·b.

Each is an op of its own, registered as `kernels/ops/<name>.py` and `kernels/triton/<name>.py` are
found, with one Case. They interpret or compile, as TRITON_INTERPRET says when this is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from trimpot.kernels.proof.cases import Case, Maker, Sizes
from trimpot.kernels.triton.launch import check, launch

BLOCK = 1024
SMALL, LARGE = {"N": 4 * BLOCK - 24}, {"N": 64 * BLOCK}


@triton.jit
def triple(X, Y, count, factor, stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count if MASKED else at >= 0
    x = tl.load(X + at * stride, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + at, (x * factor).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def triple_twice_read(X, Y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(Y + at, x.to(Y.dtype.element_ty), mask=at < count)
    again = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(Y + at, (again * 3.0).to(Y.dtype.element_ty), mask=at < count)


@triton.jit
def triple_racing(X, Y, count, BLOCK: tl.constexpr):
    """Every program writes all of Y, the last one what is right."""
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(Y + at, (x * 3.0).to(Y.dtype.element_ty), mask=at < count)


@triton.jit
def triple_undefined(X, Y, count, BLOCK: tl.constexpr):
    """What the masked lanes hold, which is anything on a GPU, goes into the sum."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count).to(tl.float32)
    zero = tl.sum(x, 0) * 0.0
    tl.store(Y + at, (x * 3.0 + zero).to(Y.dtype.element_ty), mask=at < count)


@triton.jit
def triple_hungry(X, Y, count, BLOCK: tl.constexpr):
    """All of a block stays in registers until its sum is known."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    total = tl.sum(x, 0)
    tl.store(Y + at, (x * 3.0 + total * 1e-30).to(Y.dtype.element_ty), mask=at < count)


@triton.jit
def product(A, B, C, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, depth, K):
        a = tl.load(A + row * depth + first + inner[None, :])
        b = tl.load(B + (first + inner)[:, None] * N + column)
        total += tl.dot(a, b, input_precision="ieee")
    tl.store(C + row * N + column, total.to(C.dtype.element_ty))


def _one(kernel: Any, threads: int = 128, block: int = BLOCK) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        check("toy", x)
        y = torch.empty_like(x)
        grid = (triton.cdiv(x.numel(), block),)
        launch(kernel, grid, x, y, x.numel(), BLOCK=block, threads=threads)
        return y

    return forward


def tripled(
    x: torch.Tensor, factor: float = 3.0, stride: int = 1, masked: bool = True
) -> torch.Tensor:
    check("toy", x)
    y = torch.empty(x.numel() // stride, dtype=x.dtype, device=x.device)
    launch(
        triple, (triton.cdiv(y.numel(), BLOCK),), x, y, y.numel(), factor, stride,
        BLOCK=BLOCK, MASKED=masked, threads=128,
    )  # fmt: skip
    return y


def _multiplied(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    check("toy", a, b)
    c = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    launch(
        product, (1,), a, b, c, a.shape[1], M=a.shape[0], N=b.shape[1], K=32, threads=128
    )  # fmt: skip
    return c


def toy(
    name: str, forward: Callable[..., Any], definition: Any = lambda x: x * 3, **said: Any
) -> Case:
    """Registers the op and gives its case."""
    for folder, function in (("ops", definition), ("triton", forward)):
        module: Any = ModuleType(f"trimpot.kernels.{folder}.{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.forward = function
        sys.modules[module.__name__] = module
    settled: dict[str, Any] = {
        "arguments": lambda make, n: {"x": make.normal(n["N"])},
        "large": LARGE,
        "small": SMALL,
        "budget": lambda n, size: 2 * n["N"] * size,
        "wide_loads": True,
    }
    return Case(name, "forward", **(settled | said))


def _strided(make: Maker, n: Sizes) -> dict[str, Any]:
    return {"x": make.normal(2 * n["N"])}


def _matrices(make: Maker, n: Sizes) -> dict[str, Any]:
    return {"a": make.normal(n["M"], n["K"]), "b": make.normal(n["K"], n["M"])}


SQUARE = {"M": 128, "K": 64}

GOOD = toy("toy_good", tripled)
WRONG = toy("toy_wrong", lambda x: tripled(x, 3.1))
OTHER_DTYPE = toy("toy_other_dtype", lambda x: tripled(x).float())
TWO_PASSES = toy("toy_two_passes", lambda x: tripled(tripled(x, 1.0)))
READS_TWICE = toy("toy_reads_twice", _one(triple_twice_read))
UNMASKED = toy("toy_unmasked", lambda x: tripled(x, masked=False))
RACING = toy("toy_racing", _one(triple_racing))
UNDEFINED = toy("toy_undefined", _one(triple_undefined))
HUNGRY = toy("toy_hungry", _one(triple_hungry, threads=64, block=1 << 15))
NARROW = toy("toy_narrow", lambda x: tripled(x, stride=2), lambda x: x[::2] * 3, arguments=_strided)
PRODUCT = toy(
    "toy_product", _multiplied, lambda a, b: a @ b, arguments=_matrices, large=SQUARE,
    small=SQUARE, has_dot=True, wide_loads=False, flops=lambda n: 2.0 * n["M"] ** 2 * n["K"],
    budget=lambda n, size: (2 * n["M"] * n["K"] + n["M"] ** 2) * size,
)  # fmt: skip
NO_TENSOR_CORE = toy("toy_no_tensor_core", tripled, has_dot=True)
