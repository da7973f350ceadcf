"""`trimpot train`: a config to a finished run, with Ray in between and somebody watching."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimpot.cluster import journal as journals
from trimpot.cluster.display import Display
from trimpot.cluster.elastic import Elastic
from trimpot.cluster.fleet import cluster_fleet, local_fleet
from trimpot.cluster.launch import ray_cluster
from trimpot.cluster.prepare import check_inputs, check_room, draft_plan, prepare_run, run_lock
from trimpot.cluster.sinks import Sinks, open_sinks
from trimpot.runner.config import Config
from trimpot.runner.errors import TrimpotError, UserError
from trimpot.runner.journal import FILE, Journal
from trimpot.runner.redact import redact
from trimpot.runner.types import Event, Plan

INTERRUPTED = 130
"""Exit code of a run that was told to stop (128 + SIGINT). It goes on when started again."""


@dataclass
class Result:
    """What `trimpot train --json` prints."""

    status: str
    """done | interrupted"""
    run_dir: str
    step: int
    held_out_before: float | None
    held_out_after: float | None
    adapter: str | None
    report: str
    seconds: float

    @property
    def exit_code(self) -> int:
        return 0 if self.status == "done" else INTERRUPTED


@dataclass
class Stopper:
    """Turns Ctrl-C and SIGTERM into a stop at the end of the step; a second one abandons."""

    run: Path
    say: Callable[[str], None]
    asked: bool = field(default=False)

    def __call__(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        (self.run / "stop").touch()
        self.say("stopping: this step is finished and saved first (again to abandon it)")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        (self.run / "stop").unlink(missing_ok=True)
        before = {n: signal.signal(n, self) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            (self.run / "stop").unlink(missing_ok=True)


def train_run(config: Config, address: str | None, fresh: bool, display: Display) -> Result:
    """Train to the end, or to where it is told to stop. Raises TrimpotError."""
    started = time.time()
    check_inputs(config)
    run = Path(config.output_dir).resolve()
    if address is None:  # all that needs no cluster is refused before anything is made
        check_room(draft_plan(config, local_fleet(config)))
    with run_lock(run), contextlib.ExitStack() as stack:
        if not fresh and (result := finished(run, config)):
            display.say(f"{run} is finished already; --fresh starts over")
            return result
        ray = stack.enter_context(ray_cluster(address, cpus=1)) if address is not None else None
        fleet = cluster_fleet(config, ray) if ray is not None else local_fleet(config)
        prepared = prepare_run(config, fleet, fresh)
        plan = prepared.plan
        watcher = Watcher(plan, display, started)
        watcher.sinks = open_sinks(
            config.tracking.sinks,
            project=config.tracking.project,
            run_name=config.tracking.run_name or run.name,
            run_dir=run,
            config=config.model_dump(mode="json"),
            warn=watcher.warn,
        )
        stack.callback(watcher.close)
        for note in prepared.notes:
            watcher.warn(note)
        watcher.phase("driver", started)
        if ray is None:
            began = time.time()
            cpus = plan.world_size * config.fleet.cpus_per_worker
            ray = stack.enter_context(ray_cluster(None, cpus))
            watcher.phase("ray", began)
        return watcher.run(ray, local=address is None)


def finished(run: Path, config: Config) -> Result | None:
    """The result of a run that is done, if this is what the directory holds."""
    events = journals.read(run) if (run / FILE).is_file() else []
    history = journals.history(events)
    if not history.end or history.end.get("status") != "done":
        return None
    # Other settings are refused before anybody is told that all is done.
    from trimpot.cluster.prepare import check_same_run

    check_same_run(run, draft_plan(config, local_fleet(config)))
    return _result(run, "done", history)


def _result(run: Path, status: str, history: journals.Run) -> Result:
    adapter = run / "adapter"
    return Result(
        status=status,
        run_dir=str(run),
        step=history.last_step,
        held_out_before=history.held_out_before,
        held_out_after=history.held_out_after,
        adapter=str(adapter) if adapter.is_dir() else None,
        report=str(run / "report.html"),
        seconds=history.seconds,
    )


class Watcher:
    """Follows a run's journal for whoever looks, and writes how it ended."""

    def __init__(self, plan: Plan, display: Display, started: float):
        self.plan, self.display, self.started = plan, display, started
        self.sinks: Sinks | None = None
        self.elastic: Elastic | None = None
        self.dir = Path(plan.run_dir)
        Journal(self.dir, mend=True).close()
        self.offset = journals.whole_bytes(self.dir / FILE)

    def tell(self, event: Event) -> None:
        """Write an event of the driver's own; the journal's readers see it like any other."""
        # After a failure rank 0's last line may be torn; while it lives, its lines are whole.
        with contextlib.closing(Journal(self.dir, mend=event.kind == "failure")) as journal:
            journal(event)

    def warn(self, text: str) -> None:
        self.tell(Event("warning", {"text": text}))

    def close(self) -> None:
        """Let the sinks finish. What they complain of now comes too late for the report."""
        if self.sinks is not None:
            self.sinks.close()
            self._watch(lambda: True)

    def phase(self, name: str, since: float) -> None:
        self.tell(Event("phase", {"name": name, "seconds": time.time() - since}))

    def run(self, ray: Any, local: bool) -> Result:
        stopper = Stopper(self.dir, self.display.say)
        status, step, error = "failed", 0, None
        try:
            self.elastic = Elastic(ray, self.plan, self._watch, self.tell, local)
            with stopper.installed():
                outcome = self.elastic.run()
            status = "done" if outcome.complete else "interrupted"
            step = outcome.step
        except KeyboardInterrupt:
            status = "interrupted"
        except TrimpotError as failure:
            error = str(failure)
            self._keep_failure(failure)
            raise
        finally:
            history = self._end(status, step, error)
        return _result(self.dir, status, history)

    def _watch(self, ended: Callable[[], bool]) -> None:
        for event in journals.follow(self.dir / FILE, ended, offset=self.offset):
            self._handle(event)
        self.offset = journals.whole_bytes(self.dir / FILE)

    def _handle(self, event: dict[str, Any]) -> None:
        self.display.handle(event)
        if self.elastic is not None:
            self.elastic.hear(event)
        if self.sinks is not None:
            self.sinks.handle(event)

    def _keep_failure(self, failure: TrimpotError) -> None:
        """Ray's own account of a failure, for whoever must dig."""
        import traceback

        text = "".join(traceback.format_exception(failure))
        with contextlib.suppress(OSError):  # a full disk may be what failed
            (self.dir / "failure.log").write_text(redact(text), encoding="utf-8")

    def _end(self, status: str, step: int, error: str | None) -> journals.Run:
        history = journals.history(journals.read(self.dir))
        adapter = self.dir / "adapter"
        values = {
            "status": status,
            "step": step or history.last_step,
            "seconds": time.time() - self.started,
            "held_out_before": history.held_out_before,
            "held_out_after": history.held_out_after,
            "adapter": str(adapter) if adapter.is_dir() else None,
            "error": error,
        }
        self.tell(Event("end", values))
        from trimpot.cluster.report import write_report

        try:
            write_report(self.dir)
        except UserError as failure:  # the run's own outcome is worth more
            self.warn(str(failure))
        self._watch(lambda: True)
        return journals.history(journals.read(self.dir))
