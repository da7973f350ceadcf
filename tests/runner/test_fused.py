"""Our ops in models of transformers: the same loss and gradients as transformers' own code, by the
2 × rule against float64, and the table that says what runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from exact import keep_float64
from families import (
    ADAPTER,
    BACKENDS,
    COMMON,
    assert_two_fold,
    build,
    our_loss,
    outcome,
    plain_loss,
    table,
    wide,
    with_lora,
)
from torch import nn

from trimpot.runner import hub
from trimpot.runner.adapters.lora import LoraLinear, add_lora, lora_layers
from trimpot.runner.families import FAMILIES
from trimpot.runner.fused.norm import norm_kind
from trimpot.runner.fused.swap import NOUNS, swap_in


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_the_same(
    family: str, backend: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_float64(monkeypatch)
    model = build(family)
    if method == "lora":
        with_lora(model)
    exact = outcome(wide(model), plain_loss)
    plain = outcome(copy.deepcopy(model), plain_loss)
    came = swap_in(model, table(backend))
    assert_two_fold(outcome(model, our_loss), plain, exact)
    gate = "geglu" if family.startswith("gemma") else "swiglu"
    ran = {op for op, row in came.items() if op in NOUNS and row["backend"] == backend}
    wanted = {"add_rms_norm", "rope", "varlen_attention", gate, "linear_cross_entropy"}
    assert ran == wanted | ({"lora_linear"} if method == "lora" else set()), came


def test_the_table_counts_what_runs() -> None:
    model = with_lora(build("qwen3"))
    came = swap_in(model, table("torch"))
    assert came["lora_linear"]["why"] == "a test; 14 layers"
    assert came["add_rms_norm"]["why"] == "a test; 9 norms"  # 4 of each layer and the last
    assert came["rope"]["why"] == "a test; 2 attention layers"
    assert came["varlen_attention"]["why"] == "a test; 2 attention layers"
    assert came["swiglu"]["why"] == "a test; 2 feed-forward layers"
    assert came["linear_cross_entropy"]["why"] == "a test; 1 output layer"
    assert came["geglu"]["backend"] == "off"
    assert came["adamw_step"] == {"backend": "torch", "why": "a test"}


def test_off_leaves_the_model_as_it_is() -> None:
    model = with_lora(build("llama"))
    before = [type(module) for module in model.modules()]
    came = swap_in(model, table("off"))
    assert [type(module) for module in model.modules()] == before
    assert came == table("off")


@pytest.mark.parametrize("on", [op for op in NOUNS if op != "geglu"])
def test_each_op_alone(on: str) -> None:
    """One op on and the others off: none stands on another."""
    model = with_lora(build("llama"))
    plain = outcome(copy.deepcopy(model), plain_loss)
    came = swap_in(model, {**table("off"), on: {"backend": "torch", "why": "a test"}})
    assert came[on]["backend"] == "torch"
    for a, b in zip(outcome(model, our_loss), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_parameters_keep_their_names_and_values() -> None:
    model = with_lora(build("gemma2"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    swap_in(model, table("torch"))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert type(model).__name__ == "Gemma2ForCausalLM"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_swapped_model_generates_the_same(backend: str) -> None:
    """With its cache of keys and values, and from left-padded prompts."""
    model = with_lora(build("qwen3")).eval()
    ids = torch.tensor([[0, 0, 7, 9, 23], [5, 88, 4, 100, 31]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**given, **settings)
    swap_in(model, table(backend))
    assert torch.equal(model.generate(**given, **settings), want)


def test_other_models_keep_their_own_code() -> None:
    """GPT-2 has none of the layers; its loss still goes with its output layer."""
    config = transformers.GPT2Config(
        vocab_size=211, n_embd=48, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    plain = outcome(copy.deepcopy(model), plain_loss)
    came = swap_in(model, table("torch"))
    for op in ("rope", "swiglu", "varlen_attention"):
        assert came[op]["backend"] == "off"
        assert "none of the layers known: gemma, gemma2" in came[op]["why"]
    assert came["add_rms_norm"] == {
        "backend": "off",
        "why": "no module of the model computes an RMS norm",
    }
    assert came["linear_cross_entropy"]["backend"] == "torch"
    for a, b in zip(outcome(model, our_loss), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_logits_that_are_more_than_a_product_stay() -> None:
    """Cohere scales its logits: the fused loss would be another one."""
    config = transformers.CohereConfig(**{**COMMON, "logit_scale": 0.25})
    torch.manual_seed(0)
    model = transformers.CohereForCausalLM(config).train()
    plain = plain_loss(model)
    came = swap_in(model, table("torch"))
    assert came["linear_cross_entropy"]["backend"] == "off"
    assert "makes more of its logits" in came["linear_cross_entropy"]["why"]
    torch.testing.assert_close(our_loss(model), plain)


def _norms() -> Iterator[tuple[str, nn.Module, float | None]]:
    """(what it is, the module, the offset of its weight or None if it is no RMS norm)"""
    model = build("llama")
    yield "llama", model.model.norm, 0.0
    yield "gemma", build("gemma").model.norm, 1.0
    yield "layer norm", nn.LayerNorm(48), None
    yield "torch's", nn.RMSNorm(48, eps=1e-5), 0.0
    yield "linear", nn.Linear(4, 4), None


@pytest.mark.parametrize("number", range(5))
def test_norms_are_told_by_their_numbers(number: int) -> None:
    name, module, offset = list(_norms())[number]
    kind = norm_kind(module)
    assert (kind.offset if kind else None) == offset, name


class _Odd(nn.Module):
    """Nearly an RMS norm: the fault decides."""

    def __init__(self, fault: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))
        self.variance_epsilon, self.fault = 1e-6, fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.fault == "mean" else x
        eps = 0.0 if self.fault == "eps" else self.variance_epsilon
        y = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * self.weight
        return 2 * y if self.fault == "scale" else y


@pytest.mark.parametrize("fault", ["", "mean", "eps", "scale"])
def test_what_is_nearly_a_norm_is_none(fault: str) -> None:
    assert (norm_kind(_Odd(fault)) is None) == bool(fault)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_layers_have_the_same_gradients(backend: str) -> None:
    """With dropout: its masks come again, bit for bit."""
    adapter = ADAPTER.model_copy(update={"lora_dropout": 0.3})
    found = []
    for recompute in (False, True):
        model = build("llama")
        add_lora(model, adapter, seed=1)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.fill_(0.1)
        swap_in(model, table(backend))
        if recompute:
            hub.recompute_layers(model)
        torch.manual_seed(11)
        found.append(outcome(model, our_loss))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_dropout_is_the_same_with_kernels_and_without() -> None:
    adapter = ADAPTER.model_copy(update={"lora_dropout": 0.3})
    found = []
    for backend in ("off", *BACKENDS):
        model = build("llama")
        add_lora(model, adapter, seed=1)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.fill_(0.1)
        only = {**table("off"), "lora_linear": {"backend": backend, "why": "a test"}}
        swap_in(model, only)
        # One by one, as seeds are drawn sibling by sibling too.
        torch.manual_seed(11)
        found.append(outcome(model, our_loss))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_layer_compiles_whole(backend: str) -> None:
    model = with_lora(build("qwen3"))
    swap_in(model, table(backend))
    layer = model.model.layers[0]
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    positions = model.model.rotary_emb(x, torch.arange(9)[None])

    def run(function: Any) -> list[torch.Tensor]:
        given = x.clone().requires_grad_()
        layer.zero_grad()
        y = function(given, position_embeddings=positions, attention_mask=None)
        y.square().sum().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert len(grads) == 14 and given.grad is not None
        return [y.detach(), given.grad, *grads]

    eager = run(layer)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(whole), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_siblings_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v and gate, up: 4 calls a layer, not 7."""
    from trimpot.runner.adapters import lora

    calls: list[int] = []
    whole = lora.lora_linear

    def counted(x: torch.Tensor, weights: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(weights))
        return whole(x, weights, *args, **kwargs)

    monkeypatch.setattr(lora, "lora_linear", counted)
    model = with_lora(build("llama"))
    swap_in(model, table("torch"))
    our_loss(model)
    assert calls == [3, 1, 2, 1] * 2


def test_an_adapter_that_is_scaled_to_nothing_is_not_computed() -> None:
    """What evaluation of the base model uses: bit for bit the base layer."""
    model = with_lora(build("llama"))
    swap_in(model, table("torch"))
    layer = next(m for m in model.modules() if isinstance(m, LoraLinear))
    layer.scale = 0
    x = torch.randn(3, 48)
    assert torch.equal(layer(x), layer.base_layer(x))
