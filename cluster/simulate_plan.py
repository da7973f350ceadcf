"""What is to be simulated: options first, then a run.yaml, then a run's journal, then what is
usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimpot.cluster import journal
from trimpot.cluster.costs import Measured, measure
from trimpot.cluster.policy import Limits, prior_hours
from trimpot.cluster.simulate import Costs, Job
from trimpot.runner.errors import ConfigError

if TYPE_CHECKING:
    from trimpot.runner.config import Config

ROUNDS = 4
"""Micro-batches per worker and step, where nothing says how many."""
HOURS = 24.0
LONGER = 4.0
"""Preemptions are drawn for so many times as long as the steps would take, never broken."""


@dataclass(frozen=True)
class Given:
    """By options; None: not by them. As in `Job`, `Limits` and `Costs`."""

    min_workers: int | None = None
    max_workers: int | None = None
    workers_per_node: int | None = None
    micro_batches: int | None = None
    step_s: float | None = None
    steps: int | None = None
    hours: float | None = None
    price: float | None = None
    """US$ of a node and hour."""
    nodes: int | None = None
    stall_s: float | None = None
    save_s: float | None = None
    restart_s: float | None = None
    detect_s: float | None = None


@dataclass(frozen=True)
class SimulatedPlan:
    job: Job
    costs: Costs
    sources: dict[str, str]
    """Of step_s and of each cost: given | measured | assumed."""
    nodes: int
    price: float | None

    @property
    def hours(self) -> float:
        """For which preemptions are to be drawn."""
        if self.job.hours is not None:
            return self.job.hours
        assert self.job.total_steps is not None
        return LONGER * self.job.total_steps * self.job.step_s / 3600 + 1


def make_plan(
    given: Given, config_file: Path | None, overrides: Sequence[str], run: Path | None
) -> SimulatedPlan:
    """Raises UserError where something is missing or contradicts itself."""
    config = _config(config_file, overrides)
    found = measure(journal.read(run)) if run is not None else Measured()
    limits = _limits(given, config, found)
    each = given.workers_per_node or _per_node(config, limits.max_workers)
    step_s = given.step_s
    if step_s is None and found.round_s is not None:
        step_s = found.round_s * limits.rounds(limits.max_workers)
    if step_s is None:
        raise ConfigError(
            "how long a step takes is not known; give --step-seconds, or --run of a run that made "
            "some"
        )
    steps = given.steps or _steps(config, found)
    said = config.checkpoint.hours_said if config else None
    job = Job(
        limits=limits,
        step_s=step_s,
        total_steps=steps,
        hours=given.hours if steps or given.hours else HOURS,
        workers_per_node=each,
        every_steps=config.checkpoint.every_steps if config else "auto",
        prior_hours=prior_hours(said, limits.preemptible),
        **({} if config is None else _patience(config)),
    )
    costs, sources = _costs(given, found)
    sources["step_s"] = "given" if given.step_s is not None else "measured"
    nodes = given.nodes or -(-limits.max_workers // each)
    price = given.price
    if price is None and config and config.fleet.price_per_hour is not None:
        price = config.fleet.price_per_hour / config.fleet.nodes
    return SimulatedPlan(job, costs, sources, nodes, price)


def _config(path: Path | None, overrides: Sequence[str]) -> Config | None:
    if path is None:
        return None
    from trimpot.runner.run_yaml import load_config

    return load_config(path, overrides)


def _patience(config: Config) -> dict[str, float]:
    fleet = config.fleet
    return {"grow_after_s": fleet.grow_after_s, "start_timeout_s": fleet.start_timeout_s}


def _limits(given: Given, config: Config | None, found: Measured) -> Limits:
    start = found.start or {}
    least, most = given.min_workers, given.max_workers
    split = start.get("sequence_parallel_size", 1)
    if config is not None:
        split = config.fleet.sequence_parallel_size
        few, many = config.fleet.worker_range or (config.fleet.most_workers,) * 2
        most = most or many
        least = least or (few and most and min(few, most))
    most = most or start.get("world_size")
    if most is None:
        raise ConfigError("how many workers there may be is not known; give --max-workers")
    least = least or split
    if least > most:
        raise ConfigError(f"--min-workers {least} is over --max-workers {most}; lower it")
    if most < split:
        raise ConfigError(
            f"{most} workers are less than the {split} that share a row; raise --max-workers"
        )
    micros = given.micro_batches or _micro_batches(config) or found.micro_batches
    return Limits(
        min_workers=least,
        max_workers=most,
        micro_batches=micros or ROUNDS * most // split,
        sequence_parallel_size=split,
        max_failures=config.fleet.max_failures if config else 3,
        preemptible=config.fleet.preemptible if config else True,
    )


def _micro_batches(config: Config | None) -> int | None:
    if config is None:
        return None
    micro = config.optim.micro_batch_size
    if micro == "auto":
        from trimpot.cluster.fleet import local_fleet
        from trimpot.cluster.prepare import draft_plan

        micro = draft_plan(config, local_fleet(config)).micro_batch_size
    return config.optim.batch_size // micro


def _per_node(config: Config | None, workers: int) -> int:
    return -(-workers // config.fleet.nodes) if config and config.fleet.nodes > 1 else 1


def _steps(config: Config | None, found: Measured) -> int | None:
    if config is not None and config.optim.max_steps is not None:
        return config.optim.max_steps
    return (found.start or {}).get("total_steps")


def _costs(given: Given, found: Measured) -> tuple[Costs, dict[str, str]]:
    usual, sources = Costs(), {}
    chosen: dict[str, float] = {}
    for name in ("stall_s", "save_s", "restart_s", "detect_s"):
        by_option = getattr(given, name)
        measured = getattr(found, name, None)
        if by_option is not None:
            chosen[name], sources[name] = by_option, "given"
        elif measured is not None:
            chosen[name], sources[name] = measured, "measured"
        else:
            chosen[name], sources[name] = getattr(usual, name), "assumed"
    if chosen["stall_s"] > chosen["save_s"]:
        if sources["save_s"] == "given" and sources["stall_s"] == "given":
            raise ConfigError(
                f"--stall-seconds {given.stall_s:g} is over --save-seconds {given.save_s:g}, of "
                "which it is a part; lower it"
            )
        if sources["stall_s"] == "assumed":
            chosen["stall_s"] = chosen["save_s"]
        else:
            chosen["save_s"] = chosen["stall_s"]
    return Costs(**chosen), sources
