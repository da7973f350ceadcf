"""`trimpot quickstart`: prepare, train, export, merge; the whole way of a newcomer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from trimpot.cluster.display import Display
from trimpot.cluster.train import train_run
from trimpot.runner.errors import TrainError
from trimpot.runner.recipes.prepare import prepare
from trimpot.runner.run_yaml import load_config


def run_quickstart(out: Path, recipe: str) -> dict[str, Any]:
    """Everything from packages to a merged model in the folder `out`. Raises TrimpotError."""
    started = time.time()
    config_file = prepare(recipe, out, say=typer.echo)
    typer.echo(f"\n$ trimpot train {config_file}")
    with Display() as display:
        result = train_run(load_config(config_file), address=None, fresh=False, display=display)
    if result.status != "done":
        raise TrainError(f"stopped at step {result.step}; the same command goes on from there")
    # Imported here: exporting brings torch in, which training leaves to the workers.
    from trimpot.runner.export import export_run

    run = Path(result.run_dir)
    exported = {}
    for kind, merged in (("adapter", False), ("merged", True)):
        typer.echo(f"\n$ trimpot export {run}{' --merged' if merged else ''}")
        exported[kind] = export_run(run, None, merged=merged, dtype=None)
        typer.echo(f"{exported[kind]['path']}: {'; '.join(exported[kind]['verdict']['reasons'])}")
    typer.echo(f"\ntalk with it: trimpot chat {run} --compare")
    return {
        "held_out_before": result.held_out_before,
        "held_out_after": result.held_out_after,
        "adapter": exported["adapter"]["path"],
        "merged": exported["merged"]["path"],
        "report": result.report,
        "seconds": round(time.time() - started, 1),
    }
