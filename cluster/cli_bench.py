"""`trimpot bench`: what is measured, and against whom."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trimpot.runner.errors import ConfigError

bench = typer.Typer(help="Measure, paired against a peer in one run.", no_args_is_help=True)

Threads = Annotated[int, typer.Option(min=1, help="Threads of each side on a CPU.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; every round runs every side.")]
JsonPath = Annotated[
    str | None, typer.Option("--json", help="A file, or - to end with one JSON object on a line.")
]


def _emit(values: Any) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, default=str))


def _show(renderable: Any) -> None:
    from rich.console import Console

    terminal = Console()
    # A table that is cut helps nobody: into a file or a pipe it goes as wide as it is.
    (terminal if terminal.is_terminal else Console(width=240)).print(renderable)


def _progress(text: str) -> None:
    """To stderr: stdout is the result's."""
    sys.stderr.write(f"{text}\n")  # in one piece: ops are proven by several threads


@bench.command("launch")
def launch(
    model: Annotated[Path, typer.Option(help="Folder of the model to train.")],
    data: Annotated[Path, typer.Option(help="Data to train on.")],
    workers: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=4)] = 30,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on a line.")
    ] = False,
) -> None:
    """What Ray costs: step time and time to the first step, against torchrun of the same worker."""
    from trimpot.cluster.bench import bench_launch

    values = bench_launch(
        model, data, workers, steps, repeats, say=(lambda _: None) if as_json else typer.echo
    )
    if as_json:
        _emit(values)


@bench.command("saves")
def saves(
    model: Annotated[Path, typer.Option(help="Folder of the model to train.")],
    data: Annotated[Path, typer.Option(help="Data to train on.")],
    workers: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=5, help="The first save comes after 60 s.")] = 400,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on a line.")
    ] = False,
) -> None:
    """What checkpoints at their default interval cost a run, against the same run without them."""
    from trimpot.cluster.bench_saves import bench_saves

    values = bench_saves(
        model, data, workers, steps, repeats, say=_progress if as_json else typer.echo
    )
    if as_json:
        _emit(values)


@bench.command("kernels")
def kernels(
    op: Annotated[str, typer.Option(help="Ops by name, with commas; without it, all.")] = "",
    shape: Annotated[str, typer.Option(help="T | S | M | llama3-8b | llama3-70b.")] = "S",
    mode: Annotated[str, typer.Option(help="fwd, bwd, fwd+bwd; both also give the sum.")] = (
        "fwd,bwd"
    ),
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16.")] = "fp32",
    vs: Annotated[str, typer.Option(help="torch, compile, peft, liger.")] = "torch",
    backend: Annotated[
        str,
        typer.Option(
            help="auto, torch, cpp, cpp:int16 (bf16x3, fp32), triton, vendor; with commas between."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu | cuda (ROCm too).")] = "cpu",
    tokens: Annotated[int | None, typer.Option(min=1, help="Instead of the shape's.")] = None,
    threads: Threads = 1,
    repeats: Repeats = 5,
    json_path: JsonPath = None,
    csv: Annotated[Path | None, typer.Option(help="The rows as CSV.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the plots, PNG.")] = None,
    html: Annotated[Path | None, typer.Option(help="One page with everything in it.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="--json of an earlier run, to pair rows with.")
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if a ratio (now/then, or to the peer) is lower."),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="No timing: compile for GPUs, count traffic, model.")
    ] = False,
    prove: Annotated[
        bool, typer.Option("--prove", help="On a GPU: are the compiled kernels right? Then times.")
    ] = False,
) -> None:
    """Our kernels against torch, torch.compile, PEFT and Liger: checked first, then timed."""
    from trimpot.cluster import bench_kernels as work

    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch comes in
    files = work.Files(json_path, csv, plots, html)
    if dry or prove:
        step, table = (
            (work.dry, work.report.dry_table) if dry else (work.prove, work.report.proof_table)
        )
        result, code = step(work.split(op), files, _progress)
        _show(table(result["rows"]))
        if json_path == "-":
            _emit(result)
        raise typer.Exit(code)
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device} is not known; give cpu or cuda")
    values = {
        "ops": work.split(op),
        "shapes": work.split(shape),
        "modes": work.split(mode),
        "dtypes": work.split(dtype),
        "peers": work.split(vs),
        "backends": work.split(backend),
        "device": device,
        "threads": threads,
        "repeats": repeats,
        "tokens": tokens,
    }
    result, changes, code = work.run(values, compare, fail_under, files, _progress)
    _tell(result, work.report.rows_table(result["rows"]), json_path)
    if changes and json_path != "-":
        _show(work.report.changes_table(changes))
    raise typer.Exit(code)


@bench.command("step")
def step(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="T | S | M; S-packed; S-full trains all weights; repeatable."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a model, instead of a shape of random weights.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Our GEMMs: int16, bf16x3, int8, fp32; the first is `rows`. With +selective "
            "behind it, gate and up are recomputed, with +selective:8 in eight layers."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="fp32 | bf16 | fp32-documents (all three without it) | fp32-compiled."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=16, help="Instead of the shape's.")] = None,
    threads: Threads = 1,
    repeats: Repeats = 5,
    json_path: JsonPath = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the plots, PNG.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="One page: rows, share per op, roofline.")
    ] = None,
) -> None:
    """One training step of ours, LoRA r16 or full, against transformers + PEFT in a plain loop."""
    from trimpot.cluster import bench_step as work

    workloads = [*(shape or []), *([str(model)] if model else [])] or ["S"]
    result = work.run(workloads, variant, peer, tokens, threads, repeats, _progress)
    if json_path and json_path != "-":
        work.write_json(Path(json_path), result)
    work.write_drawings(result, plots, html)
    if json_path == "-":
        _emit(result)
        return
    for table in work.tables(result):
        _show(table)


def _tell(result: dict[str, Any], table: Any, json_path: str | None) -> None:
    if json_path == "-":
        _emit(result)
    else:
        _show(table)
