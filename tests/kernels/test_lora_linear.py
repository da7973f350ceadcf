"""Linear layers with low-rank updates: against autograd in float64, PEFT and itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import kernel_checks as checks
import pytest
import torch
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from trimpot.kernels import native
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.ops import lora_linear as op
from trimpot.kernels.ops.lora_linear import lora_linear
from trimpot.kernels.ops.philox import keep_mask

Tensors = list[torch.Tensor]
Segment = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    rows: int
    depth: int
    outputs: tuple[int, ...]
    rank: int
    bias: bool = False
    dropout: tuple[float, ...] = (0.0,)
    """Of each adapter."""
    segments: tuple[Segment, ...] = ()
    """(adapter, first row, rows); () is all rows to adapter 0."""

    @property
    def adapters(self) -> int:
        return len(self.dropout)

    @property
    def cuts(self) -> tuple[Segment, ...]:
        return self.segments or ((0, 0, self.rows),)


MANY = Shape(
    61, 70, (33, 10), 8, True, (0.0, 0.25, 0.5),
    ((2, 3, 10), (0, 13, 20), (1, 40, 1), (1, 41, 0), (2, 45, 16)),
)  # fmt: skip
SHAPES = [
    Shape(40, 96, (64,), 16),
    Shape(37, 67, (45, 3, 65), 8, bias=True),
    Shape(1, 33, (7, 32), 1, bias=True),
    Shape(1, 1, (1,), 1),
    Shape(0, 16, (8, 5), 4, bias=True),
    Shape(0, 16, (8, 5), 4, dropout=(0.5,)),
    Shape(15, 130, (31,), 64, dropout=(0.3,)),
    Shape(70, 289, (257, 31), 256),
    Shape(460, 320, (96,), 16, bias=True, dropout=(0.1,)),
    Shape(30, 40, (33,), 8, segments=((0, 5, 20),)),
    Shape(30, 40, (33,), 8, dropout=(0.0, 0.0), segments=((1, 0, 30),)),
    replace(MANY, dropout=(0.0, 0.0, 0.0)),
    MANY,
]
SEEDS = (3, 2**61 + 5, 0, 2**32, -7, 12, 2**62 - 1, 99, 1)


@dataclass
class Given:
    x: torch.Tensor
    weights: Tensors
    biases: list[torch.Tensor | None]
    a: Tensors
    b: Tensors
    dys: Tensors
    scales: list[float]
    seeds: torch.Tensor

    def to(self, dtype: torch.dtype) -> Given:
        def cast(tensors: Sequence[Any]) -> list[Any]:
            return [None if t is None else t.to(dtype) for t in tensors]

        weights, biases, a, b, dys = map(
            cast, (self.weights, self.biases, self.a, self.b, self.dys)
        )
        return Given(self.x.to(dtype), weights, biases, a, b, dys, self.scales, self.seeds)


def inputs(
    n: Shape, dtype: torch.dtype = torch.float64, outliers: bool = False, draw: int = 0
) -> Given:
    """Adapter i has rank max(R − 2i, 1), by zeros. Outliers × 20 in a row, a column and an item."""
    make = torch.Generator().manual_seed(n.rows + n.depth + n.rank + 1000 * draw)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=make, dtype=torch.float64)

    x, j = normal(n.rows, n.depth), len(n.outputs)
    weights = [normal(outputs, n.depth, scale=n.depth**-0.5) for outputs in n.outputs]
    dys = [normal(n.rows, outputs) for outputs in n.outputs]
    a = [normal(n.adapters, n.rank, n.depth, scale=n.depth**-0.5) for _ in n.outputs]
    b = [normal(n.adapters, outputs, n.rank, scale=0.2) for outputs in n.outputs]
    for p, q in zip(a, b, strict=True):
        for adapter in range(n.adapters):
            own = max(n.rank - 2 * adapter, 1)
            p[adapter, own:], q[adapter, :, own:] = 0, 0
    for matrix in (x, *weights, *dys) if outliers else ():
        matrix[:, 3 % matrix.shape[1]] *= 20
        matrix[3 % max(matrix.shape[0], 1)] *= 20
        matrix[0, -1] *= 20
    biases = [normal(outputs) if n.bias else None for outputs in n.outputs]
    scales = [0.5 + 0.3 * i for i in range(j * n.adapters)]
    seeds = torch.tensor(SEEDS[: j * n.adapters]).view(j, n.adapters)
    return Given(x, weights, biases, a, b, dys, scales, seeds).to(dtype)


def by_formula(n: Shape, g: Given, x: torch.Tensor, a: Tensors, b: Tensors) -> Tensors:
    """ys, by plain torch: each segment's own matrices and mask."""
    ys: Tensors = []
    for j, (weight, bias) in enumerate(zip(g.weights, g.biases, strict=True)):
        y = linear(x, weight, bias)
        for adapter, first, count in n.cuts:
            rows, p = slice(first, first + count), n.dropout[adapter]
            kept = x[rows]
            if p:
                seed = int(g.seeds[j, adapter])
                mask = keep_mask(seed, p, first, count, n.depth, x.device)
                kept = kept * mask.to(x.dtype) / (1 - p)
            update = linear(linear(kept, a[j][adapter]), b[j][adapter])
            update = g.scales[j * n.adapters + adapter] * update
            y = y + pad(update, (0, 0, first, n.rows - first - count))
        ys.append(y)
    return ys


