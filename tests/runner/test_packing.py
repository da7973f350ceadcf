"""Packed rows train what samples in rows of their own train, to the bit where that can be, and
little of what the model computes is padding."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from families import BACKENDS, COMMON, build, table, with_lora
from runs import config, prepared, run_arrangements
from tiny import tiny_data

from trimpot.runner.checkpoint import load_state, newest_checkpoint
from trimpot.runner.config import DataSection, check_config
from trimpot.runner.data.batch import IGNORED, Batch, collate, join, slice_of
from trimpot.runner.data.compile import Compiled, compile_splits, load_splits
from trimpot.runner.data.cursor import Cursor, deal
from trimpot.runner.data.fill import fill_of
from trimpot.runner.families import FAMILIES
from trimpot.runner.fused.swap import swap_in
from trimpot.runner.hub import Tokenizer
from trimpot.runner.plan.facts import read_facts
from trimpot.runner.plan.plan import make_plan
from trimpot.runner.tasks.causal_lm import token_loss_sum
from trimpot.runner.types import Fleet, Plan

ROWS, LENGTH = 44, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packing")


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[bool, Compiled]:
    """{packed: the samples}. Prompts, which are not trained, and answers; most are short."""
    draw = random.Random(3)
    letters = lambda mean: "".join(  # noqa: E731
        draw.choices("abcdefgh ", k=1 + int(draw.lognormvariate(mean, 1)))
    )
    rows = [{"prompt": f"{i} {letters(1.5)}", "completion": letters(2.5)} for i in range(ROWS)]
    path = toy.write_rows(folder / "rows.jsonl", rows)
    tokenizer = Tokenizer(toy.toy_model(folder / "toy", template=None))
    return {
        packing: compile_splits(
            DataSection(train=str(path), packing=packing, max_length=LENGTH, eval_fraction=0),
            0,
            folder / str(packing),
            tokenizer,
        )[0]
        for packing in (True, False)
    }


def epoch(data: Compiled, joined: bool, micro: int) -> list[Batch]:
    """All micro-batches of one step over all samples, as the loop has them."""
    indices = Cursor(len(data), seed=0).take(0, len(data) // micro * micro)
    assert len(indices) == len(data)
    micros = deal(indices, data.lengths, micro).tolist()
    packed = len(data) < len(data.documents) - 1
    return [join(data, each) if joined else collate(data, each, packed) for each in micros]


def learned(model: Any, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per trained token, and its gradients, of one step."""
    model.zero_grad()
    tokens = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = token_loss_sum(model, batch)
        (loss / tokens).backward()
        total += loss.item()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return total / tokens, found


