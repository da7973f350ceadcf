"""Our side of `trimpot bench step`: the runner's own model of a plan, with the runner's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimpot.runner import hub
from trimpot.runner.adapters.lora import lora_layers
from trimpot.runner.config import check_config
from trimpot.runner.model import build_model
from trimpot.runner.plan.plan import make_plan
from trimpot.runner.types import Fleet, Plan


@dataclass
class Built:
    model: nn.Module
    adapters: dict[str, nn.Parameter]
    """By our names: "<layer>.lora_A", "<layer>.lora_B"."""
    about: dict[str, Any]


def build_ours(folder: Path, variant: str, rank: int, alpha: float) -> Built:
    """`variant`: what the GEMMs of frozen weights compute in, as `cpu_gemm` has it; behind a plus
    `selective`, or `selective:8` for as many layers, the activation checkpointing."""
    plan = plan_of(folder, variant, rank, alpha)
    model = build_model(plan, None)
    adapters: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(model).items():
        adapters |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    kernels = {op: choice["backend"] for op, choice in plan.kernels.items()}
    return Built(model, adapters, {"variant": variant, "kernels": kernels})


def plan_of(folder: Path, variant: str, rank: int, alpha: float) -> Plan:
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
            "adapter": {"lora_rank": rank, "lora_alpha": alpha},
            "data": {"train": "random", "max_length": 64},
            "optim": {"batch_size": 1},
            "kernels": {"cpu_gemm": gemm},
        },
        "bench step",
    )
    return make_plan(config, Fleet(), hub.model_facts(str(folder), None), str(folder.parent))
