"""Output layer and loss in one: against torch's cross_entropy in float64, and itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import kernel_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trimpot.kernels import native
from trimpot.kernels.errors import BackendError, KernelError
from trimpot.kernels.ops import linear_cross_entropy as op
from trimpot.kernels.ops import logits
from trimpot.kernels.ops.implementation import implementation
from trimpot.kernels.ops.linear_cross_entropy import linear_cross_entropy

IGNORE = -100
UPSTREAM = torch.tensor(0.5)
"""A power of two rounds nothing: gradients are kept for 1 and scaled in backward."""
DRAWS = 8
"""Of labels, whose losses are one result: a single sum may be right by luck."""


@dataclass(frozen=True)
class Terms:
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    weighted: bool = False

    def settings(self) -> dict[str, Any]:
        return {
            "label_smoothing": self.smoothing, "z_loss": self.z_loss, "softcap": self.softcap,
        }  # fmt: skip


TERMS = [
    Terms(),
    Terms(weighted=True),
    Terms(smoothing=0.1),
    Terms(z_loss=1e-2),
    Terms(softcap=3.0),
    Terms(smoothing=0.2, z_loss=1e-3, softcap=5.0, weighted=True),
]
SHAPES = [(1, 1, 2), (1, 16, 7), (37, 33, 101), (64, 96, 32), (61, 64, 513)]
"""M, H, V."""


@dataclass
class Given:
    h: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def to(self, dtype: torch.dtype) -> Given:
        return replace(self, h=self.h.to(dtype), weight=self.weight.to(dtype))


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float64, outliers: bool = False
) -> Given:
    """Logits of about ± 2; every fourth label from the second on is ignored, some weights are 0."""
    rows, hidden, vocabulary = shape
    make = torch.Generator().manual_seed(sum(shape))
    h = torch.randn(rows, hidden, generator=make, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden, generator=make, dtype=torch.float64)
    weight *= 2 * hidden**-0.5
    for matrix in (h, weight) if outliers else ():
        matrix[:, 3] *= 20
        matrix[3] *= 20
        matrix[0, -1] *= 20
    labels = torch.randint(vocabulary, (rows,), generator=make)
    labels[1::4] = IGNORE
    weights = 3 * torch.rand(rows, generator=make)
    weights[2::5] = 0
    return Given(h.to(dtype), weight.to(dtype), labels, weights)


def by_torch(h, weight, labels, weights, n: Terms) -> torch.Tensor:
    z = F.linear(h, weight)
    z = z if z.dtype == torch.float64 else z.float()
    if n.softcap:
        z = n.softcap * torch.tanh(z / n.softcap)
    loss = F.cross_entropy(
        z, labels, ignore_index=IGNORE, label_smoothing=n.smoothing, reduction="none"
    )
    loss = loss + torch.where(labels == IGNORE, 0.0, n.z_loss * z.logsumexp(-1).square())
    return (loss * weights.to(loss.dtype) if n.weighted else loss).sum()


def loss_of(backend: str, h, weight, labels, weights, n: Terms) -> torch.Tensor:
    if backend == "by torch":
        return by_torch(h, weight, labels, weights, n)
    given = weights if n.weighted else None
    return linear_cross_entropy(h, weight, labels, given, **n.settings(), backend=backend)


def run(backend: str, g: Given, n: Terms = TERMS[0]) -> list[torch.Tensor]:
    """The losses of all draws of labels, dh, dW."""

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return loss_of(backend, h, weight, g.labels, g.weights, n)

    loss, dh, dw = checks.with_gradients(function, (g.h, g.weight), (UPSTREAM,))
    losses = [loss]
    for draw in range(1, DRAWS):
        moved = (g.labels + draw) % g.weight.shape[0]
        labels = moved.where(g.labels != IGNORE, IGNORE)
        losses.append(loss_of(backend, g.h, g.weight, labels, g.weights, n))
    return [torch.stack(losses), dh, dw]


def assert_right(backend: str, got, g: Given, n: Terms) -> None:
    exact, plain = run("by torch", g.to(torch.float64), n), run("by torch", g, n)
    int16 = backend in checks.LOW
    if g.h.shape[0] == 1 and int16:  # a single row of plain torch may be right by luck
        for found, want in zip(got, exact, strict=True):
            assert checks.distance(found, want) < 1e-3 + torch.finfo(g.h.dtype).eps
    elif g.h.shape[0] == 1:
        checks.assert_twice(got, plain, exact, units=16)
    elif int16 and g.h.dtype == torch.float32:
        checks.assert_half_of_bf16(got, run("by torch", g.to(torch.bfloat16), n), exact)
    else:
        checks.assert_twice(got, plain, exact)


@pytest.fixture(autouse=True)
def _preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.take_the_preferred(monkeypatch)
    checks.take_small_chunks(monkeypatch)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n", TERMS, ids=str)
@checks.product_backends
def test_obeys_the_rule(backend: str, n: Terms, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        g = inputs(shape, dtype)
        assert_right(backend, run(backend, g, n), g, n)


@checks.needs_extension
@pytest.mark.parametrize("outliers", [False, True], ids=["even", "outliers"])
@pytest.mark.parametrize("n", [TERMS[0], TERMS[5]], ids=str)
def test_int16_has_at_most_half_of_bf16s_error(n: Terms, outliers: bool) -> None:
    if outliers:  # a cap that most logits are beyond would leave those of no size
        n = replace(n, softcap=100 * n.softcap)
    for shape in ((60, 576, 2049), (45, 289, 700)):
        g = inputs(shape, torch.float32, outliers)
        assert_right("cpp:int16", run("cpp:int16", g, n), g, n)


@checks.needs_extension
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_whatever_is_fastest_obeys_the_rule(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    g, n = inputs(SHAPES[2], dtype), TERMS[5]
    assert_right("cpp", run("cpp", g, n), g, n)


@checks.needs_extension
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n", TERMS, ids=str)
def test_torchs_product_among_cpp_obeys_the_rule(
    n: Terms, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.take_torchs_product(monkeypatch)
    g = inputs(SHAPES[2], dtype)
    assert_right("cpp", run("cpp", g, n), g, n)


@pytest.mark.parametrize("n", TERMS, ids=str)
def test_gradients_are_those_of_the_formula(n: Terms) -> None:
    g = inputs((7, 4, 5))

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return loss_of("torch", h, weight, g.labels, g.weights, n)

    assert torch.autograd.gradcheck(function, (g.h.requires_grad_(), g.weight.requires_grad_()))


@pytest.mark.parametrize("n", TERMS, ids=str)
def test_the_reference_is_torchs_cross_entropy(n: Terms) -> None:
    g = inputs(SHAPES[2])

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weights = g.weights if n.weighted else None
        return op.reference(h, weight, g.labels, weights, **n.settings())

    got = checks.with_gradients(function, (g.h, g.weight), (UPSTREAM,))
    want = run("by torch", g, n)
    torch.testing.assert_close(got, [want[0][0], *want[1:]])


# ---- labels that count nothing


@checks.product_backends
@pytest.mark.parametrize("ignore_index", [IGNORE, 3, -1])
def test_ignored_tokens_are_as_if_they_were_not_there(backend: str, ignore_index: int) -> None:
    g = inputs(SHAPES[2], torch.float32)
    g.labels[g.labels == 3] = 4
    ignored = g.labels == IGNORE
    g.labels[ignored] = ignore_index

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        at = slice(None) if h.shape[0] == 37 else ~ignored
        return linear_cross_entropy(
            h, weight, g.labels[at], g.weights[at], ignore_index=ignore_index, backend=backend
        )

    loss, dh, dw = checks.with_gradients(function, (g.h, g.weight), (UPSTREAM,))
    alone = checks.with_gradients(function, (g.h[~ignored], g.weight), (UPSTREAM,))
    assert not dh[ignored].any()
    checks.assert_same_bits([loss, dh[~ignored], dw], alone)


@checks.product_backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n", [TERMS[0], TERMS[5]], ids=str)
def test_all_ignored_is_zero(n: Terms, dtype: torch.dtype, backend: str) -> None:
    g = inputs(SHAPES[2], dtype)
    g.labels.fill_(IGNORE)
    g.h[3] = torch.nan
    for result in run(backend, g, n):
        assert torch.equal(result, torch.zeros_like(result))


@checks.product_backends
def test_no_tokens(backend: str) -> None:
    g = inputs((0, 8, 5), torch.float32)
    loss, dh, dw = run(backend, g, TERMS[5])
    assert not loss.any() and dh.shape == (0, 8) and torch.equal(dw, torch.zeros(5, 8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("backend", "every_row"),
    [
        ("torch", False),
        ("torch", True),
        *(pytest.param(name, False, marks=checks.needs_extension) for name in checks.ARITHMETICS),
    ],
)
def test_what_ignored_tokens_hold_comes_to_nothing(
    backend: str, value: float, every_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their h. On a GPU every row is looked at, ignored or not."""
    if every_row:
        monkeypatch.setattr(logits, "trained", lambda *_: None)
    g, n = inputs(SHAPES[2], torch.float32), TERMS[5]
    clean = run(backend, g, n)
    assert_right(backend, clean, g, n)
    g.h[1], g.h[5, 2] = value, value
    assert g.labels[1] == g.labels[5] == IGNORE
    checks.assert_same_bits(run(backend, g, n), clean)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@checks.product_backends
