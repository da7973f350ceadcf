"""SwiGLU and GeGLU: against torch, float64 and themselves."""

from __future__ import annotations

import kernel_checks as checks
import pytest
import torch
import torch.nn.functional as F

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import geglu, glu, swiglu

OPS = {"swiglu": swiglu, "geglu": geglu}
EAGER = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}
"""As the models of transformers write it."""

each_op = pytest.mark.parametrize("op", OPS)
backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)]
)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """gate (up to ± 15), up, dy, rounded to `dtype`."""
    make = torch.Generator().manual_seed(sum(shape))
    gate, up, dy = (torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(3))
    return [(gate * 4).to(dtype), up.to(dtype), dy.to(dtype)]


def run(op: str, backend: str, gate, up, dy) -> list[torch.Tensor]:
    def function(*args: torch.Tensor) -> torch.Tensor:
        if backend == "reference":
            return OPS[op].reference(*args)
        if backend == "eager":
            return EAGER[op](*args)
        return getattr(OPS[op], op)(*args, backend)

    return checks.with_gradients(function, (gate, up), (dy,))


@each_op
def test_gradients_are_those_of_the_formula(op: str) -> None:
    gate, up, _ = (t.requires_grad_() for t in inputs((3, 8)))
    function = getattr(OPS[op], op)
    assert torch.autograd.gradcheck(lambda *a: function(*a, "torch"), (gate, up))


@each_op
@backends
def test_is_an_op_as_torch_wants_it(op: str, backend: str) -> None:
    gate, up, dy = inputs((4, 6), torch.float32)
    args = (gate.clone().requires_grad_(), up.clone().requires_grad_(), backend)
    torch.library.opcheck(OPS[op]._op, args)
    torch.library.opcheck(OPS[op]._backward_op, (dy, gate, up, backend))


@each_op
@pytest.mark.parametrize("dtype", [torch.float64, *checks.DTYPES])
def test_the_definition_is_what_models_do(op: str, dtype: torch.dtype) -> None:
    given = inputs((7, 300), dtype)
    got, theirs = run(op, "torch", *given), run(op, "eager", *given)
    if dtype == torch.float64:
        for mine, true in zip(got, theirs, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
        return
    checks.assert_twice(got, theirs, run(op, "reference", *(t.double() for t in given)))


@checks.needs_extension
@each_op
@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_obeys_the_rule(op: str, dtype: torch.dtype, isa: str) -> None:
    given = inputs((7, 2903), dtype)
    with checks.isa(isa):
        got = run(op, "cpp", *given)
    exact = run(op, "reference", *(t.double() for t in given))
    checks.assert_twice(got, run(op, "reference", *given), exact)
    for count in (1, 3, 7, 16, 20, 33, 100):  # the end of a vector computes as its middle does
        with checks.isa(isa):
            part = run(op, "cpp", *(t[1, :count] for t in given))
        checks.assert_same_bits(part, [t[1, :count] for t in got])


@checks.needs_extension
@each_op
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_is_right_to_the_digit_far_out(op: str, isa: str) -> None:
    """Where the activation is small, its relative error is small as well."""
    gate = torch.linspace(-80, 80, 4001)
    one = torch.ones_like(gate)
    g = gate.double()
    exact = run(op, "torch", g, one.double(), one.double())  # F.gelu loses digits even so
    with checks.isa(isa):
        got = run(op, "cpp", gate, one, one)
    v, slope = (g, 1.0) if op == "swiglu" else (glu._argument(True, g), glu._slope(True, g))
    scale = v.sigmoid() * (1 + g.abs() * slope)  # of the terms that act′ is the sum of
    normal = scale > 1e-30
    assert normal.sum() > 2000
    for mine, true in zip(got, exact, strict=True):
        # Half an ulp of an argument of up to 80 is 4e-6 of its exponential.
        assert ((mine - true) / scale)[normal].abs().max() < 2e-5


@checks.needs_extension
@each_op
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_reads_views(op: str, dtype: torch.dtype) -> None:
    """Halves of one fused projection, rows that repeat, items with gaps."""
    gate, up, dy = inputs((4, 6, 40), dtype)
    want = run(op, "cpp", gate, up, dy)
    fused = torch.cat([gate, up], -1)
    checks.assert_same_bits(run(op, "cpp", *fused.chunk(2, -1), dy), want)
    transposed = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (gate, up, dy)]
    checks.assert_same_bits(run(op, "cpp", *transposed), want)
    row = dy[:1, :1]
    repeated = run(op, "cpp", gate, up, row.expand(4, 6, 40))
    checks.assert_same_bits(repeated, run(op, "cpp", gate, up, row.repeat(4, 6, 1)))


@each_op
@backends
@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0)])
def test_no_items(op: str, backend: str, shape: tuple[int, ...]) -> None:
    assert all(t.shape == shape for t in run(op, backend, *inputs(shape, torch.float32)))


@checks.needs_extension
@each_op
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_passes_what_is_not_finite(op: str, isa: str) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 200.0, -200.0, 1.0])
    gate, up = (t.flatten() for t in torch.meshgrid(special, special, indexing="ij"))
    for dy in (torch.ones_like(up), torch.full_like(up, torch.inf)):
        with checks.isa(isa):
            got = run(op, "cpp", gate, up, dy)
        checks.assert_same_specials(got, run(op, "eager", gate, up, dy))


@checks.needs_extension
@each_op
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_gives_the_same_bits_again_and_on_any_number_of_threads(
    op: str, dtype: torch.dtype
) -> None:
    given = inputs((31, 1537), dtype)
    checks.assert_steady(lambda: run(op, "cpp", *given))


@each_op
@backends
def test_compiles_whole(op: str, backend: str) -> None:
    gate, up, dy = inputs((5, 16), torch.float32)
    function = getattr(OPS[op], op)
    compiled = torch.compile(lambda *a: function(*a, backend), fullgraph=True, backend="aot_eager")
    got = checks.with_gradients(compiled, (gate, up), (dy,))
    checks.assert_same_bits(got, run(op, backend, gate, up, dy))


@each_op
def test_arguments_that_do_not_fit(op: str) -> None:
    gate = torch.zeros(2, 8)
    with pytest.raises(KernelError, match=rf"{op}: gate is \(2, 8\), up \(8,\); one shape"):
        getattr(OPS[op], op)(gate, gate[0], "torch")


@checks.needs_extension
@each_op
def test_cpp_refuses_what_it_can_not_run(op: str) -> None:
    gate = torch.zeros(2, 8, dtype=torch.float64)
    with pytest.raises(KernelError, match=r"not torch\.float64; use torch"):
        getattr(OPS[op], op)(gate, gate, "cpp")
