"""One worker's story, under Ray, torchrun, or alone: `python -m … worker RUN/plan.json`."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trimpot.kernels.heap import give_back_freed_memory, keep_freed_memory
from trimpot.runner import copier as copiers
from trimpot.runner import engine as engines
from trimpot.runner.checkpoint import (
    Reader,
    check_shapes,
    checkpoint_at,
    list_checkpoints,
    put_aside,
    step_of,
)
from trimpot.runner.data.compile import Compiled, load_splits
from trimpot.runner.data.fill import fill_of
from trimpot.runner.engine import start_engine
from trimpot.runner.error_start import start_from_error
from trimpot.runner.errors import (
    CheckpointError,
    DataError,
    StorageError,
    TrimpotError,
    WorkerStorageError,
)
from trimpot.runner.health import Health
from trimpot.runner.in_order import fix_arithmetic
from trimpot.runner.journal import Journal
from trimpot.runner.loop import run_loop
from trimpot.runner.model import (
    attends_by_document,
    build_model,
    count_parameters,
    kernels_of,
)
from trimpot.runner.plan.plan import plan_from_json
from trimpot.runner.pulse import PULSE
from trimpot.runner.reading import JSON_BYTES, read_bounded
from trimpot.runner.redact import log_to_stderr
from trimpot.runner.session import Report, Session
from trimpot.runner.telemetry import telemetry_off
from trimpot.runner.types import NODE, Checkpoint, Event, Plan

VERSIONS = ("trimpot", "torch", "deepspeed", "transformers", "ray", "numpy", "safetensors")
CANDIDATES = 64
"""Checkpoints that are tried, from the newest, before a run starts over."""
log = logging.getLogger(__name__)


def train(plan: Plan, report: Report, asked: Callable[[], bool] = lambda: False) -> Checkpoint:
    """Train what the plan says, from where the run directory's newest checkpoint stands.

    Every worker of the process group must call. `report` hears rank 0's steps and events.
    Returns the last checkpoint, which is `complete` unless the run was told to stop: by a file
    RUN/stop or RUN/leave, or by `asked` on any worker.
    """
    clock = Phases(report)
    run = Path(plan.run_dir)
    data, held_out = _data(run)
    assert plan.total_steps is not None

    fix_arithmetic(plan.config)
    PULSE.enter("model")
    model = build_model(plan, engines.deepspeed_config(plan))
    parameters, trained = count_parameters(model)
    clock.tell("model")
    PULSE.enter("load")
    found = _newest_good(run / "checkpoints", report)
    token = engines.first_text(secrets.token_hex(4))
    copier, fetched = copiers.begin(plan, data.digest, found[0] if found else None, report, token)
    if fetched:
        found = _newest_good(run / "checkpoints", report)
    reader = _matching(plan, data, model, *found) if found is not None else None
    if reader is not None:
        engines.load_weights(model, reader.whole, plan.zero_stage)
    elif plan.config.adapter.lora_init == "quantization_error":
        start_from_error(plan, model, data)
        clock.tell("lora_init")
    PULSE.enter("engine")
    engine = start_engine(plan, model)
    if found is not None and reader is not None:
        engine.load_moments(reader.part, found[0].step)
        reader.close()
    clock.tell("engine")
    first = found[0].step + 1 if found else 1
    nodes = engines.texts(os.environ.get(NODE, ""))
    report(_start(plan, model, data, held_out, parameters, trained, first, nodes))
    config, last = plan.config, found[0] if found else None
    past = found[1].get("health") if found else None
    health = Health(config.health, config.checkpoint.every_steps, past)

    def reopen(accept: Callable[[int], bool]) -> tuple[Checkpoint, Reader] | None:
        at = _newest_good(run / "checkpoints", report, accept)
        return (at[0], _matching(plan, data, model, *at)) if at is not None else None

    session = Session(
        plan, engine, data, held_out, report, health, last, asked, reopen, token, copier
    )
    if first == 1:
        session.evaluate(0)
        session.show("before")
        clock.tell("first look")
    try:
        for step, signals in run_loop(plan, engine, data, health, first, session.signals):
            stopped = session.after(step, signals)
            if step.step == first:
                clock.tell("first step")
            if stopped:
                break
    finally:
        with PULSE.within("save"):
            session.saver.close()
    with PULSE.within("save"):
        last = session.close()
    if last.complete:
        session.show("after")
    return last


def _newest_good(
    folder: Path, report: Report, accept: Callable[[int], bool] = lambda step: True
) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest checkpoint that verifies and whose step is accepted, the same on all workers: each
    checks a part of its files. A damaged one is named, and set aside."""
    rank, world = engines.ranks()
    there = list_checkpoints(folder) if rank == 0 else []
    newest = [path for path in there if accept(step_of(path))][:CANDIDATES]
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
    nodes: list[str],
) -> Event:
    config = plan.config
    values = {
        "run_dir": plan.run_dir,
        "version": _version("trimpot"),
        "resumed_from": first - 1 if first > 1 else None,
        "world_size": plan.world_size,
        "nodes": nodes if any(nodes) else [],
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
    PULSE.start(int(os.environ.get("RANK", "0")), plan.world_size)
    engines.join_workers()
    rank, _ = engines.ranks()
    if torch.cuda.is_available():
        PULSE.measure_gpu()
    journal = Journal(run, mend=True) if rank == 0 else None
    report: Report = journal or (lambda event: None)
    if handed is not None:
        report(Event("phase", {"name": "workers", "seconds": max(0.0, started - handed)}))
    report(Event("phase", {"name": "imports", "seconds": imported - started}))
    report(Event("phase", {"name": "process group", "seconds": time.time() - imported}))
    try:
        last = train(plan, report, asked)
    except OSError as error:
        raise WorkerStorageError(f"{error.filename or run}: {error.strerror or error}") from error
    finally:
        if journal:
            journal.close()
        PULSE.end()
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


def _own_plan(path: Path) -> str:
    """The text of RUN/plan.json. One that was copied here from another run would be trained there.

    Raises CheckpointError, FileNotFoundError.
    """
    try:
        raw = read_bounded(path, JSON_BYTES).decode()
        plan = plan_from_json(raw)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TrimpotError) as error:
        fault = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is no plan ({fault}); give the plan.json that `trimpot train` wrote"
        ) from None
    if Path(plan.run_dir).resolve() != path.resolve().parent:
        raise CheckpointError(
            f"{path} is of the run in {plan.run_dir}; give that run's own plan.json"
        )
    return raw


def main() -> int:
    telemetry_off()
    log_to_stderr("%(message)s")
    if len(sys.argv) != 2:
        log.error("usage: python -m trimpot.runner.worker RUN/plan.json")
        return 2
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        path = Path(sys.argv[1])
        asked = _stop_signals()
        result = run_worker(_own_plan(path), time.time(), asked=asked)
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
