"""How tensor ops are checked: the 2x rule against float64, and bits that never differ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from trimpot.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("generic", "avx2", "avx512")
STATE = native.state()
needs_extension = pytest.mark.skipif(not STATE.available, reason=STATE.why)
TILES = STATE.available and native.extension().gemm_fast_split()
LOW = ("cpp:int16", "cpp:bf16x3") if TILES else ("cpp:int16",)
"""Those of less than the tensors' float32 that precision bf16 permits."""
ARITHMETICS = ("cpp:fp32", *LOW)
cpp_arithmetics = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=needs_extension) for name in ARITHMETICS]
)
product_backends = pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(name, marks=needs_extension) for name in ARITHMETICS)]
)
"""Of ops around matrix products."""

Tensors = Sequence[torch.Tensor]


def max_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    assert got.shape == exact.shape
    return (got.double() - exact.double()).abs().max().item() if got.numel() else 0.0


def tiny(dtype: torch.dtype, exact: torch.Tensor) -> float:
    """Half a unit in the last place of the largest item: what rounding alone costs."""
    return torch.finfo(dtype).eps / 2 * (exact.abs().max().item() if exact.numel() else 0.0)


def assert_twice(got: Tensors, plain: Tensors, exact: Tensors, units: float = 0.5) -> None:
    """Each error against float64 is, in norm, at most twice that of plain torch in the same type,
    and `units` in the last place; no item's is above four times torch's largest.

    Twice in norm, because the largest of a few hundred roundings is luck: 2.1e-6 beside torch's
    6.7e-7 was seen where the norms are 6.5e-8 and 4.5e-8.
    """
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        assert g.dtype == p.dtype
        found, allowed = distance(g, e), 2 * distance(p, e) + units * torch.finfo(g.dtype).eps
        assert found <= allowed, f"result {i}: {found} > {allowed}"
        allowed = 4 * max_error(p, e) + 2 * units * tiny(g.dtype, e)
        assert max_error(g, e) <= allowed, f"result {i}: {max_error(g, e)} > {allowed}"


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    """‖got − exact‖ / ‖exact‖"""
    exact = exact.double()
    norm = exact.norm().item()
    return (got.double() - exact).norm().item() / norm if norm else got.double().norm().item()


def assert_half_of_bf16(got: Tensors, low: Tensors, exact: Tensors) -> None:
    """Each tensor's error against float64 is at most half of that of `low`, torch in bfloat16, in
    norm; the largest is not above it."""
    for i, (g, p, e) in enumerate(zip(got, low, exact, strict=True)):
        assert g.dtype == torch.float32
        found, allowed = distance(g, e), distance(p, e) / 2 + torch.finfo(g.dtype).eps / 2
        assert found <= allowed, f"result {i}: {found} > {allowed}"
        assert max_error(g, e) <= max_error(p, e) + tiny(g.dtype, e), f"result {i}"


def assert_judged(backend: str, got: Tensors, plain: Tensors, low: Tensors, exact: Tensors) -> None:
    """Low arithmetic on float32 is held to half of the error of torch's bfloat16 (`low`), all else
    to twice that of torch in the same type (`plain`)."""
    if backend in LOW and plain[0].dtype == torch.float32:
        assert_half_of_bf16(got, low, exact)
    else:
        assert_twice(got, plain, exact)


def take_the_preferred(patch: pytest.MonkeyPatch) -> None:
    """Products in the arithmetic that was asked for and not in the fastest that is permitted: what
    is measured may be otherwise the next time."""
    if STATE.available:
        from trimpot.kernels.cpp import rates

        patch.setattr(rates, "choose", lambda name, dtype, *_: rates.permitted(name, dtype)[0])


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        assert torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


def assert_same_specials(got: Tensors, want: Tensors) -> None:
    """NaN, inf and −inf stand where they do in `want`."""
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isnan(), w.isnan())
        assert torch.equal(g.isposinf(), w.isposinf())
        assert torch.equal(g.isneginf(), w.isneginf())


def skip_torchs_bits(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Below AVX2 the fp32 products of float32 are torch's, whose bits are not ours to promise."""
    fp32 = (backend, dtype) == ("cpp:fp32", torch.float32)
    if fp32 and STATE.available and native.extension().gemm_isa() == "generic":
        pytest.skip("torch's products run here")


def with_gradients(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor | None],
    upstream: Tensors,
) -> list[torch.Tensor]:
    """Outputs of `function(*inputs)`, then the gradients of the inputs that are there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = outputs[: len(upstream)]
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(
        outputs, wanted, [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)]
    )
    return [*(y.detach() for y in outputs), *grads]


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """The elementwise kernels of that instruction set; skips where the machine lacks it."""
    extension = native.extension()
    before = extension.elementwise_isa()
    try:
        if extension.elementwise_isa(name) != name:
            pytest.skip(f"this machine has no {name}")
        yield
    finally:
        extension.elementwise_isa(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_steady(run: Callable[[], Tensors]) -> None:
    """The same bits on a second run, and with 1, 2 and 3 threads."""
    with threads(1):
        first = run()
        assert_same_bits(run(), first)
    for count in (2, 3):
        with threads(count):
            assert_same_bits(run(), first)


def take_small_chunks(patch: pytest.MonkeyPatch, count: int = 1) -> None:
    """Chunks of `count` bytes of logits, of 16 rows (14 in C++) at least."""
    from trimpot.kernels.ops import logits

    patch.setattr(logits, "CHUNK_BYTES", count)
    if STATE.available:
        from trimpot.kernels.cpp import head

        patch.setattr(head, "CHUNK_BYTES", count)


def take_torchs_product(patch: pytest.MonkeyPatch) -> None:
    """Backend cpp on a processor on which torch's own product is the fastest."""
    from trimpot.kernels.cpp import rates

    patch.setattr(rates, "choose", lambda *_: "torch")
