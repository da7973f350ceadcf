"""Steps that can't be right change nothing, and a run gets past them, or says why it can't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import HERE, config, prepared, torchrun
from tiny import tiny_data

STAGES = [0, 1, 2, 3]


def treat(world: int, folder: Path, jobs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{name: [what each rank was told, and digests of its weights]} of runs with faults."""
    (folder / "jobs.json").write_text(json.dumps([{"stop": None, **job} for job in jobs]))
    torchrun(world, HERE / "sick.py", folder / "told", folder / "jobs.json")
    ranks = [json.loads((folder / f"told.{rank}").read_text()) for rank in range(world)]
    return {job["name"]: [rank[job["name"]] for rank in ranks] for job in jobs}


def of_kind(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [values for found, values in run["told"] if found == kind]


def job(name: str, checked: Any, faults: dict[str, list[int]], stop: int | None = None) -> dict:
    plan = prepared(checked)
    if plan.zero_stage == 3:  # nothing persists whole: tiny parameters would all be too small
        from trimpot.runner.plan.plan import plan_to_json

        plan = plan.replace(zero={**plan.zero, "stage3_param_persistence_threshold": 0})
        Path(plan.run_dir, "plan.json").write_text(plan_to_json(plan))
    return {"name": name, "plan": f"{plan.run_dir}/plan.json", "faults": faults, "stop": stop}


OPTIM = {"batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2, "max_grad_norm": 1.0}
FAULTS = {"loss": [1], "gradient": [3], "high loss": [7], "steep": [9]}
VARIANTS = {
    **{f"fp32-zero{stage}": {"fleet": {"zero_stage": stage}} for stage in STAGES},
    **{
        f"bf16-zero{stage}": {"precision": "bf16", "fleet": {"zero_stage": stage}}
        for stage in STAGES
    },
    "offload": {"fleet": {"zero_stage": 2, "offload_optimizer": True}},
    "full": {
        "method": "full",
        "adapter": None,
        "precision": "bf16",
        "fleet": {"zero_stage": 3},
        "optim": {"learning_rate": 1e-4, "weight_decay": 0.1},
    },
    "torch": {"kernels": {"adamw_step": "torch"}, "fleet": {"zero_stage": 1}},
}


@pytest.mark.slow
def test_a_bad_step_leaves_weights_and_moments_as_they_are(model, tmp_path):
    """NaN in the first step, when there are no moments, in the gradient alone, and spikes; each of
    one worker's making, seen by both."""
    data = tiny_data(tmp_path, 60)
    jobs = []
    for name, sections in VARIANTS.items():
        update = {**sections, "optim": {**OPTIM, "max_steps": 10, **sections.get("optim", {})}}
        update["fleet"] = {"workers": 2, **sections["fleet"]}
        jobs.append(job(name, config(model, data, tmp_path / name, **update), FAULTS))
    bad = {1: "loss", 3: "gradient norm", 7: "loss", 9: "gradient norm"}
    for name, (first, second) in treat(2, tmp_path, jobs).items():
        assert first["digests"] == second["digests"], name
        told = of_kind(first, "bad_step")
        assert [event["step"] for event in told] == [*bad], name
        for event in told:
            assert event["why"].startswith(f"the {bad[event['step']]} of step"), name
            assert (event["action"], len(event["samples"])) == ("skip", 4), name
        digests = {int(step): digest for step, digest in first["digests"].items()}
        for step in range(2, 11):
            assert (digests[step] == digests[step - 1]) == (step in bad), (name, step)
        health = {v["step"]: v["health"] for v in of_kind(first, "step")}
        assert {s for s, h in health.items() if h != "ok"} == {*bad}, name
        assert of_kind(first, "end") == [{"step": 10, "complete": True}], name