def ours(n: Shape, g: Given, x: torch.Tensor, a: Tensors, b: Tensors, backend: str) -> Tensors:
    segments = torch.tensor(n.segments, dtype=torch.int32) if n.segments else None
    biases = g.biases if n.bias else None
    return lora_linear(
        x, g.weights, a, b, g.scales, biases=biases, dropout=n.dropout, seeds=g.seeds,
        segments=segments, backend=backend,
    )  # fmt: skip


def run(backend: str, n: Shape, g: Given) -> Tensors:
    """ys, dx, dA_j, dB_j."""
    j = len(g.weights)

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, a, b = leaves[0], list(leaves[1 : 1 + j]), list(leaves[1 + j :])
        if backend == "formula":
            return tuple(by_formula(n, g, x, a, b))
        return tuple(ours(n, g, x, a, b, backend))

    return checks.with_gradients(function, (g.x, *g.a, *g.b), g.dys)


@pytest.fixture(autouse=True)
def _preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.take_the_preferred(monkeypatch)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n", SHAPES, ids=str)
@checks.product_backends
def test_obeys_the_rule(backend: str, n: Shape, dtype: torch.dtype) -> None:
    """Of one row and rank 1, all items of dB have the one rounding of x·A, which is small by luck
    now and then, torch's too: eight draws are taken together."""
    draws = [inputs(n, dtype, draw=draw) for draw in range(8 if n.rows == 1 else 1)]

    def of_all(name: str, t: torch.dtype) -> list[torch.Tensor]:
        each = [run(name, n, g.to(t)) for g in draws]
        return [torch.stack(results) for results in zip(*each, strict=True)]

    exact, plain, low = (of_all("formula", t) for t in (torch.float64, dtype, torch.bfloat16))
    checks.assert_judged(backend, of_all(backend, dtype), plain, low, exact)


@checks.needs_extension
@pytest.mark.parametrize("outliers", [False, True], ids=["even", "outliers"])
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 256])
def test_int16_has_at_most_half_of_bf16s_error(rank: int, outliers: bool) -> None:
    for n in (
        Shape(100, 576, (192, 64), rank),
        Shape(101, 577, (31,), rank, dropout=(0.1,)),
    ):
        g = inputs(n, torch.float32, outliers)
        exact, low = (run("formula", n, g.to(t)) for t in (torch.float64, torch.bfloat16))
        checks.assert_half_of_bf16(run("cpp:int16", n, g), low, exact)


