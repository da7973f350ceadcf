"""The `trimpot` command. Each subcommand imports what it needs, so that help answers at once."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from trimpot.cluster.cli_bench import bench
from trimpot.cluster.cli_simulate import simulate
from trimpot.kernels.errors import KernelError
from trimpot.runner.errors import ConfigError, TrimpotError
from trimpot.runner.reading import check_contained
from trimpot.runner.redact import log_to_stderr, redact
from trimpot.runner.telemetry import telemetry_off

app = typer.Typer(
    help="Fine-tune large pretrained models on a Ray cluster, or on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(help="A run.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, such as optim.learning_rate=1e-4.")
]
RunDir = Annotated[Path, typer.Argument(help="A run's folder (output_dir).", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on a line.")]
Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster to join (host:port, auto)."),
]


@app.callback(invoke_without_command=True)
def _main(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        try:
            typer.echo(version("trimpot"))
        except PackageNotFoundError:
            typer.echo("not installed")
        raise typer.Exit


def _emit(values: Any) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, default=str))


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    fresh: Annotated[
        bool, typer.Option(help="Start over, whatever the run's folder holds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a run; one that was interrupted goes on where it was."""
    from trimpot.cluster.display import Display
    from trimpot.cluster.train import train_run
    from trimpot.runner.run_yaml import load_config

    checked = load_config(config, overrides or [])
    with Display() as display:
        result = train_run(checked, address, fresh, display)
    if as_json:
        _emit(dataclasses.asdict(result))
    raise typer.Exit(result.exit_code)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run would be arranged and how much memory it needs, without starting it."""
    from trimpot.cluster.fleet import local_fleet
    from trimpot.cluster.prepare import check_inputs, compiled_fill, draft_plan
    from trimpot.cluster.show import plan_table, plan_values
    from trimpot.runner.run_yaml import load_config

    checked = load_config(config, overrides or [])
    check_inputs(checked)
    fleet = local_fleet(checked)
    drafted = draft_plan(checked, fleet)
    fill = compiled_fill(drafted)
    if as_json:
        _emit(plan_values(drafted, fleet, fill))
    else:
        _print(plan_table(drafted, fleet, fill))


@app.command()
def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of run.yaml, for editors."""
    from trimpot.runner.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=None if as_json else 2))


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the model.")],
    data: Annotated[Path, typer.Argument(help="JSONL, JSON, Parquet, CSV or datasets folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented run.yaml for a model and a data file."""
    from trimpot.cluster.init import write_config

    path = write_config(model, data, out, force)
    if as_json:
        _emit({"config": str(path)})
    else:
        typer.echo(f"wrote {path}; look it over, then: trimpot train {path}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show this machine, its packages, and which kernels run on what, and why."""
    from trimpot.cluster.doctor import examine, render

    facts = examine()
    if as_json:
        _emit(facts)
    else:
        _print(render(facts))


@app.command()
def report(run: RunDir, as_json: AsJson = False) -> None:
    """Write a run's report again, as one HTML file."""
    from trimpot.cluster.report import write_report

    path = write_report(_existing_run(run))
    if as_json:
        _emit({"report": str(path)})
    else:
        typer.echo(str(path))


@app.command()
def export(
    run: RunDir,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model, not only the adapter.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of the merged weights: fp32 | bf16; the base's otherwise.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a finished run's adapter (PEFT format) or merged model, and check what was written."""
    run = _existing_run(run)  # before torch comes in
    from trimpot.runner.export import export_run

    result = export_run(run, out, merged=merged, dtype=dtype)
    if as_json:
        _emit(result)
    else:
        typer.echo(f"wrote {result['path']}; checked: {'; '.join(result['verdict']['reasons'])}")


@app.command()
def chat(
    run: RunDir,
    compare: Annotated[bool, typer.Option(help="The base model's answer beside it.")] = False,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Ask this and end; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=8192)] = 256,
    as_json: AsJson = False,
) -> None:
    """Talk with a finished run's model."""
    run = _existing_run(run)
    from trimpot.cluster.chat import chat_with

    answers = chat_with(run, prompt or [], compare, max_new_tokens, quiet=as_json)
    if as_json:
        _emit({"answers": answers})


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(help="Which; without it they are listed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to make.")] = None,
    source: Annotated[Path | None, typer.Option(help="Raw data that are here already.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a folder with a real model, real data and a run.yaml, ready to train."""
    from trimpot.runner.recipes.prepare import list_recipes, prepare

    if name is None:
        known = list_recipes()
        if as_json:
            _emit(known)
        else:
            typer.echo("\n".join(f"{key:12} {text}" for key, text in known.items()))
        return
    say = (lambda text: None) if as_json else typer.echo
    path = prepare(name, out or Path(name), source=source, say=say)
    if as_json:
        _emit({"config": str(path)})
    else:
        typer.echo(f"ready; now: trimpot train {path}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to work in.")] = Path(
        "quickstart"
    ),
    recipe_name: Annotated[str, typer.Option("--recipe", help="technical | legal | medical")] = (
        "technical"
    ),
    as_json: AsJson = False,
) -> None:
    """Train SmolLM2-135M on a real data set, export and merge it: the whole way in one command."""
    from trimpot.cluster.quickstart import run_quickstart

    result = run_quickstart(out, recipe_name)
    if as_json:
        _emit(result)


app.add_typer(bench, name="bench")
app.command()(simulate)


def _existing_run(run: Path) -> Path:
    if not (run / "journal.jsonl").is_file():
        what = "has no journal.jsonl" if run.is_dir() else "is not there"
        raise ConfigError(f"{run} {what}; give the folder of a run (its output_dir)")
    check_contained(run)
    return run.resolve()


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


UsageError: Any = typer.BadParameter.__base__
"""Of the click that typer brings along, or stands on: an unknown option, a missing argument."""


def main() -> None:
    """Console script. Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    telemetry_off()
    log_to_stderr("%(levelname)s %(name)s: %(message)s")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UsageError as error:
        if message := " ".join(error.format_message().split()):  # empty: help was asked for
            path = error.ctx.command_path if error.ctx else "trimpot"
            typer.echo(redact(f"error: {message.rstrip('.')}; see {path} --help"), err=True)
        sys.exit(error.exit_code)
    except (TrimpotError, KernelError) as error:
        typer.echo(redact(f"error: {' '.join(str(error).splitlines())}"), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
