"""Run folders: checkpoints, plans, journals, links that lead out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_inputs import (
    HUGE,
    PICKLE,
    SHELL,
    Input,
    Make,
    both,
    edit,
    link,
    put,
    safetensors,
    zipped,
)


def a_run(folder: Path) -> None:
    """What `trimpot train` makes before Ray."""
    from trimpot.cluster.prepare import prepare_run, run_lock
    from trimpot.runner.run_yaml import load_config
    from trimpot.runner.types import Fleet

    config = load_config(folder / "run.yaml")
    with run_lock(folder / "run"):
        prepare_run(config, Fleet(memory_bytes=2**30), fresh=False)


def a_checkpoint(folder: Path, **facts: Any) -> Path:
    import torch

    from trimpot.runner.checkpoint import save_checkpoint

    known = {"plan_digest": "p", "data_digest": "d", "world_size": 1} | facts
    state = {"w": {key: torch.ones(4) for key in ("weight", "exp_avg", "exp_avg_sq")}}
    where = folder / "run/checkpoints"
    return save_checkpoint(where, state, step=2, cursor=8, complete=True, facts=known).path


def sealed(change: Callable[[dict[str, Any], Path], Any]) -> Make:
    """A checkpoint whose manifest was changed, and sealed again by somebody who knows how."""

    def make(folder: Path) -> None:
        from trimpot.runner.manifest import seal_of, text_of

        path = a_checkpoint(folder)
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest, path)
        manifest["seal"] = seal_of(manifest)
        (path / "manifest.json").write_text(text_of(manifest))

    return make


def holds(raw: bytes) -> Callable[[dict[str, Any], Path], None]:
    """The checkpoint's file is this, and its manifest says so."""

    def change(manifest: dict[str, Any], path: Path) -> None:
        import hashlib

        (path / "state.safetensors").write_bytes(raw)
        print_of = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        manifest["files"] = {"state.safetensors": print_of}

    return change


def names(name: str) -> Callable[[dict[str, Any], Path], None]:
    def change(manifest: dict[str, Any], _: Path) -> None:
        manifest["files"][name] = next(iter(manifest["files"].values()))

    return change


def checkpoints() -> Iterator[Input]:
    args, action = ("run/checkpoints",), "checkpoint"

    def case(name: str, make: Make) -> Input:
        return Input(f"checkpoint: {name}", make, args=args, action=action)

    def tensor(**entry: Any) -> bytes:
        known = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry
        return safetensors({"weight/w": known}, b"\0" * 16)

    for name, raw in {
        "a pickle": PICKLE,
        "a torch checkpoint": zipped(),
        "a header of all": b"\xff" * 8 + b"{}",
        "deep JSON": safetensors(b"[" * 500_000),
        "a huge dimension": tensor(shape=[HUGE]),
        "offsets beyond the end": tensor(data_offsets=[0, HUGE]),
        "another dtype": tensor(dtype="OBJ"),
    }.items():
        yield case(f"{name}, sealed", sealed(holds(raw)))
    for name in (
        "../outside", "../../../outside/bait", "/etc/passwd", "..", ".", "a/../../b", "a\0b", "",
        "x" * 5000, SHELL, "/dev/zero",
    ):  # fmt: skip
        yield case(f"a file named {name[:30]!r}, sealed", sealed(names(name)))
    for name, values in {
        "a step of text": {"step": "2"},
        "a huge step": {"step": HUGE},
        "a negative cursor": {"cursor": -HUGE},
        "files in a list": {"files": [["a", "b"]]},
        "shapes of nothing": {"shapes": {"w": [HUGE, HUGE]}},
        "shapes of text": {"shapes": {"w": "x"}},
        "a format of the future": {"format": 99},
        "a format in a list": {"format": [2]},
        "no files": {"files": {}},
        "a size of text": {"files": {"state.safetensors": {"size": "x", "sha256": 3}}},
    }.items():
        make = sealed(lambda manifest, _, values=values: manifest.update(values))
        ends = "either" if name in ("a negative cursor", "no files") else "refused"
        yield Input(f"checkpoint: {name}, sealed", make, args=args, action=action, ends=ends)
    for name, text in {
        "deep": "[" * 500_000,
        "a pickle": PICKLE,
        "a long number": '{"format": ' + "9" * 100_000 + "}",
        "a list": "[]",
        "large": '{"format": 2, "x": "' + "x" * 40_000_000 + '"}',
        "of another program": json.dumps({"version": 1, "shards": ["../../outside/bait"]}),
    }.items():
        manifest = "run/checkpoints/step-00000002/manifest.json"
        yield case(f"a manifest that is {name}", both(a_checkpoint, put(manifest, text)))
    step = "run/checkpoints/step-00000002"
    for name, to in {"elsewhere": "../../../../outside/bait", "a device": "/dev/zero"}.items():
        yield case(
            f"a file that leads to {name}",
            both(a_checkpoint, link(f"{step}/state.safetensors", to)),
        )
        yield case(
            f"a manifest that leads to {name}",
            both(a_checkpoint, link(f"{step}/manifest.json", to)),
        )
    for name in (
        "step-99999999999999999999",
        f"step-{'9' * 200}",
        "step-00000009\n",
        "step-٠٠٠٠٠٠٠٩",
    ):
        make = both(a_checkpoint, lambda f, n=name: (f / "run/checkpoints" / n).mkdir())
        yield Input(
            f"checkpoint: one named {name[:10]!r} … {len(name)}",
            make,
            args=args,
            action=action,
            ends="either",
        )

    def shard(manifest: dict[str, Any], path: Path) -> None:
        entry = next(iter(manifest["files"].values()))
        entry["slices"] = {"w": [0, HUGE]}
        manifest["shapes"] = {"w": [HUGE]}

    yield case("a shard of all there is, sealed", sealed(shard))