@pytest.mark.parametrize("backend", [*BACKENDS, "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_train_what_they_train_apart(
    splits: dict[bool, Compiled], family: str, backend: str
) -> None:
    """Both ways that the runner has to make a micro-batch: joined for models that attend by
    document, padded for transformers' own attention."""
    assert splits[True].digest == splits[False].digest
    changes = {"vocab_size": toy.VOCABULARY, "max_position_embeddings": LENGTH}
    model = with_lora(build(family, use_cache=False, **changes))
    swap_in(model, table(backend))
    joined = backend != "off"
    alone, want = learned(model, epoch(splits[False], joined, 4))
    together, got = learned(model, epoch(splits[True], joined, 2))
    assert abs(together - alone) <= 1e-6 * alone  # measured: at most 5e-8
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in want.items():
        # measured: at most 3.3e-7 of the largest, in sums of other orders
        assert (got[name] - gradient).abs().max() <= 1e-6 * largest, name


@pytest.mark.slow
def test_a_run_of_packed_rows_trains_what_one_of_samples_trains(model: Path, tmp_path: Path):
    """By real workers: one step over all samples; Adam's first moment is (1 − β₁) of a gradient."""
    data, plans = tiny_data(tmp_path, 60), []
    for kernels in ("auto", "off"):
        for packing in (True, False):
            out = tmp_path / f"{kernels}-{packing}"
            options = {"packing": packing, "max_length": 256, "eval_fraction": 0}
            sections: dict[str, Any] = {
                "method": "full",
                "adapter": None,
                "data": options,
                "kernels": {"default": kernels},
                "optim": {"max_steps": 1, "warmup_steps": 0, "max_grad_norm": None},
            }
            prepared(config(model, data, out, **sections))
            train, _ = load_splits(out / "data") or pytest.fail("no data")
            micro = max(n for n in range(1, 5) if len(train) % n == 0)
            sections["optim"] |= {"batch_size": len(train), "micro_batch_size": micro}
            plans.append(prepared(config(model, data, out, **sections)))
    losses = run_arrangements(1, plans, tmp_path)
    for at in (0, 2):
        (together,), (alone,) = losses[at : at + 2]
        assert abs(together - alone) <= 1e-6 * alone
        got, want = first_moments(plans[at]), first_moments(plans[at + 1])
        largest = max(float(moment.abs().max()) for moment in want.values())
        for name, moment in want.items():
            assert (got[name] - moment).abs().max() <= 1e-6 * largest, name


def first_moments(plan: Plan) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(Path(plan.run_dir) / "checkpoints", pytest.fail, set_aside=False)
    assert found is not None
    return {name: tensors["exp_avg"] for name, tensors in load_state(found[0]).items()}


# --- what another document can change


def row(lengths: list[int], own: int, seed: int, trained: float) -> Batch:
    """A packed row in which document `own` is always the same; `seed` and `trained` decide the
    tokens of the others and which of them are trained."""
    parts = []
    for place, length in enumerate(lengths):
        draw = torch.Generator().manual_seed(7 if place == own else 100 * seed + place)
        ids = torch.randint(3, COMMON["vocab_size"], (length,), generator=draw)
        part = 0.5 if place == own else trained
        labels = torch.where(torch.rand(length, generator=draw) < part, ids, IGNORED)
        labels[0] = IGNORED
        parts.append((ids, labels, torch.arange(length)))
    ids, labels, positions = (torch.cat(each)[None] for each in zip(*parts, strict=True))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def seen_by(model: Any, batch: Batch, own: slice) -> list[torch.Tensor]:
    """Last hidden states, logits, and the loss's gradient by what goes in, of some tokens."""
    hidden: list[torch.Tensor] = []
    hook = model.base_model.norm.register_forward_hook(lambda *seen: hidden.append(seen[2]))
    given = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    inputs = {"inputs_embeds": given, "position_ids": batch["position_ids"]}
    token_loss_sum(model, {**inputs, "labels": batch["labels"]}).backward()
    hook.remove()
    assert given.grad is not None
    with torch.no_grad():
        logits = model(**inputs).logits
    return [x[:, own].clone() for x in (hidden[0], logits, given.grad)]


VARIANTS = [*BACKENDS, *(["cpp:int16"] if "cpp" in BACKENDS else []), "off"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_document_changes_no_bit(family: str, variant: str, dtype: torch.dtype) -> None:
    """Neither by its tokens nor by what is trained of it, nor by falling into two."""
    model = with_lora(build(family, use_cache=False)).to(dtype)
    kernels = table(variant.partition(":")[0])
    for op in ("lora_linear", "linear_cross_entropy"):  # those that have arithmetics of their own
        kernels[op] = {"backend": variant, "why": "a test"}
    swap_in(model, kernels)
    own = slice(20, 43)
    want = seen_by(model, row([20, 23, 27], 1, seed=1, trained=0.5), own)
    assert all(bool(x.any()) for x in want)
    for other in (
        row([20, 23, 27], 1, seed=2, trained=0.5),
        row([20, 23, 27], 1, seed=1, trained=1.0),
        row([7, 13, 23, 20, 7], 2, seed=3, trained=0.2),
    ):
        for before, after in zip(want, seen_by(model, other, own), strict=True):
            assert torch.equal(before, after)


# --- how full


def lengths_like(kind: str, count: int, capacity: int) -> np.ndarray:
    draw = np.random.default_rng(4)
    mean, spread = {"short": (4.0, 1.2), "middling": (5.0, 1.0), "long": (6.0, 0.8)}.get(
        kind, (0.0, 0.0)
    )
    if kind == "nearly full":
        found = draw.uniform(0.9, 1.0, count) * capacity
    else:
        found = draw.lognormal(mean, spread, count)
    return np.clip(found.astype(np.int64), 4, capacity)


def of_lengths(lengths: np.ndarray, capacity: int, folder: Path) -> tuple[Plan, Compiled]:
    """Packed samples of so many tokens, and a plan that trains them in micro-batches of 4."""
    rows = [{"text": "a" * (length - 1)} for length in lengths]
    values = {**toy.RUN, "model": {"path": str(toy.toy_model(folder / "model"))}}
    path = toy.write_rows(folder / "rows.jsonl", rows)
    values["data"] = {"train": str(path), "packing": True, "max_length": capacity}
    values["data"]["eval_fraction"] = 0
    values["optim"] = {"batch_size": 8, "micro_batch_size": 4}
    checked = check_config(values, "test")
    facts = replace(read_facts(folder / "model"), max_positions=capacity)
    plan = make_plan(checked, Fleet(), facts, str(folder))
    return plan, compile_splits(checked.data, 0, folder, Tokenizer(folder / "model"))[0]


def computed(plan: Plan, data: Compiled, make: Callable[[list[int]], list[Batch]]) -> float:
    """Real tokens over those that go through the model, counted on the tensors of an epoch."""
    real = shown = 0
    cursor = Cursor(len(data), plan.config.seed)
    for step in range(len(data) // 8):
        for micro in deal(cursor.take(8 * step, 8), data.lengths, 4):
            real += int(data.lengths[micro].sum())
            shown += sum(batch["input_ids"].numel() for batch in make(micro.tolist()))
    return real / shown


@pytest.mark.parametrize("kind", ["short", "middling", "long", "nearly full"])
def test_little_is_padding(kind: str, tmp_path: Path) -> None:
    """Of long-tailed samples, and as little as can be of nearly full ones: no two share a row."""
    capacity, count = 1024, 1500
    if kind == "nearly full":
        count = 160
    plan, data = of_lengths(lengths_like(kind, count, capacity), capacity, tmp_path)
    padded, joined = (fill_of(plan, data, by_document) for by_document in (False, True))
    assert padded.documents == joined.documents == count
    share = computed(plan, data, lambda micro: [collate(data, micro, packed=True)])
    assert padded.computed_share == share >= 0.98
    assert joined.computed_share == computed(plan, data, lambda micro: [join(data, micro)]) == 1
    assert padded.row_share == data.tokens.size / (len(data) * capacity)
    if kind == "nearly full":
        assert padded.rows == padded.least_rows == count
        assert padded.row_share < 0.98
    else:
        assert padded.row_share >= 0.98
        assert padded.rows <= 1.005 * padded.least_rows


def test_slices_of_a_row_waste_less_than_a_token_a_worker(tmp_path: Path) -> None:
    plan, data = of_lengths(lengths_like("middling", 300, 256), 256, tmp_path)
    fleet = plan.config.fleet.model_copy(update={"workers": 3, "sequence_parallel_size": 3})
    plan = plan.replace(config=plan.config.model_copy(update={"fleet": fleet}), world_size=3)
    share = computed(plan, data, lambda m: [slice_of(join(data, m), r, 3) for r in range(3)])
    assert fill_of(plan, data, by_document=True).computed_share == share >= 0.997
