"""`trimpot simulate`: options, files and journals to a job, its costs, and its traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

GENERATOR = "Preemptions that are drawn"
PLAN = "What is run"
COSTS = "What it costs"


def simulate(
    config: Annotated[Path | None, typer.Argument(help="A run.yaml; not needed.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="A run's folder: steps, saves and starts as it had them.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="CSV: seconds,node,event,notice_s; else it is drawn.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="As many as max-workers need, without it."),
    ] = None,
    between: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e6, help="Hours between preemptions.", rich_help_panel=GENERATOR
        ),
    ] = 2.0,
    life: Annotated[
        Literal["exponential", "weibull", "bathtub"],
        typer.Option(help="How long nodes live.", rich_help_panel=GENERATOR),
    ] = "exponential",
    zones: Annotated[
        int, typer.Option(min=1, help="That nodes are dealt to.", rich_help_panel=GENERATOR)
    ] = 3,
    zone_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Of preemptions, that take a whole zone.", rich_help_panel=GENERATOR
        ),
    ] = 0.1,
    notice: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Seconds; 0: there is none.", rich_help_panel=GENERATOR),
    ] = 120.0,
    noticed: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share that has a notice.", rich_help_panel=GENERATOR),
    ] = 1.0,
    back: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share that comes back.", rich_help_panel=GENERATOR),
    ] = 1.0,
    back_after: Annotated[
        float, typer.Option(min=0, max=1e8, help="Seconds, mean.", rich_help_panel=GENERATOR)
    ] = 600.0,
    runs: Annotated[
        int, typer.Option(min=1, max=100_000, help="How many are drawn.", rich_help_panel=GENERATOR)
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the first.", rich_help_panel=GENERATOR)] = 0,
    write_trace: Annotated[
        Path | None, typer.Option(help="Write the first one drawn.", rich_help_panel=GENERATOR)
    ] = None,
    min_workers: Annotated[int | None, typer.Option(min=1, rich_help_panel=PLAN)] = None,
    max_workers: Annotated[int | None, typer.Option(min=1, rich_help_panel=PLAN)] = None,
    workers_per_node: Annotated[int | None, typer.Option(min=1, rich_help_panel=PLAN)] = None,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="Of a step, all workers'.", rich_help_panel=PLAN)
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1e6, help="Of a step with all workers.", rich_help_panel=PLAN),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, rich_help_panel=PLAN)] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e5, help="When it ends, done or not.", rich_help_panel=PLAN),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="US$ of a node and hour.", rich_help_panel=PLAN),
    ] = None,
    stall_seconds: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="Training stops for each save.", rich_help_panel=COSTS),
    ] = None,
    save_seconds: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="Until it is durable.", rich_help_panel=COSTS),
    ] = None,
    restart_seconds: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="To the first step.", rich_help_panel=COSTS)
    ] = None,
    detect_seconds: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="Until a loss is known.", rich_help_panel=COSTS),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Goodput and price of a run on nodes that come and go, on a simulated clock.

    What the real run decides, its own code decides here.
    """
    from trimpot.cluster import simulate_show as show
    from trimpot.cluster.simulate import simulate as once
    from trimpot.cluster.simulate_plan import Given, make_plan
    from trimpot.cluster.traces import Spot, draw_trace, read_trace, to_csv

    given = Given(
        min_workers, max_workers, workers_per_node, micro_batches, step_seconds, steps, hours,
        price, nodes, stall_seconds, save_seconds, restart_seconds, detect_seconds,
    )  # fmt: skip
    plan = make_plan(given, config, overrides or [], run)
    if trace is not None:
        traces = [read_trace(trace, plan.nodes)]
        what = f"{trace.name}, {len(traces[0].nodes)} nodes"
    else:
        spot = Spot(
            plan.nodes, between, life, zones, zone_share, notice, noticed, back, back_after
        )  # fmt: skip
        traces = [draw_trace(spot, plan.hours, n) for n in range(seed, seed + runs)]
        what = show.describe(spot, runs)
    if write_trace is not None:
        from trimpot.cluster.prepare import write_text

        write_text(write_trace, to_csv(traces[0]))
    outcomes = [once(plan.job, plan.costs, each) for each in traces]
    if as_json:
        typer.echo(json.dumps(show.values(plan, outcomes)))
    else:
        from rich.console import Console

        Console().print(show.render(what, plan, outcomes))
    failed = all(o.status in ("no room", "given up") for o in outcomes)
    raise typer.Exit(1 if failed else 0)