@checks.needs_extension
def test_int16_stands_weights_with_dead_rows_and_columns() -> None:
    """They count for nothing in x Wᵀ and dY W, but adapters read all of x and dY."""
    n = Shape(60, 320, (128, 96), 8)
    g = inputs(n, torch.float32)
    for dead in ("rows", "columns", "all"):
        for weight in g.weights:
            weight[: {"rows": 40, "columns": 0, "all": 128}[dead]] = 0
            weight[:, : 80 if dead == "columns" else 0] = 0
        exact, low = (run("formula", n, g.to(t)) for t in (torch.float64, torch.bfloat16))
        checks.assert_half_of_bf16(run("cpp:int16", n, g), low, exact)


@checks.needs_extension
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n", [SHAPES[1], MANY], ids=str)
def test_whatever_is_fastest_obeys_the_rule(
    n: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    g = inputs(n, dtype)
    exact, plain = (run("formula", n, g.to(t)) for t in (torch.float64, dtype))
    checks.assert_twice(run("cpp", n, g), plain, exact)


@pytest.mark.parametrize(
    "n",
    [Shape(3, 4, (2, 3), 2, bias=True, dropout=(0.4,)),
     Shape(7, 3, (2,), 2, False, (0.0, 0.5), ((1, 0, 2), (0, 2, 3), (1, 6, 1)))],
    ids=["siblings", "adapters"],
)  # fmt: skip
def test_gradients_are_those_of_the_formula(n: Shape) -> None:
    g = inputs(n)
    j = len(g.weights)
    leaves = [t.requires_grad_() for t in (g.x, *g.a, *g.b)]

    def function(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(ours(n, g, x, list(rest[:j]), list(rest[j:]), "torch"))

    assert torch.autograd.gradcheck(function, leaves)


def test_the_reference_is_the_formula() -> None:
    n = Shape(9, 6, (5,), 3, bias=True, dropout=(0.5,))
    g = inputs(n)
    drop = keep_mask(int(g.seeds[0, 0]), 0.5, 0, 9, 6, g.x.device) * 2.0
    got = op.reference(g.x, g.weights[0], g.a[0][0], g.b[0][0], g.scales[0], g.biases[0], drop)
    torch.testing.assert_close([got], by_formula(n, g, g.x, g.a, g.b))


@checks.product_backends
@pytest.mark.parametrize(("rank", "bias"), [(4, True), (16, False)])
def test_is_pefts_layer(rank: int, bias: bool, backend: str) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear, LoraLayer

    torch.manual_seed(rank)
    made = Linear(
        torch.nn.Linear(96, 65, bias=bias),
        "default",
        LoraConfig(r=rank, lora_alpha=24),
        r=rank,
        lora_alpha=24,
        init_lora_weights=False,
    )
    assert isinstance(made, LoraLayer)
    layer: Any = made
    parts = [layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]]
    x, dy = torch.randn(2, 19, 96), torch.randn(2, 19, 65)

    def theirs(dtype: torch.dtype) -> Tensors:
        layer.zero_grad()
        given = x.detach().to(dtype, copy=True).requires_grad_()
        y = layer.to(dtype)(given)
        y.backward(dy.to(dtype))
        found = [y, given.grad, parts[1].weight.grad, parts[2].weight.grad]
        return [t.detach().clone() for t in found]

    plain = theirs(torch.float32)
    weight, a, b = (part.weight.detach().clone() for part in parts)
    biases = [layer.base_layer.bias.detach().clone()] if bias else None
    exact, low = theirs(torch.float64), theirs(torch.bfloat16)

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, [weight], [a], [b], [24 / rank], biases=biases, backend=backend)[0]

    got = checks.with_gradients(function, (x, a, b), (dy,))
    checks.assert_judged(backend, got, plain, low, exact)


