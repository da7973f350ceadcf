"""linear_cross_entropy and token_logprobs in Triton, interpreted: against the formulas of
ops/*.py: `reference` in float64 with torch's own gradients, and against the torch backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import interpreted
import kernel_checks as checks
import pytest
import torch

pytest.importorskip("triton")

from trimpot.kernels.errors import BackendError
from trimpot.kernels.ops import linear_cross_entropy as loss_op
from trimpot.kernels.ops import logits
from trimpot.kernels.ops import token_logprobs as logp_op
from trimpot.kernels.ops.implementation import implementation
from trimpot.kernels.triton import launch

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""h, W, labels."""

IGNORE = -100
H = 24
SHAPES = [(5, 37), (6, 8200), (3, 20011)]
"""M, V: one block, the second block of a pair, more than a pair; rows of 16-bit types end within
a load's 16 bytes."""

mended = interpreted.mended
every_dtype = pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)


def test_under_the_interpreter() -> None:
    """The rest of this file, in a process where Triton interprets. (25 s)"""
    interpreted.run_interpreted(__file__)


def test_needs_a_gpu_or_the_interpreter() -> None:
    h, weight, labels = inputs(2, 9, torch.float32)
    with pytest.raises(BackendError, match="it runs on a GPU"):
        loss_op.linear_cross_entropy(h, weight, labels, backend="triton")
    with pytest.raises(BackendError, match="it runs on a GPU"):
        logp_op.token_logprobs(h, weight, labels, backend="triton")


@dataclass(frozen=True)
class Terms:
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    weighted: bool = False

    def keywords(self, weights: torch.Tensor) -> dict[str, Any]:
        return {
            "token_weights": weights if self.weighted else None, "label_smoothing": self.smoothing,
            "z_loss": self.z_loss, "softcap": self.softcap,
        }  # fmt: skip


TERMS = [
    Terms(),
    Terms(weighted=True),
    Terms(smoothing=0.1),
    Terms(z_loss=1e-2),
    Terms(softcap=20.0),
    Terms(smoothing=0.2, z_loss=1e-3, softcap=2.0, weighted=True),
]
every_term = pytest.mark.parametrize("n", TERMS, ids=str)


