"""transformers and PEFT in a plain loop: what a run is held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from trimpot.runner.adapters.lora import add_lora
from trimpot.runner.config import Config
from trimpot.runner.data.compile import Compiled, load_splits
from trimpot.runner.types import Plan


@dataclass(frozen=True)
class Plain:
    losses: list[float]
    """Of each step, nats per trained token."""
    held_out: float
    """After the last; NaN without held-out data."""
    adapter: dict[str, torch.Tensor]


def plain_torch(plan: Plan, dtype: torch.dtype = torch.float32) -> Plain:
    """A PEFT model trained in a loop that has nothing of ours but the tokens and the random start
    of A: a cosine schedule, rows one by one, so that nothing is padded."""
    optim, seed, steps = plan.config.optim, plan.config.seed, plan.total_steps
    assert steps is not None
    train, held_out = load_splits(Path(plan.run_dir) / "data")
    model, weights = peft_model(plan.config, dtype)
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(train))
    losses = []
    for step in range(steps):
        warm = optim.warmup_steps
        done = max(0, step - warm) / (steps - warm)
        factor = (step + 1) / warm if step < warm else (1 + np.cos(np.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = optim.learning_rate * factor
        samples = order[step * optim.batch_size : (step + 1) * optim.batch_size]
        tokens = sum(int(trained.sum()) for i in samples for _, trained in train.parts(i))
        total = 0.0
        for i in samples:
            loss = loss_sum(model, train, i)
            (loss / tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights.values(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / tokens)
    count = min(len(held_out), plan.config.evaluation.max_samples) if held_out else 0
    adapter = {name: p.detach() for name, p in weights.items()}
    return Plain(losses, mean_loss(model, held_out, count), adapter)


def loss_sum(model: torch.nn.Module, data: Compiled, sample: int) -> torch.Tensor:
    ((ids, trained),) = data.parts(sample)
    targets = torch.from_numpy(np.where(trained, ids, -100).astype("int64"))
    logits = model(torch.from_numpy(ids.astype("int64"))[None]).logits[0]
    return functional.cross_entropy(logits[:-1], targets[1:], reduction="sum")


@torch.no_grad()
def mean_loss(model: torch.nn.Module, data: Compiled | None, count: int) -> float:
    """Of the first `count` rows, per trained token."""
    if data is None or not count:
        return float("nan")
    total = sum(loss_sum(model, data, i).item() for i in range(count))
    return total / sum(int(trained.sum()) for i in range(count) for _, trained in data.parts(i))


def peft_model(
    checked: Config, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """PEFT's model with our start, and its trained parameters under our names."""
    load = lambda: AutoModelForCausalLM.from_pretrained(checked.model.path, dtype=torch.float32)  # noqa: E731
    ours = load()
    add_lora(ours, checked.adapter, checked.seed)
    start = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    rank, alpha = checked.adapter.lora_rank, checked.adapter.lora_alpha
    model = get_peft_model(
        load(), LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    )
    weights = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert weights.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(start[name])
    return model.to(dtype), weights
