"""A plan as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from trimpot.runner.types import Fleet, Plan


def plan_values(plan: Plan, fleet: Fleet) -> dict[str, Any]:
    """What `trimpot plan --json` prints. Memory in bytes per worker."""
    memory = plan.memory
    assert memory is not None
    return {
        "world_size": plan.world_size,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "batch_size": plan.config.optim.batch_size,
        "zero_stage": plan.zero_stage,
        "offload_optimizer": plan.config.fleet.offload_optimizer,
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
        "kernels": plan.kernels,
        "digest": plan.digest,
    }


def plan_table(plan: Plan, fleet: Fleet) -> Table:
    values = plan_values(plan, fleet)
    memory = values["memory"]
    table = Table(title="plan", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_row("workers", f"{plan.world_size} (ZeRO stage {plan.zero_stage})")
    table.add_row(
        "batch",
        f"{values['batch_size']} = {plan.world_size} workers × {plan.micro_batch_size} samples × "
        f"{plan.gradient_accumulation_steps} accumulation steps",
    )
    table.add_row("training", f"{values['method']}, {values['precision']}")
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
