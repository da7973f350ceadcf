"""A plan as a person reads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from trimpot.cluster.journal import packing, percentage
from trimpot.runner.data.fill import Fill
from trimpot.runner.types import Fleet, Plan


def plan_values(plan: Plan, fleet: Fleet, fill: Fill | None = None) -> dict[str, Any]:
    """What `trimpot plan --json` prints. Memory in bytes per worker."""
    memory = plan.memory
    assert memory is not None
    return {
        "world_size": plan.world_size,
        "sequence_parallel_size": plan.sequence_parallel_size,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "batch_size": plan.config.optim.batch_size,
        "zero_stage": plan.zero_stage,
        "offload_optimizer": plan.config.fleet.offload_optimizer,
        "activation_checkpointing": plan.config.model.activation_checkpointing,
        "selective_layers": plan.config.model.selective_layers,
        "precision": plan.config.precision,
        "method": plan.config.method,
        "memory": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
            "logits": memory.logits,
            "total": memory.total,
            "available": fleet.memory_bytes or None,
        },
        "fill": asdict(fill) if fill else None,
        "kernels": plan.kernels,
        "digest": plan.digest,
    }


def plan_table(plan: Plan, fleet: Fleet, fill: Fill | None = None) -> Table:
    values = plan_values(plan, fleet, fill)
    memory = values["memory"]
    table = Table(title="plan", title_justify="left", show_header=False, box=None, pad_edge=False)
    split = plan.sequence_parallel_size
    shared = f", {split} to a row" if split > 1 else ""
    table.add_row("workers", f"{plan.world_size} (ZeRO stage {plan.zero_stage}{shared})")
    each = f"group{'s' * (plan.lanes > 1)} of {split} workers" if split > 1 else "workers"
    table.add_row(
        "batch",
        f"{values['batch_size']} = {plan.lanes} {each} × {plan.micro_batch_size} samples × "
        f"{plan.gradient_accumulation_steps} accumulation steps",
    )
    if fill and plan.config.data.packing:
        table.add_row("packing", packing(asdict(fill)))
    elif plan.config.data.packing:
        tokens = f"{plan.config.data.max_length:,} tokens"
        table.add_row(
            "packing", f"rows of {tokens}; how full is known once train has read the data"
        )
    if fill:
        table.add_row("computed", f"{percentage(fill.computed_share)} real tokens")
    table.add_row("training", f"{values['method']}, {values['precision']}")
    if made_again := values["activation_checkpointing"]:
        some = f"gate and up of {values['selective_layers'] or 'all'} layers"
        table.add_row("recomputed", "whole layers" if made_again is True else some)
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        table.add_row(part, f"{memory[part] / 2**20:10,.1f} MiB")
    have = f" of {memory['available'] / 2**20:,.1f}" if memory["available"] else ""
    backends: dict[str, list[str]] = {}
    for op, choice in plan.kernels.items():
        backends.setdefault(choice["backend"], []).append(op)
    for backend, ops in sorted(backends.items()):
        table.add_row(f"on {backend}", ", ".join(ops))
    table.add_row("predicted", f"{memory['total'] / 2**20:10,.1f} MiB per worker{have}")
    return table
