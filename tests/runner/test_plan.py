"""The plan: counts against real models, memory against what autograd keeps, arrangements against
trying them all."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trimpot.kernels import native
from trimpot.kernels.cpp.rates import permitted
from trimpot.kernels.dispatch import preferred_arithmetic
from trimpot.kernels.errors import BackendError
from trimpot.runner import model
from trimpot.runner.adapters.lora import add_lora
from trimpot.runner.config import Config, all_keys, check_config
from trimpot.runner.engine import deepspeed_config
from trimpot.runner.errors import ModelError, PlanError
from trimpot.runner.model import _freeze_but
from trimpot.runner.plan.facts import ModelFacts, facts_from, read_facts, read_shapes
from trimpot.runner.plan.kernels import choose_kernels
from trimpot.runner.plan.memory import Arrangement, predict_memory, trained_parameters
from trimpot.runner.plan.plan import (
    FITS,
    for_workers,
    make_plan,
    plan_from_json,
    plan_to_json,
)
from trimpot.runner.tasks.causal_lm import token_loss_sum
from trimpot.runner.types import Fleet, Plan

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"tie_word_embeddings": False},
    "llama, tied": GROUPED | {"tie_word_embeddings": True},
    "qwen2": GROUPED,  # biases
    "qwen3": GROUPED | {"head_dim": 16},  # heads that are not hidden / heads
    "gemma2": GROUPED | {"head_dim": 8},
    "phi3": GROUPED,  # q, k, v in one
    "gpt_neox": SIZES,  # a head of another name
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": SIZES | {"n_layer": 2, "n_head": 4},
    "qwen3_moe": GROUPED | {"num_experts": 3, "moe_intermediate_size": 16, "head_dim": 8},
}


def built(name: str) -> Any:
    kind = name.partition(",")[0]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[name]))


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    model = built(request.param)
    model.save_pretrained(folder)
    return request.param, model, read_facts(folder)


def run(**sections: Any) -> Config:
    raw = {
        "model": {"path": "/m"},
        "data": {"train": "/t"},
        "output_dir": "/r",
        "precision": "fp32",
    }
    return check_config(raw | sections, "test")


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_sizes_are_those_of_the_real_model(saved: Any) -> None:
    _, model, facts = saved
    config = model.config
    assert facts.parameters == model.num_parameters()
    assert facts.layers == config.num_hidden_layers == 2
    assert facts.hidden == config.hidden_size == 32
    assert facts.vocab == config.vocab_size == 96
    assert facts.heads == config.num_attention_heads == 4
    assert facts.kv_heads == getattr(config, "num_key_value_heads", 4)
    assert facts.head_dim == getattr(config, "head_dim", None) or 8
    assert facts.max_positions == getattr(config, "max_position_embeddings", 1 << 30)
    assert facts.architecture == type(model).__name__


def test_what_lora_trains(saved: Any) -> None:
    name, _, facts = saved
    names = sorted({module.rsplit(".", 1)[-1] for module in facts.linears("all-linear")})
    for targets in ("all-linear", names[:1]):
        config = run(adapter={"lora_rank": 5, "target_modules": targets})
        model = built(name)
        layers = add_lora(model, config.adapter, seed=0)
        assert trained_parameters(config, facts) == trainable(model) > 0
        assert set(facts.linears(targets)) == set(layers)


@pytest.mark.parametrize("patterns", [["*.layers.1.*", "*.h.1.*"], ["*norm*"], ["*"]], ids=str)
def test_what_freeze_trains(saved: Any, patterns: list[str]) -> None:
    name, _, facts = saved
    model = built(name)
    hits = [p for p in patterns if any(fnmatchcase(n, p) for n, _ in model.named_parameters())]
    assert hits
    _freeze_but(model, hits)
    data = {"train": "t", "max_length": 32}
    config = run(method="freeze", freeze={"trainable": hits}, data=data)
    assert trained_parameters(config, facts) == trainable(model) > 0
    make_plan(config, Fleet(), facts, "/r")  # which refuses names that are not there


def test_full_trains_all(saved: Any) -> None:
    _, model, facts = saved
    assert trained_parameters(run(method="full"), facts) == model.num_parameters()


# --- memory


class Kept:
    """Bytes that autograd keeps for backward, parameters aside."""

    def __init__(self, model: Any):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def kept(model: Any, samples: int, length: int) -> int:
    ids = torch.randint(0, 96, (samples, length))
    seen = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(seen.pack, lambda tensor: tensor):
        loss = token_loss_sum(model, {"input_ids": ids, "labels": ids})
    assert loss.requires_grad
    return seen.size


WIDE = GROUPED | {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_are_what_autograd_keeps(precision: str, method: str, tmp_path: Path) -> None:
    """Never under it, and at most 40 % over."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDE)).train()
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    config = run(method=method, precision=precision, data={"train": "t", "max_length": 128})
    if method == "lora":
        add_lora(model, config.adapter, seed=0)
    memory = predict_memory(config, facts, Arrangement(1, 3, 0))
    plain = kept(model, 3, 128)
    assert plain <= memory.activations + memory.logits <= 1.4 * plain

    model.gradient_checkpointing_enable({"use_reentrant": False})
    sparing = config.model_copy(
        update={"model": config.model.model_copy(update={"activation_checkpointing": True})}
    )
    less = predict_memory(sparing, facts, Arrangement(1, 3, 0))
    # What stays, and the one layer that is recomputed at a time.
    needed = kept(model, 3, 128) + plain / 4
    assert needed <= less.activations + less.logits <= 1.4 * needed