def inputs(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensors:
    """h, W, and labels, of which every fourth is ignored."""
    make = torch.Generator().manual_seed(rows + vocabulary)
    h = torch.randn(rows, H, generator=make).to(dtype)
    weight = (torch.randn(vocabulary, H, generator=make) * 2 * H**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=make)
    labels[1::4] = IGNORE
    return h, weight, labels


def token_weights(rows: int) -> torch.Tensor:
    weights = torch.linspace(0.3, 3, rows)
    weights[2::5] = 0
    return weights


def loss_forward(
    backend: str, given: Tensors, n: Terms, need_dh: bool = True, need_dw: bool = True
) -> Any:  # fmt: skip
    h, weight, labels = given
    terms = n.keywords(token_weights(len(labels)))
    return implementation("linear_cross_entropy", backend).forward(
        h, weight, labels, ignore_index=IGNORE, need_dh=need_dh, need_dw=need_dw, **terms
    )


def exact_loss(given: Tensors, n: Terms) -> list[torch.Tensor]:
    h, weight, labels = given
    terms = n.keywords(token_weights(len(labels)).double())
    weights = terms.pop("token_weights")

    def function(h: Any, weight: Any) -> torch.Tensor:
        return loss_op.reference(h, weight, labels, weights, ignore_index=IGNORE, **terms)

    upstream = torch.ones((), dtype=torch.float64)
    return checks.with_gradients(function, [h.double(), weight.double()], [upstream])


def logp_both(
    backend: str, given: Tensors, g: torch.Tensor, softcap: float, temperature: float
) -> list[torch.Tensor]:
    """logp, lse, dh, dW."""
    h, weight, labels = given
    chosen = implementation("token_logprobs", backend)
    settings = {"ignore_index": IGNORE, "softcap": softcap, "temperature": temperature}
    logp, lse = chosen.forward(h, weight, labels, **settings)
    dh, dw = chosen.backward(g, h, weight, labels, lse, **settings, need_dh=True, need_dw=True)
    return [logp, lse, dh, dw]


def exact_logp(
    given: Tensors, g: torch.Tensor, softcap: float, temperature: float
) -> list[torch.Tensor]:
    h, weight, labels = given

    def function(h: Any, weight: Any) -> torch.Tensor:
        return logp_op.reference(
            h, weight, labels, ignore_index=IGNORE, softcap=softcap, temperature=temperature
        )

    logp, dh, dw = checks.with_gradients(function, [h.double(), weight.double()], [g])
    z = h.double() @ weight.double().T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lse = torch.logsumexp(z / temperature, 1).where(labels != IGNORE, 0)
    return [logp, lse, dh, dw]


@every_dtype
@every_term
def interpreted_loss_obeys_the_rule(n: Terms, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        given = inputs(*shape, dtype)
        got = loss_forward("triton", given, n)
        checks.assert_twice(got, loss_forward("torch", given, n), exact_loss(given, n))
        assert not got[1][given[2] == IGNORE].any()


@every_dtype
@pytest.mark.parametrize(("softcap", "temperature"), [(0.0, 1.0), (0.0, 0.7), (5.0, 1.3)])
def interpreted_logprobs_obey_the_rule(
    softcap: float, temperature: float, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        given, g = inputs(*shape, dtype), torch.linspace(-2, 3, shape[0])
        settings = softcap, temperature
        got = logp_both("triton", given, g, *settings)
        checks.assert_twice(
            got, logp_both("torch", given, g, *settings), exact_logp(given, g, *settings)
        )
        ignored = given[2] == IGNORE
        assert not any(t[ignored].any() for t in got[:3])


@pytest.mark.parametrize("n", [TERMS[0], TERMS[-1]], ids=str)
def interpreted_a_gradient_that_is_not_needed_changes_nothing(n: Terms) -> None:
    given = inputs(6, 8200, torch.bfloat16)
    want = loss_forward("triton", given, n)
    for need_dh, need_dw in ((False, False), (True, False), (False, True)):
        got = loss_forward("triton", given, n, need_dh, need_dw)
        kept = [True, need_dh, need_dw]
        assert [t.numel() > 0 for t in got] == kept
        both = [(g, w) for g, w, k in zip(got, want, kept, strict=True) if k]
        checks.assert_same_bits(*zip(*both, strict=True))


@every_dtype
def interpreted_nothing_of_ignored_tokens_leaks(dtype: torch.dtype) -> None:
    h, weight, labels = inputs(6, 8200, dtype)
    g = torch.linspace(-2, 3, 6)
    foul, foul_g = h.clone(), g.clone()
    foul[1], foul[5], foul_g[1] = torch.nan, torch.inf, torch.nan
    checks.assert_same_bits(
        loss_forward("triton", (foul, weight, labels), TERMS[-1]),
        loss_forward("triton", (h, weight, labels), TERMS[-1]),
    )
    checks.assert_same_bits(
        logp_both("triton", (foul, weight, labels), foul_g, 5.0, 0.7),
        logp_both("triton", (h, weight, labels), g, 5.0, 0.7),
    )
    foul[0] = torch.nan
    loss, dh, dw = loss_forward("triton", (foul, weight, labels), Terms())
    assert loss.isnan() and dw.isnan().all()
    assert dh[0].isnan().all() and dh[1:].isfinite().all()


@pytest.mark.parametrize("rows", [0, 4])
def interpreted_no_tokens_and_none_that_counts(rows: int) -> None:
    h, weight, _ = inputs(rows, 37, torch.bfloat16)
    labels = torch.full((rows,), IGNORE)
    loss, *gradients = loss_forward("triton", (h, weight, labels), TERMS[-1])
    assert loss.shape == () and loss == 0
    results = [*gradients, *logp_both("triton", (h, weight, labels), torch.ones(rows), 0.0, 1.0)]
    want = [(rows, H), (37, H), (rows,), (rows,), (rows, H), (37, H)]
    assert [tuple(t.shape) for t in results] == want
    assert not any(t.any() for t in results)


@every_dtype
def interpreted_chunks_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(10, 300, dtype)
    g = torch.linspace(-2, 3, 10)
    monkeypatch.setattr(logits, "chunk_rows", lambda *_: 4)
    assert len(list(logits.chunks(10, 300, torch.device("cpu")))) == 3
    got, plain = (loss_forward(b, given, TERMS[-1]) for b in ("triton", "torch"))
    checks.assert_twice(got, plain, exact_loss(given, TERMS[-1]))
    got, plain = (logp_both(b, given, g, 5.0, 0.7) for b in ("triton", "torch"))
    checks.assert_twice(got, plain, exact_logp(given, g, 5.0, 0.7))


@every_dtype
def interpreted_the_same_bits_whatever_memory_held(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, g = inputs(6, 8201, dtype), torch.linspace(-2, 3, 6)

    def run() -> list[torch.Tensor]:
        return [
            *loss_forward("triton", given, TERMS[-1]), *logp_both("triton", given, g, 5.0, 0.7)
        ]  # fmt: skip

    empty, first = torch.empty, run()
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    checks.assert_same_bits(run(), first)


@pytest.mark.parametrize("sign", [-1, 1])
def interpreted_large_logits_do_not_overflow(sign: int) -> None:
    h, weight, labels = inputs(5, 8200, torch.float32)
    h[:, 0], weight[:, 0] = 1.0, sign * 1e4  # adds the same to all logits of a row
    given = h, weight, labels
    got, plain = (loss_forward(b, given, Terms(smoothing=0.1)) for b in ("triton", "torch"))
    exact = exact_loss(given, Terms(smoothing=0.1))
    assert got[1][:, 0].abs().max() < 1e4 * 2**-20  # Σ_V dz is 0; exp(z - lse) would give 2.6
    for results in (got, plain, exact):
        results[1][:, 0] = 0
    checks.assert_twice(got, plain, exact)


def interpreted_small_arguments_of_the_soft_cap_keep_their_digits() -> None:
    """logp at a cap so high that tanh changes nothing."""
    given, g = inputs(5, 37, torch.float32), torch.linspace(-2, 3, 5)
    capped, free = (logp_both("triton", given, g, cap, 1.0) for cap in (1e4, 0.0))
    for c, f in zip(capped, free, strict=True):
        assert checks.max_error(c, f.double()) < 4 * 2**-23 * f.abs().max()


@pytest.mark.parametrize("label", [37, -1, 2**32 + 3])
def interpreted_a_label_out_of_range_is_not_a_number(label: int) -> None:
    h, weight, labels = inputs(5, 37, torch.float32)
    labels[0] = label
    loss, dh, _ = loss_forward("triton", (h, weight, labels), Terms())
    assert loss.isnan() and dh[0].isnan().all() and dh[1:].isfinite().all()
    logp = implementation("token_logprobs", "triton").forward(h, weight, labels, IGNORE, 0.0, 1.0)[
        0
    ]
    assert logp[0].isnan() and logp[1:].isfinite().all()


@every_dtype
def interpreted_ops_give_what_torch_gives(dtype: torch.dtype) -> None:
    """Through autograd, from operands that are not contiguous, a gradient that is expanded, and
    W wider than h."""
    h, weight, labels = inputs(8, 300, dtype)
    h, labels = h.repeat(1, 2).reshape(2, 4, 2 * H)[..., ::2], labels.reshape(4, 2).T
    weight, weights = weight.float(), token_weights(8).reshape(2, 4)
    assert not (h.is_contiguous() or labels.is_contiguous())

    def run(backend: str, h: Any, weight: Any, labels: Any, weights: Any) -> list[torch.Tensor]:
        def loss(h: Any, weight: Any) -> torch.Tensor:
            return loss_op.linear_cross_entropy(h, weight, labels, weights, backend=backend)

        def logp(h: Any, weight: Any) -> torch.Tensor:
            return logp_op.token_logprobs(h, weight, labels, temperature=0.7, backend=backend)

        wide = torch.promote_types(h.dtype, torch.float32)
        return [
            *checks.with_gradients(loss, [h, weight], [torch.tensor(2.0, dtype=wide)]),
            *checks.with_gradients(
                logp, [h, weight], [torch.tensor(0.5, dtype=wide).expand(labels.shape)]
            ),
        ]

    exact = run("torch", h.double(), weight.double(), labels, weights.double())
    given = h, weight, labels, weights
    checks.assert_twice(run("triton", *given), run("torch", *given), exact)


def interpreted_a_launch_for_each_chunk_and_no_look_at_values() -> None:
    """On meta tensors there are no values to look at."""
    rows, vocabulary = 2 * logits.GPU_ROWS + 1, 50257
    h, weight = torch.empty(rows, H, device="meta"), torch.empty(vocabulary, H, device="meta")
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    with launch.recording() as launches:
        dh, dw = loss_forward("triton", (h, weight, labels), Terms(smoothing=0.1, z_loss=0.1))[1:]
    assert (dh.shape, dw.shape) == (h.shape, weight.shape)
    assert [one.grid for one in launches] == [(683,)] * 3
    z = launches[0].args[0]
    assert z.stride(0) % 16 == 0 and z.shape[1] >= vocabulary
    with launch.recording() as launches:
        logp_both("triton", (h, weight, labels), torch.empty(rows, device="meta"), 0.0, 1.0)
    assert [one.kernel.__name__ for one in launches] == (
        ["row_logprob"] * 3 + ["row_logprob_gradient"] * 3
    )
