"""lora_linear in Triton, interpreted: against the formula in float64 with torch's own gradients,
and against the torch backend. What it moves is held to the budget at the sizes of Llama 8B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import interpreted
import kernel_checks as checks
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from trimpot.kernels.errors import BackendError
from trimpot.kernels.ops import lora_linear as op
from trimpot.kernels.ops import philox as masks
from trimpot.kernels.proof.cases import Case, call, maker
from trimpot.kernels.triton import launch, lora_linear, philox

Tensors = list[torch.Tensor]
Segment = tuple[int, int, int]

mended = interpreted.mended
every_dtype = pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)


def test_under_the_interpreter() -> None:
    """The rest of this file, in a process where Triton interprets. (35 s)"""
    interpreted.run_interpreted(__file__)


@dataclass(frozen=True)
class Shape:
    rows: int
    depth: int
    outputs: tuple[int, ...]
    rank: int
    dropout: tuple[float, ...] = (0.0,)
    """Of each adapter; adapter i has rank max(rank − 2i, 1), by zeros."""
    segments: tuple[Segment, ...] = ()
    """(adapter, first row, rows); () is all rows to adapter 0."""

    @property
    def cuts(self) -> tuple[Segment, ...]:
        return self.segments or ((0, 0, self.rows),)


MANY = Shape(
    80, 68, (70, 33), 16, (0.0, 0.25, 0.5),
    ((2, 3, 10), (0, 13, 35), (1, 50, 1), (1, 51, 0), (2, 55, 20)),
)  # fmt: skip
"""Blocks of rows that end early, rows without an adapter, an adapter in two places."""
SHAPES = [
    Shape(140, 128, (256,), 16),  # whole tiles in depth and columns
    Shape(33, 70, (300, 5), 8, (0.3,)),
    MANY,
    Shape(1, 1, (1,), 1),
    Shape(20, 36, (17,), 1, (0.5,)),
    Shape(40, 70, (50, 20), 256, (0.1,)),
    Shape(30, 64, (48,), 40),
    Shape(16, 32, (8, 9, 10, 11), 4),
    Shape(0, 16, (8, 5), 4, (0.5,)),
    Shape(30, 40, (33,), 8, (0.0, 0.0), ((1, 0, 20),)),
]


def inputs(n: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of forward, and dys; the second sibling has no bias."""
    make = torch.Generator().manual_seed(n.rows + n.depth + n.rank)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=make)).to(dtype)

    adapters, siblings = len(n.dropout), len(n.outputs)
    given: dict[str, Any] = {
        "x": normal(n.rows, n.depth),
        "weights": [normal(columns, n.depth, scale=n.depth**-0.5) for columns in n.outputs],
        "biases": [normal(columns if j != 1 else 0) for j, columns in enumerate(n.outputs)],
        "a": [normal(adapters, n.rank, n.depth, scale=n.depth**-0.5) for _ in n.outputs],
        "b": [normal(adapters, columns, n.rank, scale=0.2) for columns in n.outputs],
        "scales": [0.5 + 0.3 * i for i in range(siblings * adapters)],
        "dropouts": list(n.dropout),
        "seeds": torch.randint(-(2**62), 2**62, (siblings, adapters), generator=make),
        "segments": torch.tensor(n.cuts, dtype=torch.int32).reshape(-1, 3),
        "dys": [normal(n.rows, columns) for columns in n.outputs],
    }
    for p, q in zip(given["a"], given["b"], strict=True):
        for adapter in range(adapters):
            own = max(n.rank - 2 * adapter, 1)
            p[adapter, own:], q[adapter, :, own:] = 0, 0
    return given


