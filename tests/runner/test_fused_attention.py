"""Attention by document in models of transformers: packed rows learn what their documents learn
alone, and what transformers' own masks say in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import keep_float64
from families import (
    BACKENDS,
    COMMON,
    assert_two_fold,
    build,
    outcome,
    table,
    wide,
    with_lora,
)
from torch.nn import functional

from trimpot.runner import hub
from trimpot.runner.data.batch import IGNORED
from trimpot.runner.families import FAMILIES
from trimpot.runner.fused.documents import DOCUMENTS, cu_seqlens
from trimpot.runner.fused.swap import swap_in
from trimpot.runner.tasks.causal_lm import token_loss_sum

LENGTHS = ((9, 1, 21), (17, 3))
"""Of the documents in two rows of 31; what is left of the second is padding."""
WIDTH = 31
Batch = dict[str, torch.Tensor]


def documents() -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [
        [torch.randint(3, COMMON["vocab_size"], (n,), generator=draw) for n in row]
        for row in LENGTHS
    ]


def packed() -> Batch:
    """As runner/data/batch.py makes it."""
    ids = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int64)
    labels, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for r, row in enumerate(documents()):
        at = 0
        for tokens in row:
            own = slice(at, at + len(tokens))
            ids[r, own] = tokens
            labels[r, own] = tokens
            labels[r, at] = IGNORED  # not predicted from the document before
            positions[r, own] = torch.arange(len(tokens))
            at = own.stop
        positions[r, at:] = torch.arange(WIDTH - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def built(family: str, **changes: Any) -> Any:
    return build(family, use_cache=False, **changes)


def loss_of(given: Batch) -> Callable[[Any], torch.Tensor]:
    return lambda model: token_loss_sum(model, given)


def plain_loss(model: Any) -> torch.Tensor:
    """transformers' logits, torch's cross-entropy, in the model's own type."""
    given = packed()
    labels = given.pop("labels")[:, 1:]
    logits = model(**given).logits[:, :-1]
    return functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def alone(model: Any) -> torch.Tensor:
    """Each document by itself, in a row of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in (tokens for row in documents() for tokens in row if len(tokens) > 1):
        ids = tokens[None]
        total = total + token_loss_sum(model, {"input_ids": ids, "labels": ids}).double()
    return total


def seen_by_layers(model: Any, given: dict[str, Any]) -> list[dict[str, Any]]:
    """What each attention layer is given in one forward."""
    seen: list[dict[str, Any]] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    layers = model.base_model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return seen


def test_documents_are_told_by_positions() -> None:
    assert cu_seqlens(None, 3, 4).tolist() == [0, 4, 8, 12]
    assert cu_seqlens(packed()["position_ids"], 2, WIDTH).tolist() == [0, 9, 10, 31, 48, 51, 62]
    assert cu_seqlens(torch.arange(4, 9)[None], 2, 5).tolist() == [0, 5, 10]
    assert cu_seqlens(torch.zeros(1, 3, dtype=torch.int64), 1, 3).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_learn_what_they_learn_alone(family: str, backend: str) -> None:
    model = with_lora(built(family))
    swap_in(model, table(backend))
    together = [t.clone() for t in outcome(model, loss_of(packed()))]
    apart = outcome(model, alone)
    assert abs(together[0] - apart[0]) <= 1e-6 * apart[0]
    for a, b in zip(together[1:], apart[1:], strict=True):
        # measured: at most 1.1e-6 of the largest, in sums of other orders
        assert (a - b).abs().max() <= 4e-6 * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_is_transformers_attention_in_float64(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 5 and soft caps among them; one op on, all else transformers' own."""
    keep_float64(monkeypatch)
    model = wide(built(family))
    want = outcome(copy.deepcopy(model), plain_loss)
    only = {**table("off"), "varlen_attention": {"backend": "torch", "why": "a test"}}
    came = swap_in(model, only)
    assert came["varlen_attention"] == {"backend": "torch", "why": "a test; 2 attention layers"}
    for got, exact in zip(outcome(model, plain_loss), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_as_close_to_float64_as_transformers(
    family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_float64(monkeypatch)
    model = with_lora(built(family))
    exact = outcome(wide(model), plain_loss)
    plain = outcome(copy.deepcopy(model), plain_loss)
    swap_in(model, table(backend))
    assert_two_fold(outcome(model, loss_of(packed())), plain, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_get_documents_and_no_mask(family: str) -> None:
    model = built(family)
    swap_in(model, table("torch"))
    given = {key: value for key, value in packed().items() if key != "labels"}
    for seen in seen_by_layers(model, given):
        assert seen[DOCUMENTS].tolist() == [0, 9, 10, 31, 48, 51, 62]
        assert seen["attention_mask"].numel() == 0
    for seen in seen_by_layers(model, {"inputs_embeds": torch.randn(2, 4, 48)}):
        assert seen[DOCUMENTS].tolist() == [0, 4, 8]


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_caches_are_transformers_own(family: str) -> None:
    model = built(family).eval()
    ids = packed()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    calls = (
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "use_cache": True},
        {"input_ids": ids, "output_attentions": True},
    )
    want = [model(**given).logits for given in calls]
    only = {**table("off"), "varlen_attention": {"backend": "torch", "why": "a test"}}
    swap_in(model, only)
    for given, logits in zip(calls, want, strict=True):
        assert all(not seen.get(DOCUMENTS, ()) for seen in seen_by_layers(model, given))
        assert torch.equal(model(**given).logits, logits)


def test_attention_with_dropout_stays() -> None:
    model = built("llama", attention_dropout=0.1)
    came = swap_in(model, table("torch"))
    assert came["varlen_attention"] == {
        "backend": "off",
        "why": "attention_dropout is 0.1, and the op has none",
    }
    given = {key: value for key, value in packed().items() if key != "labels"}
    assert all(DOCUMENTS not in seen for seen in seen_by_layers(model, given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_layers_have_the_same_gradients(backend: str) -> None:
    found = []
    for recompute in (False, True):
        model = with_lora(built("qwen3"))
        swap_in(model, table(backend))
        if recompute:
            hub.recompute_layers(model)
        found.append(outcome(model, loss_of(packed())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
