"""Rows split over workers: real processes train what one worker trains, in the same order, and go
on from its checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BACKENDS
from runs import HERE, config, prepared, run_arrangements, torchrun
from tiny import tiny_data

from trimpot.runner.checkpoint import load_state, newest_checkpoint
from trimpot.runner.data.batch import IGNORED, Batch, slice_of
from trimpot.runner.types import Plan

STEPS, FEW, BEFORE = 20, 4, 2
"""Steps of a run; of one for which a look is enough; before the one whose gradients are seen."""
FIRST: dict[str, Any] = {"max_steps": FEW, "schedule": "constant"}
EVERY: dict[str, Any] = {"checkpoint": {"every_steps": 1, "keep": STEPS}}


def arranged(model: Path, out: Path, workers: int, split: int, /, **sections: Any) -> Plan:
    """Rows of several samples, two a step. Goes on with what `out` holds already."""
    data = tiny_data(out.parent, 200)
    values: dict[str, Any] = {
        "data": {"max_length": 160, "packing": True},
        "optim": {"batch_size": 2, "micro_batch_size": 1, "max_steps": STEPS, "warmup_steps": 0},
        "fleet": {"workers": workers, "sequence_parallel_size": split},
    }
    values["optim"]["max_grad_norm"] = None  # moments are of whole gradients
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return prepared(config(model, data, out, **values), fresh=not out.exists())


def states(plan: Plan) -> list[dict[str, torch.Tensor]]:
    """Weights and moments after each step that has a checkpoint, in order."""
    found, folder = [], Path(plan.run_dir) / "checkpoints"
    while (newest := newest_checkpoint(folder, pytest.fail, set_aside=False)) is not None:
        parts = load_state(newest[0]).items()
        found.append({f"{key}/{n}": t for n, part in parts for key, t in part.items()})
        newest[0].path.rename(folder / f"seen-{newest[0].path.name}")
    for path in folder.glob("seen-*"):
        path.rename(folder / path.name.removeprefix("seen-"))
    return found[::-1]


def gradients(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of the step in between, by what Adam's first moment has taken of it."""
    return {
        key: (moment - 0.9 * before[key]) / 0.1
        for key, moment in after.items()
        if key.startswith("exp_avg/")
    }