# ---- several adapters


@checks.product_backends
def test_ranks_are_padded_by_zeros_that_stay(backend: str) -> None:
    """A stack of adapters of lower rank gives what each gives alone; zeros get no gradient."""
    n = replace(MANY, dropout=(0.0, 0.0, 0.0))
    g = inputs(n, torch.float32)
    j = len(g.weights)
    got = run(backend, n, g)
    ys, das, dbs = got[:j], got[1 + j : 1 + 2 * j], got[1 + 2 * j :]
    for adapter in range(n.adapters):
        own = n.rank - 2 * adapter
        assert not any(d[adapter, own:].any() for d in das)
        assert not any(d[adapter, :, own:].any() for d in dbs)
        for first, count in (cut[1:] for cut in n.cuts if cut[0] == adapter):
            rows = slice(first, first + count)
            alone = lora_linear(
                g.x[rows],
                g.weights,
                [p[adapter, :own] for p in g.a],
                [p[adapter, :, :own] for p in g.b],
                [g.scales[i * n.adapters + adapter] for i in range(j)],
                biases=g.biases,
                backend=backend,
            )
            tolerance = 2e-3 if backend in checks.LOW else 2e-6
            for y, want in zip(ys, alone, strict=True):
                torch.testing.assert_close(y[rows], want, rtol=0, atol=tolerance)


@checks.product_backends
def test_rows_in_no_segment_have_the_base_layer_alone(backend: str) -> None:
    n = replace(MANY, rows=80)
    g = inputs(n, torch.float32)
    free = torch.ones(n.rows, dtype=torch.bool)
    for _, first, count in n.cuts:
        free[first : first + count] = False
    got = run(backend, n, g)
    g.b = [torch.zeros_like(p) for p in g.b]
    base = run(backend, n, g)
    for y, want in zip(got[:3], base[:3], strict=True):  # and dx
        checks.assert_same_bits([y[free]], [want[free]])
        assert (y[~free] != want[~free]).any()


@checks.product_backends
def test_segments_of_one_adapter_see_their_part_of_one_mask(backend: str) -> None:
    whole = Shape(41, 32, (24,), 8, dropout=(0.5,))
    cut = replace(whole, segments=((0, 17, 24), (0, 0, 17)))
    g = inputs(whole, torch.float32)
    for a, b in zip(run(backend, whole, g), run(backend, cut, g), strict=True):
        tolerance = 1e-3 if backend in checks.LOW else 1e-5  # whole, dY B reads integers
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- dropout


def masks(backend: str, dtype: torch.dtype) -> Tensors:
    """D of two siblings, of the forward pass and of the input's gradient: W = 0, A = B = 1."""
    rows, width, p = 50, 64, 0.25
    eye, zero = torch.eye(width, dtype=dtype), torch.zeros(width, width, dtype=dtype)
    seeds = torch.tensor([[5], [2**61 + 9]])
    found: Tensors = []
    for j in range(2):
        x = torch.ones(rows, width, dtype=dtype, requires_grad=True)
        ys = lora_linear(
            x, [zero] * 2, [eye] * 2, [eye] * 2, [1.0] * 2, dropout=p, seeds=seeds, backend=backend
        )
        ys[j].sum().backward()
        assert x.grad is not None
        found += [ys[j].detach(), x.grad]
    return found


@pytest.mark.parametrize("dtype", checks.DTYPES)
@checks.product_backends
def test_masks_are_those_of_the_seeds(backend: str, dtype: torch.dtype) -> None:
    found = masks(backend, dtype)
    for seed, pair in zip((5, 2**61 + 9), (found[:2], found[2:]), strict=True):
        keep = keep_mask(seed, 0.25, 0, 50, 64, torch.device("cpu"))
        for mask in pair:
            assert torch.equal(mask != 0, keep)
            torch.testing.assert_close(mask[keep], torch.full_like(mask[keep], 1 / 0.75))


