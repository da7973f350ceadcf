"""Trains prepared plans while numbers go wrong: `torchrun … sick.py RESULT JOBS.json`.

JOBS: [{"name", "plan": path of a plan.json, "faults": {kind: [step, …]}, "stop": step or null}, …].
With `stop` a run is told to stop after that step, and goes on in a second start. Faults:

    loss       the last worker's loss is NaN           gradient   its gradient alone is NaN
    high loss  every loss is 100 times what it is      steep      every gradient is
    weights    all weights and moments of all workers are NaN after the step
    flip       a bit of a trained weight of the last worker is another after the step
    frozen     a bit of a frozen one

Each rank writes {name: {"told": [[kind, values], …], "digests": {step: of weights and moments}}} to
RESULT.RANK; an error that ended a run is the last thing told.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trimpot.runner import engine as engines
from trimpot.runner import health, loop, worker
from trimpot.runner.engine import MOMENTS, Engine
from trimpot.runner.errors import TrimpotError
from trimpot.runner.plan.plan import plan_from_json
from trimpot.runner.types import StepReport

health.LEAST = 4  # a spike is known after few steps, and so a test is short


class Scaled(torch.autograd.Function):
    """The loss as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class Patient:
    """One run, its faults, and what became of it."""

    def __init__(self, job: dict[str, Any]):
        self.faults, self.stop = job["faults"], job["stop"]
        self.plan = plan_from_json(Path(job["plan"]).read_text())
        self.step, self.engine = 0, None
        self.told: list[Any] = []
        self.digests: dict[int, str] = {}

    def has(self, kind: str) -> bool:
        return self.step in self.faults.get(kind, ())

    def loss(self, real: Any) -> Any:
        def call(*arguments: Any) -> torch.Tensor:
            value = real(*arguments)
            if not value.requires_grad:
                return value
            last = engines.ranks()[0] == engines.ranks()[1] - 1
            if self.has("loss") and last:
                value = value * math.nan
            if self.has("gradient") and last:
                value = Scaled.apply(value, math.nan)
            if self.has("high loss"):
                value = value * 100
            return Scaled.apply(value, 100.0) if self.has("steep") else value

        return call

    def train_step(self, real: Any) -> Any:
        def call(plan: Any, engine: Any, data: Any, step: int, *rest: Any) -> float:
            self.step = step
            return real(plan, engine, data, step, *rest)

        return call

    def start_engine(self, real: Any) -> Any:
        def call(*arguments: Any) -> Engine:
            self.engine = real(*arguments)
            return self.engine

        return call

    def hear(self, event: Any) -> None:
        if not isinstance(event, StepReport):
            if event.kind in ("bad_step", "corruption", "warning", "checkpoint"):
                self.told.append([event.kind, event.values])
            return
        self.told.append(["step", {"step": event.step, "loss": event.loss, "health": event.health}])
        self.digests[event.step] = digest(self.engine)
        if self.has("weights"):
            lost = {n: torch.full(torch.Size(s), math.nan) for n, s in self.engine.shapes().items()}
            self.engine.rewind(
                lambda name, _: lost[name],
                lambda name, _, start, stop: lost[name].flatten()[start:stop],
                event.step,
            )
        if engines.ranks()[0] == engines.ranks()[1] - 1:
            parameters = list(self.engine.module.parameters())
            if self.has("flip"):
                flip(next(p for p in parameters if p.requires_grad and p.numel()))
            if self.has("frozen"):
                flip(next(getattr(p, "ds_tensor", p) for p in parameters if not p.requires_grad))
        if event.step + 1 == self.stop:
            Path(self.plan.run_dir, "stop").touch()

    def run(self) -> dict[str, Any]:
        wrapped = (
            (loop, "token_loss_sum", self.loss),
            (loop, "_train_step", self.train_step),
            (worker, "start_engine", self.start_engine),
        )
        real = [getattr(module, name) for module, name, _ in wrapped]
        for (module, name, wrap), function in zip(wrapped, real, strict=True):
            setattr(module, name, wrap(function))
        try:
            last = worker.train(self.plan, self.hear)
            if self.stop:
                assert (last.step, last.complete) == (self.stop, False), last
                dist.barrier()
                Path(self.plan.run_dir, "stop").unlink(missing_ok=True)
                dist.barrier()
                last = worker.train(self.plan, self.hear)
            self.told.append(["end", {"step": last.step, "complete": last.complete}])
        except TrimpotError as error:
            values = {"type": type(error).__name__, "text": str(error)}
            self.told.append(["error", values | {"ranks": getattr(error, "ranks", None)}])
        finally:
            for (module, name, _), function in zip(wrapped, real, strict=True):
                setattr(module, name, function)
        self.engine = None
        return {"told": self.told, "digests": self.digests}


def flip(tensor: torch.Tensor) -> None:
    """Another lowest bit of the middle element."""
    kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    flat = tensor.detach().view(-1).view(kind)
    flat[len(flat) // 2] ^= 1


def digest(engine: Engine) -> str:
    """Of the weights as the model computes with them, of their masters, moments, and step."""
    found = hashlib.sha256()
    for name, values in engine.state().items():
        with engine.whole([engine.names[name]]):
            inner = engine.names[name].detach().float().cpu()
        found.update(name.encode() + inner.numpy().tobytes())
        for key in ("weight", *MOMENTS):
            found.update(values[key].numpy().tobytes())
    steps = {float(moments["step"]) for moments in engine.optimizer.state.values()}
    return f"{found.hexdigest()} after {steps}"


def main() -> None:
    result, jobs = sys.argv[1:]
    engines.join_workers()
    told = {}
    for job in json.loads(Path(jobs).read_text()):
        told[job["name"]] = Patient(job).run()
        gc.collect()
    Path(f"{result}.{engines.ranks()[0]}").write_text(json.dumps(told))
    engines.leave_workers()


if __name__ == "__main__":
    main()
