"""The training loop: steps, held-out loss, learning rate."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from trimpot.runner.config import OptimSection
from trimpot.runner.data.batch import Batch, collate, join, slice_of
from trimpot.runner.data.compile import Compiled
from trimpot.runner.data.cursor import Cursor, deal
from trimpot.runner.engine import Engine, device, memory_bytes, ranks, sum_over_workers
from trimpot.runner.health import Health
from trimpot.runner.model import attends_by_document
from trimpot.runner.pulse import PULSE
from trimpot.runner.tasks.causal_lm import token_loss_sum
from trimpot.runner.types import Plan, StepReport


def learning_rate(optim: OptimSection, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 1): linear warm-up, then the schedule."""
    if step <= optim.warmup_steps:
        return optim.learning_rate * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    # The first step after warm-up runs at the full rate, the last one just above the floor.
    done = (step - 1 - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    falling = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    return optim.learning_rate * (optim.final_fraction + (1 - optim.final_fraction) * falling)


def run_loop(
    plan: Plan,
    engine: Engine,
    data: Compiled,
    health: Health,
    first: int,
    signals: Callable[[], list[float]],
) -> Iterator[tuple[StepReport, list[float]]]:
    """Optimizer steps `first` … total, each with what the workers signal to each other.

    `signals` is asked on every worker before a step's update, and the sums over all workers reach
    each of them with the step's loss, so that they stop and save at the same step. `health` is told
    of each step, and a bad one updates nothing: `health.bad` until the next.
    """
    assert plan.total_steps is not None
    cursor = Cursor(len(data), plan.config.seed)
    lengths, trained = data.lengths, data.trained_lengths
    for step in range(first, plan.total_steps + 1):
        start = time.perf_counter()
        PULSE.begin_step(step)
        rate = learning_rate(plan.config.optim, step, plan.total_steps)
        engine.set_learning_rate(rate)
        size = plan.config.optim.batch_size
        indices = cursor.take((step - 1) * size, size)
        tokens = int(trained[indices].sum())
        micros = deal(indices, lengths, plan.micro_batch_size)
        local = _train_step(plan, engine, data, step, micros, tokens)
        summed = sum_over_workers([*local, *signals()])
        loss, signalled = math.fsum(summed[: len(local)]) / tokens, summed[len(local) :]
        why = engine.update(lambda norm, step=step, loss=loss: health.judge(step, loss, norm))
        health.record(step, loss, engine.grad_norm(), why, indices.tolist())
        report = StepReport(
            step=step,
            loss=loss,
            learning_rate=rate,
            grad_norm=engine.grad_norm(),
            tokens=int(lengths[indices].sum()),
            trained_tokens=tokens,
            seconds=time.perf_counter() - start,
            memory_bytes=memory_bytes(),
        )
        yield report, signalled


def _train_step(
    plan: Plan, engine: Engine, data: Compiled, step: int, micros: np.ndarray, tokens: int
) -> list[float]:
    """Forward and backward of this worker's micro-batches → the summed loss of each slice of each
    micro-batch, 0 where it is another worker's: summed over workers, they are in one order.

    Every worker knows the whole step's samples, hence its trained tokens, without asking anyone.
    DeepSpeed averages gradients over workers; × averaged_over makes a sum of that, also where a
    micro-batch is split over several: each has the gradient of its own tokens.
    Where the micro-batches do not divide over the lanes, those without one in the last round
    repeat one at weight 0: under ZeRO a forward and a backward are collectives.
    """
    split = plan.sequence_parallel_size
    lane, own = divmod(ranks()[0], split)
    engine.inner.train()
    losses = [0.0] * (len(micros) * split)
    for start in range(0, len(micros), plan.lanes):
        busy = min(plan.lanes, len(micros) - start)
        number = min(start + lane, len(micros) - 1)  # the last one is the shortest
        weight = 1.0 if lane < busy else 0.0
        # Dropout depends on which slice of which micro-batch this is, never on who computes it.
        torch.manual_seed(_mix(plan.config.seed, step, number, own))
        batch = _tensors(plan, engine, data, micros[number])
        loss = token_loss_sum(engine.inner, batch)
        engine.backward(loss * (weight * engine.averaged_over / tokens), busy * split)
        if lane < busy:
            losses[number * split + own] = loss.item()
    return losses


def _mix(*parts: int) -> int:
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def _tensors(plan: Plan, engine: Engine, data: Compiled, samples: np.ndarray) -> Batch:
    """What this worker computes of a micro-batch, on its device."""
    PULSE.enter("data")
    if attends_by_document(engine.module):
        batch, workers = join(data, samples.tolist()), plan.sequence_parallel_size
        batch = slice_of(batch, ranks()[0] % workers, workers) if workers > 1 else batch
    else:
        batch = collate(data, samples.tolist(), plan.config.data.packing)
    PULSE.computes(batch["input_ids"].numel())
    return {key: value.to(device(), non_blocking=True) for key, value in batch.items()}


def held_out_loss(plan: Plan, engine: Engine, data: Compiled) -> tuple[float, int, int]:
    """(nats per trained token, trained tokens, samples) of the held-out split.

    Every worker must call. Workers with fewer micro-batches repeat one at weight 0: under ZeRO-3
    a forward is a collective, and all must do as many.
    """
    split = plan.sequence_parallel_size
    lane, own = divmod(ranks()[0], split)
    count = min(len(data), plan.config.evaluation.max_samples)
    order = np.argsort(-data.lengths[:count], kind="stable")
    size = plan.micro_batch_size
    micros = [order[i : i + size] for i in range(0, count, size)]
    engine.inner.eval()
    losses = [0.0] * (len(micros) * split)
    with torch.no_grad():
        for start in range(0, len(micros), plan.lanes):
            number = start + lane
            samples = micros[min(number, len(micros) - 1)]
            value = token_loss_sum(engine.inner, _tensors(plan, engine, data, samples)).item()
            if number < len(micros):
                losses[number * split + own] = value
    engine.inner.train()
    tokens = int(data.trained_lengths[order].sum())
    return math.fsum(sum_over_workers(losses)) / tokens, tokens, count
