"""One worker's story, under Ray, torchrun, or alone: `python -m … worker RUN/plan.json`."""

from __future__ import annotations

import json
import logging
import platform
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trimpot.kernels.heap import give_back_freed_memory, keep_freed_memory
from trimpot.runner import engine as engines
from trimpot.runner.adapters.peft_io import save_adapter
from trimpot.runner.checkpoint import (
    Reader,
    check_shapes,
    checkpoint_at,
    list_checkpoints,
    load_state,
    prune,
    put_aside,
)
from trimpot.runner.data.compile import Compiled, load_splits
from trimpot.runner.data.fill import fill_of
from trimpot.runner.engine import Engine, start_engine
from trimpot.runner.errors import (
    CheckpointError,
    DataError,
    SaveError,
    StorageError,
    TrimpotError,
)
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
from trimpot.runner.saver import Failed, Pace, Saved, Saver
from trimpot.runner.types import Checkpoint, Event, Plan, StepReport

Report = Callable[[StepReport | Event], None]
VERSIONS = ("trimpot", "torch", "deepspeed", "transformers", "ray", "numpy", "safetensors")
CANDIDATES = 64
"""Checkpoints that are tried, from the newest, before a run starts over."""
log = logging.getLogger(__name__)


def train(plan: Plan, report: Report, asked: Callable[[], bool] = lambda: False) -> Checkpoint:
    """Train what the plan says, from where the run directory's newest checkpoint stands.

    Every worker of the process group must call. `report` hears rank 0's steps and events.
    Returns the last checkpoint, which is `complete` unless the run was told to stop: by a file
    RUN/stop, or by `asked` on any worker.
    """
    clock = Phases(report)
    run = Path(plan.run_dir)
    data, held_out = _data(run)
    assert plan.total_steps is not None

    model = build_model(plan, engines.deepspeed_config(plan))
    parameters, trained = count_parameters(model)
    clock.tell("model")
    found = _newest_good(run / "checkpoints", report)
    reader = _matching(plan, data, model, *found) if found is not None else None
    if reader is not None:
        engines.load_weights(model, reader.whole, plan.zero_stage)
    engine = start_engine(plan, model)
    if found is not None and reader is not None:
        engine.load_moments(reader.part, found[0].step)
        reader.close()
    clock.tell("engine")
    first = found[0].step + 1 if found else 1
    report(_start(plan, model, data, held_out, parameters, trained, first))
    session = Session(plan, engine, data, held_out, report, found[0] if found else None, asked)
    if first == 1:
        session.evaluate(0)
        session.show("before")
        clock.tell("first look")
    try:
        for step, signals in run_loop(plan, engine, data, first, session.signals):
            stopped = session.after(step, signals)
            if step.step == first:
                clock.tell("first step")
            if stopped:
                break
    finally:
        session.saver.close()
    assert session.last is not None
    if session.last.complete:
        session.show("after")
    return session.last


