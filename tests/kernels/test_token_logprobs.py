"""Log-probabilities of given tokens: against torch's cross_entropy in float64, and itself."""

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
from trimpot.kernels.ops import logits
from trimpot.kernels.ops import token_logprobs as op
from trimpot.kernels.ops.implementation import implementation
from trimpot.kernels.ops.token_logprobs import token_logprobs

IGNORE = -100


@dataclass(frozen=True)
class Terms:
    softcap: float = 0.0
    temperature: float = 1.0


TERMS = [Terms(), Terms(softcap=3.0), Terms(temperature=0.7), Terms(5.0, 1.6)]
SHAPES = [(1, 1, 2), (1, 16, 7), (37, 33, 101), (64, 96, 32), (61, 64, 513)]
"""M, H, V."""


@dataclass
class Given:
    h: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    g: torch.Tensor
    """Gradient of each log-probability."""

    def to(self, dtype: torch.dtype) -> Given:
        return replace(self, h=self.h.to(dtype), weight=self.weight.to(dtype))


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float64, outliers: bool = False
) -> Given:
    """Logits of about ± 2; every fourth label from the second on is ignored."""
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
    g = torch.randn(rows, generator=make)
    g[2::5] = 0
    return Given(h.to(dtype), weight.to(dtype), labels, g)


def by_torch(h, weight, labels, n: Terms) -> torch.Tensor:
    z = F.linear(h, weight)
    z = z if z.dtype == torch.float64 else z.float()
    if n.softcap:
        z = n.softcap * torch.tanh(z / n.softcap)
    return -F.cross_entropy(z / n.temperature, labels, ignore_index=IGNORE, reduction="none")


def logprobs(backend: str, h, weight, labels, n: Terms) -> torch.Tensor:
    if backend == "by torch":
        return by_torch(h, weight, labels, n)
    return token_logprobs(
        h, weight, labels, softcap=n.softcap, temperature=n.temperature, backend=backend
    )


def run(backend: str, g: Given, n: Terms = TERMS[0]) -> list[torch.Tensor]:
    """logp, dh, dW."""

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return logprobs(backend, h, weight, g.labels, n)

    return checks.with_gradients(function, (g.h, g.weight), (g.g,))


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
        got = run(backend, g, n)
        assert_right(backend, got, g, n)
        assert not got[0][g.labels == IGNORE].any() and not got[1][g.labels == IGNORE].any()


@checks.needs_extension
@pytest.mark.parametrize("outliers", [False, True], ids=["even", "outliers"])
@pytest.mark.parametrize("n", TERMS[:3], ids=str)
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
    g, n = inputs(SHAPES[2], dtype), TERMS[1]
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
        return logprobs("torch", h, weight, g.labels, n)

    assert torch.autograd.gradcheck(function, (g.h.requires_grad_(), g.weight.requires_grad_()))


@pytest.mark.parametrize("n", TERMS, ids=str)
def test_the_reference_is_torchs_cross_entropy(n: Terms) -> None:
    g = inputs(SHAPES[2])

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        settings: Any = {"softcap": n.softcap, "temperature": n.temperature}
        return op.reference(h, weight, g.labels, **settings)

    got = checks.with_gradients(function, (g.h, g.weight), (g.g,))
    torch.testing.assert_close(got, run("by torch", g, n))


@checks.product_backends
def test_probabilities_of_all_tokens_sum_to_one(backend: str) -> None:
    g = inputs((9, 16, 33), torch.float32)
    each = [
        token_logprobs(g.h, g.weight, torch.full((9,), label), temperature=0.5, backend=backend)
        for label in range(33)
    ]
    torch.testing.assert_close(torch.stack(each).exp().sum(0), torch.ones(9))


# ---- labels that count nothing


@pytest.mark.parametrize("n", TERMS, ids=str)
@checks.product_backends
@pytest.mark.parametrize("ignore_index", [IGNORE, 3, -1])
def test_ignored_tokens_are_as_if_they_were_not_there(
    backend: str, ignore_index: int, n: Terms
) -> None:
    g = inputs(SHAPES[2], torch.float32)
    g.labels[g.labels == 3] = 4
    ignored = g.labels == IGNORE
    g.labels[ignored] = ignore_index

    def run_at(at: Any) -> list[torch.Tensor]:
        def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return token_logprobs(
                h, weight, g.labels[at], ignore_index=ignore_index, softcap=n.softcap,
                temperature=n.temperature, backend=backend,
            )  # fmt: skip

        return checks.with_gradients(function, (g.h[at], g.weight), (g.g[at],))

    logp, dh, dw = run_at(slice(None))
    assert not logp[ignored].any() and not dh[ignored].any()
    checks.assert_same_bits([logp[~ignored], dh[~ignored], dw], run_at(~ignored))


@pytest.mark.parametrize("n", TERMS, ids=str)
@checks.product_backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_all_ignored_is_zero(n: Terms, dtype: torch.dtype, backend: str) -> None:
    g = inputs(SHAPES[2], dtype)
    g.labels.fill_(IGNORE)
    g.h[3] = torch.nan
    for result in run(backend, g, n):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("n", TERMS, ids=str)