def test_what_is_not_finite_stays_in_its_row(backend: str, value: float) -> None:
    """But for the loss and dW, which are sums over the rows."""
    for n in (TERMS[0], TERMS[4]):
        g = inputs(SHAPES[2], torch.float32)
        clean = run(backend, g, n)
        g.h[4, 2] = value
        loss, dh, dw = run(backend, g, n)
        rest = torch.arange(37) != 4
        checks.assert_same_bits([dh[rest]], [clean[1][rest]])
        if value != value or not n.softcap:  # a soft cap takes an infinite logit back
            assert not loss.isfinite().any() and dh[4].isnan().all() and not dw.isfinite().all()


# ---- sizes of logits


@checks.product_backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1500.0])
def test_any_size_of_logits(scale: float, dtype: torch.dtype, backend: str) -> None:
    for n in (TERMS[0], TERMS[2], replace(TERMS[4], softcap=3 * max(scale, 1.0))):
        g = inputs((37, 33, 101))
        g.h *= scale
        g = g.to(dtype)
        got = run(backend, g, n)
        assert all(t.isfinite().all() for t in got)
        assert_right(backend, got, g, n)


# ---- what is asked for


@checks.product_backends
def test_only_what_is_asked_for_is_computed(backend: str) -> None:
    """A frozen head, frozen h, no gradient at all: the same numbers."""
    g, n = inputs(SHAPES[2], torch.float32), TERMS[5]
    losses, dh, dw = run(backend, g, n)
    for train_h, train_w in ((True, False), (False, True), (False, False)):
        h, weight = g.h.clone().requires_grad_(train_h), g.weight.clone().requires_grad_(train_w)
        loss = loss_of(backend, h, weight, g.labels, g.weights, n)
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)
        assert loss.requires_grad == (train_h or train_w)
        if loss.requires_grad:
            (loss * UPSTREAM).backward()
        for leaf, want in ((h, dh if train_h else None), (weight, dw if train_w else None)):
            if want is None:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None
                torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-7)
    leaf = g.h.requires_grad_()
    with torch.no_grad():
        assert not loss_of(backend, leaf, g.weight, g.labels, g.weights, n).requires_grad


