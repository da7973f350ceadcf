"""`make parity`: the quickstart at its full size against transformers and PEFT in a plain loop."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from exact import keep_float64
from plain import Plain, plain_torch
from runs import prepared, run_arrangements

from trimpot.runner.recipes.prepare import prepare
from trimpot.runner.run_yaml import load_config
from trimpot.runner.types import Plan

pytestmark = pytest.mark.parity
HOUR = 3600.0
KERNELS = {"auto": {"default": "auto"}, "off": {"default": "off"}, "int16": {"cpu_gemm": "int16"}}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Of the technical recipe with kernels on, with transformers' own code, and in int16."""
    folder = tmp_path_factory.mktemp("parity")
    base = load_config(prepare("technical", folder, say=tell))
    made = {}
    for name, wanted in KERNELS.items():
        kernels = base.kernels.model_copy(update=wanted)
        update = {"kernels": kernels, "output_dir": str(folder / name)}
        made[name] = prepared(base.model_copy(update=update))
    return made


@pytest.fixture(scope="module")
def peft(plans: dict[str, Plan]) -> Plain:
    return plain_torch(plans["off"])


@pytest.fixture(scope="module")
def ours(plans: dict[str, Plan]) -> dict[str, tuple[list[float], list[float]]]:
    """{name: (losses, held-out losses)}"""
    folder, found = Path(plans["auto"].run_dir).parent, {}
    for name, plan in plans.items():
        (losses,) = run_arrangements(plan.world_size, [plan], folder, timeout=HOUR)
        told = json.loads((folder / f"losses-{plan.world_size}.json").read_text())
        found[name] = losses, told[f"{plan.run_dir}/plan.json#held-out"]
    return found


def test_peft_lands_on_the_same_held_out_loss(ours, peft: Plain) -> None:
    _, held_out = ours["auto"]
    tell(f"held-out: ours {held_out[0]:.5f} to {held_out[-1]:.5f}, PEFT {peft.held_out:.5f}")
    assert held_out[-1] < held_out[0] - 1
    assert held_out[-1] == pytest.approx(peft.held_out, rel=0.01)


def test_int16_lands_on_the_held_out_loss_of_fp32(ours) -> None:
    held_out, exact = (ours[name][1][-1] for name in ("int16", "auto"))
    tell(f"held-out: int16 {held_out:.5f}, fp32 {exact:.5f}")
    assert held_out != exact  # it was int16
    assert held_out == pytest.approx(exact, rel=0.005)


def test_kernels_keep_as_close_to_float64_as_torch_does(ours, plans, peft, monkeypatch) -> None:
    """Root mean square over the steps, of the loss in nats."""
    keep_float64(monkeypatch)
    exact = plain_torch(plans["off"], torch.float64).losses
    off = {name: distance(losses, exact) for name, (losses, _) in ours.items()}
    off["PEFT"] = distance(peft.losses, exact)
    tell("from float64: " + ", ".join(f"{name} {value:.3e}" for name, value in off.items()))
    assert 0 < off["auto"] <= 2 * off["off"]


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def distance(losses: Sequence[float], exact: Sequence[float]) -> float:
    each = [(a - b) ** 2 for a, b in zip(losses, exact, strict=True)]
    return math.sqrt(sum(each) / len(each))
