"""Residual add and RMS norm: against transformers, float64 and itself."""

from __future__ import annotations

import kernel_checks as checks
import pytest
import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import add_rms_norm as op
from trimpot.kernels.ops.add_rms_norm import add_rms_norm

EPS = 1e-5
SHAPES = [(1, 1), (1, 576), (3, 7), (37, 100), (2, 5, 64), (131, 2051)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, residual, weight and the gradients of y and s, rounded to `dtype`."""
    make = torch.Generator().manual_seed(sum(shape))
    sizes = (shape, shape, shape[-1:], shape, shape)
    return [torch.randn(size, generator=make, dtype=torch.float64).to(dtype) for size in sizes]


def run(backend: str, x, residual, weight, dy, ds, offset: float = 0.0) -> list[torch.Tensor]:
    def function(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if backend == "reference":
            return op.reference(*args, EPS, offset)
        return add_rms_norm(*args, EPS, offset, backend)

    upstream = (dy, ds) if residual is not None else (dy,)
    return checks.with_gradients(function, (x, residual, weight), upstream)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("alone", [False, True])
def test_gradients_are_those_of_the_formula(alone: bool, offset: float) -> None:
    x, residual, weight, *_ = (t.requires_grad_() for t in inputs((3, 8)))
    args = (x, None if alone else residual, weight)
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, EPS, offset, "torch"), args)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)])
@pytest.mark.parametrize("alone", [False, True])
def test_is_an_op_as_torch_wants_it(alone: bool, backend: str) -> None:
    x, residual, weight, dy, ds = inputs((4, 6), torch.float32)
    residual = None if alone else residual.requires_grad_()
    args = (x.requires_grad_(), residual, weight.requires_grad_(), EPS, 1.0, backend)
    torch.library.opcheck(op._op, args)
    saved = x.detach(), weight.detach(), torch.rand(4), 0.0
    torch.library.opcheck(op._backward_op, (dy, ds, *saved, True, backend))
    torch.library.opcheck(op._backward_op, (dy, None, *saved, False, backend))


@pytest.mark.parametrize("dtype", [torch.float64, *checks.DTYPES])
def test_is_llamas_norm(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual, weight, dy, ds = inputs((2, 5, 64), dtype)
    llama = LlamaRMSNorm(64, EPS).to(dtype)

    def transformers(x, residual, weight):
        s = x + residual
        return torch.func.functional_call(llama, {"weight": weight}, (s,)), s

    got = run("torch", x, residual, weight, dy, ds)
    theirs = checks.with_gradients(transformers, (x, residual, weight), (dy, ds))
    if dtype == torch.float64:  # they norm in float32 even then
        for a, b in zip(got, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    else:
        exact = run("reference", *(t.double() for t in (x, residual, weight, dy, ds)))
        checks.assert_twice(got, theirs, exact)


def test_is_gemmas_norm() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    x, _, weight, *_ = inputs((3, 64), torch.float32)
    gemma = Gemma2RMSNorm(64, EPS)
    gemma.weight.data.copy_(weight)
    y, _ = add_rms_norm(x, None, gemma.weight, EPS, 1.0, "torch")
    torch.testing.assert_close(y, gemma(x), rtol=1e-6, atol=1e-6)


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpp_obeys_the_rule(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    given = inputs(shape, dtype)
    for residual, offset in ((given[1], 0.0), (None, 1.0)):
        args = [given[0], residual, *given[2:]]
        wide = [None if t is None else t.double() for t in args]
        with checks.isa(isa):
            got = run("cpp", *args, offset)
        plain, exact = run("reference", *args, offset), run("reference", *wide, offset)
        checks.assert_twice(got, plain, exact)


@checks.needs_extension
def test_cpp_sums_a_weights_gradient_over_many_rows() -> None:
    given = inputs((9001, 33), torch.float32)
    exact = run("reference", *(t.double() for t in given))
    checks.assert_twice(run("cpp", *given), run("reference", *given), exact)


@checks.needs_extension
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_reads_views(dtype: torch.dtype) -> None:
    """A slice of wider rows, rows that repeat, items with gaps; a weight with gaps."""
    x, residual, weight, dy, ds = inputs((6, 5, 40), dtype)
    views = {
        "slice": x.new_zeros(6, 5, 100).index_copy_(2, torch.arange(20, 60), x)[..., 20:60],
        "transposed": x.transpose(0, 2).contiguous().transpose(0, 2),
        "permuted rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": x[:1, :1].expand(6, 5, 40),
    }
    gapped = torch.stack([weight, weight], -1)[:, 0]
    for name, view in views.items():
        want = run("cpp", view.contiguous(), residual, weight, dy, ds)
        got = run("cpp", view, residual, gapped, dy, ds)
        checks.assert_same_bits(got, want), name
        got = run("cpp", residual, view, weight, view, view)
        plain = view.contiguous()
        checks.assert_same_bits(got, run("cpp", residual, plain, weight, plain, plain)), name


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)])
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...], backend: str) -> None:
    y, s, dx, dresidual, dweight = run(backend, *inputs(shape, torch.float32))
    assert y.shape == s.shape == dx.shape == dresidual.shape == shape
    assert torch.equal(dweight, torch.zeros(8))


@checks.needs_extension
def test_cpp_needs_no_more_than_is_asked_for() -> None:
    x, residual, weight, dy, ds = inputs((5, 16), torch.float32)
    rstd = torch.rand(5)
    with_dw = op._backward_op(dy, ds, x, weight, rstd, 0.0, True, "cpp")
    without = op._backward_op(dy, ds, x, weight, rstd, 0.0, False, "cpp")
    assert without[1].numel() == 0
    checks.assert_same_bits(without[:1], with_dw[:1])
    y, s = add_rms_norm(x.requires_grad_(), residual, weight, backend="cpp")
    (only_y,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (only_s,) = torch.autograd.grad(s, x, ds, retain_graph=True)
    (both,) = torch.autograd.grad((y, s), x, (dy, ds))
    torch.testing.assert_close(only_y + only_s, both)


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_passes_what_is_not_finite(isa: str) -> None:
    x, residual, weight, dy, ds = inputs((6, 37), torch.float32)
    x[0, 3], x[1, 36], residual[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3, 5], residual[3, 5], dy[4, 1], ds[5, 2] = torch.inf, -torch.inf, torch.nan, torch.inf
    given = x, residual, weight, dy, ds
    with checks.isa(isa):
        got = run("cpp", *given)
    checks.assert_same_specials(got, run("torch", *given))


@checks.needs_extension
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_gives_the_same_bits_again_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    given = inputs((300, 577), dtype)
    checks.assert_steady(lambda: run("cpp", *given))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)])
def test_compiles_whole_and_replays_under_checkpointing(backend: str) -> None:
    x, residual, weight, dy, ds = inputs((5, 16), torch.float32)
    want = run(backend, x, residual, weight, dy, ds)

    def function(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return add_rms_norm(*args, EPS, 0.0, backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    checks.assert_same_bits(checks.with_gradients(compiled, (x, residual, weight), (dy, ds)), want)

    def replayed(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    checks.assert_same_bits(checks.with_gradients(replayed, (x, residual, weight), (dy, ds)), want)


def test_a_wide_residual_stream_stays_wide() -> None:
    x, residual, weight, *_ = inputs((5, 16), torch.float32)
    y, s = add_rms_norm(x.bfloat16(), residual, weight, backend="torch")
    assert y.dtype == s.dtype == torch.float32
    assert torch.equal(s, x.bfloat16().float() + residual)


def test_arguments_that_do_not_fit() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(KernelError, match=r"weight \(4,\); \[..., H\], the same, and \[H\]"):
        add_rms_norm(x, None, weight[:4], backend="torch")
    with pytest.raises(KernelError, match=r"x is \(2, 8\), residual \(1, 8\)"):
        add_rms_norm(x, x[:1], weight, backend="torch")


@checks.needs_extension
def test_cpp_refuses_what_it_can_not_run() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(
        KernelError, match=r"takes float32, bfloat16 and float16, not torch.float64"
    ):
        add_rms_norm(x.double(), None, weight, backend="cpp")