def branch(plan: Plan, out: Path) -> Path:
    """A copy of a run as it stood after step BEFORE."""
    shutil.copytree(plan.run_dir, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > BEFORE:
            shutil.rmtree(path)
    return out


def held_out(folder: Path, world: int) -> dict[str, list[float]]:
    """{run: held-out losses before and after} of the last call of run_arrangements there."""
    told = json.loads((folder / f"losses-{world}.json").read_text())
    return {
        Path(key.removesuffix("/plan.json#held-out")).name: losses
        for key, losses in told.items()
        if key.endswith("#held-out")
    }


@pytest.mark.slow
def test_workers_on_a_row_train_what_one_does(model: Path, tmp_path: Path) -> None:
    """Losses of whole runs, and of the first steps at the other ZeRO stages and without packing."""
    samples = {"data": {"packing": False}, "optim": {**FIRST, "batch_size": 4}}
    samples["optim"]["micro_batch_size"] = 2
    kinds: dict[str, dict[str, Any]] = {
        **{backend: {"kernels": {"default": backend}} for backend in BACKENDS},
        "first": {"optim": FIRST},
        "samples": samples,
    }
    plans = [arranged(model, tmp_path / kind, 1, 1, **kinds[kind]) for kind in kinds]
    alone = dict(zip(kinds, run_arrangements(1, plans, tmp_path), strict=True))
    for backend in BACKENDS:  # it learns, so that agreeing means something
        assert alone[backend][-1] < alone[backend][0] - 0.1
    evals = held_out(tmp_path, 1)
    wanted = [*((backend, 0) for backend in BACKENDS), (BACKENDS[-1], 2)]
    wanted += [("first", 1), ("first", 3), ("samples", 0)]
    plans = [
        arranged(model, tmp_path / f"{kind}-z{z}", 2, 2, **kinds[kind], fleet={"zero_stage": z})
        for kind, z in wanted
    ]
    together = run_arrangements(2, plans, tmp_path)
    for (kind, stage), curve in zip(wanted, together, strict=True):
        # measured: at most 6e-8
        assert curve == pytest.approx(alone[kind], rel=1e-4), (kind, stage)
        seen = held_out(tmp_path, 2)[f"{kind}-z{stage}"]
        assert seen == pytest.approx(evals[kind], rel=1e-4), (kind, stage)


@pytest.mark.slow
def test_gradients_of_workers_on_a_row_are_those_of_one(model: Path, tmp_path: Path) -> None:
    """Both go on from one worker's checkpoint, so that both adapters' parts have a gradient."""
    kinds = {b: {"kernels": {"default": b}, "optim": FIRST, **EVERY} for b in BACKENDS}
    alone = {b: arranged(model, tmp_path / b, 1, 1, **kinds[b]) for b in BACKENDS}
    curves = run_arrangements(1, [*alone.values()], tmp_path)
    plans = [
        arranged(model, branch(alone[b], tmp_path / f"{b}-2"), 2, 2, **kinds[b]) for b in BACKENDS
    ]
    together = run_arrangements(2, plans, tmp_path)
    for backend, plan, curve, want in zip(BACKENDS, plans, together, curves, strict=True):
        assert curve == pytest.approx(want[BEFORE:], rel=1e-5)
        before, after = states(alone[backend])[BEFORE - 1 : BEFORE + 1]
        exact, mine = gradients(before, after), gradients(before, states(plan)[BEFORE])
        largest = max(float(gradient.abs().max()) for gradient in exact.values())
        for key, gradient in exact.items():
            assert gradient.any(), key
            # measured: at most 3.8e-7 of the largest, in sums of other orders
            assert (mine[key] - gradient).abs().max() <= 1e-6 * largest, key


@pytest.mark.slow
def test_interrupted_on_one_row_is_bit_equal_to_unbroken(model: Path, tmp_path: Path) -> None:
    """With dropout, whose masks are of slices, and layers that are recomputed, exchanges and
    all."""
    sections = {"model": {"activation_checkpointing": True}, "adapter": {"lora_dropout": 0.2}}
    plans = [
        arranged(model, tmp_path / name, 2, 2, optim=FIRST, **sections)
        for name in ("whole", "broken")
    ]
    whole, broken = run_arrangements(2, plans, tmp_path, [None, 2])
    assert whole == broken
    last = [states(plan)[-1] for plan in plans]
    for key, tensor in last[0].items():
        assert torch.equal(tensor, last[1][key]), key


@pytest.mark.slow
def test_rows_of_two_groups_and_of_more_workers_than_key_heads(model: Path, tmp_path: Path) -> None:
    """2 × 2 workers, and 4 on one row of a model with 4 heads over 2 of keys."""
    (want,) = run_arrangements(1, [arranged(model, tmp_path / "1", 1, 1, optim=FIRST)], tmp_path)
    plans = [arranged(model, tmp_path / f"4-{n}", 4, n, optim=FIRST) for n in (2, 4)]
    for plan, curve in zip(plans, run_arrangements(4, plans, tmp_path), strict=True):
        assert curve == pytest.approx(want, rel=1e-5), plan.lanes


@pytest.mark.slow
def test_attention_of_any_heads_is_that_of_the_whole_row() -> None:
    """Output and gradients in float64, in four processes (exchanges.py)."""
    torchrun(4, HERE / "exchanges.py")


def long_row(model: Path, folder: Path, workers: int) -> Plan:
    """A step over one row of 16,303 tokens, most of them in a document of 14,000 words, of a model
    that takes so many."""
    if not (long := folder / "model").exists():
        shutil.copytree(model, long)
        settings = json.loads((long / "config.json").read_text())
        settings["max_position_embeddings"] = 16384
        (long / "config.json").write_text(json.dumps(settings))
    words = ["value", "list", "the"] * 5000
    rows = [{"text": " ".join(words[:count])} for count in (14000, 2300)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"optim": {"batch_size": 1, "max_steps": 1, "warmup_steps": 0}}
    values["fleet"] = {"workers": workers, "sequence_parallel_size": workers}
    values["data"] = {"max_length": 16384, "packing": True, "eval_fraction": 0}
    return prepared(config(long, data, folder / f"run-{workers}", **values))


@pytest.mark.slow
def test_a_long_row_takes_less_memory_of_each_of_two_workers(model: Path, tmp_path: Path) -> None:
    seen, plans = [], [long_row(model, tmp_path, workers) for workers in (1, 2)]
    for plan in plans:
        torchrun(plan.world_size, "-m", "trimpot.runner.worker", f"{plan.run_dir}/plan.json")
        lines = Path(plan.run_dir, "journal.jsonl").read_text().splitlines()
        seen += [event for event in map(json.loads, lines) if event["kind"] == "step"]
    alone, shared = seen
    assert shared["tokens"] == alone["tokens"] > 16_000
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert plans[0].memory is not None
    assert alone["memory_bytes"] - shared["memory_bytes"] > 0.2 * plans[0].memory.activations


@pytest.mark.slow
def test_a_model_whose_attention_stays_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    plan = arranged(folder, tmp_path / "run", 2, 2)
    with pytest.raises(AssertionError) as failed:
        torchrun(2, "-m", "trimpot.runner.worker", f"{plan.run_dir}/plan.json")
    said = str(failed.value)
    assert "attention by document, and LlamaForCausalLM has none (attention_dropout is" in said
    assert "set fleet.sequence_parallel_size=1" in said
    assert "Traceback" not in said.split("sequence_parallel_size")[0]


def test_slices_have_every_token_and_its_successor_once() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
    ids = torch.arange(10, 18)[None]
    labels = torch.tensor([[IGNORED, 11, 12, IGNORED, IGNORED, 15, 16, 17]])
    row: Batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    slices = [slice_of(row, rank, 3) for rank in range(3)]
    assert [part["input_ids"].tolist() for part in slices] == [
        [[10, 11, 12]],
        [[13, 14, 15]],
        [[16, 17, 0]],
    ]
    assert [part["targets"].tolist() for part in slices] == [
        [[11, 12, IGNORED]],
        [[IGNORED, 15, 16]],  # 16 stands in the next slice
        [[17, IGNORED, IGNORED]],
    ]
    assert [part["position_ids"].tolist() for part in slices] == [
        [[0, 1, 2]],
        [[0, 0, 1]],
        [[2, 3, 0]],
    ]
    assert all(part["split_documents"].tolist() == [0, 3, 4, 8] for part in slices)
