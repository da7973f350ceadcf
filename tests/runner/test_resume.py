"""An interrupted run ends with the adapter of an unbroken one, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import config, prepared, run_arrangements
from safetensors.torch import load_file
from tiny import tiny_data

from trimpot.runner.checkpoint import list_checkpoints, load_state, newest_checkpoint
from trimpot.runner.types import Plan

STEPS = 5
VARIANTS = {
    "fp32-zero0": {"fleet": {"zero_stage": 0}},
    "fp32-zero1-offload": {"fleet": {"zero_stage": 1, "offload_optimizer": True}},
    "fp32-zero2-dropout": {"fleet": {"zero_stage": 2}, "adapter": {"lora_dropout": 0.2}},
    "fp32-zero3-recompute": {
        "fleet": {"zero_stage": 3},
        "adapter": {"lora_dropout": 0.1},
        "model": {"activation_checkpointing": True},
    },
    "fp32-zero2-selective": {
        "fleet": {"zero_stage": 2},
        "adapter": {"lora_dropout": 0.1},
        "model": {"activation_checkpointing": "selective"},
    },
    "bf16-zero0": {"precision": "bf16", "fleet": {"zero_stage": 0}},
    "bf16-zero2-decay": {
        "precision": "bf16",
        "fleet": {"zero_stage": 2},
        "optim": {"weight_decay": 0.1},
    },
    "bf16-zero3-full": {
        "precision": "bf16",
        "fleet": {"zero_stage": 3},
        "method": "full",
        "adapter": None,
        "optim": {"learning_rate": 1e-4, "weight_decay": 0.1},
    },
    "fp32-zero2-freeze": {
        "fleet": {"zero_stage": 2},
        "method": "freeze",
        "adapter": None,
        "freeze": {"trainable": ["model.layers.3.*", "model.norm.weight"]},
        "optim": {"learning_rate": 1e-4},
    },
    "fp32-zero3-packed": {"fleet": {"zero_stage": 3}, "data": {"packing": True}},
}


def final_state(plan: Plan) -> dict[str, torch.Tensor]:
    """Weights and both moments at the end."""
    folder = Path(plan.run_dir) / "checkpoints"
    found = newest_checkpoint(folder, pytest.fail, set_aside=False)
    assert found is not None
    assert (found[0].complete, found[0].step) == (True, STEPS)
    state = load_state(found[0])
    return {f"{n}/{k}": t for n, tensors in state.items() for k, t in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_interrupted_is_bit_equal_to_unbroken(model, tmp_path, world):
    data = tiny_data(tmp_path, 60)
    plans, stops = [], []
    for name, sections in VARIANTS.items():
        update = {**sections, "optim": {"batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-2}}
        update["optim"] |= {"micro_batch_size": 4 // world // 2, **sections.get("optim", {})}
        update["fleet"] = {"workers": world, **sections["fleet"]}
        every = range(1, STEPS) if name == "fp32-zero2-dropout" else [2]
        for stop in [None, *every]:
            plans.append(prepared(config(model, data, tmp_path / f"{name}-{stop}", **update)))
            stops.append(stop)
    losses = run_arrangements(world, plans, tmp_path, stops)
    unbroken = {}
    for plan, stop, curve in zip(plans, stops, losses, strict=True):
        name = Path(plan.run_dir).name
        state = final_state(plan)
        assert len(curve) == STEPS, name
        if stop is None:
            unbroken = {"curve": curve, "state": state}
            continue
        assert curve == unbroken["curve"], name
        assert state.keys() == unbroken["state"].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, unbroken["state"][key]), (name, key)


@pytest.mark.slow
def test_a_run_moves_between_stages_and_world_sizes(model, tmp_path):
    """1 worker at stage 0 begins, 2 at stage 3 end: the losses are those of one that stayed."""
    data = tiny_data(tmp_path, 60)
    optim = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2}
    stays = config(model, data, tmp_path / "stays", optim=optim)
    moves = config(model, data, tmp_path / "moves", optim=optim, checkpoint={"every_steps": 3})
    unbroken, _ = run_arrangements(1, [prepared(stays), prepared(moves)], tmp_path)
    folder = Path(moves.output_dir) / "checkpoints"
    newest = list_checkpoints(folder)[0]
    newest.rename(tmp_path / "step-6-of-one-worker")
    fleet = moves.fleet.model_copy(update={"workers": 2, "zero_stage": 3})
    on_two = prepared(moves.model_copy(update={"fleet": fleet}), fresh=False)
    (rest,) = run_arrangements(2, [on_two], tmp_path)
    assert rest == pytest.approx(unbroken[3:], rel=1e-5)
    adapters = [
        load_file(Path(c.output_dir) / "adapter/adapter_model.safetensors") for c in (stays, moves)
    ]
    for key, tensor in adapters[0].items():
        assert (adapters[1][key] - tensor).abs().max() < 1e-4, key


MOVES = {
    "full": [(0, 2, 3), (2, 3, 0), (3, 0, 2)],
    "freeze": [(3, 2, 3)],
    "lora": [(0, 3, 2)],
}
"""ZeRO stages with 1, then 2, then 1 worker."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "moves",
    [
        {"full": [(2, 3, 0)], "lora": [(0, 3, 2)]},
        pytest.param(MOVES, marks=pytest.mark.chaos, id="every move"),
    ],
)
def test_shards_of_one_fleet_are_taken_up_by_another(model, tmp_path, moves):
    """1 worker begins, 2 go on, 1 ends: same samples, same losses as the one that went through."""
    data = tiny_data(tmp_path, 9)  # 8 of them trained on: 2 steps see each once
    optim = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 6, "weight_decay": 0.1}
    method = {
        "full": {"method": "full", "adapter": None, "optim": {**optim, "learning_rate": 1e-3}},
        "freeze": {
            "method": "freeze",
            "adapter": None,
            "freeze": {"trainable": ["model.layers.3.*", "model.norm.weight"]},
            "optim": {**optim, "learning_rate": 4e-3},
        },
        "lora": {"optim": {**optim, "learning_rate": 1e-2}},
    }
    runs = [
        (
            stages,
            config(model, data, tmp_path / f"{name}-{stages[0]}", checkpoint=OFTEN, **sections),
        )
        for name, sections in method.items()
        for stages in moves.get(name, [])
    ]
    curves, samples = [], []
    for leg, world in enumerate((1, 2, 1)):
        plans = []
        for stages, base in runs:
            fleet = base.fleet.model_copy(update={"workers": world, "zero_stage": stages[leg]})
            checked = base.model_copy(update={"fleet": fleet})
            plans.append(prepared(checked, fresh=leg == 0))
        curves.append(run_arrangements(world, plans, tmp_path))
        samples.append([taken(plan) for plan in plans])
        for plan in plans:
            folder = Path(plan.run_dir) / "checkpoints"
            newest = list_checkpoints(folder)
            assert [int(path.name[5:]) for path in newest] == [6, 4, 2][: len(newest)]
            shards = len(list((folder / "step-00000006").glob("shard-*-of-00002.safetensors")))
            assert shards == (2 if world == 2 and plan.config.method != "lora" else 0)
            for path in newest:  # the next leg begins at step 2, the last one at 4
                if int(path.name[5:]) > 2 * (leg + 1) and leg < 2:
                    shutil.rmtree(path)
    for (stages, _), unbroken, second, third in zip(runs, *curves, strict=True):
        assert second == pytest.approx(unbroken[2:], abs=1e-4), stages
        assert third == pytest.approx(unbroken[4:], abs=1e-4), stages
        assert sum(unbroken[4:]) < sum(unbroken[:2]) - 0.1, stages
    for unbroken, second, third in zip(*samples, strict=True):
        assert second == unbroken[2:]
        assert third == unbroken[4:]


OFTEN = {"every_steps": 2, "keep": 9}


def taken(plan: Plan) -> list[list[int]]:
    """The samples of each step since this was last asked."""
    path = Path(plan.run_dir, "samples.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return found