def _newest_good(folder: Path, report: Report) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest checkpoint that verifies, the same on all workers: each checks a part of its
    files. A damaged one is named, and set aside."""
    rank, world = engines.ranks()
    newest = list_checkpoints(folder)[:CANDIDATES] if rank == 0 else []
    names = engines.first_text("\n".join(path.name for path in newest))
    for path in (folder / name for name in names.splitlines()):
        found, fault = None, ""
        try:
            found = checkpoint_at(path, rank, world)
        except CheckpointError as error:
            fault = str(error)
        if not (fault := engines.first_text(fault)):
            return found
        report(Event("warning", {"text": f"{fault}; set aside, an older one is used"}))
        if rank == 0:
            put_aside(path)
    return None


def _data(run: Path) -> tuple[Compiled, Compiled | None]:
    splits = load_splits(run / "data")
    if splits is None:
        raise StorageError(
            f"this worker does not see {run}/data; output_dir must be on storage that all "
            "workers share"
        )
    return splits


def _matching(
    plan: Plan, data: Compiled, model: torch.nn.Module, at: Checkpoint, manifest: dict[str, Any]
) -> Reader:
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
    reader = Reader(at.path, manifest)
    wanted = {
        name: torch.Size(getattr(p, "ds_shape", p.shape))
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    check_shapes(reader.shapes, wanted, at.path)
    return reader


class Session:
    """What happens around the steps of one start of a run."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        data: Compiled,
        held_out: Compiled | None,
        report: Report,
        last: Checkpoint | None,
        asked: Callable[[], bool],
    ):
        """`last`: the checkpoint that this start goes on from."""
        self.plan, self.engine, self.data, self.held_out = plan, engine, data, held_out
        self.report, self.last, self.asked = report, last, asked
        self.run = Path(plan.run_dir)
        self.rank, self.world = engines.ranks()
        section = plan.config.checkpoint
        token = engines.first_text(secrets.token_hex(4) if self.rank == 0 else "")
        self.saver = Saver(self.run / "checkpoints", section.keep, self.rank, self.world, token)
        self.pace: Pace | None = None
        if section.every_steps == "auto" and self.rank == 0:
            self.pace = Pace(section.hours_between_failures)
        self.trouble = ""
        """Why the newest save failed, while none has succeeded since."""

    def signals(self) -> list[float]:
        """What this worker tells the others with each step."""
        stop = self.asked() or (self.rank == 0 and (self.run / "stop").exists())
        due = self.pace is not None and self.pace.due() and self.saver.job is None
        return [float(stop), float(due), *self.saver.progress()]

    def after(self, step: StepReport, signals: list[float]) -> bool:
        """Evaluate and save where the plan says so, then report the step → whether to stop."""
        stop, due, written, failed = signals
        self._hear(self.saver.advance(written, failed))
        config = self.plan.config
        final = step.step == self.plan.total_steps
        every = config.evaluation.every_steps
        if final or (every and step.step % every == 0):
            step = replace(step, held_out_loss=self.evaluate(step.step))
        every = config.checkpoint.every_steps
        if final or stop:
            try:
                saved = self.save(step.step, complete=final)
            except SaveError:
                self.report(step)  # it was done
                raise
            step = replace(step, checkpoint=saved.path.name)
        elif due or (every != "auto" and step.step % every == 0):
            self._hear(self.saver.finish())
            self._begin(step.step, complete=False)
        self.report(step)
        return bool(stop)

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

    def _begin(self, step: int, complete: bool) -> None:
        """Copy what is trained, and have it written. Under ZeRO every worker must call."""
        began = time.perf_counter()
        config = self.plan.config
        sharded = self.world > 1 and config.method != "lora"
        facts = {
            "plan_digest": self.plan.digest,
            "data_digest": self.data.digest,
            "world_size": self.world,
            "zero_stage": self.plan.zero_stage,
            "method": config.method,
            **({"shapes": self.engine.shapes()} if sharded else {}),
        }
        self.saver.begin(
            self.engine.share() if sharded else self.engine.state(),
            sharded=sharded,
            began=began,
            step=step,
            cursor=step * config.optim.batch_size,
            complete=complete,
            facts=facts,
        )
        if self.pace is not None:
            self.pace.begun()

    def _hear(self, outcomes: list[Saved | Failed]) -> None:
        """Tell what became of a save. Of several failures in a row only the first is news."""
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                if not self.trouble:
                    text = f"step {outcome.step} is not saved: {outcome.why}; the run goes on"
                    self.report(Event("warning", {"text": text}))
                self.trouble = outcome.why
                continue
            saved = self.last = outcome.checkpoint
            self.trouble = ""
            values: dict[str, Any] = {"step": saved.step, "path": str(saved.path)}
            values |= {"seconds": outcome.seconds, "stall_seconds": outcome.stall_s}
            if self.pace is not None:
                self.pace.measured(outcome)
                values["next_seconds"] = self.pace.every_s
            self.report(Event("checkpoint", values))

    def save(self, step: int, complete: bool) -> Checkpoint:
        """Save, and wait until that is durable. Raises SaveError on all workers."""
        self._hear(self.saver.finish())
        self._begin(step, complete)
        self._hear(self.saver.finish())
        # What worker 0 says counts: it alone knows of the commit.
        if engines.first_text(self.trouble if self.rank == 0 else ""):  # once more, with more room
            if self.rank == 0 and self.last is not None:
                prune(self.run / "checkpoints", self.last, keep=1)
            self._begin(step, complete)
            self._hear(self.saver.finish())
        if not self.trouble and complete and self.rank == 0:
            self.trouble = self._write_adapter()
        if why := engines.first_text(self.trouble if self.rank == 0 else ""):
            raise SaveError(self._missing(step, why))
        if self.rank:  # only worker 0 knows the rest
            path = self.run / "checkpoints" / f"step-{step:08d}"
            cursor = step * self.plan.config.optim.batch_size
            self.last = Checkpoint(path, step, cursor, self.plan.digest, "", complete)
        assert self.last is not None
        return self.last

    def _missing(self, step: int, why: str) -> str:
        kept, there = 0, "there is no checkpoint"
        if self.last is not None:
            kept, there = self.last.step, f"{self.last.path} is the newest checkpoint"
        lost = f"steps {kept + 1} to {step} are lost" if kept < step else "no step is lost"
        return f"{why}; {lost}, {there}; make room, and start again: it goes on from there"

    def _write_adapter(self) -> str:
        """Write RUN/adapter from the checkpoint that was just saved → what went wrong."""
        config = self.plan.config
        if config.method != "lora":
            return ""
        assert self.last is not None
        try:
            state = load_state(self.last, keys=("weight",))
            tensors = {name: values["weight"] for name, values in state.items()}
            save_adapter(tensors, config.adapter, self.plan.model_path, self.run / "adapter")
        except (OSError, SafetensorError, CheckpointError) as error:
            return f"{self.run}/adapter can't be written: {error}"
        return ""


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


def run_worker(
    plan_json: str,
    started: float,
    handed: float | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Join the workers, train, leave: what a launcher calls in each worker process.

    `started`, `handed`: time.time() when this process began its work, and when the launcher
    began to look for room for it. `asked`: as of `train`. Returns {step, complete, seconds}.
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
        last = train(plan, report, asked)
    except OSError as error:
        raise StorageError(f"{error.filename or run}: {error.strerror or error}") from error
    finally:
        if journal:
            journal.close()
    engines.leave_workers()
    return {"step": last.step, "complete": last.complete, "seconds": time.time() - started}


def _stop_signals() -> Callable[[], bool]:
    """From now on SIGINT and SIGTERM finish and save the step → whether one came.

    A second one ends the process.
    """
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return lambda: bool(came)


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if len(sys.argv) != 2:
        log.error("usage: python -m trimpot.runner.worker RUN/plan.json")
        return 2
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        path = Path(sys.argv[1])
        asked = _stop_signals()
        result = run_worker(path.read_text(encoding="utf-8"), time.time(), asked=asked)
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