@checks.product_backends
def test_no_tokens(backend: str, n: Terms) -> None:
    logp, dh, dw = run(backend, inputs((0, 8, 5), torch.float32), n)
    assert logp.shape == (0,) and dh.shape == (0, 8) and torch.equal(dw, torch.zeros(5, 8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", TERMS, ids=str)
@pytest.mark.parametrize(
    ("backend", "every_row"),
    [
        ("torch", False),
        ("torch", True),
        *(pytest.param(name, False, marks=checks.needs_extension) for name in checks.ARITHMETICS),
    ],
)
def test_what_ignored_tokens_hold_comes_to_nothing(
    backend: str, n: Terms, value: float, every_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their h. On a GPU every row is looked at, ignored or not."""
    if every_row:
        monkeypatch.setattr(logits, "trained", lambda *_: None)
    g = inputs(SHAPES[2], torch.float32)
    clean = run(backend, g, n)
    assert_right(backend, clean, g, n)
    g.h[1], g.h[5, 2], g.g[9] = value, value, value
    assert all(g.labels[at] == IGNORE for at in (1, 5, 9))
    checks.assert_same_bits(run(backend, g, n), clean)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@checks.product_backends
def test_what_is_not_finite_stays_in_its_row(backend: str, value: float) -> None:
    """But for dW, which is a sum over the rows."""
    for n in (TERMS[0], TERMS[2]):
        g = inputs(SHAPES[2], torch.float32)
        clean = run(backend, g, n)
        g.h[4, 2] = value
        logp, dh, dw = run(backend, g, n)
        rest = torch.arange(37) != 4
        checks.assert_same_bits([logp[rest], dh[rest]], [clean[0][rest], clean[1][rest]])
        assert not logp[4].isfinite() and dh[4].isnan().all() and not dw.isfinite().all()


# ---- sizes of logits


@checks.product_backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1500.0])
def test_any_size_of_logits(scale: float, dtype: torch.dtype, backend: str) -> None:
    for n in (TERMS[0], TERMS[2], Terms(softcap=3 * max(scale, 1.0))):
        g = inputs((37, 33, 101))
        g.h *= scale
        g = g.to(dtype)
        got = run(backend, g, n)
        assert all(t.isfinite().all() for t in got)
        assert_right(backend, got, g, n)


# ---- what is asked for


@pytest.mark.parametrize("n", [TERMS[2], TERMS[3]], ids=str)
@checks.product_backends
def test_only_what_is_asked_for_is_computed(backend: str, n: Terms) -> None:
    """A frozen head, frozen h, no gradient at all: the same numbers."""
    g = inputs(SHAPES[2], torch.float32)
    logp, dh, dw = run(backend, g, n)
    for train_h, train_w in ((True, False), (False, True), (False, False)):
        h, weight = g.h.clone().requires_grad_(train_h), g.weight.clone().requires_grad_(train_w)
        found = logprobs(backend, h, weight, g.labels, n)
        torch.testing.assert_close(found, logp, rtol=1e-6, atol=1e-7)
        assert found.requires_grad == (train_h or train_w)
        if found.requires_grad:
            found.backward(g.g)
        for leaf, want in ((h, dh if train_h else None), (weight, dw if train_w else None)):
            if want is None:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None
                torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-7)


@checks.product_backends
def test_gradients_add_up_and_scale(backend: str) -> None:
    """Of a sum they are expanded, of a mean scaled: both as of single tokens, one after another."""
    g = inputs((12, 16, 33), torch.float32)
    h = g.h.requires_grad_()
    logp = token_logprobs(h, g.weight, g.labels, backend=backend)
    (whole,) = torch.autograd.grad(logp.sum() / 12, h, retain_graph=True)
    parts = [torch.autograd.grad(one, h, retain_graph=True)[0] for one in logp]
    tolerance = 1e-3 if backend in checks.LOW else 1e-6
    torch.testing.assert_close(sum(parts) / 12, whole, rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("n", TERMS, ids=str)
@checks.product_backends
def test_the_logits_of_all_tokens_are_never_there(backend: str, n: Terms) -> None:
    rows, _, vocabulary = shape = (1000, 32, 1001)
    g = inputs(shape, torch.float32)
    chosen = implementation(op.OP, backend)
    settings = (IGNORE, n.softcap, n.temperature)
    for need_dw in (False, True):

        def run(need_dw: bool = need_dw) -> None:
            _, lse = chosen.forward(g.h, g.weight, g.labels, *settings)
            chosen.backward(g.g, g.h, g.weight, g.labels, lse, *settings, True, need_dw)

        run()  # bf16x3 keeps memory for the halves of h, which is larger here than a chunk
        with Largest() as seen:
            run()
        # A chunk is 16 rows (14 in C++), W and its pack are two of them.
        assert 14 * vocabulary <= seen.items <= 33 * vocabulary
    with Largest() as seen:
        by_torch(g.h, g.weight, g.labels, n)
    assert seen.items == rows * vocabulary  # as it would be


@checks.product_backends
def test_only_lse_is_saved_beside_the_inputs(backend: str) -> None:
    g = inputs(SHAPES[4], torch.float32)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logp = token_logprobs(g.h.requires_grad_(), g.weight, g.labels, backend=backend)
    inputs_at = {t.data_ptr() for t in (g.h, g.weight, g.labels)}
    assert [t.shape for t in saved if t.data_ptr() not in inputs_at] == [logp.shape]
    logp.sum().backward()


# ---- strides, bits


@checks.product_backends
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_reads_views(backend: str, dtype: torch.dtype) -> None:
    g, n = inputs((24, 33, 101), dtype), TERMS[1]
    wide = torch.zeros(24, 60, dtype=dtype)
    wide[:, 9:42] = g.h
    gapped = torch.stack([g.labels, g.labels], 1)[:, 0]
    views = [
        replace(g, h=wide[:, 9:42]),
        replace(g, h=g.h.T.contiguous().T, labels=gapped, g=torch.stack([g.g, g.g], 1)[:, 0]),
        replace(g, weight=g.weight.T.contiguous().T),
        replace(g, h=g.h[:1].expand(24, 33), g=g.g[:1].expand(24)),
        replace(g, labels=g.labels[:1].expand(24)),
    ]
    for view in views:
        plain = Given(*(t.contiguous() for t in vars(view).values()))
        got, want = run(backend, view, n), run(backend, plain, n)
        assert_right(backend, got, plain, n)
        if backend in checks.LOW:
            checks.assert_same_bits(got, want)
    shaped = logprobs(backend, g.h.view(2, 3, 4, 33), g.weight, g.labels.view(2, 3, 4), n)
    assert shaped.shape == (2, 3, 4)
    checks.assert_same_bits([shaped.view(24)], run(backend, g, n)[:1])


@pytest.mark.parametrize("n", TERMS[:3], ids=str)
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
    checks.assert_same_bits(run("torch", g, TERMS[3]), run("torch", g, TERMS[3]))


# ---- as torch has it


@checks.product_backends
def test_is_an_op_as_torch_wants_it(backend: str) -> None:
    g = inputs((6, 4, 7), torch.float32)
    for needs in ((True, True), (True, False), (False, True)):
        back = (g.g, g.h, g.weight, g.labels, torch.rand(6), IGNORE, 5.0, 1.0, *needs, backend)
        torch.library.opcheck(op._backward_op, back)
    h, weight = g.h.requires_grad_(), g.weight.requires_grad_()
    torch.library.opcheck(op._op, (h, weight, g.labels, IGNORE, 0.0, 0.7, backend))


@checks.product_backends
def test_compiles_whole_and_replays_under_checkpointing(backend: str) -> None:
    g, n = inputs(SHAPES[2], torch.float32), TERMS[2]

    def function(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return logprobs(backend, h, weight, g.labels, n).exp()

    def replayed(h: torch.Tensor, weight: torch.Tensor) -> Any:
        return checkpoint(function, h, weight, use_reentrant=False)

    compiled: Any = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = checks.with_gradients(function, (g.h, g.weight), (g.g,))
    for call in (replayed, compiled):
        checks.assert_same_bits(checks.with_gradients(call, (g.h, g.weight), (g.g,)), want)


@checks.product_backends
def test_autocast_gives_what_torchs_own_layer_would(backend: str) -> None:
    """And a backward pass inside it computes in the types of forward."""
    g, n = inputs(SHAPES[2], torch.float32), TERMS[2]
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = run(backend, g, n), run("by torch", g, n)
    assert [t.dtype for t in got] == [torch.float32] * 3
    checks.assert_twice(got, plain, run("by torch", g.to(torch.float64), n))
    assert checks.max_error(got[1], got[1].bfloat16()) == 0  # it was computed in bfloat16
    h = g.h.requires_grad_()
    logp = logprobs(backend, h, g.weight, g.labels, n)
    (want,) = torch.autograd.grad(logp, h, g.g, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        checks.assert_same_bits(torch.autograd.grad(logp, h, g.g), [want])


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
    return token_logprobs(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"h": torch.zeros(5, 3)}, r"h is \(5, 3\), weight \(7, 4\), labels \(5,\)"),
        ({"h": torch.zeros(4, 4)}, r"\[..., H\], \[V, H\] and \[...\] are wanted"),
        ({"weight": torch.zeros(4)}, r"weight \(4,\)"),
        ({"labels": torch.zeros(5, 1).long()}, r"labels \(5, 1\)"),
        ({"labels": torch.zeros(5).int()}, r"labels are torch\.int32; torch\.int64 is wanted"),
        ({"temperature": 0.0}, r"temperature is 0.0, softcap 0.0; more than 0 and 0 or more"),
        ({"temperature": -1.0}, r"temperature is -1.0"),
        ({"softcap": -1.0}, r"softcap -1.0"),
    ],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=f"token_logprobs: .*{message}"):
        call(**changed)


def test_a_backend_that_can_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(call(), torch.full((5,), 1 / 7).log())
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
