"""One worker's story, under Ray, torchrun, or alone: `python -m … worker RUN/plan.json`."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trimpot.kernels.heap import give_back_freed_memory, keep_freed_memory
from trimpot.runner import engine as engines
from trimpot.runner.adapters.peft_io import save_adapter
from trimpot.runner.checkpoint import (
    check_state,
    load_state,
    newest_checkpoint,
    prune,
    save_checkpoint,
)
from trimpot.runner.data.compile import Compiled, load_splits
from trimpot.runner.data.fill import fill_of
from trimpot.runner.engine import Engine, State, start_engine
from trimpot.runner.errors import CheckpointError, DataError, StorageError, TrimpotError
from trimpot.runner.journal import Journal
from trimpot.runner.loop import held_out_loss, run_loop
from trimpot.runner.model import (
    attends_by_document,
    build_model,
    count_parameters,
    kernels_of,
)
from trimpot.runner.plan.plan import plan_from_json
from trimpot.runner.sample import answer_prompts
from trimpot.runner.types import Checkpoint, Event, Plan, StepReport

Report = Callable[[StepReport | Event], None]
VERSIONS = ("trimpot", "torch", "deepspeed", "transformers", "ray", "numpy", "safetensors")
log = logging.getLogger(__name__)


def train(plan: Plan, report: Report) -> Checkpoint:
    """Train what the plan says, from where the run directory's newest checkpoint stands.

    Every worker of the process group must call. `report` hears rank 0's steps and events.
    Returns the last checkpoint, which is `complete` unless the run was told to stop
    (by a file RUN/stop).
    """
    clock = Phases(report)
    run = Path(plan.run_dir)
    data, held_out = _data(run)
    assert plan.total_steps is not None
    rank, _ = engines.ranks()

    model = build_model(plan, engines.deepspeed_config(plan))
    parameters, trained = count_parameters(model)
    clock.tell("model")
    found = newest_checkpoint(run / "checkpoints", _warn(report), set_aside=rank == 0)
    state: State | None = None
    if found is not None:
        state = _matching_state(plan, data, model, *found)
        engines.load_weights(model, state, plan.zero_stage)
    engine = start_engine(plan, model)
    if found is not None and state is not None:
        engine.load_moments(state, found[0].step)
        del state
    clock.tell("engine")
    first = found[0].step + 1 if found else 1
    report(_start(plan, model, data, held_out, parameters, trained, first))
    session = Session(plan, engine, data, held_out, report)
    if first == 1:
        session.evaluate(0)
        session.show("before")
        clock.tell("first look")
    last = found[0] if found else None
    for step, stop in run_loop(plan, engine, data, first, (run / "stop").exists):
        last = session.after(step, stop) or last
        if step.step == first:
            clock.tell("first step")
        if stop and step.step < plan.total_steps:
            assert last is not None
            return last
    assert last is not None
    session.show("after")
    return last


def _data(run: Path) -> tuple[Compiled, Compiled | None]:
    splits = load_splits(run / "data")
    if splits is None:
        raise StorageError(
            f"this worker does not see {run}/data; output_dir must be on storage that all "
            "workers share"
        )
    return splits


def _warn(report: Report) -> Callable[[str], None]:
    return lambda text: report(Event("warning", {"text": text}))


def _matching_state(
    plan: Plan, data: Compiled, model: torch.nn.Module, at: Checkpoint, manifest: dict[str, Any]
) -> State:
    """The checkpoint's tensors, if they belong to this plan, data and model."""
    if at.plan_digest != plan.digest:
        raise CheckpointError(
            f"checkpoint {at.path} is of a run with other settings; "
            "start over with --fresh, or choose another output_dir"
        )
    if manifest["data_digest"] != data.digest:
        raise CheckpointError(
            f"the data changed since checkpoint {at.path} was saved; "
            "put it back, start over with --fresh, or choose another output_dir"
        )
    state = load_state(at)
    wanted = {
        name: torch.Size(getattr(p, "ds_shape", p.shape))
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    check_state(state, wanted, at.path)
    return state


class Session:
    """What happens around the steps of one start of a run."""

    def __init__(
        self, plan: Plan, engine: Engine, data: Compiled, held_out: Compiled | None, report: Report
    ):
        self.plan, self.engine, self.data, self.held_out = plan, engine, data, held_out
        self.report = report
        self.run = Path(plan.run_dir)
        self.rank, self.world = engines.ranks()

    def after(self, step: StepReport, stop: bool) -> Checkpoint | None:
        """Evaluate and save where the plan says so, then report the step."""
        config, saved = self.plan.config, None
        final = step.step == self.plan.total_steps
        every = config.evaluation.every_steps
        if final or (every and step.step % every == 0):
            step = replace(step, held_out_loss=self.evaluate(step.step))
        if final or stop or step.step % config.checkpoint.every_steps == 0:
            saved = self.save(step.step, complete=final)
            step = replace(step, checkpoint=saved.path.name)
        self.report(step)
        return saved

    def evaluate(self, step: int) -> float | None:
        if self.held_out is None:
            return None
        loss, tokens, samples = held_out_loss(self.plan, self.engine, self.held_out)
        values = {"step": step, "loss": loss, "tokens": tokens, "samples": samples}
        self.report(Event("eval", values))
        return loss

    def show(self, when: str) -> None:
        """Answer held-out prompts. All workers do: under ZeRO-3 generating is a collective."""
        section = self.plan.config.samples
        if self.held_out is None or not section.prompts:
            return
        asked = self.held_out.shown[: section.prompts]
        answers = answer_prompts(
            self.plan, self.engine, [prompt for prompt, _, _ in asked], section.max_new_tokens
        )
        for (_, question, reference), answer in zip(asked, answers, strict=True):
            values = {"when": when, "prompt": question, "answer": answer, "reference": reference}
            self.report(Event("sample", values))

    def save(self, step: int, complete: bool) -> Checkpoint:
        start = time.perf_counter()
        state = self.engine.state()  # a collective under ZeRO: every worker calls
        folder = self.run / "checkpoints"
        facts = {
            "plan_digest": self.plan.digest,
            "data_digest": self.data.digest,
            "world_size": self.world,
            "zero_stage": self.plan.zero_stage,
            "method": self.plan.config.method,
        }
        cursor = step * self.plan.config.optim.batch_size
        path, failure = folder / f"step-{step:08d}", ""
        saved = Checkpoint(path, step, cursor, self.plan.digest, "", complete)
        if self.rank == 0:
            try:
                saved = save_checkpoint(
                    folder, state, step=step, cursor=cursor, complete=complete, facts=facts
                )
                prune(folder, self.plan.config.checkpoint.keep)
                if complete and self.plan.config.method == "lora":
                    self._write_adapter(state)
            except StorageError as error:
                failure = str(error)
        # The others wait until it is durable, and stop with rank 0 where it can't be.
        if engines.sum_over_workers([float(bool(failure))])[0]:
            raise StorageError(failure or f"checkpoint {path} could not be written by rank 0")
        seconds = time.perf_counter() - start
        self.report(Event("checkpoint", {"step": step, "path": str(path), "seconds": seconds}))
        return saved

    def _write_adapter(self, state: State) -> None:
        tensors = {name: values["weight"] for name, values in state.items()}
        config = self.plan.config
        try:
            save_adapter(tensors, config.adapter, self.plan.model_path, self.run / "adapter")
        except OSError as error:
            raise StorageError(f"{self.run}/adapter can't be written: {error}") from None


class Phases:
    """Tells how long each phase of a start took."""

    def __init__(self, report: Report):
        self.report, self.since = report, time.perf_counter()

    def tell(self, name: str) -> None:
        now = time.perf_counter()
        self.report(Event("phase", {"name": name, "seconds": now - self.since}))
        self.since = now


def _start(
    plan: Plan,
    model: torch.nn.Module,
    data: Compiled,
    held_out: Compiled | None,
    parameters: int,
    trained: int,
    first: int,
) -> Event:
    config = plan.config
    values = {
        "run_dir": plan.run_dir,
        "version": _version("trimpot"),
        "resumed_from": first - 1 if first > 1 else None,
        "world_size": plan.world_size,
        "sequence_parallel_size": plan.sequence_parallel_size,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "zero_stage": plan.zero_stage,
        "precision": config.precision,
        "method": config.method,
        "batch_size": config.optim.batch_size,
        "total_steps": plan.total_steps,
        "first_step": first,
        "parameters": parameters,
        "trainable_parameters": trained,
        "train_samples": len(data),
        "eval_samples": len(held_out) if held_out else 0,
        "tokens_per_epoch": int(data.lengths.sum()),
        "fill": asdict(fill_of(plan, data, attends_by_document(model))),
        "kernels": kernels_of(model),
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in VERSIONS},
        "memory_predicted_bytes": plan.memory.total if plan.memory else None,
    }
    return Event("start", values)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def run_worker(plan_json: str, started: float, handed: float | None = None) -> dict[str, Any]:
    """Join the workers, train, leave: what a launcher calls in each worker process.

    `started`, `handed`: time.time() when this process began its work, and when the launcher
    began to look for room for it. Returns {step, complete, seconds}.
    """
    imported = time.time()
    plan = plan_from_json(plan_json)
    run = Path(plan.run_dir)
    if not run.is_dir():
        raise StorageError(
            f"this worker does not see {run}; output_dir must be on storage that all workers share"
        )
    # Who has whole layers recomputed gives time for memory.
    if plan.config.model.activation_checkpointing is True and not torch.cuda.is_available():
        give_back_freed_memory()
    engines.join_workers()
    rank, _ = engines.ranks()
    journal = Journal(run, mend=True) if rank == 0 else None
    report: Report = journal or (lambda event: None)
    if handed is not None:
        report(Event("phase", {"name": "workers", "seconds": max(0.0, started - handed)}))
    report(Event("phase", {"name": "imports", "seconds": imported - started}))
    report(Event("phase", {"name": "process group", "seconds": time.time() - imported}))
    try:
        last = train(plan, report)
    except OSError as error:
        raise StorageError(f"{error.filename or run}: {error.strerror or error}") from error
    finally:
        if journal:
            journal.close()
    engines.leave_workers()
    return {"step": last.step, "complete": last.complete, "seconds": time.time() - started}


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if len(sys.argv) != 2:
        log.error("usage: python -m trimpot.runner.worker RUN/plan.json")
        return 2
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        path = Path(sys.argv[1])
        result = run_worker(path.read_text(encoding="utf-8"), time.time())
    except FileNotFoundError as error:
        log.error("%s is not there", error.filename)
        return DataError.exit_code
    except TrimpotError as error:
        log.error("%s", error)
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
