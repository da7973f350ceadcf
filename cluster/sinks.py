"""Metrics to TensorBoard, MLflow, W&B and Trackio, none of which can stop or slow a run.

Each sink lives in a daemon thread of its own behind a bounded queue: what raises is dropped with
one warning, what hangs loses values and is left behind at the end. The journal has them all.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from trimpot.cluster.journal import Event
from trimpot.runner.errors import UserError
from trimpot.runner.redact import without_secrets

QUEUE_EVENTS = 4096
CLOSE_TIMEOUT_S = 15.0
"""For all sinks together: long enough for an upload's last batch, short beside any run."""


class Sink(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


Opener = Callable[[int], Sink]
"""Makes a sink, in its own thread; the argument is the first step it will be given."""


@dataclass(frozen=True)
class Tracking:
    """What every tracker is told once. `config` has no secrets in it."""

    project: str
    run_name: str
    run_dir: Path
    config: dict[str, Any]


def open_sinks(
    names: Sequence[str],
    *,
    project: str,
    run_name: str | None,
    run_dir: Path,
    config: dict[str, Any],
    warn: Callable[[str], None],
) -> Sinks:
    """The sinks of these names. `warn` is called from `handle` and `close`, once a dropped sink.

    Raises UserError for a name that is not known or a package that is not installed. Nothing is
    imported or connected here: that may take seconds, and is done in the sink's own thread.
    """
    tracking = Tracking(project, run_name or run_dir.name, run_dir, without_secrets(config))
    openers: dict[str, Opener] = {}
    for name in names:
        if name not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise UserError(f"tracking.sinks has {name!r}; known are {known}")
        package, connect = _KNOWN[name]
        if not installed(package):
            raise UserError(
                f"tracking.sinks has {name}, but {package} is not installed; "
                f"`pip install trimpot[{name}]`, or take {name} out of tracking.sinks"
            )
        openers[name] = _opener(connect, package, tracking)
    return Sinks(openers, warn)


def installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # W&B and MLflow leave folders of their names behind: those are namespaces, not packages.
    return spec is not None and spec.origin is not None


def _opener(connect: _Connect, package: str, tracking: Tracking) -> Opener:
    return lambda first_step: connect(importlib.import_module(package), tracking, first_step)


class Sinks:
    """Hands events to sinks. Neither `handle` nor `close` raises for a sink's sake."""

    def __init__(
        self,
        openers: Mapping[str, Opener],
        warn: Callable[[str], None],
        queue_events: int = QUEUE_EVENTS,
    ) -> None:
        self._threads = [_SinkThread(name, make, queue_events) for name, make in openers.items()]
        self._warn = warn
        self._held_out: tuple[int, float] | None = None

    def handle(self, event: Event) -> None:
        """Pass one event of the journal on; returns at once, whatever the sinks do."""
        if event["kind"] == "start":
            first_step = event.get("first_step") or 1
            for thread in self._threads:
                thread.begin(first_step)
        elif values := self._values(event):
            for thread in self._threads:
                thread.give(event["step"], values)
        self._tell()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Let the sinks write what they have, for at most `timeout_s` altogether."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.end()
        for thread in self._threads:
            thread.wait(max(0.0, deadline - time.monotonic()))
        self._tell()
        for thread in self._threads:
            if thread.running:
                self._warn(
                    f"{thread.name} did not finish in {timeout_s:g} s and is left behind; "
                    "journal.jsonl has every value"
                )
            elif thread.lost and thread.failure is None:
                self._warn(
                    f"{thread.name} was too slow: {thread.lost} of its values are missing; "
                    "journal.jsonl has every value"
                )
        self._threads = []

    def _tell(self) -> None:
        for thread in self._threads:
            if thread.failure is not None and not thread.told:
                thread.told = True
                self._warn(
                    f"{thread.name} failed and gets no more values; journal.jsonl has every one: "
                    f"{_one_line(thread.failure)}"
                )

    def _values(self, event: Event) -> dict[str, float]:
        if event["kind"] == "eval":
            return self._held_out_once(event["step"], event["loss"])
        if event["kind"] != "step":
            return {}
        values = {
            "loss": event["loss"],
            "learning_rate": event["learning_rate"],
            "grad_norm": event["grad_norm"],
            "memory": float(event["memory_bytes"]),
        }
        if event["seconds"] > 0:
            values["tokens_per_second"] = event["tokens"] / event["seconds"]
        if event.get("held_out_loss") is not None:
            values |= self._held_out_once(event["step"], event["held_out_loss"])
        return values

    def _held_out_once(self, step: int, loss: float) -> dict[str, float]:
        """An evaluation stands in the journal twice: as its own line and in its step's."""
        if self._held_out == (step, loss):
            return {}
        self._held_out = (step, loss)
        return {"held_out_loss": loss}


def _one_line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or "no message"
    line = line if len(line) <= 200 else line[:199] + "…"
    return f"{type(error).__name__}: {without_secrets(line)}"


@dataclass
class _SinkThread:
    """One sink, its queue and its thread. `failure`, `lost` and `done` are what it tells back."""

    name: str
    make: Opener
    queue_events: int
    failure: BaseException | None = None
    told: bool = False
    lost: int = 0
    first_step: int = 1
    started: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.items: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(
            self.queue_events
        )

    def begin(self, first_step: int) -> None:
        if self.started:
            return
        self.first_step, self.started = first_step, True
        threading.Thread(target=self._work, name=f"sink-{self.name}", daemon=True).start()

    def give(self, step: int, values: dict[str, float]) -> None:
        if self.failure is not None or not self.started:
            return
        try:
            self.items.put_nowait((step, dict(values)))  # a tracker may add to its own
        except queue.Full:
            self.lost += 1

    def end(self) -> None:
        self.ended.set()
        with contextlib.suppress(queue.Full):  # it looks at `ended` when it has caught up
            self.items.put_nowait(None)

    def wait(self, timeout_s: float) -> None:
        if self.started:
            self.done.wait(timeout_s)

    @property
    def running(self) -> bool:
        return self.started and not self.done.is_set()

    def _work(self) -> None:
        try:
            sink = self.make(self.first_step)
            while True:
                try:
                    item = self.items.get(timeout=0.2)
                except queue.Empty:
                    if self.ended.is_set():
                        break
                    continue
                if item is None:
                    break
                sink.log(*item)
            sink.close()
        except BaseException as failure:  # a tracker's sys.exit, too, is only its own end
            self.failure = failure
        finally:
            self.done.set()


# The trackers. Each function runs in its sink's thread and gets the imported package.

_Connect = Callable[[ModuleType, Tracking, int], Sink]


class _TensorBoard:
    def __init__(self, package: Any, tracking: Tracking, first_step: int) -> None:
        import yaml

        # purge_step hides what an interrupted session wrote beyond where this one goes on.
        purge = first_step if first_step > 1 else None
        folder = tracking.run_dir / "tensorboard"
        self._writer = package.SummaryWriter(logdir=str(folder), purge_step=purge, flush_secs=10)
        text = yaml.safe_dump(tracking.config, sort_keys=False, allow_unicode=True)
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown for code
        self._writer.add_text("config", indented, first_step - 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """Through the client, so that nothing depends on mlflow's notion of an active run."""

    def __init__(self, package: Any, tracking: Tracking, first_step: int) -> None:
        from mlflow.entities import Metric, Param  # type: ignore[import-not-found]

        self._metric = Metric
        self._client = package.MlflowClient()
        experiment = self._client.get_experiment_by_name(tracking.project)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(tracking.project)
        )
        run = self._client.create_run(experiment_id, run_name=tracking.run_name)
        self._run_id = run.info.run_id
        params = [Param(k, str(v)[:500]) for k, v in flat(tracking.config).items()]
        for at in range(0, len(params), 100):  # MLflow's own limit of one call
            self._client.log_batch(self._run_id, params=params[at : at + 100])

    def log(self, step: int, values: dict[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _WandB:
    def __init__(self, package: Any, tracking: Tracking, first_step: int) -> None:
        online = package.setup().settings.mode not in ("offline", "disabled", "dryrun")
        # Without a key, init would ask for one where there is a terminal.
        if online and not package.login(prompt=False, verify=False):
            raise RuntimeError("nobody is logged in; `wandb login`, or set WANDB_MODE=offline")
        self._run = package.init(
            project=tracking.project,
            name=tracking.run_name,
            dir=str(tracking.run_dir),
            config=tracking.config,
            # The terminal belongs to the run's own display.
            settings=package.Settings(console="off"),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, package: Any, tracking: Tracking, first_step: int) -> None:
        self._run = package.init(
            project=tracking.project, name=tracking.run_name, config=tracking.config
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_KNOWN: dict[str, tuple[str, _Connect]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "mlflow": ("mlflow", _MLflow),
    "wandb": ("wandb", _WandB),
    "trackio": ("trackio", _Trackio),
}


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"optim": {"epochs": 1}} → {"optim.epochs": 1}"""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return values