@checks.product_backends
def test_no_gradient_goes_to_token_weights(backend: str) -> None:
    g = inputs(SHAPES[1], torch.float32)
    weights, h = g.weights.requires_grad_(), g.h.requires_grad_()
    linear_cross_entropy(h, g.weight, g.labels, weights, backend=backend).backward()
    assert weights.grad is None and h.grad is not None


# ---- memory


class Largest(TorchDispatchMode):
    """The most items of a tensor that an operation inside gave back."""

    items = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.items = max(self.items, tensor.numel())
        return out


@pytest.mark.parametrize("n", [TERMS[0], TERMS[5]], ids=str)
@checks.product_backends
def test_the_logits_of_all_tokens_are_never_there(backend: str, n: Terms) -> None:
    rows, _, vocabulary = shape = (1000, 32, 1001)
    g = inputs(shape, torch.float32)
    weights = g.weights if n.weighted else None
    for need_dw in (False, True):

        def run(need_dw: bool = need_dw) -> None:
            implementation(op.OP, backend).forward(
                g.h, g.weight, g.labels, weights, IGNORE, n.smoothing, n.z_loss, n.softcap, True,
                need_dw,
            )  # fmt: skip

        run()  # bf16x3 keeps memory for the halves of h, which is larger here than a chunk
        with Largest() as seen:
            run()
        # A chunk is 16 rows (14 in C++), W and its pack are two of them.
        assert 14 * vocabulary <= seen.items <= 33 * vocabulary
    with Largest() as seen:
        by_torch(g.h, g.weight, g.labels, weights, n)
    assert seen.items == rows * vocabulary  # as it would be


