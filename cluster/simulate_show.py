"""Simulated runs as a person reads them, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimpot.cluster.journal import duration
from trimpot.cluster.simulate import CAUSES, Cause, Outcome
from trimpot.cluster.simulate_plan import SimulatedPlan
from trimpot.cluster.traces import Spot

BAR = 16
"""Columns of the longest bar."""
COLOURS: dict[Cause, str] = {
    "training": "green",
    "saving": "cyan",
    "restarting": "yellow",
    "detecting": "magenta",
    "redone": "red",
    "waiting": "blue",
}
RATIOS = {
    "goodput": "of the workers' time was steps kept",
    "progress": "of an unbroken full fleet's",
    "paid_share": "of all paid time was steps kept",
}


def values(plan: SimulatedPlan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What `trimpot simulate --json` prints."""
    dollars = [cost_usd(o, plan.price) for o in outcomes]
    return {
        "job": asdict(plan.job),
        "costs": asdict(plan.costs),
        "sources": plan.sources,
        "nodes": plan.nodes,
        "price_per_node_hour": plan.price,
        "runs": len(outcomes),
        **{name: spread([getattr(o, name) for o in outcomes]) for name in RATIOS},
        "elapsed_s": spread([o.elapsed_s for o in outcomes]),
        "share_by_cause": shares(outcomes),
        "cost_usd": spread([d for d in dollars if d is not None]),
        "outcomes": [asdict(o) | {"cost_usd": d} for o, d in zip(outcomes, dollars, strict=True)],
    }


def describe(spot: Spot, runs: int) -> str:
    """Of traces that are drawn, in a line."""
    told = "no notice" if not spot.notice_s * spot.noticed_share else f"{spot.notice_s:g} s notice"
    if 0 < spot.noticed_share < 1 and spot.notice_s:
        told += f" for {100 * spot.noticed_share:g} %"
    drawn = f"{runs} traces of " if runs > 1 else ""
    return f"{drawn}{spot.nodes} nodes, a preemption every {spot.hours_between:g} h, {told}"


def spread(found: Sequence[float]) -> dict[str, float] | None:
    if not found:
        return None
    ranked = sorted(found)
    return {
        "median": median(ranked),
        "p5": ranked[int(0.05 * (len(ranked) - 1))],
        "lowest": ranked[0],
        "highest": ranked[-1],
    }


def shares(outcomes: Sequence[Outcome]) -> dict[Cause, float]:
    """Of the elapsed time, all runs together."""
    elapsed = sum(o.elapsed_s for o in outcomes) or 1.0
    return {cause: sum(o.seconds[cause] for o in outcomes) / elapsed for cause in CAUSES}


def cost_usd(outcome: Outcome, price: float | None) -> float | None:
    return None if price is None else outcome.paid_node_s / 3600 * price


def render(what: str, plan: SimulatedPlan, outcomes: Sequence[Outcome]) -> RenderableType:
    limits = plan.job.limits
    workers = f"{limits.min_workers} to {limits.max_workers} workers"
    parts: list[RenderableType] = [Text(f"{what}; {workers}", style="bold"), Text()]
    parts += [_ratios(outcomes), Text(), _times(outcomes), Text()]
    parts += [_facts(plan, outcomes), Text(), _assumed(plan)]
    ends = [o for o in outcomes if o.status in ("no room", "given up")]
    if ends:
        count = f"{len(ends)} of {len(outcomes)} runs" if len(outcomes) > 1 else "the run"
        why = "; ".join(sorted({o.why or "too few nodes are left" for o in ends}))
        parts += [Text(), Text(f"{count} did not get to the end: {why}", style="bold red")]
    return Group(*parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _ratios(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="bold")
    many = len(outcomes) > 1
    for name in ("median", "lowest", "highest") if many else ("",):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for name, meaning in RATIOS.items():
        found = spread([getattr(o, name) for o in outcomes]) or {}
        cells = [_percent(found[key]) for key in ("median", "lowest", "highest")]
        style = "bold green" if name == "goodput" else ""
        row = [Text(cell, style=style) for cell in (cells if many else cells[:1])]
        table.add_row(name.replace("_", " "), *row, meaning)
    return table


def _times(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", style="dim")
    found = shares(outcomes)
    # Training dwarfs the rest, which is what one looks for: the bars are of what is lost.
    most = max((s for cause, s in found.items() if cause != "training"), default=0.0)
    for cause, meaning in CAUSES.items():
        seconds = fmean(o.seconds[cause] for o in outcomes)
        bar = "" if cause == "training" or not most else "━" * round(BAR * found[cause] / most)
        table.add_row(
            cause, duration(seconds), _percent(found[cause]),
            Text(bar, style=COLOURS[cause]), meaning,
        )  # fmt: skip
    return table


def _facts(plan: SimulatedPlan, outcomes: Sequence[Outcome]) -> Table:
    job, price = plan.job, plan.price
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("")

    def mean(name: str) -> str:
        value = fmean(getattr(o, name) for o in outcomes)
        return f"{value:,.0f}" if len(outcomes) == 1 else f"{value:,.1f}"

    each = "" if len(outcomes) == 1 else ", on average"
    table.add_row("steps", f"{mean('steps')} done, {mean('steps_lost')} lost and done again{each}")
    table.add_row(
        "restarts",
        f"{mean('restarts')}: {mean('noticed')} after a notice, {mean('unnoticed')} without, "
        f"{mean('growths')} to grow",
    )
    table.add_row("checkpoints", mean("checkpoints"))
    table.add_row("elapsed", duration(fmean(o.elapsed_s for o in outcomes)))
    if price is not None:
        paid = fmean(cost_usd(o, price) or 0.0 for o in outcomes)
        nodes = -(-job.limits.max_workers // job.workers_per_node)
        ideal = fmean(o.steps * job.step_s for o in outcomes) / 3600 * nodes * price
        text = f"US$ {paid:,.2f}; the same steps on an unbroken full fleet: US$ {ideal:,.2f}"
        table.add_row("cost", text)
    return table


def _assumed(plan: SimulatedPlan) -> Table:
    job, costs = plan.job, plan.costs
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("", style="dim", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    rows = {
        "step_s": ("a step of all workers", job.step_s),
        "stall_s": ("a checkpoint stops training", costs.stall_s),
        "save_s": ("it is durable after", costs.save_s),
        "restart_s": ("a restart", costs.restart_s),
        "detect_s": ("a lost node is missed after", costs.detect_s),
    }
    for name, (what, seconds) in rows.items():
        table.add_row(what, f"{seconds:.3g} s", plan.sources[name])
    return table
