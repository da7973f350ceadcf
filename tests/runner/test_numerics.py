"""However a run is arranged, it trains the same thing: that of a plain torch loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exact import keep_float64
from plain import plain_torch
from runs import config, prepared, run_arrangements
from safetensors.torch import load_file
from tiny import tiny_data

from trimpot.runner.config import Config
from trimpot.runner.data.batch import join
from trimpot.runner.data.compile import load_splits
from trimpot.runner.data.cursor import Cursor
from trimpot.runner.model import build_model
from trimpot.runner.plan.plan import for_workers, plan_to_json
from trimpot.runner.tasks.causal_lm import token_loss_sum
from trimpot.runner.types import Plan

STEPS, BATCH = 20, 8
ARRANGEMENTS = ((0, 1), (0, 4), (1, 2), (2, 1), (2, 4), (3, 1), (3, 2), (3, 4))
"""ZeRO stages with micro-batches of a worker and step: what is summed where differs by stage."""


def adapter_of(plan: Plan) -> dict[str, torch.Tensor]:
    tensors = load_file(Path(plan.run_dir) / "adapter" / "adapter_model.safetensors")
    return {
        k.removeprefix("base_model.model.").removesuffix(".weight"): v for k, v in tensors.items()
    }


def arranged(base: Config, out: Path, world: int, stage: int, accumulation: int) -> Config:
    update = {
        "output_dir": str(out / f"z{stage}-w{world}-a{accumulation}"),
        "fleet": base.fleet.model_copy(update={"workers": world, "zero_stage": stage}),
        "optim": base.optim.model_copy(
            update={"micro_batch_size": BATCH // (world * accumulation)}
        ),
    }
    return base.model_copy(update=update)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """(base config, losses, adapter) of the plain loop."""
    folder = tmp_path_factory.mktemp("numerics")
    base = config(model, tiny_data(folder, 200), folder / "plain")
    plain = plain_torch(prepared(base))
    return base, plain.losses, plain.adapter


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_arrangement_trains_what_plain_torch_trains(reference, tmp_path, world):
    base, losses, adapter = reference
    assert losses[-1] < losses[0] - 0.3  # it learns, so that agreeing means something
    plans = [
        prepared(arranged(base, tmp_path, world, stage, accumulation))
        for stage, accumulation in ARRANGEMENTS
    ]
    for kind in (True, "selective"):
        recomputed = base.model.model_copy(update={"activation_checkpointing": kind})
        again = base.model_copy(update={"model": recomputed})
        plans.append(prepared(arranged(again, tmp_path / f"recomputed-{kind}", world, 3, 1)))
    # Nothing persists whole: tiny parameters would all be under DeepSpeed's threshold.
    plans = [rewritten(plan) for plan in plans]
    for plan, found in zip(plans, run_arrangements(world, plans, tmp_path), strict=True):
        name = Path(plan.run_dir).name
        assert found == pytest.approx(losses, rel=1e-4), name
        saved = adapter_of(plan)
        assert saved.keys() == adapter.keys(), name
        for key, tensor in adapter.items():
            assert saved[key].numel() > 0, name
            assert (saved[key] - tensor).abs().max() < 1e-4, (name, key)


@pytest.mark.chaos
def test_worlds_that_do_not_divide_train_the_same(reference, tmp_path):
    """4 and 8 micro-batches a step on 3 workers, of which 2 and 1 idle in the last round."""
    base, losses, adapter = reference
    plans = []
    for stage, micro in ((0, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)):
        optim = base.optim.model_copy(update={"micro_batch_size": micro})
        fleet = base.fleet.model_copy(update={"workers": 1, "zero_stage": stage})
        update = {"output_dir": str(tmp_path / f"z{stage}-m{micro}")}
        plan = prepared(base.model_copy(update={**update, "optim": optim, "fleet": fleet}))
        plans.append(rewritten(for_workers(plan, 3)))
    for plan, found in zip(plans, run_arrangements(3, plans, tmp_path), strict=True):
        name = Path(plan.run_dir).name
        assert found == pytest.approx(losses, rel=1e-4), name
        saved = adapter_of(plan)
        for key, tensor in adapter.items():
            assert (saved[key] - tensor).abs().max() < 1e-4, (name, key)
        samples, _ = load_splits(Path(plan.run_dir) / "data")
        order = Cursor(len(samples), base.seed).take(0, STEPS * BATCH)
        taken = Path(plan.run_dir, "samples.jsonl").read_text().splitlines()
        assert [i for line in taken for i in json.loads(line)] == order.tolist(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_micro_batch_of_weight_0_contributes_exactly_nothing(reference, tmp_path, precision):
    base, _, _ = reference
    update = {"precision": precision, "output_dir": str(tmp_path / "run")}
    plan = prepared(base.model_copy(update=update))
    module = build_model(plan, {}).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    train, _ = load_splits(Path(plan.run_dir) / "data")
    batch = join(train, [0, 1])
    for weight in (1.0, 0.0):
        module.zero_grad()
        (token_loss_sum(module, batch) * weight).backward()
        sums = [float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None]
        assert any(sums) == bool(weight)
        assert len(sums) == len(adapter_names(module))


def adapter_names(module: torch.nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


def rewritten(plan: Plan) -> Plan:
    if plan.zero_stage == 3:
        plan = plan.replace(zero={**plan.zero, "stage3_param_persistence_threshold": 0})
    Path(plan.run_dir, "plan.json").write_text(plan_to_json(plan))
    return plan


@pytest.mark.slow
def test_bf16_stays_near_fp32_at_every_stage(reference, tmp_path):
    base, losses, _ = reference
    base = base.model_copy(update={"precision": "bf16"})
    plans = [prepared(arranged(base, tmp_path, 2, stage, 1)) for stage in (0, 1, 2, 3)]
    curves = run_arrangements(2, plans, tmp_path)
    for plan, curve in zip(plans, curves, strict=True):
        # Seen: 0.0023 nats. Adam's bias correction off by one step: 0.015 (see start_engine).
        assert curve == pytest.approx(losses, abs=0.007), plan.zero_stage


@pytest.mark.slow
def test_kernels_keep_as_close_to_float64_as_torch_does(reference, tmp_path, monkeypatch):
    """The loss at each of 20 steps, and the adapter after them: ours with every kernel on, against
    transformers' own code, both against a loop in float64."""
    base, _, _ = reference
    by_kernels = {}
    for default in ("auto", "off"):
        kernels = base.kernels.model_copy(update={"default": default})
        out = tmp_path / default
        by_kernels[default] = prepared(
            arranged(base.model_copy(update={"kernels": kernels}), out, 1, 0, 1)
        )
    on, off = run_arrangements(1, list(by_kernels.values()), tmp_path)
    keep_float64(monkeypatch)
    plain = plain_torch(by_kernels["off"], torch.float64)
    exact, adapter = plain.losses, plain.adapter

    def curve_off(found: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(found, exact, strict=True))

    def adapter_off(plan: Plan) -> float:
        saved = adapter_of(plan)
        return sum(float((saved[key] - tensor).norm()) for key, tensor in adapter.items())

    assert on != off  # other arithmetic, so that agreeing means something
    assert curve_off(on) <= 2 * curve_off(off)
    assert adapter_off(by_kernels["auto"]) <= 2 * adapter_off(by_kernels["off"])
