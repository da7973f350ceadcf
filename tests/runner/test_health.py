"""Steps that can't be right change nothing, and a run gets past them, or says why it can't."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import HERE, config, prepared, torchrun
from tiny import tiny_data
from torch.nn import functional
from transformers import AutoModelForCausalLM

from trimpot.runner.adapters.lora import add_lora
from trimpot.runner.checkpoint import list_checkpoints
from trimpot.runner.config import HealthSection
from trimpot.runner.data.compile import load_splits
from trimpot.runner.data.cursor import Cursor
from trimpot.runner.health import LEAST, LOSS_FLOOR, Health, limit
from trimpot.runner.plan.plan import plan_from_json
from trimpot.runner.replicas import fingerprint, odd_ones, weighted_sum


def treat(world: int, folder: Path, jobs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{name: [what each rank was told, and digests of its weights]} of runs with faults."""
    (folder / "jobs.json").write_text(json.dumps([{"stop": None, **job} for job in jobs]))
    torchrun(world, HERE / "sick.py", folder / "told", folder / "jobs.json", timeout=900)
    ranks = [json.loads((folder / f"told.{rank}").read_text()) for rank in range(world)]
    return {job["name"]: [rank[job["name"]] for rank in ranks] for job in jobs}


def of_kind(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [values for found, values in run["told"] if found == kind]


def job(name: str, checked: Any, faults: dict[str, list[int]], stop: int | None) -> dict:
    plan = prepared(checked)
    if plan.zero_stage == 3:  # nothing persists whole: tiny parameters would all be too small
        from trimpot.runner.plan.plan import plan_to_json

        plan = plan.replace(zero={**plan.zero, "stage3_param_persistence_threshold": 0})
        Path(plan.run_dir, "plan.json").write_text(plan_to_json(plan))
    return {"name": name, "plan": f"{plan.run_dir}/plan.json", "faults": faults, "stop": stop}


OPTIM = {"batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2, "schedule": "constant"}
FAULTS = {"loss": [1], "gradient": [3], "steep": [7], "high loss": [9]}
ALWAYS = {"check_every": 1}
STAGES = (0, 2, 3)
VARIANTS = {
    **{f"fp32-zero{stage}": {"fleet": {"zero_stage": stage}} for stage in STAGES},
    **{f"bf16-zero{s}": {"precision": "bf16", "fleet": {"zero_stage": s}} for s in (0, 1)},
    "offload": {
        "fleet": {"zero_stage": 2, "offload_optimizer": True},
        "kernels": {"adamw_step": "torch"},
    },
    "bf16-zero3-full": {
        "method": "full",
        "adapter": None,
        "precision": "bf16",
        "fleet": {"zero_stage": 3},
        "optim": {"learning_rate": 1e-4, "weight_decay": 0.1},
    },
}


def sick(model: Path, data: Path, name: str, faults: dict[str, list[int]], **sections: Any) -> dict:
    """A job of two workers, at first of 4 samples a step."""
    update = {**sections, "optim": {**OPTIM, **sections.get("optim", {})}}
    update["fleet"] = {"workers": 2, **sections["fleet"]}
    stop = update.pop("stop", None)
    return job(name, config(model, data, data.parent / name, **update), faults, stop)


def plain_losses(path: str, skipped: set[int], back: dict[int, int]) -> list[float]:
    """Losses of a loop that has nothing of ours but the adapter, its start, and the samples.

    `skipped`: steps that update nothing. `back`: {after this step: weights and moments of that}.
    """
    plan = plan_from_json(Path(path).read_text())
    train, _ = load_splits(Path(plan.run_dir) / "data")
    model = AutoModelForCausalLM.from_pretrained(plan.config.model.path, dtype=torch.float32)
    add_lora(model, plan.config.adapter, plan.config.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optim, cursor = plan.config.optim, Cursor(len(train), plan.config.seed)
    adam = torch.optim.AdamW(weights, weight_decay=0.0)
    losses, kept = [], {}
    for step in range(1, plan.total_steps + 1):
        adam.param_groups[0]["lr"] = optim.learning_rate * min(1, step / optim.warmup_steps)
        total, tokens = torch.zeros(()), 0
        for sample in cursor.take((step - 1) * optim.batch_size, optim.batch_size):
            ((ids, trained),) = train.parts(sample)
            targets = torch.from_numpy(np.where(trained, ids, -100).astype("int64"))
            logits = model(torch.from_numpy(ids.astype("int64"))[None]).logits[0]
            total = total + functional.cross_entropy(logits[:-1], targets[1:], reduction="sum")
            tokens += int(trained.sum())
        losses.append(total.item() / tokens)
        if step not in skipped:
            (total / tokens).backward()
            torch.nn.utils.clip_grad_norm_(weights, optim.max_grad_norm)
            adam.step()
            adam.zero_grad()
        kept[step] = deepcopy((model.state_dict(), adam.state_dict()))
        if step in back:
            model.load_state_dict(kept[back[step]][0])
            adam.load_state_dict(deepcopy(kept[back[step]][1]))
    return losses


def losses_of(run: dict[str, Any]) -> dict[int, float]:
    return {v["step"]: v["loss"] for v in of_kind(run, "step")}


@pytest.mark.slow
def test_a_bad_step_leaves_weights_and_moments_as_they_are(model, tmp_path):
    """NaN in the first step, when there are no moments, in the gradient alone, and spikes; of one
    worker's making, or of both. And no weight is taken for corrupt."""
    data = tiny_data(tmp_path, 60)
    jobs = []
    for name, sections in VARIANTS.items():
        sections = {**sections, "optim": {"max_steps": 20, **sections.get("optim", {})}}
        jobs.append(sick(model, data, name, FAULTS, health=ALWAYS, **sections))
    bad = {1: "loss", 3: "gradient norm", 7: "gradient norm", 9: "loss"}
    runs = treat(2, tmp_path, jobs)
    for name, (first, second) in runs.items():
        assert first["digests"] == second["digests"], name
        assert of_kind(first, "end") == [{"step": 20, "complete": True}], name
        told = of_kind(first, "bad_step")
        assert [event["step"] for event in told] == [*bad], name
        for event in told:
            assert event["why"].startswith(f"the {bad[event['step']]} of step"), name
            assert (event["action"], len(event["samples"])) == ("skip", 4), name
        digests = {int(step): digest for step, digest in first["digests"].items()}
        for step in range(2, 21):
            assert (digests[step] == digests[step - 1]) == (step in bad), (name, step)
        health = {v["step"]: v["health"] for v in of_kind(first, "step")}
        assert {s for s, h in health.items() if h != "ok"} == {*bad}, name
    wanted = plain_losses(jobs[0]["plan"], {*bad}, {})
    for stage in STAGES:
        found = losses_of(runs[f"fp32-zero{stage}"][0])
        for step in {*range(1, 21)} - {1, 9}:
            assert found[step] == pytest.approx(wanted[step - 1], rel=1e-4), (stage, step)


ROW = {"loss": [10, 11, 12]}
EVERY = {"every_steps": 4, "keep": 1}


@pytest.mark.slow
def test_a_row_of_bad_steps_is_left_behind(model, tmp_path):
    data, two = tiny_data(tmp_path, 60), {"zero_stage": 2}
    short = {"checkpoint": EVERY, "optim": {"max_steps": 14}}
    full = VARIANTS["bf16-zero3-full"]
    jobs = [
        sick(model, data, "row", ROW, fleet=two, **short),
        sick(model, data, "stopped-between", ROW, fleet=two, stop=11, **short),
        sick(model, data, "stopped-before", ROW, fleet=two, stop=9, **short),
        sick(model, data, "lost-0", {"weights": [9]}, fleet={"zero_stage": 0}, **short),
        sick(model, data, "lost-bf16-1", {"weights": [9]}, precision="bf16",
             fleet={"zero_stage": 1}, **short),
        sick(model, data, "lost-3", {"weights": [9]}, **{**full, **short},
             ),
        sick(model, data, "endless", {"loss": [*range(5, 15)]}, fleet=two, **short),
        sick(model, data, "nowhere", {"gradient": [2, 3, 4]}, fleet=two, **short),
        sick(model, data, "strict", {"high loss": [6]}, fleet=two, health={"on_bad_step": "stop"},
             **short),
    ]  # fmt: skip
    runs = {name: ranks[0] for name, ranks in treat(2, tmp_path, jobs).items()}
    row = runs["row"]
    wanted = plain_losses(jobs[0]["plan"], {10, 11, 12}, {12: 8})
    for step in {*range(1, 15)} - {10, 11, 12}:
        assert losses_of(row)[step] == pytest.approx(wanted[step - 1], rel=1e-4), step
    for name in ("row", "lost-0", "lost-bf16-1", "lost-3"):
        run = runs[name]
        told = [(e["step"], e["action"], e["to"]) for e in of_kind(run, "bad_step")]
        assert told == [(10, "skip", None), (11, "skip", None), (12, "rewind", 8)], name
        assert run["digests"]["12"] == run["digests"]["8"] != run["digests"]["13"], name
        assert of_kind(run, "end") == [{"step": 14, "complete": True}], name
        (newest, *_) = list_checkpoints(tmp_path / name / "checkpoints")
        manifest = json.loads((newest / "manifest.json").read_text())
        assert (manifest["step"], manifest["health"]["undone"]) == (14, [[9, 12]]), name
        assert math.isfinite(losses_of(run)[13]), name
    for name in ("stopped-between", "stopped-before"):
        assert runs[name]["digests"] == row["digests"], name
        assert [e["step"] for e in of_kind(runs[name], "bad_step")] == [10, 11, 12], name
    (error,) = of_kind(runs["endless"], "error")
    assert error["type"] == "TrainError"
    assert error["text"].startswith("the loss of step 11 is nan; samples [")
    assert "went back 2 times" in error["text"]
    assert error["text"].endswith("lower optim.learning_rate, or look at these samples")
    (error,) = of_kind(runs["nowhere"], "error")
    assert error["text"].startswith("the gradient norm of step 2 is ")
    assert "no checkpoint from before to go back to" in error["text"]
    (error,) = of_kind(runs["strict"], "error")
    assert error["text"].startswith("the loss of step 6 is ")
    assert runs["strict"]["digests"]["6"] == runs["strict"]["digests"]["5"]


CHECKED = {"health": {"check_every": 3}, "checkpoint": {"every_steps": 4, "keep": 9}}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_flipped_bit_is_found_before_it_is_saved(model, tmp_path, world):
    """After step 7, with a check due at 8, ahead of the save."""
    data = tiny_data(tmp_path, 60)
    optim = {"batch_size": 6, "max_steps": 12}
    jobs = [
        sick(model, data, f"{kind}-{stage}", {kind: [7]}, optim=optim, **CHECKED,
             precision=precision, fleet={"workers": world, "zero_stage": stage})
        for kind, stage, precision in (
            ("flip", 0, "fp32"), ("frozen", 1, "bf16"), ("frozen", 3, "fp32")
        )[: 3 if world == 2 else 1]
    ]  # fmt: skip
    for name, ranks in treat(world, tmp_path, jobs).items():
        suspects = [0, 1] if (name, world) == ("flip-0", 2) else [world - 1]
        for run in ranks:
            (event,) = of_kind(run, "corruption")
            assert (event["step"], event["ranks"]) == (8, suspects), name
            (error,) = of_kind(run, "error")
            assert (error["type"], error["ranks"]) == ("CorruptionError", suspects), name
        assert f"worker{'s' * (len(suspects) > 1)} {suspects[0]}" in error["text"]
        assert [int(p.name[5:]) for p in list_checkpoints(tmp_path / name / "checkpoints")] == [4]


# --- without processes


def curve(draw: np.random.Generator, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """(losses, gradient norms) as ordinary runs have them: falling or flat, with the noise of small
    or large batches, now and then harder samples, epochs, and norms that grow out of a warm-up."""
    t = np.arange(steps)
    last = draw.uniform(0.02, 0.9)
    trend = np.log(draw.uniform(1, 8) * (last + (1 - last) * np.exp(-t / draw.uniform(5, steps))))
    trend -= draw.choice([0.0, 0.3, 0.8]) * (t // (steps // 3))  # an epoch that was seen before
    spread = draw.choice([0.02, 0.1, 0.3, 0.6])
    kind = draw.integers(3)
    noise = draw.normal(size=steps) if kind < 2 else draw.laplace(size=steps) / math.sqrt(2)
    if kind == 1:  # neighbours are alike
        for i in range(1, steps):
            noise[i] = 0.8 * noise[i - 1] + 0.6 * noise[i]
    hard = np.where(draw.random(steps) < 0.08, draw.uniform(0, 0.6), 0.0)
    grown = np.log(np.minimum(1, (t + 1) / draw.uniform(1, 100)))
    drift = draw.uniform(-1.5, 1.5) * t / steps
    norms = grown + drift + draw.uniform(0.1, 0.7) * draw.normal(size=steps) + hard
    return np.exp(trend + spread * noise + hard), np.exp(norms)


def judged(losses: np.ndarray, norms: np.ndarray, **section: Any) -> list[int]:
    """Places of the bad steps of a curve."""
    health, bad = Health(HealthSection(**section), "auto"), []
    for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
        why = health.judge(step, loss, norm)
        health.record(step, loss, norm, why, [])
        bad += [step] * bool(why)
    return bad


def test_an_ordinary_curve_has_no_bad_step() -> None:
    draw, tight = np.random.default_rng(5), 0
    for _ in range(40):
        losses, norms = curve(draw)
        assert judged(losses, norms) == []
        tight += len(judged(losses, norms, spike_threshold=3))
    assert tight > 5  # they are noisy enough to raise alarms


def test_a_divergence_is_found_where_it_begins() -> None:
    """The loss rises to that of a model that knows nothing, or the norm a hundredfold."""
    draw = np.random.default_rng(6)
    for _ in range(20):
        losses, norms = curve(draw, 320)
        norms[300] *= 1e5
        assert 300 in judged(losses, norms)
    losses, norms = 2 * np.exp(0.05 * draw.normal(size=(2, 200)))
    losses[150:153] = 10.4
    assert judged(losses, norms) == [150, 151, 152]
    assert judged(losses, norms, spike_threshold=None) == []


def test_the_limit_is_what_its_formula_says() -> None:
    draw = np.random.default_rng(7)
    logs = draw.normal(1.0, 0.4, 128)
    middle = np.median(logs)
    spread = max(1.4826 * np.median(np.abs(logs - middle)), (np.sort(logs)[115] - middle) / 1.2816)
    assert limit(np.exp(logs), 10, LOSS_FLOOR) == pytest.approx(np.exp(middle + 10 * spread))
    assert limit([2.0] * 128, 10, LOSS_FLOOR) == pytest.approx(2 * math.exp(10 * LOSS_FLOOR))


def test_what_a_run_decides_goes_through_its_checkpoints() -> None:
    """Interrupted after any step, it finds the same steps bad and does the same about them."""
    draw = np.random.default_rng(8)
    losses, norms = np.exp(0.1 * draw.normal(size=(2, 120)))
    losses[[40, 60, 61, 62, 80, 81]] = math.nan
    norms[[62 + LEAST - 8, 110]] = 1e3
    section = HealthSection()

    def through(at: int | None) -> tuple[list[Any], dict[str, Any]]:
        health, told = Health(section, "auto"), []
        for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
            if step == at:
                health = Health(section, "auto", json.loads(json.dumps(health.state())))
            health.record(step, loss, norm, health.judge(step, loss, norm), [step])
            told.append(health.action(False))
            if told[-1] == "rewind":
                health.rewound(50, step)
        return told, health.state()

    unbroken = through(None)
    actions = {step: action for step, action in enumerate(unbroken[0]) if action != "none"}
    # A spike is one only where enough was seen since the rewind.
    assert actions == dict.fromkeys((40, 60, 61, 80, 81, 110), "skip") | {62: "rewind"}
    for at in range(120):
        assert through(at) == unbroken


def test_a_rewind_goes_where_good_weights_are() -> None:
    health = Health(HealthSection(rewind_after=2), 10)
    for step in range(1, 36):
        health.record(step, 1.0, 1.0, "", [])
    for step in (36, 37):
        health.record(step, math.nan, 1.0, "it is bad", [step])
    assert health.action(final=False) == "rewind"
    assert [s for s in range(1, 50) if health.may_return_to(s)] == [10, 20, 30]
    health.rewound(20, 37)  # the checkpoint of step 30 was damaged
    assert [s for s in range(1, 70) if health.may_return_to(s)] == [10, 20, 40, 50, 60]
    for step in range(38, 51):
        health.record(step, 1.0, 1.0, "", [])
    for rewinds in (1, 2):  # again and again, without enough good steps between them
        for step in (51, 52):
            health.record(step, math.nan, 1.0, "it is bad", [step])
        assert health.action(final=False) == ("rewind" if rewinds < 2 else "stop")
        health.rewound(50, 52)


def test_the_last_step_does_not_end_on_weights_that_are_lost() -> None:
    health = Health(HealthSection(), "auto")
    health.record(1, 1.0, 1.0, "", [])
    health.record(2, math.nan, 1.0, health.judge(2, math.nan, 1.0), [7])
    assert (health.action(final=False), health.action(final=True)) == ("skip", "rewind")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8])
def test_no_bit_changes_unseen(kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 255, (4 * 53,), generator=draw, dtype=torch.uint8)
    raw = raw[: 4 * 53 - (3 if kind is torch.uint8 else 0)]
    tensors = [torch.ones(3), raw.view(kind)]
    seen = {fingerprint(tensors)}
    for at in range(len(raw)):
        for bit in range(8):
            raw[at] ^= 1 << bit
            seen.add(fingerprint(tensors))
            raw[at] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(raw)


def test_the_sum_that_gpus_take_is_that_of_whole_numbers(monkeypatch) -> None:
    monkeypatch.setattr("trimpot.runner.replicas.CHUNK_WORDS", 7)
    words = torch.randint(-(2**31), 2**31, (100,), dtype=torch.int32)
    golden = 0x9E3779B97F4A7C15
    whole = sum(int(w) * (i * golden % 2**64 | 1) for i, w in enumerate(words)) % 2**64
    assert weighted_sum(words) == whole


def test_the_minority_is_suspect() -> None:
    assert odd_ones(["a", "a", "a"]) == ()
    assert odd_ones(["a", "b", "a"]) == (1,)
    assert odd_ones(["b", "a", "a", "c"]) == (0, 1, 2, 3)  # no majority
    assert odd_ones(["b", "a", "a", "c", "a"]) == (0, 3)
    assert odd_ones(["a", "b"]) == (0, 1)