def by_formula(n: Shape, g: dict[str, Any]) -> Tensors:
    """ys, dx, das, dbs in float64: each segment by ops/lora_linear.py: reference."""
    wide = {name: [t.double() for t in g[name]] for name in ("weights", "biases", "a", "b", "dys")}
    x = g["x"].double().requires_grad_()
    a, b = ([p.requires_grad_() for p in wide[name]] for name in "ab")
    ys: Tensors = []
    for j, weight in enumerate(wide["weights"]):
        bias = wide["biases"][j] if wide["biases"][j].numel() else None
        y = torch.nn.functional.linear(x, weight, bias)
        for adapter, first, count in n.cuts:
            rows, p = slice(first, first + count), n.dropout[adapter]
            drop = None
            if p:
                seed = int(g["seeds"][j, adapter])
                keep = masks.keep_mask(seed, p, first, count, n.depth, x.device)
                drop = keep.double() / (1 - p)
            scale = g["scales"][j * len(n.dropout) + adapter]
            part = op.reference(x[rows], weight, a[j][adapter], b[j][adapter], scale, bias, drop)
            y = torch.cat([y[:first], part, y[first + count :]])
        ys.append(y)
    grads = torch.autograd.grad(ys, [x, *a, *b], wide["dys"])
    return [*(y.detach() for y in ys), *grads]


