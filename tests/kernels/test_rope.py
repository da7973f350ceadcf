"""Rotary embedding with and without q/k norm: against transformers, float64 and itself."""

from __future__ import annotations

from dataclasses import dataclass

import kernel_checks as checks
import pytest
import torch

from trimpot.kernels.errors import KernelError
from trimpot.kernels.ops import rope as op
from trimpot.kernels.ops.rope import rope

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    q_heads: int
    k_heads: int
    width: int
    half: int
    tables: int = 1
    """Of angles: one for all sequences, or as many as there are."""


SHAPES = [
    Shape(3, 101, 1, 1, 2, 1),
    Shape(2, 5, 9, 3, 64, 32),
    Shape(2, 3, 4, 2, 80, 10, tables=2),  # partial
    Shape(3, 7, 2, 1, 33, 16, tables=3),  # odd, one dimension passes
    Shape(1, 11, 3, 3, 256, 128),
    Shape(2, 2, 2, 2, 24, 0),  # nothing is rotated
]
backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cpp", marks=checks.needs_extension)]
)
Given = list[torch.Tensor]


def inputs(n: Shape, dtype: torch.dtype = torch.float64) -> Given:
    """q, k, cos, sin, q_weight, k_weight, dq, dk, rounded to `dtype`."""
    make = torch.Generator().manual_seed(n.width + n.length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    angles = 100 * normal(n.tables, n.length, n.half)
    q, k = (n.batch, n.length, n.q_heads, n.width), (n.batch, n.length, n.k_heads, n.width)
    made = [normal(*q), normal(*k), angles.cos(), angles.sin(), normal(n.width), normal(n.width)]
    return [t.to(dtype) for t in [*made, normal(*q), normal(*k)]]


def run(backend: str, given: Given, norm: bool, offset: float = 0.0) -> list[torch.Tensor]:
    q, k, cos, sin, q_weight, k_weight, dq, dk = given

    def function(q, k, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q_weight, k_weight = weights or (None, None)
        if backend == "reference":
            return op.reference(q, k, cos, sin, q_weight, k_weight, EPS, offset)
        return rope(q, k, cos, sin, q_weight, k_weight, EPS, offset, backend)

    weights = (q_weight, k_weight) if norm else ()
    return checks.with_gradients(function, (q, k, *weights), (dq, dk))


def doubles(given: Given) -> Given:
    return [t.double() for t in given]


@pytest.mark.parametrize("norm", ["both", "none", "k"])
def test_gradients_are_those_of_the_formula(norm: str) -> None:
    q, k, cos, sin, q_weight, k_weight, *_ = inputs(Shape(2, 3, 2, 1, 6, 2, tables=2))
    q_weight = q_weight.requires_grad_() if norm == "both" else None
    k_weight = k_weight.requires_grad_() if norm != "none" else None
    args = (q.requires_grad_(), k.requires_grad_(), cos, sin, q_weight, k_weight)
    assert torch.autograd.gradcheck(lambda *a: rope(*a, EPS, 1.0, "torch"), args)


@backends
@pytest.mark.parametrize("norm", ["both", "none", "k"])
def test_is_an_op_as_torch_wants_it(norm: str, backend: str) -> None:
    q, k, cos, sin, q_weight, k_weight, dq, dk = inputs(SHAPES[2], torch.float32)
    weights = [q_weight if norm == "both" else None, k_weight if norm != "none" else None]
    rstds = [
        torch.rand(0 if w is None else x.shape[:3]) for w, x in zip(weights, (q, k), strict=True)
    ]
    saved = [None if w is None else x for w, x in zip(weights, (q, k), strict=True)]
    for need_dw in (True, False):
        args = (dq, dk, *saved, cos, sin, *weights, *rstds, 1.0, need_dw, backend)
        torch.library.opcheck(op._backward_op, args)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (q, k, *weights)]
    torch.library.opcheck(op._op, (*leaves[:2], cos, sin, *leaves[2:], EPS, 0.0, backend))


@pytest.mark.parametrize("dtype", [torch.float64, *checks.DTYPES])
def test_is_llamas_rotation(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    given = inputs(SHAPES[1], dtype)

    def transformers(q, k):
        twice = (torch.cat([t, t], -1) for t in given[2:4])
        return apply_rotary_pos_emb(q, k, *twice, unsqueeze_dim=2)

    theirs = checks.with_gradients(transformers, given[:2], given[-2:])
    exact = run("reference", doubles(given), norm=False)
    checks.assert_twice(run("torch", given, norm=False), theirs, exact)


def test_is_qwens_norm_and_rotation() -> None:
    from transformers.models.qwen3 import modeling_qwen3 as qwen

    given = inputs(SHAPES[1], torch.float32)
    q, k, cos, sin, q_weight, k_weight, *_ = given
    norms = [qwen.Qwen3RMSNorm(64, EPS) for _ in range(2)]
    for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
        norm.weight.data.copy_(weight)
    twice = (torch.cat([t, t], -1) for t in (cos, sin))
    want = qwen.apply_rotary_pos_emb(norms[0](q), norms[1](k), *twice, unsqueeze_dim=2)
    for g, w in zip(rope(*given[:6], EPS, backend="torch"), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@checks.needs_extension
@pytest.mark.parametrize("isa", checks.ISAS)
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("norm", [False, True])
def test_cpp_obeys_the_rule(norm: bool, dtype: torch.dtype, isa: str) -> None:
    for n in SHAPES:
        given = inputs(n, dtype)
        with checks.isa(isa):
            got = run("cpp", given, norm, offset=1.0)
        plain = run("reference", given, norm, offset=1.0)
        checks.assert_twice(got, plain, run("reference", doubles(given), norm, offset=1.0))


@checks.needs_extension
def test_cpp_sums_a_weights_gradient_over_many_tokens() -> None:
    given = inputs(Shape(3, 1001, 3, 1, 8, 4), torch.float32)
    plain, exact = run("reference", given, True), run("reference", doubles(given), True)
    checks.assert_twice(run("cpp", given, True), plain, exact)


@checks.needs_extension
@pytest.mark.parametrize("norm", [False, True])
def test_one_side_may_have_a_norm(norm: bool) -> None:
    q, k, cos, sin, q_weight, *_ = inputs(SHAPES[1], torch.float32)
    weights = (q_weight, None) if norm else (None, q_weight)
    got = rope(q, k, cos, sin, *weights, EPS, backend="cpp")
    for g, w in zip(got, op.reference(q, k, cos, sin, *weights, EPS), strict=True):
        torch.testing.assert_close(g, w)


@checks.needs_extension
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_reads_views(dtype: torch.dtype, norm: bool) -> None:
    """Parts of one fused projection, heads before tokens, D with gaps, expanded; tables with a
    gap, float32 or expanded over the sequences."""
    given = inputs(SHAPES[1], dtype)
    q, k, cos, sin, *rest, dq, dk = given
    want = run("cpp", given, norm)
    fused = torch.cat([q, k], 2)
    parts = fused[:, :, :9], fused[:, :, 9:]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, dq, dk)]
    gapped = [torch.stack([t, t], -1)[..., 0] for t in (q, k, cos, sin, dq, dk)]
    tables = [torch.cat([t, t], -1)[..., :32] for t in (cos, sin)]
    for args in (
        [*parts, *given[2:]],
        [*turned[:2], cos, sin, *rest, *turned[2:]],
        [*gapped[:4], *rest, *gapped[4:]],
        [q, k, *tables, *rest, dq, dk],
        [q, k, cos.expand(2, -1, -1), sin.expand(2, -1, -1), *rest, dq, dk],
        [q, k, cos.float(), sin.float(), *rest, dq, dk],
    ):
        checks.assert_same_bits(run("cpp", args, norm), want)
    repeated = [q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), *given[2:]]
    plain = [t.contiguous() for t in repeated]
    checks.assert_same_bits(run("cpp", repeated, norm), run("cpp", plain, norm))