@checks.product_backends
def test_a_frozen_head_saves_as_much_as_h(backend: str) -> None:
    g = inputs(SHAPES[4], torch.float32)
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = linear_cross_entropy(g.h.requires_grad_(), g.weight, g.labels, backend=backend)
    assert sum(shape.numel() for shape in saved) == g.h.numel()
    loss.backward()


def test_chunks_cover_all_rows_and_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimpot.kernels.cpp import head

    monkeypatch.undo()
    cpu = torch.device("cpu")
    assert logits.chunk_rows(49152, cpu) == 256
    for rows in (0, 1, 15, 256, 257, 5000):
        for vocabulary in (1, 49152, 262144):
            for slices, least in (
                ([*logits.chunks(rows, vocabulary, cpu)], 16),
                ([*head.chunks(rows, vocabulary)], 14),
            ):
                covered = [i for cut in slices for i in range(cut.start, cut.stop)]
                assert covered == [*range(rows)]
                most = max(logits.CHUNK_BYTES // (4 * vocabulary), least)
                assert all(cut.stop - cut.start <= most for cut in slices)
    assert [*logits.chunks(3000, 128, torch.device("cuda"))] == [
        slice(0, 1000), slice(1000, 2000), slice(2000, 3000),
    ]  # fmt: skip


# ---- strides, bits


@checks.product_backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_reads_views(backend: str, dtype: torch.dtype) -> None:
    g, n = inputs((24, 33, 101), dtype), TERMS[5]
    wide = torch.zeros(24, 60, dtype=dtype)
    wide[:, 9:42] = g.h
    gapped = torch.stack([g.labels, g.labels], 1)[:, 0]
    views = [
        replace(g, h=wide[:, 9:42]),
        replace(g, h=g.h.T.contiguous().T, labels=gapped, weights=g.weights[::1]),
        replace(g, weight=g.weight.T.contiguous().T),
        replace(g, h=g.h[:1].expand(24, 33), weights=g.weights[:1].expand(24)),
        replace(g, labels=g.labels[:1].expand(24)),
    ]
    for view in views:
        plain = Given(*(t.contiguous() for t in vars(view).values()))
        got, want = run(backend, view, n), run(backend, plain, n)
        assert_right(backend, got, plain, n)
        if backend in checks.LOW:
            checks.assert_same_bits(got, want)
    shaped = linear_cross_entropy(
        g.h.view(2, 3, 4, 33), g.weight, g.labels.view(2, 3, 4), g.weights.view(2, 3, 4),
        **n.settings(), backend=backend,
    )  # fmt: skip
    checks.assert_same_bits([shaped], [run(backend, g, n)[0][0]])


@pytest.mark.parametrize("n", [TERMS[0], TERMS[5]], ids=str)
@pytest.mark.parametrize("dtype", checks.DTYPES)
@checks.cpp_arithmetics
def test_same_bits_again_and_on_any_number_of_threads(
    backend: str, dtype: torch.dtype, n: Terms, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.take_small_chunks(monkeypatch, 150 * 4 * 2001)
    g = inputs((401, 96, 2001), dtype)
    checks.assert_steady(lambda: run(backend, g, n))


def test_torch_gives_the_same_bits_again() -> None:
    g = inputs(SHAPES[4], torch.float32)
    checks.assert_same_bits(run("torch", g, TERMS[5]), run("torch", g, TERMS[5]))


@checks.product_backends
def test_chunks_change_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g, n = inputs(SHAPES[4], torch.float32), TERMS[5]
    small = run(backend, g, n)
    checks.take_small_chunks(monkeypatch, 1 << 30)
    for a, b in zip(run(backend, g, n), small, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-6)


# ---- as torch has it


@checks.product_backends
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_is_an_op_as_torch_wants_it(backend: str, needs: tuple[bool, bool]) -> None:
    g = inputs((6, 4, 7), torch.float32)
    h, weight = g.h.requires_grad_(needs[0]), g.weight.requires_grad_(needs[1])
    for weights in (g.weights, None):
        args = (h, weight, g.labels, weights, IGNORE, 0.1, 1e-3, 5.0, *needs, backend)
        torch.library.opcheck(op._op, args)


@checks.product_backends
def test_compiles_whole_and_replays_under_checkpointing(backend: str) -> None:
    g, n = inputs(SHAPES[2], torch.float32), TERMS[5]

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return loss_of(backend, h, weight, g.labels, g.weights, n) / 7

    def replayed(h: torch.Tensor, weight: torch.Tensor) -> Any:
        return checkpoint(function, h, weight, use_reentrant=False)

    compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = checks.with_gradients(function, (g.h, g.weight), (UPSTREAM,))
    for call in (replayed, compiled):
        got = checks.with_gradients(call, (g.h, g.weight), (UPSTREAM,))
        checks.assert_same_bits(got, want)


@checks.product_backends
def test_autocast_gives_what_torchs_own_layer_would(backend: str) -> None:
    g, n = inputs(SHAPES[2], torch.float32), TERMS[2]
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = run(backend, g, n), run("by torch", g, n)
    assert [t.dtype for t in got] == [torch.float32] * 3
    checks.assert_twice(got, plain, run("by torch", g.to(torch.float64), n))
    assert checks.max_error(got[1], got[1].bfloat16()) == 0  # it was computed in bfloat16


@checks.product_backends
def test_a_wide_head_gets_a_wide_gradient(backend: str) -> None:
    g, n = inputs(SHAPES[2], torch.bfloat16), TERMS[0]
    want = run(backend, g, n)
    g.weight = g.weight.float()
    got = run(backend, g, n)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32]
    checks.assert_same_bits([*got[:2], got[2].bfloat16()], want)


# ---- errors


def call(**changed: Any) -> torch.Tensor:
    given: dict[str, Any] = {
        "h": torch.zeros(5, 4),
        "weight": torch.zeros(7, 4),
        "labels": torch.zeros(5, dtype=torch.int64),
        "backend": "torch",
    }
    return linear_cross_entropy(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"h": torch.zeros(5, 3)}, r"h is \(5, 3\), weight \(7, 4\), labels \(5,\)"),
        ({"h": torch.zeros(4, 4)}, r"\[..., H\], \[V, H\] and \[...\] are wanted"),
        ({"weight": torch.zeros(4)}, r"weight \(4,\)"),
        ({"labels": torch.zeros(5, 1).long()}, r"labels \(5, 1\)"),
        ({"labels": torch.zeros(5).int()}, r"labels are torch\.int32; torch\.int64 is wanted"),
        ({"token_weights": torch.ones(4)}, r"token_weights are \(4,\), labels \(5,\); one weight"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1.5, softcap 0.0; 0 … 1 and 0 or more"),
        ({"label_smoothing": -0.1}, r"label_smoothing is -0.1"),
        ({"softcap": -1.0}, r"softcap -1.0"),
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=f"linear_cross_entropy: .*{message}"):
        call(**changed)


def test_a_backend_that_can_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(call(), 5 * torch.tensor(7.0).log())
    with pytest.raises(BackendError, match="has no backend 'cuda'; it has torch, cpp, triton"):
        call(backend="cuda")
    with pytest.raises(BackendError, match="triton"):
        call(backend="triton")  # on the CPU
    with pytest.raises(BackendError, match="'int4'; one of auto, fp32, int16"):
        call(backend="cpp:int4")
    monkeypatch.setattr(native, "state", lambda: native.State(False, "it is shut"))
    with pytest.raises(BackendError, match="native kernels can't run: it is shut"):
        call(backend="cpp:int16")


@checks.cpp_arithmetics
def test_cpp_does_not_compute_float64_in_less(backend: str) -> None:
    with pytest.raises(KernelError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        run(backend, inputs(SHAPES[0]))