def runs() -> Iterator[Input]:
    for name, to in {
        "journal.jsonl": "../../outside/bait",
        "plan.json": "../../outside/bait",
        "plan.json.partial": "../../outside/new",
        "report.html": "../../outside/bait",
        "failure.log": "../../outside/bait",
        "stop": "../../outside/new",
        ".lock": "../../outside/bait",
        ".writable": "../../outside/bait",
        "checkpoints": "../../outside",
        "data": "../../outside",
        "adapter": "../../outside",
        "tensorboard": "../../outside",
        ".ray": "../../outside",
        "data/train.partial": "../../../outside/new",
        "data/train.safetensors": "../../../outside/bait",
        "data/eval.safetensors": "../../../outside/bait",
    }.items():
        yield Input(f"a run whose {name} leads outside", link(f"run/{name}", to))
        make = (
            both(a_run, link(f"run/{name}", to))
            if "/" in name or name == "plan.json.partial"
            else None
        )
        if make:
            yield Input(f"a run that was, whose {name} leads outside", make)
        elif name not in ("data",):
            args = ("train", "run.yaml", "--fresh")
            yield Input(
                f"--fresh over a {name} that leads outside", link(f"run/{name}", to), args=args
            )
    yield Input(
        "a run that leads outside", link("run", "../outside"), ends="inert", writes=("../outside",)
    )

    for name, change in {
        "a pickle": put("run/plan.json", PICKLE),
        "deep": put("run/plan.json", "[" * 500_000),
        "a long number": put("run/plan.json", '{"config": ' + "9" * 50_000 + "}"),
        "a list": put("run/plan.json", "[]"),
        "another's": put("run/plan.json", json.dumps({"config": {"model": {"path": "/etc"}}})),
    }.items():
        yield Input(f"a plan.json that is {name}", both(a_run, change))
        journal = put("run/journal.jsonl", '{"kind": "start", "time": 1}\n')
        for command in ("export", "chat"):
            more = ("-p", "x") if command == "chat" else ()
            args = (command, "run", *more)
            yield Input(
                f"{command} with a plan.json that is {name}",
                both(a_run, journal, change),
                args=args,
            )
        args = ("run/plan.json",)
        yield Input(
            f"a worker with a plan.json that is {name}",
            both(a_run, change),
            args=args,
            action="run_worker",
        )

    def elsewhere(**values: Any) -> Make:
        return both(a_run, edit("run/plan.json", **values))

    for name, values in {
        "run_dir": {"run_dir": "OUTSIDE"},
        "an unknown key": {"evil": 1},
        "a model elsewhere": {"model_path": "/etc", "run_dir": "RUN"},
        "a huge world": {"world_size": HUGE},
        "kernels of another": {"kernels": {"os": {"backend": "system", "why": "x"}}},
    }.items():

        def make(folder: Path, values: dict[str, Any] = values) -> None:
            places = {"OUTSIDE": str(folder.parent / "outside"), "RUN": str(folder / "run")}
            elsewhere(**{k: places.get(str(v), v) for k, v in values.items()})(folder)

        ends = "refused" if name in ("run_dir", "an unknown key") else "either"
        args = ("run/plan.json",)
        yield Input(
            f"a worker with a plan.json of {name}", make, args=args, action="run_worker", ends=ends
        )

    for name, raw in {
        "a pickle": PICKLE,
        "a header of all": b"\xff" * 8 + b"{}",
        "nothing": b"",
        "no notes": safetensors({}, b""),
    }.items():
        make = both(a_run, put("run/data/train.safetensors", raw))
        yield Input(f"compiled data that are {name}", make, ends="inert")

    xss = "<script>fetch('http://127.0.0.1:9/')</script><img src=x onerror=alert(1)>{{7*7}}"
    start = {"kind": "start", "time": 1.0, "run_dir": xss, "config": {"model": {"path": xss}}}
    start |= {"versions": {xss: xss}, "kernels": {xss: {"backend": xss, "why": xss}}}
    sample = {
        "kind": "sample",
        "time": 2.0,
        "when": "before",
        "prompt": xss,
        "answer": xss,
        "reference": xss,
    }
    step = {
        "kind": "step", "time": 3.0, "step": 1, "loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0,
        "tokens": 1, "trained_tokens": 1, "seconds": 1.0, "memory_bytes": 1,
    }  # fmt: skip
    for name, events in {
        "scripts": [start, sample, step, {"kind": "warning", "time": 4, "text": xss}],
        "numbers for text": [dict(start, run_dir=7, config=7, versions=7, kernels=7)],
        "text for numbers": [start, dict(step, loss="x", step="y")],
        "infinite losses": [
            start,
            dict(step, loss=float("inf")),
            dict(step, step=2, loss=float("nan")),
        ],
        "huge numbers": [start, dict(step, step=10**30, tokens=10**300, loss=1e308)],
        "steps far apart": [start, step, dict(step, step=10**12)],
        "missing keys": [{"kind": "start"}, {"kind": "step"}, {"kind": "end"}, {"kind": "sample"}],
        "unknown kinds": [{"kind": ["x"], "time": 1}, {"kind": {"a": 1}}, {"kind": 7, "time": "x"}],
        "a time out of the calendar": [dict(start, time=1e300)],
        "a path for a checkpoint": [
            start,
            {"kind": "checkpoint", "time": 1, "step": 1, "path": [xss], "seconds": "x"},
        ],
    }.items():
        text = "".join(json.dumps(event) + "\n" for event in events)
        make = both(lambda f: (f / "run").mkdir(), put("run/journal.jsonl", text))
        args = ("report", "run")
        yield Input(f"report of a journal with {name}", make, args=args, ends="either")
    for name, text in {
        "a pickle": PICKLE,
        "deep": "[" * 1_000_000 + "\n",
        "a long number": '{"kind": "step", "step": ' + "9" * 100_000 + "}\n",
        "no line end": "x" * 10_000_000,
        "many damaged lines": "{\n" * 100_000,
    }.items():
        make = put("run/journal.jsonl", text)
        yield Input(
            f"report of a journal that is {name}", make, args=("report", "run"), ends="either"
        )
    yield Input(
        "report of a device", link("run/journal.jsonl", "/dev/zero"), args=("report", "run")
    )