@backends
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("n", [Shape(0, 5, 2, 1, 8, 4), Shape(2, 0, 2, 1, 8, 4)])
def test_no_tokens(n: Shape, norm: bool, backend: str) -> None:
    given = inputs(n, torch.float32)
    q, k, dq, dk, *dws = run(backend, given, norm)
    assert q.shape == dq.shape == given[0].shape and k.shape == dk.shape == given[1].shape
    assert all(torch.equal(dw, torch.zeros(8)) for dw in dws)


@checks.needs_extension
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("isa", checks.ISAS)
def test_cpp_passes_what_is_not_finite(isa: str, norm: bool) -> None:
    given = inputs(SHAPES[1], torch.float32)
    q, k, *_, dq, dk = given
    q[0, 0, 0, 3], q[0, 1, 2, 63], k[1, 2, 0, 40] = torch.nan, torch.inf, -torch.inf
    dq[0, 2, 1, 0], dk[1, 1, 2, 31] = torch.inf, torch.nan
    with checks.isa(isa):
        got = run("cpp", given, norm)
    checks.assert_same_specials(got, run("torch", given, norm))


@checks.needs_extension
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_cpp_gives_the_same_bits_again_and_on_any_number_of_threads(
    dtype: torch.dtype, norm: bool
) -> None:
    given = inputs(Shape(2, 150, 4, 2, 64, 24, tables=2), dtype)
    checks.assert_steady(lambda: run("cpp", given, norm))


@backends
def test_compiles_whole(backend: str) -> None:
    q, k, cos, sin, *weights, dq, dk = inputs(SHAPES[1], torch.float32)

    def function(q, k, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rope(q, k, cos, sin, *weights, EPS, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = checks.with_gradients(compiled, (q, k, *weights), (dq, dk))
    want = checks.with_gradients(function, (q, k, *weights), (dq, dk))
    checks.assert_same_bits(got, want)


def test_arguments_that_do_not_fit() -> None:
    q, k, cos, sin, weight, *_ = inputs(SHAPES[1], torch.float32)
    with pytest.raises(KernelError, match=r"k \(2, 5, 3, 32\); \[B, T, Hq, D\]"):
        rope(q, k[..., :32], cos, sin, backend="torch")
    with pytest.raises(KernelError, match=r"\[2 or 1, 5, up to 32\] is wanted, half of"):
        rope(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), backend="torch")
    with pytest.raises(KernelError, match=r"weight is \(32,\); \(64,\) fits"):
        rope(q, k, cos, sin, weight[:32], backend="torch")


@checks.needs_extension
def test_cpp_refuses_what_it_can_not_run() -> None:
    q, k, cos, sin, *_ = inputs(SHAPES[1])
    with pytest.raises(KernelError, match=r"not torch\.float64; use torch"):
        rope(q, k, cos, sin, backend="cpp")
    wide, table = torch.zeros(1, 1, 1, 4096), torch.zeros(1, 1, 8)
    with pytest.raises(KernelError, match="heads of 4096 dimensions"):
        rope(wide, wide, table, table, backend="cpp")