def test_state_by_hand(tmp_path: Path) -> None:
    """ZeRO's table (Rajbhandari et al. 2020, figure 1): 2 + 2 + 12 bytes a parameter, sharded."""
    facts = read_facts(toy.toy_model(tmp_path / "m"))
    p = sum(tensor.size for tensor in toy.weights().values())
    config = run(method="full", precision="bf16")
    parts = {}
    for stage in range(4):
        memory = predict_memory(config, facts, Arrangement(4, 1, stage))
        parts[stage] = (memory.weights, memory.gradients, memory.optimizer)
    block = sum(t.size for n, t in toy.weights().items() if ".layers.0." in n)
    assert parts == {
        0: (2 * p, 2 * p, 12 * p),
        1: (2 * p, 2 * p, 3 * p),
        2: (2 * p, p // 2, 3 * p),
        3: (p // 2 + 2 * block * 2, p // 2, 3 * p),
    }
    offloaded = run(method="full", fleet={"offload_optimizer": True})
    assert predict_memory(offloaded, facts, Arrangement(4, 1, 2)).optimizer == 0


def test_packed_weights_lie_in_their_files(tmp_path: Path) -> None:
    """Those of layers, in the type that they are computed in, of one worker; once as a pack."""
    folder = toy.toy_model(tmp_path / "m")
    facts = dataclasses.replace(read_facts(folder), dtype="float32")
    kernels = {op: {"backend": "cpp", "why": ""} for op in ("lora_linear", "linear_cross_entropy")}
    config = run(precision="fp32", kernels={"cpu_gemm": "bf16x3"})
    linears = sum(a * b for a, b in facts.linears("all-linear").values())
    packs = 4 * (linears + facts.vocab * facts.hidden)
    trained = trained_parameters(config, facts)

    def weights(**changes: Any) -> int:
        at = Arrangement(changes.pop("world", 1), 1, 0)
        found = dataclasses.replace(facts, **changes)
        return predict_memory(config, found, at, kernels).weights

    whole = 4 * (facts.parameters + trained) + packs
    assert weights() == whole - 4 * linears
    assert weights(dtype="bfloat16") == weights(world=2) == whole
    head = {"lm_head.weight": (facts.vocab, facts.hidden)}
    tied = {n: shape for n, shape in facts.shapes.items() if n not in head}
    size = facts.vocab * facts.hidden
    assert weights(shapes=tied) == whole - 4 * linears
    assert weights(shapes=tied | head, family="llama") == whole - 4 * (linears + size)


def test_workers_on_a_row_have_its_tokens_between_them(facts: ModelFacts) -> None:
    config = run(method="full", data={"train": "t", "max_length": 64})
    split = run(
        method="full",
        data={"train": "t", "max_length": 64},
        fleet={"workers": 4, "sequence_parallel_size": 4},
    )
    whole, part = (predict_memory(c, facts, Arrangement(4, 2, 2)) for c in (config, split))
    assert (part.activations, part.logits) == (whole.activations // 4, whole.logits // 4)
    assert (part.weights, part.gradients, part.optimizer) == (
        whole.weights,
        whole.gradients,
        whole.optimizer,
    )


# --- arrangement


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return read_facts(toy.toy_model(tmp_path_factory.mktemp("m") / "m"))


def fits(config: Config, facts: ModelFacts, memory: int) -> Iterator[tuple[int, int]]:
    """All (stage, micro-batch) that fit, the wanted one first."""
    share = config.optim.batch_size // int(config.fleet.workers)
    for stage, micro in itertools.product(range(4), range(share, 0, -1)):
        at = Arrangement(int(config.fleet.workers), micro, stage)
        needed = predict_memory(config, facts, at, choose_kernels(config, Fleet(), facts)).total
        if share % micro == 0 and needed <= FITS * memory:
            yield stage, micro


@pytest.mark.parametrize("memory", [2**21, 2**20, 700_000, 600_000, 500_000])
@pytest.mark.parametrize("workers", [2, 3])
def test_the_lowest_stage_then_the_largest_micro_batch(
    facts: ModelFacts, memory: int, workers: int
) -> None:
    config = run(
        method="full",
        data={"train": "t", "max_length": 32},
        optim={"batch_size": 12},
        fleet={"workers": workers},
    )
    wanted = next(fits(config, facts, memory), None)
    fleet = Fleet(memory_bytes=memory)
    if wanted is None:
        with pytest.raises(PlanError, match=r"the least this run needs is .* GiB per worker"):
            make_plan(config, fleet, facts, "/r")
        return
    plan = make_plan(config, fleet, facts, "/r")
    assert (plan.zero_stage, plan.micro_batch_size) == wanted
    assert plan.world_size * plan.micro_batch_size * plan.gradient_accumulation_steps == 12
    at = Arrangement(workers, wanted[1], wanted[0])
    assert plan.memory == predict_memory(config, facts, at, plan.kernels)


def test_the_sizes_above_try_each_outcome(facts: ModelFacts) -> None:
    """Or the test above would say little."""
    config = run(
        method="full",
        data={"train": "t", "max_length": 32},
        optim={"batch_size": 12},
        fleet={"workers": 2},
    )
    sizes = (2**21, 2**20, 700_000, 600_000, 500_000)
    outcomes = {next(fits(config, facts, memory), None) for memory in sizes}
    assert None in outcomes
    assert len(outcomes) >= 4


def test_workers_default_to_the_gpus(facts: ModelFacts) -> None:
    config = run(data={"train": "t", "max_length": 32})
    assert make_plan(config, Fleet(nodes=2, gpus_per_node=4), facts, "/r").world_size == 8
    assert make_plan(config, Fleet(), facts, "/r").world_size == 1


def test_workers_that_share_rows(facts: ModelFacts) -> None:
    """The batch divides over groups of them; by default there are as many as a row wants."""
    data = {"train": "t", "max_length": 32}
    config = run(
        data=data,
        optim={"batch_size": 6, "micro_batch_size": 1},
        fleet={"workers": 4, "sequence_parallel_size": 2},
    )
    plan = make_plan(config, Fleet(), facts, "/r")
    assert (plan.world_size, plan.lanes, plan.gradient_accumulation_steps) == (4, 2, 3)
    auto = run(data=data, fleet={"sequence_parallel_size": 2})
    assert make_plan(auto, Fleet(), facts, "/r").world_size == 2
    assert make_plan(auto, Fleet(nodes=2, gpus_per_node=4), facts, "/r").world_size == 8
    with pytest.raises(PlanError, match=r"3 workers do not divide .* set fleet\.workers=4"):
        make_plan(auto, Fleet(gpus_per_node=3), facts, "/r")


def test_a_plan_for_another_number_of_workers(facts: ModelFacts) -> None:
    """Any up to one per micro-batch, whether or not it divides; only what depends on it changes."""
    data = {"train": "t", "max_length": 32}
    optim = {"batch_size": 24, "micro_batch_size": 3}
    config = run(data=data, optim=optim, fleet={"workers": 4, "zero_stage": 2})
    plan = make_plan(config, Fleet(), facts, "/r")
    rounds = {1: 8, 2: 4, 3: 3, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}
    for world, accumulation in rounds.items():
        other = for_workers(plan, world, facts)
        at = Arrangement(world, 3, 2)
        assert other == plan.replace(
            world_size=world,
            gradient_accumulation_steps=accumulation,
            memory=predict_memory(config, facts, at, plan.kernels),
        )
        assert other.digest == plan.digest
        assert for_workers(other, 4, facts) == plan
        assert for_workers(plan, world).memory == plan.memory
        asked = deepspeed_config(other)
        assert asked["train_batch_size"] == 3 * accumulation * world
    with pytest.raises(PlanError, match=r"9 workers are more than the 8 micro-.* at most 8, or"):
        for_workers(plan, 9)
    with pytest.raises(PlanError, match=r"0 workers do not divide"):
        for_workers(plan, 0)
    shared = run(data=data, optim=optim, fleet={"workers": 4, "sequence_parallel_size": 2})
    plan = make_plan(shared, Fleet(), facts, "/r")
    assert for_workers(plan, 6).gradient_accumulation_steps == 3
    with pytest.raises(PlanError, match=r"3 workers do not divide into groups .* 2; take 4"):
        for_workers(plan, 3)
    with pytest.raises(PlanError, match=r"18 workers are more than the 8 .* take at most 16"):
        for_workers(plan, 18)
    # What the user wrote and can change is still refused.
    with pytest.raises(PlanError, match=r"batch_size 24 does not divide over 5 workers"):
        make_plan(run(data=data, optim=optim, fleet={"workers": 5}), Fleet(), facts, "/r")


def test_a_range_of_workers_is_planned_for_its_top_and_fits_at_its_bottom(
    facts: ModelFacts,
) -> None:
    data = {"train": "t", "max_length": 32}
    optim = {"batch_size": 12, "micro_batch_size": 1}

    def plan_of(least: int, most: int, micro: int | str = 1, **fleet: Any):
        config = run(
            data=data,
            optim=optim | {"micro_batch_size": micro},
            fleet={"workers": {"min": least, "max": most}, **fleet},
        )
        return make_plan(config, Fleet(memory_bytes=2**30), facts, "/r")

    plan = plan_of(1, 8)
    assert (plan.world_size, plan.gradient_accumulation_steps) == (8, 2)
    assert plan_of(1, 99).world_size == 12
    assert plan_of(2, 8, sequence_parallel_size=2).world_size == 8
    # With 5 of its 12 samples to each of 2 workers, or any micro-batch that divides 12.
    assert plan_of(1, 2, "auto").micro_batch_size == 6
    assert plan_of(1, 5, "auto").micro_batch_size == 2
    # One worker holds all of the optimizer, whatever the stage.
    assert plan_of(1, 8).memory.optimizer == plan_of(1, 1).memory.optimizer
    assert plan_of(1, 8).zero_stage == 0
    with pytest.raises(PlanError, match=r"workers is 7 to 9, and 6 micro-batches .* 6 busy"):
        plan_of(7, 9, 2)
    with pytest.raises(PlanError, match=r"groups of fleet.sequence_parallel_size 4 make 4 of them"):
        plan_of(5, 7, sequence_parallel_size=4)


def test_rows_are_split_over_workers_without_a_fused_kernel_too(
    facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sdpa knows no other workers: where attention has no kernel, its definition in torch runs."""
    monkeypatch.setattr(native, "state", lambda: native.State(False, "a test"))
    data = {"train": "t", "max_length": 32}
    whole = make_plan(run(data=data), Fleet(), facts, "/r")
    split = make_plan(run(data=data, fleet={"sequence_parallel_size": 2}), Fleet(), facts, "/r")
    assert whole.kernels["varlen_attention"]["backend"] == "off"
    assert split.kernels["varlen_attention"]["backend"] == "torch"


def test_what_the_user_set_is_kept_even_where_it_seems_too_large(facts: ModelFacts) -> None:
    config = run(
        data={"train": "t", "max_length": 32},
        optim={"micro_batch_size": 16},
        fleet={"workers": 1, "zero_stage": 2},
    )
    plan = make_plan(config, Fleet(memory_bytes=1), facts, "/r")
    assert (plan.zero_stage, plan.micro_batch_size) == (2, 16)


def test_a_plan_survives_its_journey(facts: ModelFacts) -> None:
    config = run(
        data={"train": "t", "max_length": 32, "chat_template": "中 {{ x }}"},
        optim={"betas": [0.8, 0.95], "max_grad_norm": None, "learning_rate": 1 / 3},
        fleet={"offload_optimizer": True},
        adapter={"target_modules": ["q_proj"]},
    )
    plan = make_plan(config, Fleet(memory_bytes=2**30), facts, "/r").replace(total_steps=7)
    arrived = plan_from_json(plan_to_json(plan))
    assert arrived == plan
    assert arrived.digest == plan.digest
    assert arrived.zero["offload_optimizer"] == {"device": "cpu"}


KERNELS = {k for k in all_keys() if k.startswith("kernels.") and k != "kernels.cpu_gemm"}
"""Backends differ by rounding, as world sizes do; arithmetics differ by more."""
NO_NUMBERS = {
    "model.path", "model.activation_checkpointing", "data.train", "data.eval", "output_dir",
    "optim.micro_batch_size",
    *(key for key in all_keys() if key.split(".")[0] in
      ("fleet", "checkpoint", "health", "evaluation", "samples", "tracking")),
    *KERNELS,
}  # fmt: skip
OTHER: dict[str, Any] = {
    "model.path": "/n", "model.revision": "v2", "model.attention": "eager",
    "model.activation_checkpointing": True, "model.quantization": "nf4",
    "method": "full", "precision": "fp32",
    "seed": 9, "output_dir": "/q", "adapter.lora_rank": 9, "adapter.lora_alpha": 9,
    "adapter.lora_dropout": 0.5, "adapter.target_modules": ["q_proj"],
    "data.train": "/u", "data.eval": "/e", "data.eval_fraction": 0.5, "data.format": "text",
    "data.overlong": "drop", "data.packing": True, "data.max_length": 99,
    "optim.batch_size": 32, "optim.micro_batch_size": 2, "optim.epochs": 2, "optim.max_steps": 9,
    "optim.schedule": "linear", "optim.betas": [0.5, 0.5], "optim.final_fraction": 0.5,
    "optim.weight_decay": 0.5, "optim.eps": 0.5, "optim.max_grad_norm": 0.5,
    "optim.learning_rate": 0.5, "optim.warmup_steps": 5, "fleet.zero_stage": 2,
    "fleet.gpus_per_worker": 0, "fleet.price_per_hour": 3.5, "fleet.offload_optimizer": True,
    "fleet.preemptible": True, "fleet.max_failures": 9, "tracking.sinks": ["wandb"],
    "kernels.cpu_gemm": "int16", "health.on_bad_step": "stop", "health.window": 64,
    "health.rewind_after": 4, "checkpoint.copy_to": "file:///c",
    **dict.fromkeys(KERNELS, "torch"),
}  # fmt: skip
"""Another value for each key. Names that are not here get "x", counts 3."""


WITH = (
    "task", "freeze.trainable", "model.double_quant", "deterministic", "checkpoint.copy_verify",
    "checkpoint.copy_wait_s", "adapter.lora_init", "model.selective_layers",
)  # fmt: skip
ALONE = [key for key in all_keys() if key not in WITH]
"""Keys that can be set without another: a task has one value, freeze wants its method,
double_quant and lora_init a quantization, and deterministic a micro-batch size."""


@pytest.mark.parametrize("key", ALONE)
def test_the_digest_knows_what_decides_the_numbers(key: str, facts: ModelFacts) -> None:
    texts = ("_column", "prompt", "template", "gpu", "interface", "project", "run_name")
    value = OTHER.get(key, "x" if key.endswith(texts) else 3)
    section, _, name = key.rpartition(".")
    base = {"model": {"path": "/m"}, "data": {"train": "/t"}, "output_dir": "/r"}
    raw = base | ({section: base.get(section, {}) | {name: value}} if section else {name: value})
    plan = make_plan(run(data={"train": "t", "max_length": 32}), Fleet(), facts, "/r")
    before, after = (plan.replace(config=check_config(r, "test")) for r in (base, raw))
    assert before.config != after.config
    assert (before.digest == after.digest) == (key in NO_NUMBERS)
    elsewhere = before.replace(run_dir="/q", world_size=8, micro_batch_size=2, zero={"stage": 3})
    assert elsewhere.digest == before.digest


def deterministic(facts: ModelFacts, memory: int = 0, /, **sections: Any) -> Plan:
    raw = {"data": {"train": "t", "max_length": 32}, "deterministic": True} | sections
    raw["optim"] = {"batch_size": 8, "micro_batch_size": 2} | sections.get("optim", {})
    return make_plan(run(**raw), Fleet(memory_bytes=memory), facts, "/r")


def test_under_deterministic_the_digest_knows_what_decides_a_bit(facts: ModelFacts) -> None:
    plan = deterministic(facts)
    for other in (
        deterministic(facts, deterministic=False),
        deterministic(facts, optim={"micro_batch_size": 1}),
        deterministic(facts, fleet={"cpus_per_worker": 2}),
        deterministic(facts, fleet={"sequence_parallel_size": 2}),
        deterministic(facts, kernels={"lora_linear": "torch"}),
    ):
        assert other.digest != plan.digest
    for same in (
        for_workers(plan, 3),
        deterministic(facts, fleet={"workers": 4, "zero_stage": 0, "gpu": "H100"}),
        plan.replace(run_dir="/q", kernels={**plan.kernels, "pack": {"backend": "torch"}}),
    ):
        assert same.digest == plan.digest


def test_deterministic_runs_at_stage_0_and_pays_for_its_sums(facts: ModelFacts) -> None:
    """Also where another stage would fit better; gradients are there twice, and an fp32 sum."""
    full: dict[str, Any] = {"method": "full", "fleet": {"workers": 4}, "precision": "bf16"}
    plan = deterministic(facts, 2**30, **full)
    assert (plan.zero_stage, deterministic(facts, **full).zero_stage) == (0, 0)
    alone = for_workers(plan, 1, facts)
    assert plan.memory is not None and alone.memory is not None
    assert plan.memory.gradients == facts.parameters * (2 + 2 + 4 + 1)
    assert alone.memory.gradients == facts.parameters * (2 + 4)
    full["fleet"] = {"workers": {"min": 1, "max": 4}}
    ranged = deterministic(facts, **full)
    assert (ranged.zero_stage, ranged.world_size) == (0, 4)
    assert ranged.memory is not None and ranged.memory.gradients >= plan.memory.gradients
    with pytest.raises(PlanError, match="the least this run needs"):
        deterministic(facts, plan.memory.total // 2, **full)


def test_deterministic_measures_no_arithmetic(facts: ModelFacts) -> None:
    """A product of bf16 is otherwise chosen by a measurement in each worker."""
    if not native.state().available:
        pytest.skip(native.state().why)
    wanted = f"cpp:{preferred_arithmetic()}"
    assert wanted != "cpp:auto"
    bf16 = {"precision": "bf16"}
    assert deterministic(facts, **bf16).kernels["lora_linear"]["backend"] == wanted
    asked = deterministic(facts, kernels={"cpu_gemm": "fp32"}, **bf16)
    assert asked.kernels["lora_linear"]["backend"] == "cpp:fp32"
    fp32 = deterministic(facts)
    assert fp32.kernels["lora_linear"]["backend"] == "cpp"
    assert permitted("auto", torch.float32) in (("fp32",), ("torch",))


def test_the_digest_knows_how_lora_starts_and_not_what_is_recomputed(facts: ModelFacts) -> None:
    def digest(*, lora_init: str = "random", **model: Any) -> str:
        model = {"path": "/m", "quantization": "nf4", **model}
        config = run(
            data={"train": "t", "max_length": 32}, model=model, adapter={"lora_init": lora_init}
        )
        return make_plan(config, Fleet(), facts, "/r").digest

    assert digest() != digest(lora_init="quantization_error")
    assert digest() == digest(activation_checkpointing="selective", selective_layers=1)


def test_no_more_is_recomputed_than_fits(facts: ModelFacts) -> None:
    """auto: nothing, gate and up of the fewest layers that do, of all, whole layers."""
    facts = dataclasses.replace(facts, layers=6, intermediate=4096)
    micro: int | str = 1

    def plan(kind: bool | str, memory: int = 0, layers: int | None = None) -> Plan:
        config = run(
            model={"path": "/m", "activation_checkpointing": kind, "selective_layers": layers},
            data={"train": "t", "max_length": 32},
            optim={"micro_batch_size": micro},
            kernels={"default": "torch"},
        )
        return make_plan(config, Fleet(memory_bytes=memory), facts, "/r")

    def needs(*kind: Any) -> int:
        memory = predict_memory(
            plan(*kind).config, facts, Arrangement(1, 1, 0), plan(False).kernels
        )
        return int(memory.total / 0.92) + 1

    def chosen(memory: int) -> tuple[bool | str, int | None]:
        found = plan("auto", memory)
        section = found.config.model
        assert found.memory is not None and found.memory.total <= 0.92 * memory
        return section.activation_checkpointing, section.selective_layers

    sizes = [needs(False), *(needs("selective", 0, n) for n in range(1, 7)), needs(True)]
    assert sizes == sorted(sizes, reverse=True)
    assert chosen(sizes[0]) == (False, None)
    for layers in range(1, 7):
        assert chosen(sizes[layers]) == ("selective", layers)
        assert chosen(sizes[layers - 1] - 2) == ("selective", layers)
    assert chosen(sizes[7]) == (True, None)
    with pytest.raises(PlanError, match=r"lower data\.max_length, or use more workers"):
        plan("auto", sizes[7] // 2)
    with pytest.raises(PlanError, match=r"set model\.activation_checkpointing=auto"):
        plan("selective", sizes[7] // 2)
    assert plan("auto").config.model.activation_checkpointing is False  # memory is not known
    micro = "auto"
    assert plan("auto", 8 * sizes[0]).config.model.activation_checkpointing is False
    assert plan("auto", sizes[1]).micro_batch_size > 1  # rather than fewer layers
    facts = dataclasses.replace(facts, family="gpt2")  # no layers of ours
    assert chosen(needs(False) - 2)[0] is True


def test_the_digest_knows_double_quantisation(facts: ModelFacts) -> None:
    plans = [
        make_plan(
            run(
                data={"train": "t", "max_length": 32},
                model={"path": "/m", "quantization": "nf4", "double_quant": double_quant},
            ),
            Fleet(),
            facts,
            "/r",
        )
        for double_quant in (True, False)
    ]
    assert plans[0].digest != plans[1].digest


# --- kernels


def kernels(facts: ModelFacts, fleet: Fleet | None = None, **sections: Any) -> dict[str, str]:
    plan = make_plan(
        run(data={"train": "t", "max_length": 32}, **sections), fleet or Fleet(), facts, "/r"
    )
    assert all(set(choice) == {"backend", "why"} for choice in plan.kernels.values())
    return {op: choice["backend"] for op, choice in plan.kernels.items()}


def test_kernels_are_those_that_the_run_uses(facts: ModelFacts) -> None:
    lora = kernels(facts)
    assert sorted(lora) == [
        "adamw_step", "add_rms_norm", "content_hash", "linear_cross_entropy", "lora_linear",
        "pack", "rope", "swiglu", "varlen_attention",
    ]  # fmt: skip
    assert "lora_linear" not in kernels(facts, method="full")
    gemma = dataclasses.replace(facts, activation="gelu_pytorch_tanh")
    assert {"geglu", "swiglu"} & kernels(gemma).keys() == {"geglu"}
    other = dataclasses.replace(facts, activation="relu2")
    assert not {"geglu", "swiglu"} & kernels(other).keys()


def test_a_word_for_one_op_goes_before_the_default(facts: ModelFacts) -> None:
    chosen = kernels(facts, kernels={"default": "torch", "rope": "off"})
    tensors = {op: backend for op, backend in chosen.items() if op not in ("pack", "content_hash")}
    assert tensors.pop("rope") == "off"
    assert set(tensors.values()) == {"torch"}


@pytest.mark.skipif(not native.state().available, reason=native.state().why)
def test_arithmetic_goes_by_precision_and_cpu_gemm(facts: ModelFacts) -> None:
    assert kernels(facts, precision="fp32")["lora_linear"] == "cpp"
    assert kernels(facts, precision="bf16")["lora_linear"] == "cpp"
    forced = kernels(facts, precision="fp32", kernels={"cpu_gemm": "int16"})
    assert forced["lora_linear"] == forced["linear_cross_entropy"] == "cpp:int16"
    assert forced["rope"] == forced["adamw_step"] == "cpp"


@pytest.mark.skipif(not native.state().available, reason=native.state().why)
def test_weights_in_4_bits_are_not_packed_for_each_call(facts: ModelFacts) -> None:
    base = {"path": "/m", "quantization": "nf4"}
    chosen = kernels(facts, model=base)
    assert (chosen["nf4"], chosen["lora_linear"], chosen["swiglu"]) == ("cpp", "torch", "cpp")
    asked = kernels(facts, model=base, kernels={"cpu_gemm": "int16"})
    assert (asked["nf4"], asked["lora_linear"]) == ("cpp", "cpp:int16")
    off = kernels(facts, model=base, kernels={"default": "off"})
    assert (off["nf4"], off["lora_linear"]) == ("torch", "off")  # transformers has none for 4 bits
    assert "nf4" not in kernels(facts)


def test_attention_stays_where_only_the_definition_runs(facts: ModelFacts) -> None:
    """Its loop over documents is slower than what transformers has; who asks for it gets it."""
    gpus = Fleet(gpus_per_node=1, memory_bytes=2**34)
    assert kernels(facts, gpus, kernels={"default": "torch"})["varlen_attention"] == "torch"
    wide = dataclasses.replace(facts, head_dim=264)
    assert kernels(wide, gpus)["varlen_attention"] == "off"
    with pytest.raises(BackendError, match="heads are 264 wide, over 256; use auto"):
        kernels(wide, gpus, kernels={"varlen_attention": "triton"})
    assert kernels(wide)["varlen_attention"] == "off"
    fits = "cpp" if native.state().available else "off"
    assert kernels(facts)["varlen_attention"] == fits


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_attention_on_gpus_is_flash_attention_in_bf16_else_tritons(facts: ModelFacts) -> None:
    gpus = Fleet(gpus_per_node=1, memory_bytes=2**34)
    assert kernels(facts, gpus, precision="bf16")["varlen_attention"] == "vendor"
    assert kernels(facts, gpus, precision="fp32")["varlen_attention"] == "triton"
    narrow = dataclasses.replace(facts, head_dim=20)
    assert kernels(narrow, gpus, precision="bf16")["varlen_attention"] == "triton"
    for section in ({"default": "triton"}, {"varlen_attention": "triton"}):
        found = kernels(facts, gpus, kernels=section, precision="bf16")
        assert found["varlen_attention"] == "triton"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_worker_without_flash_attention_takes_triton(facts: ModelFacts, monkeypatch) -> None:
    """What GPU a worker has, and what its model's scores are, the plan does not know."""
    gpus = Fleet(gpus_per_node=1, memory_bytes=2**34)

    def found(gpu: dict[str, str], softcap: float | None = None, **section: str) -> dict[str, str]:
        data = {"train": "t", "max_length": 32}
        config = run(data=data, precision="bf16", kernels=section)
        plan = make_plan(config, gpus, facts, "/r")
        assert plan.kernels["varlen_attention"]["backend"] == "vendor"
        monkeypatch.setattr(model, "gpu_facts", lambda device: gpu)
        scores = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=softcap))
        return model._kernels_here(plan, scores)["varlen_attention"]

    hopper = {"architecture": "sm_90", "flash": "FA3"}
    assert found(hopper) == {"backend": "vendor", "why": "FlashAttention (FA3)"}
    for gpu, softcap, why in (
        ({"architecture": "gfx942"}, None, "the GPU is gfx942"),
        ({"architecture": "sm_90", "flash": ""}, None, "built without FlashAttention"),
        (hopper, 50.0, "scores have a soft cap of 50"),
    ):
        told = found(gpu, softcap)
        assert told["backend"] == "triton" and why in told["why"]
        with pytest.raises(BackendError, match="vendor was asked for and can't run"):
            found(gpu, softcap, varlen_attention="vendor")


def test_a_backend_that_cant_run_ends_the_plan(facts: ModelFacts) -> None:
    with pytest.raises(BackendError, match="rope: triton was asked for and can't run: tensors are"):
        kernels(facts, kernels={"rope": "triton"})
    gpus = Fleet(gpus_per_node=1, memory_bytes=2**34)
    with pytest.raises(BackendError, match="cpp was asked for and can't run"):
        kernels(facts, gpus, kernels={"default": "cpp"})
    assert BackendError.exit_code == 2


# --- files


def test_shapes_over_several_files(tmp_path: Path) -> None:
    whole, parts = toy.weights(), tmp_path / "parts"
    parts.mkdir()
    names = sorted(whole)
    index = {}
    for i in range(3):
        file = f"model-{i}.safetensors"
        save_file({name: whole[name] for name in names[i::3]}, parts / file)
        index |= dict.fromkeys(names[i::3], file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert read_shapes(parts) == {name: tensor.shape for name, tensor in whole.items()}


def test_a_tied_head_that_stands_in_the_file_all_the_same(tmp_path: Path) -> None:
    folder = toy.toy_model(tmp_path / "m")
    before = read_facts(folder).parameters
    head = {"lm_head.weight": np.zeros((toy.VOCABULARY, toy.HIDDEN), np.float32)}
    save_file(toy.weights() | head, folder / "model.safetensors")
    assert read_facts(folder).parameters == before


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": "32"},
        {"model_type": None},
        {"vocab_size": 0},
    ],
    ids=str,
)
def test_odd_configs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"name/config\.json"):
        facts_from(toy.MODEL_CONFIG | change, {}, "name")


@pytest.mark.parametrize("change", [{"text_config": [1]}, {"architectures": 3}], ids=str)
def test_odd_values_that_say_nothing_are_passed_over(change: dict[str, Any]) -> None:
    assert facts_from(toy.MODEL_CONFIG | change, {}, "name").hidden == toy.HIDDEN


def test_the_language_part_of_a_model_of_several(tmp_path: Path) -> None:
    both = {"model_type": "x", "architectures": ["X"], "text_config": toy.MODEL_CONFIG}
    assert facts_from(both, {}, "name").layers == toy.LAYERS
