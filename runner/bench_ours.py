"""Our side of `trimpot bench step`: the runner's own model of a plan, with the runner's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimpot.runner import hub
from trimpot.runner.adapters.lora import lora_layers
from trimpot.runner.bench_workloads import Method
from trimpot.runner.config import check_config
from trimpot.runner.model import build_model
from trimpot.runner.optimizer import make_optimizer
from trimpot.runner.plan.plan import make_plan
from trimpot.runner.types import Fleet, Plan


@dataclass
class Built:
    model: nn.Module
    trained: dict[str, nn.Parameter]
    """Adapters by our names ("<layer>.lora_A", "<layer>.lora_B"), or with method full all."""
    about: dict[str, Any]
    optimizer: torch.optim.Optimizer


def build_ours(
    folder: Path, variant: str, method: Method, rank: int, alpha: float, learning_rate: float
) -> Built:
    """`variant`: what the GEMMs of frozen weights compute in, as `cpu_gemm` has it; behind a plus
    `selective`, or `selective:8` for as many layers, the activation checkpointing."""
    lora = {"adapter": {"lora_rank": rank, "lora_alpha": alpha}} if method == "lora" else {}
    plan = plan_of(folder, variant, {"method": method, **lora}, learning_rate)
    model = build_model(plan, None)
    trained: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(model).items():
        trained |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    trained = trained or dict(model.named_parameters())
    kernels = {op: choice["backend"] for op, choice in plan.kernels.items()}
    about = {"variant": variant, "kernels": kernels}
    return Built(model, trained, about, make_optimizer(plan, list(trained.values())))


def plan_of(folder: Path, variant: str, method: dict[str, Any], learning_rate: float) -> Plan:
    gemm, _, recomputed = variant.partition("+")
    kind, _, layers = recomputed.partition(":")
    config = check_config(
        {
            "model": {
                "path": str(folder),
                "activation_checkpointing": kind or False,
                "selective_layers": int(layers) if layers.isdigit() else layers or None,
            },
            "precision": "fp32",
            "output_dir": str(folder.parent / "run"),
            **method,
            "data": {"train": "random", "max_length": 64},
            "optim": {"batch_size": 1, "learning_rate": learning_rate},
            "kernels": {"cpu_gemm": gemm},
        },
        "bench step",
    )
    return make_plan(config, Fleet(), hub.model_facts(str(folder), None), str(folder.parent))