@checks.product_backends
def test_dropout_keeps_the_mean_and_the_rate(backend: str) -> None:
    mask = masks(backend, torch.float32)[0]
    bound = 5 * (0.25 * 0.75 / mask.numel()) ** 0.5  # five standard deviations
    assert abs((mask != 0).double().mean() - 0.75) < bound
    assert abs(mask.double().mean() - 1) < bound / 0.75 + 1e-6


@checks.product_backends
def test_seeds_are_drawn_anew_for_each_call_and_each_sibling(backend: str) -> None:
    x, eye, zero = torch.ones(9, 32), torch.eye(32), torch.zeros(32, 32)
    drawn = [
        y
        for _ in range(2)
        for y in lora_linear(
            x, [zero] * 2, [eye] * 2, [eye] * 2, [1.0] * 2, dropout=0.5, backend=backend
        )
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@checks.product_backends
def test_checkpointing_replays_the_masks(backend: str) -> None:
    n = replace(SHAPES[1], dropout=(0.5,))
    g = inputs(n, torch.float32)
    j = len(g.weights)

    def function(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = list(rest[:j]), list(rest[j:])
        return tuple(lora_linear(x, g.weights, a, b, g.scales, dropout=0.5, backend=backend))

    def replayed(*leaves: torch.Tensor) -> Any:
        return checkpoint(function, *leaves, use_reentrant=False)

    found = []
    for call in (function, replayed):
        torch.manual_seed(11)
        found.append(checks.with_gradients(call, (g.x, *g.a, *g.b), g.dys))
    checks.assert_same_bits(*found)


@checks.product_backends
def test_nothing_of_the_size_of_a_mask_is_saved(backend: str) -> None:
    """x, S, the parameters, the seeds and the table."""
    n = replace(SHAPES[8], outputs=(96, 64))
    g = inputs(n, torch.float32)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    leaves = [t.requires_grad_() for t in (g.x, *g.a, *g.b)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ours(n, g, leaves[0], leaves[1:3], leaves[3:], backend)
    at = {t.data_ptr() for t in (g.x, *g.weights, *g.a, *g.b)}
    assert g.x.data_ptr() in {t.data_ptr() for t in kept}
    new = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in at)
    assert new == sorted([(n.rows, n.rank)] * 2 + [(1, 3), (2, 1)])


# ---- what is not finite, strides, bits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@checks.product_backends
def test_what_is_not_finite_stays_in_its_row(backend: str, value: float) -> None:
    n = Shape(40, 96, (33, 64), 8, bias=True)
    g = inputs(n, torch.float32)
    clean = run(backend, n, g)
    g.x[5, 7], g.dys[0][6, 3], g.dys[1][6, 3] = value, value, value
    got, plain = run(backend, n, g), run("formula", n, g)
    for i, row in ((0, 5), (1, 5), (2, 6)):  # y of both siblings, dx
        rest = torch.arange(n.rows) != row
        assert torch.equal(got[i].isfinite(), plain[i].isfinite())
        assert not got[i][row].isfinite().any()
        checks.assert_same_bits([got[i][rest]], [clean[i][rest]])
    for found, want in zip(got[3:], plain[3:], strict=True):
        assert torch.equal(found.isfinite(), want.isfinite())


@checks.product_backends
def test_an_adapter_sees_no_others_rows(backend: str) -> None:
    """A NaN among the rows of one, or of none, does not come to the others."""
    g = inputs(MANY, torch.float32)
    j = len(g.weights)
    clean = run(backend, MANY, g)
    for row, mine in ((15, 0), (36, None)):
        spoiled = g.to(torch.float32)
        spoiled.x = g.x.clone()
        spoiled.dys = [dy.clone() for dy in g.dys]
        spoiled.x[row, 3], spoiled.dys[0][row, 2] = torch.nan, torch.nan
        got = run(backend, MANY, spoiled)
        for found, want in zip(got[1 + j :], clean[1 + j :], strict=True):
            for adapter in range(MANY.adapters):
                if adapter != mine:
                    checks.assert_same_bits([found[adapter]], [want[adapter]])
        if mine is not None:
            assert got[1 + j][mine].isnan().any() and got[-j][mine].isnan().any()


@checks.product_backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_reads_views(backend: str, dtype: torch.dtype) -> None:
    """Slices, transposed and expanded operands, gradients that are all one number."""
    checks.skip_torchs_bits(backend, dtype)
    n = Shape(30, 40, (33,), 8, bias=True)
    g = inputs(n, dtype)

    def transposed(t: torch.Tensor) -> torch.Tensor:
        return t.mT.contiguous().mT

    wide = torch.zeros(30, 99, dtype=dtype)
    wide[:, 7:47] = g.x
    bias = g.biases[0]
    assert bias is not None
    gapped = torch.stack([bias, bias], 1)[:, 0]
    views = [
        replace(g, x=wide[:, 7:47]),
        replace(g, x=transposed(g.x), dys=[transposed(g.dys[0])]),
        replace(g, weights=[transposed(g.weights[0])], biases=[gapped]),
        replace(g, a=[transposed(g.a[0])], b=[transposed(g.b[0])]),
        replace(g, x=g.x[:1].expand(30, 40)),
        replace(g, x=g.x[:, :1].expand(30, 40)),
        replace(g, dys=[g.dys[0][:1, :1].expand(30, 33)]),
    ]
    for view in views:
        plain = replace(
            view, x=view.x.contiguous(),
            **{name: [t.contiguous() for t in getattr(view, name)]
               for name in ("weights", "biases", "a", "b", "dys")},
        )  # fmt: skip
        got, want = run(backend, n, view), run(backend, n, plain)
        if backend == "torch":  # whose product may take another path for another layout
            exact = run("formula", n, plain.to(torch.float64))
            checks.assert_twice(got, want, exact)
        else:
            checks.assert_same_bits(got, want)


@checks.product_backends
def test_any_number_of_dimensions(backend: str) -> None:
    n = SHAPES[0]
    g = inputs(n, torch.float32)
    want = run(backend, n, g)

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ours(n, g, x, [a], [b], backend)[0]

    got = checks.with_gradients(
        function, (g.x.view(5, 2, 4, 96), g.a[0], g.b[0]), [g.dys[0].view(5, 2, 4, 64)]
    )
    assert got[0].shape == (5, 2, 4, 64) and got[1].shape == (5, 2, 4, 96)
    checks.assert_same_bits([t.view(w.shape) for t, w in zip(got, want, strict=True)], want)
    g.x, g.dys = g.x[:1], [g.dys[0][:1]]
    one = lora_linear(g.x[0], g.weights, g.a, g.b, g.scales, backend=backend)[0]
    torch.testing.assert_close(one, want[0][0], rtol=0, atol=1e-5)


STEADY = [
    Shape(449, 576, (192, 65), 16, bias=True),
    Shape(200, 289, (100,), 64, dropout=(0.2,)),
    MANY,
]


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n", STEADY, ids=str)
@checks.cpp_arithmetics
def test_same_bits_again_and_on_any_number_of_threads(
    backend: str, n: Shape, dtype: torch.dtype
) -> None:
    checks.skip_torchs_bits(backend, dtype)
    g = inputs(n, dtype)
    checks.assert_steady(lambda: run(backend, n, g))


@pytest.mark.parametrize("n", STEADY, ids=str)
def test_torch_gives_the_same_bits_again(n: Shape) -> None:
    g = inputs(n, torch.float32)
    checks.assert_same_bits(run("torch", n, g), run("torch", n, g))


# ---- as torch has it


@checks.product_backends
def test_only_what_is_asked_for_is_computed(backend: str) -> None:
    """x without gradient; one sibling of two in use; no gradient at all."""
    n = replace(SHAPES[1], dropout=(0.3,))
    g = inputs(n, torch.float32)
    want = run(backend, n, g)
    leaves = [t.detach().requires_grad_() for t in (*g.a, *g.b)]
    ys = ours(n, g, g.x, leaves[:3], leaves[3:], backend)
    checks.assert_same_bits(torch.autograd.grad(ys, leaves, g.dys), want[4:])
    ys = ours(n, g, g.x, leaves[:3], leaves[3:], backend)
    one = torch.autograd.grad(ys[1], leaves, g.dys[1])
    assert not any(one[i].any() for i in (0, 2, 3, 5))
    for i in (1, 4):
        torch.testing.assert_close(one[i], want[4 + i], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        ys = ours(n, g, g.x, leaves[:3], leaves[3:], backend)
    assert not any(y.requires_grad for y in ys)
    checks.assert_same_bits(ys, want[:3])


@checks.product_backends
def test_is_an_op_as_torch_wants_it(backend: str) -> None:
    n = Shape(5, 6, (4, 3), 2, dropout=(0.5, 0.0), segments=((1, 0, 2), (0, 2, 2)))
    g = inputs(n, torch.float32)
    none = torch.empty(0)
    segments = torch.tensor(n.segments, dtype=torch.int32)
    fixed = (g.scales, list(n.dropout), g.seeds, segments)
    ss = [torch.rand(5, 2), torch.rand(5, 2)]
    for need_dx in (True, False):
        back = (g.dys, g.x, g.weights, g.a, g.b, ss, *fixed, need_dx, backend)
        torch.library.opcheck(op._backward_op, back)
    x, a, b = g.x.requires_grad_(), *([t.requires_grad_() for t in p] for p in (g.a, g.b))
    torch.library.opcheck(op._op, (x, g.weights, [none, none], a, b, *fixed, backend))


@checks.product_backends
def test_compiles_whole(backend: str) -> None:
    n = replace(SHAPES[1], dropout=(0.25,))
    g = inputs(n, torch.float32)
    j = len(g.weights)

    def function(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(ours(n, g, x, list(rest[:j]), list(rest[j:]), backend))

    def drawn(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = list(rest[:j]), list(rest[j:])
        return tuple(lora_linear(x, g.weights, a, b, g.scales, dropout=0.5, backend=backend))

    for call in (function, drawn):
        found = []
        for one in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(2)
            found.append(checks.with_gradients(one, (g.x, *g.a, *g.b), g.dys))
        checks.assert_same_bits(*found)


@checks.product_backends
def test_autocast_gives_what_torchs_own_layer_would(backend: str) -> None:
    """bfloat16 outputs; gradients in the type of what they are of."""
    n = replace(SHAPES[1], dropout=(0.5,))
    g = inputs(n, torch.float32)

    def autocast(name: str) -> Tensors:
        with torch.autocast("cpu", torch.bfloat16):
            return run(name, n, g)

    got, plain = autocast(backend), autocast("formula")
    assert [t.dtype for t in got] == [torch.bfloat16] * 3 + [torch.float32] * 7
    checks.assert_twice(got, plain, run("formula", n, g.to(torch.float64)))


@checks.product_backends
def test_reads_parameters_in_the_type_of_x(backend: str) -> None:
    n = SHAPES[1]
    g = inputs(n, torch.bfloat16)
    want = run(backend, n, g)
    wide = replace(g, a=[p.float() for p in g.a], b=[p.float() for p in g.b])
    got = run(backend, n, wide)
    assert all(t.dtype == torch.float32 for t in got[4:])
    checks.assert_same_bits([t.bfloat16() for t in got], want)


@checks.needs_extension
def test_a_frozen_weight_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimpot.kernels.cpp import gemm

    packed: list[int] = []
    make = gemm.pack_weights

    def counted(weights: Sequence[torch.Tensor]) -> Any:
        packed.append(len(weights))
        return make(weights)

    monkeypatch.setattr(gemm, "pack_weights", counted)
    n = SHAPES[1]
    g = inputs(n, torch.float32)
    first = run("cpp:int16", n, g)
    checks.assert_same_bits(run("cpp:int16", n, g), first)
    assert packed == [3]
    g.weights[1].mul_(2)
    assert not torch.equal(run("cpp:int16", n, g)[1], first[1])
    assert packed == [3, 3]


@checks.needs_extension
def test_weights_that_are_not_finite_are_computed_in_fp32() -> None:
    checks.skip_torchs_bits("cpp:fp32")
    n = SHAPES[0]
    g = inputs(n, torch.float32)
    g.weights[0][3, 4] = torch.nan
    checks.assert_same_bits(run("cpp:int16", n, g), run("cpp:fp32", n, g))


# ---- errors


def call(**changed: Any) -> Tensors:
    given: dict[str, Any] = {
        "x": torch.zeros(5, 4),
        "weights": [torch.zeros(3, 4)],
        "a": [torch.zeros(2, 4)],
        "b": [torch.zeros(3, 2)],
        "scales": [1.0],
        "backend": "torch",
    }
    return lora_linear(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": []}, "0 weights, 1 A, 1 B and 0 biases; one of each per sibling"),
        ({"biases": []}, "1 weights, 1 A, 1 B and 0 biases"),
        ({"weights": [torch.zeros(4)]}, r"W \(4,\)"),
        ({"x": torch.zeros(5, 3)}, r"x \(5, 3\), W \(3, 4\), A \(1, 2, 4\), B \(1, 3, 2\)"),
        ({"a": [torch.zeros(3, 4)]}, r"A \(1, 3, 4\), B \(1, 3, 2\) of sibling 0"),
        ({"a": [torch.zeros(4)]}, r"A \(4,\)"),
        ({"b": [torch.zeros(2, 3, 2)]}, r"one n and R for all siblings"),
        ({"biases": [torch.zeros(2)]}, r"bias \(2,\) of sibling 0; \(3,\) is wanted"),
        ({"scales": [1.0, 2.0]}, r"2 scales and 1 dropouts; 1 \(siblings"),
        ({"dropout": [0.1, 0.1]}, r"1 scales and 2 dropouts; .* and 1 \(adapters\)"),
        ({"dropout": 1.0}, r"dropouts are \[1.0\]; 0 ≤ p < 1"),
        ({"dropout": -0.1}, r"dropouts are \[-0.1\]"),
        ({"seeds": torch.zeros(2, 1).long()}, r"seeds \(2, 1\), .*; \(1, 1\) and \[S, 3\]"),
        ({"segments": torch.zeros(2).int()}, r"segments \(2,\)"),
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call(**changed)


def test_the_arguments_of_the_errors_fit_otherwise() -> None:
    assert [y.shape for y in call()] == [(5, 3)]


def test_a_backend_that_can_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="has no backend 'cuda'; it has torch, cpp, triton"):
        call(backend="cuda")
    with pytest.raises(BackendError, match="triton"):
        call(backend="triton")  # on the CPU
    with pytest.raises(BackendError, match="'int4'; one of auto, fp32, int16"):
        call(backend="cpp:int4")
    with pytest.raises(BackendError, match="lora_linear has no variants of torch; 'fp32'"):
        call(backend="torch:fp32")
    monkeypatch.setattr(native, "state", lambda: native.State(False, "it is shut"))
    with pytest.raises(BackendError, match="native kernels can't run: it is shut"):
        call(backend="cpp:int16")


@checks.cpp_arithmetics
def test_cpp_does_not_compute_float64_in_less(backend: str) -> None:
    n = SHAPES[0]
    with pytest.raises(KernelError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        run(backend, n, inputs(n))
