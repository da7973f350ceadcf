"""`deterministic: true`: no bit depends on how many workers there are, or were before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import HERE, config, prepared, torchrun
from tiny import tiny_data

from trimpot.runner.checkpoint import load_state, newest_checkpoint
from trimpot.runner.plan.plan import for_workers, plan_to_json
from trimpot.runner.types import Plan

STEPS = 8
MOVES = {1: 2, 3: 4, 2: 6, 4: None}
"""{workers: the step that they stop after}, in this order. 5 micro-batches a step divide by none
but 1: some workers idle in the last round."""
OPTIM = {"batch_size": 5, "micro_batch_size": 1, "max_steps": STEPS}
ADAPTERS = {"optim": OPTIM | {"learning_rate": 1e-2}, "adapter": {"lora_dropout": 0.2}}
WEIGHTS = {"optim": OPTIM | {"learning_rate": 1e-3, "weight_decay": 0.1}, "adapter": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": ADAPTERS,
    "bf16-packed": {**ADAPTERS, "precision": "bf16", "data": {"packing": True}},
    "bf16-full": {**WEIGHTS, "precision": "bf16", "method": "full"},
    "fp32-freeze": {
        **WEIGHTS,
        "method": "freeze",
        "freeze": {"trainable": ["model.layers.3.*", "model.norm.weight"]},
    },
}
SPLIT = {**ADAPTERS, "fleet": {"workers": 2, "sequence_parallel_size": 2}}


class Runs:
    """One torchrun for all that is to be done at one number of workers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.curves: dict[str, dict[str, list[float]]] = {}
        """{run: {"", "#held-out", "#norms": over all its parts}}"""

    def go(self, world: int, work: list[tuple[Plan, int | None]]) -> None:
        """Each with the step it stops after."""
        arguments = []
        for base, stop in work:
            plan = for_workers(base, world)
            Path(plan.run_dir, "plan.json").write_text(plan_to_json(plan))
            arguments.append(f"{plan.run_dir}/plan.json" + (f"@{stop}!" if stop else ""))
        result = self.folder / f"{world}.json"
        torchrun(world, HERE / "arrangements.py", result, *arguments, timeout=900)
        found = json.loads(result.read_text())
        for (base, _), argument in zip(work, arguments, strict=True):
            curves = self.curves.setdefault(Path(base.run_dir).name, {})
            for which in ("", "#held-out", "#norms"):
                curves[which] = curves.get(which, []) + found[argument + which]


def contents(plan: Plan) -> dict[str, bytes | torch.Tensor]:
    """Weights and moments at the end, and the adapter's files."""
    found = newest_checkpoint(Path(plan.run_dir) / "checkpoints", pytest.fail, set_aside=False)
    assert found is not None and (found[0].step, found[0].complete) == (STEPS, True)
    state = load_state(found[0])
    files = sorted(Path(plan.run_dir, "adapter").glob("*"))
    assert bool(files) == (plan.config.method == "lora")
    return {f"{n}/{k}": t for n, tensors in state.items() for k, t in tensors.items()} | {
        path.name: path.read_bytes() for path in files
    }


def differing(one: Plan, other: Plan) -> list[str]:
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    return [
        key
        for key, value in a.items()
        if not (torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key])  # pyright: ignore[reportArgumentType]
    ]


@pytest.mark.slow
def test_no_bit_depends_on_the_number_of_workers(model: Path, tmp_path: Path) -> None:
    """1 worker through, against 1 → 3 → 2 → 4: losses, norms, held-out losses, weights, moments,
    the adapter's files. The same of rows over 2 workers each, 2 through against 2 → 4. Without
    `deterministic` the numbers are near, and the bits are others."""
    data, runs = tiny_data(tmp_path, 60), Runs(tmp_path)

    def plan(name: str, sections: dict[str, Any], deterministic: bool = True) -> Plan:
        update = {**sections, "deterministic": deterministic, "evaluation": {"every_steps": 2}}
        return prepared(config(model, data, tmp_path / name, **update))

    whole = {name: plan(f"{name}-whole", sections) for name, sections in VARIANTS.items()}
    moved = {name: plan(f"{name}-moved", sections) for name, sections in VARIANTS.items()}
    plain = {world: plan(f"plain-{world}", VARIANTS["fp32"], False) for world in (1, 3)}
    split = {name: plan(f"split-{name}", SPLIT) for name in ("whole", "moved")}
    for world, stop in MOVES.items():
        work = [(p, stop) for p in moved.values()]
        work += [(p, None) for p in whole.values()] if world == 1 else []
        work += [(plain[world], None)] if world in plain else []
        work += [(split["whole"], None)] if world == 2 else []
        work += [(split["moved"], {2: 4, 4: None}[world])] if world in (2, 4) else []
        runs.go(world, work)
    for name in VARIANTS:
        assert differing(whole[name], moved[name]) == [], name
        one, other = (runs.curves[f"{name}-{which}"] for which in ("whole", "moved"))
        assert (len(one[""]), len(one["#held-out"])) == (STEPS, 1 + STEPS // 2)
        assert one == other, name
    assert differing(split["whole"], split["moved"]) == []
    assert runs.curves["split-whole"] == runs.curves["split-moved"]

    assert differing(plain[1], plain[3])
    reference = runs.curves["plain-1"]
    for name in ("fp32-whole", "plain-3"):
        for which, curve in runs.curves[name].items():
            assert curve == pytest.approx(reference[which], rel=1e-5), (name, which)