def both(backend: Any, g: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """(ys, dx, das, dbs), and ss."""
    ys, ss = backend.forward(**{name: value for name, value in g.items() if name != "dys"})
    rest = {name: value for name, value in g.items() if name != "biases"}
    dx, das, dbs = backend.backward(**rest, ss=ss, need_dx=True)
    return [*ys, dx, *das, *dbs], ss


def interpreted_masks_are_the_definitions() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def write(OUT, SEED, LIMIT, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row = first_row + tl.arange(0, ROWS).to(tl.int64)
        mask = philox.keep_mask(tl.load(SEED), tl.load(LIMIT), row, first_column, COLUMNS)
        at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(OUT + at, mask)

    out = torch.zeros(16, 32, dtype=torch.int8)
    tile: dict[str, Any] = {"ROWS": 16, "COLUMNS": 32}
    for p in (1e-9, 0.1, 0.5, 1 - 1e-6):
        for seed in (0, -7, 2**32, 2**61 + 5):
            for first_row in (0, 3, 2**32 - 5):
                limit = torch.tensor([philox.limit(p)])
                write[(1,)](out, torch.tensor([seed]), limit, first_row, 8, **tile)
                want = masks.keep_mask(seed, p, first_row, 16, 40, out.device)[:, 8:]
                assert torch.equal(out, -want.to(torch.int8))
    write[(1,)](out, torch.tensor([1]), torch.tensor([philox.limit(0.0)]), 0, 0, **tile)
    assert (out == -1).all()


@every_dtype
@pytest.mark.parametrize("n", SHAPES, ids=str)
def interpreted_obeys_the_rule(n: Shape, dtype: torch.dtype) -> None:
    g = inputs(n, dtype)
    got, ss = both(lora_linear, g)
    plain, plain_ss = both(op, g)
    checks.assert_twice(got, plain, by_formula(n, g))
    exact = op.forward(**{k: v for k, v in in_float64(g).items() if k != "dys"})[1]
    checks.assert_twice(ss, plain_ss, exact)


def in_float64(g: dict[str, Any]) -> dict[str, Any]:
    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return [widen(v) for v in value] if isinstance(value, list) else value

    return {name: widen(value) for name, value in g.items()}


def interpreted_takes_views_and_other_types() -> None:
    """x and dy with gaps, adapters in float32 beside bf16; no dx where none is wanted."""
    n = Shape(37, 48, (40, 24), 8, (0.2,))
    g = inputs(n, torch.bfloat16)
    want, _ = both(lora_linear, g)
    spread = torch.zeros(37, 96, dtype=torch.bfloat16)
    spread[:, :48] = g["x"]
    turned = [dy.T.contiguous().T for dy in g["dys"]]
    floats = {name: [p.float() for p in g[name]] for name in ("weights", "a", "b")}
    got, ss = both(lora_linear, {**g, **floats, "x": spread[:, :48], "dys": turned})
    checks.assert_same_bits(got[:3], want[:3])
    assert all(t.dtype == torch.float32 for t in got[3:])
    checks.assert_same_bits([t.bfloat16() for t in got[3:]], want[3:])
    rest = {name: value for name, value in g.items() if name != "biases"}
    dx, das, dbs = lora_linear.backward(**rest, ss=ss, need_dx=False)
    assert dx.numel() == 0
    checks.assert_same_bits([*das, *dbs], want[3:])


def interpreted_is_differentiable() -> None:
    """Through the op itself, which draws the seeds; the torch backend with the same generator."""
    g = inputs(Shape(12, 20, (9,), 4), torch.float32)
    leaves = (g["x"].view(3, 4, 20), g["a"][0][0], g["b"][0][0])

    def run(backend: str) -> Tensors:
        def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(5)
            weights, biases = g["weights"], g["biases"]
            return op.lora_linear(
                x, weights, [a], [b], [2.0], biases=biases, dropout=0.5, backend=backend
            )[0]

        return checks.with_gradients(function, leaves, (g["dys"][0].view(3, 4, 9),))

    for mine, theirs in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def interpreted_gives_the_same_bits_again_without_races() -> None:
    from trimpot.kernels.proof.traffic import counting

    g = inputs(MANY, torch.bfloat16)
    with counting() as launches:
        first, first_ss = both(lora_linear, g)
    assert [fault for one in launches for fault in one.faults] == []
    again, again_ss = both(lora_linear, g)
    checks.assert_same_bits([*first, *first_ss], [*again, *again_ss])


def interpreted_what_is_not_finite_stays_in_its_row() -> None:
    g = inputs(MANY, torch.float32)
    del g["dys"]
    want, _ = lora_linear.forward(**g)
    rows = torch.tensor([0, 20, 78])
    g["x"][rows, 5] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    ys, ss = lora_linear.forward(**g)
    others = torch.ones(len(g["x"]), dtype=torch.bool).index_fill(0, rows, False)
    checks.assert_same_bits([y[others] for y in ys], [y[others] for y in want])
    assert not any(y[rows].isfinite().any() for y in ys)
    assert all((s[[0, 78]] == 0).all() for s in ss)  # no adapter
    assert not any(s[20].isfinite().all() for s in ss)


@pytest.fixture
def truncating(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three tf32 products as tensor cores make them: sums of 8, then cut to float32. The list
    counts them."""
    from triton.runtime import interpreter as shipped
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from trimpot.kernels.proof.interpreter import as_tf32

    made: list[int] = []

    def cut(values: np.ndarray) -> np.ndarray:
        rounded = values.astype(np.float32)
        over = np.abs(rounded.astype(np.float64)) > np.abs(values)
        return np.where(over, np.nextafter(rounded, np.float32(0)), rounded)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, _: Any) -> Any:
        assert precision == shipped._ir.INPUT_PRECISION.TF32x3
        made.append(a.data.shape[-1])
        tops = as_tf32(a.data), as_tf32(b.data)
        rests = as_tf32(a.data - tops[0]), as_tf32(b.data - tops[1])
        total = np.zeros(d.data.shape, np.float32)
        for left, right in ((rests[0], tops[1]), (tops[0], rests[1]), tops):
            for k in range(0, left.shape[1], 8):
                left8, right8 = (
                    t.astype(np.float64) for t in (left[:, k : k + 8], right[k : k + 8])
                )
                total = cut(total + left8 @ right8)
        return TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return made


def interpreted_float32_keeps_its_digits_on_tensor_cores(truncating: list[int]) -> None:
    n = Shape(16, 1024, (1024,), 8)
    g = inputs(n, torch.float32)
    got, _ = both(lora_linear, g)
    checks.assert_twice(got, both(op, g)[0], by_formula(n, g))
    assert len(truncating) > 100
    assert max(truncating) <= 128  # columns that are summed without float32's rounding


def in_elements(n: dict[str, int], mn: int, mk: int, kn: int) -> int:
    """mn·MN + mk·MK + kn·KN"""
    return mn * n["M"] * n["N"] + mk * n["M"] * n["K"] + kn * n["K"] * n["N"]


def touched(arguments: tuple[Any, ...]) -> int:
    """Bytes of a launch's tensors, each once: our kernels read or write all of them."""
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    places = {(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes for t in tensors}
    return sum(places.values())


def launches_of(case: Case, dtype: str, sizes: Any) -> dict[str, int]:
    """Bytes by kernel, from tensors without memory."""
    found: dict[str, int] = {}
    with launch.recording() as launches:
        call(case, "triton", case.arguments(maker(dtype, "meta"), sizes))
    for one in launches:
        name = one.kernel.__name__
        found[name] = found.get(name, 0) + touched(one.args)
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def interpreted_counts_are_what_the_launches_touch(dtype: str) -> None:
    """At the small sizes; the next test relies on it at the large ones."""
    from trimpot.kernels.proof.traffic import counting

    for case in lora_linear.proof_cases():
        if case.variant:
            continue
        sizes = {**case.small, "M": 128, "K": 256, "N": 512}
        with counting() as launches:
            call(case, "triton", case.arguments(maker(dtype), sizes))
        counted: dict[str, int] = {}
        for one in launches:
            counted[one.kernel] = counted.get(one.kernel, 0) + one.unique_bytes
        for kernel, moved in launches_of(case, dtype, sizes).items():
            assert counted.pop(kernel) == pytest.approx(moved, rel=1e-3)
        assert not counted


@pytest.mark.parametrize("variant", ["", "siblings"])
@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_traffic_of_a_step(dtype: str, size: int, variant: str) -> None:
    """8192 × 4096², rank 16: forward and backward move at most 1.05 of the budget (with S and the
    adapters), and 0.40 of PEFT's."""
    cases = [case for case in lora_linear.proof_cases() if case.variant == variant]
    assert [case.direction for case in cases] == ["forward", "backward"]
    n = cases[0].large
    assert (n["M"], n["K"], n["N"], n["R"]) == (8192, 4096, 4096, 16)
    moved = sum(sum(launches_of(case, dtype, n).values()) for case in cases)
    outputs = n["N"] if n["J"] == 1 else n["N"] * (n["J"] + 3) // 4
    whole = {"M": n["M"], "K": n["K"], "N": outputs}
    budget = sum(case.budget(n, size) for case in cases)
    ours = in_elements(whole, 3, 4, 2) * size
    assert ours < budget < 1.02 * ours
    assert moved <= 1.05 * budget
    assert moved <= 0.40 * in_elements(whole, 12, 13, 2) * size


def on_meta(g: dict[str, Any]) -> None:
    """A forward launched without a GPU or the interpreter."""
    lists: dict[str, Any] = {
        name: [t.to("meta") for t in g[name]] for name in ("weights", "biases", "a", "b")
    }
    given = {name: value for name, value in g.items() if name != "dys"}
    with launch.recording():
        lora_linear.forward(**{**given, **lists, "x": g["x"].to("meta")})


@pytest.mark.parametrize(
    "segments", [[(0, 0, 9)], [(1, 0, 8)], [(0, -1, 3)], [(0, 0, 5), (0, 4, 2)], [(0, 2, -1)]]
)
def test_refuses_segments_that_do_not_fit(segments: list[Segment]) -> None:
    g = inputs(Shape(8, 16, (8,), 4), torch.float32)
    on_meta(g | {"segments": torch.tensor([(0, 0, 5), (0, 5, 3)])})
    with pytest.raises(BackendError, match=r"lora_linear: segment .* does not fit: 1 adapters, 8"):
        on_meta(g | {"segments": torch.tensor(segments)})


def test_refuses_more_siblings_than_it_has_arguments_for() -> None:
    with pytest.raises(BackendError, match="up to 4 siblings, not 5"):
        on_meta(inputs(Shape(8, 16, (8,) * 5, 4), torch.float32))
