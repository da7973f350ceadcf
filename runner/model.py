"""Plan → the model of a worker, with what the method trains left trainable."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimpot.kernels.dispatch import choose
from trimpot.kernels.vendor.flash import gpu_facts
from trimpot.runner import hub
from trimpot.runner.adapters.lora import add_lora
from trimpot.runner.adapters.nf4_linear import nf4_layers
from trimpot.runner.engine import reach, sequence_workers
from trimpot.runner.errors import ConfigError, PlanError
from trimpot.runner.fused.swap import Table, remake_products, swap_in
from trimpot.runner.plan.kernels import ATTENTION
from trimpot.runner.quantized import load_nf4
from trimpot.runner.types import Plan


def build_model(plan: Plan, deepspeed: dict[str, Any] | None) -> nn.Module:
    """The model in train mode; under ZeRO-3 (`deepspeed` given) already partitioned."""
    config = plan.config
    model = _load(plan, deepspeed)
    if config.method == "lora":
        add_lora(model, config.adapter, config.seed)
    elif config.method == "freeze":
        assert config.freeze is not None
        _freeze_but(model, config.freeze.trainable)
    workers = sequence_workers(plan.sequence_parallel_size)
    partitioned = reach if plan.zero_stage == 3 else None
    model.kernels = swap_in(model, _kernels_here(plan, model), partitioned, workers)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    if workers is not None and not attends_by_document(model):
        raise PlanError(
            f"fleet.sequence_parallel_size {workers.size} wants attention by document, and "
            f"{type(model).__name__} has none ({kernels_of(model)['varlen_attention']['why']}); "
            "set fleet.sequence_parallel_size=1"
        )
    if config.model.activation_checkpointing == "selective":
        remake_products(model, config.model.selective_layers)
    elif config.model.activation_checkpointing:
        for layer in hub.recompute_layers(model):
            for quantised in nf4_layers(layer).values():
                quantised.recomputed = True
    return model


def _load(plan: Plan, deepspeed: dict[str, Any] | None) -> nn.Module:
    section = plan.config.model
    folder = Path(hub.fetch_model(plan.model_path, section.revision))
    if section.quantization == "none":
        return hub.load_causal_lm(
            folder,
            dtype=dtype_of(plan),
            attention=section.attention,
            deepspeed=deepspeed if plan.zero_stage == 3 else None,
        )
    return load_nf4(
        folder,
        dtype=dtype_of(plan),
        attention=section.attention,
        double_quant=section.double_quant,
        backend=plan.kernels["nf4"]["backend"],
    )


def _kernels_here(plan: Plan, model: Any) -> Table:
    """The plan's, whose FlashAttention must also suit this worker's GPU and the model's scores."""
    section, choice = plan.config.kernels, plan.kernels.get(ATTENTION)
    if choice is None or choice["backend"] != "vendor":
        return plan.kernels
    facts: dict[str, Any] = {"device": "cuda", "dtype": str(dtype_of(plan)).removeprefix("torch.")}
    facts["softcap"] = getattr(model.config, "attn_logit_softcapping", None)
    facts |= gpu_facts(torch.device("cuda"))
    found = choose(ATTENTION, getattr(section, ATTENTION) or section.default, **facts)
    return {**plan.kernels, ATTENTION: {"backend": found.backend, "why": found.why}}


def kernels_of(model: nn.Module) -> Table:
    """What the ops of a plan came to in this model: backend and reason of each."""
    return model.kernels  # pyright: ignore[reportReturnType]


def attends_by_document(model: nn.Module) -> bool:
    """Whether documents in one row cost no more than each in a row of its own."""
    return kernels_of(model).get("varlen_attention", {"backend": "off"})["backend"] != "off"


def dtype_of(plan: Plan) -> torch.dtype:
    return torch.bfloat16 if plan.config.precision == "bf16" else torch.float32


def _freeze_but(model: nn.Module, patterns: list[str]) -> None:
    hit = dict.fromkeys(patterns, 0)
    for name, parameter in model.named_parameters():
        matched = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        parameter.requires_grad_(bool(matched))
        for pattern in matched:
            hit[pattern] += 1
    if missed := [pattern for pattern, count in hit.items() if not count]:
        example = next(name for name, _ in model.named_parameters())
        raise ConfigError(
            f"freeze.trainable {missed[0]!r} names no parameter; names look like {example}"
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trained) parameters, also where ZeRO-3 has partitioned them, or NF4 packed."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    packed = sum(m.out_features * m.in_features for m in nf4_layers(model).values())
    return packed + sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
