"""Adapters against PEFT itself: it reads ours, we read its, and both compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trimpot.runner.adapters.lora import adapter_off, add_lora, lora_layers, merge_lora
from trimpot.runner.adapters.peft_io import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    replace_folder,
    save_adapter,
)
from trimpot.runner.config import AdapterSection
from trimpot.runner.errors import CheckpointError

SECTION = AdapterSection(lora_rank=4, lora_alpha=12)
IDS = torch.randint(2048, (2, 24), generator=torch.Generator().manual_seed(1))


def plain(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shaken(model: Any) -> Any:
    """Every lora_A and lora_B random: a fresh B is zero and would hide any fault."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


def peft_saved(model: Path, folder: Path, **options: Any) -> torch.Tensor:
    """Have PEFT write a random adapter → the logits of its model."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    tuned = shaken(get_peft_model(plain(model), LoraConfig(**{**settings, **options}))).eval()
    tuned.save_pretrained(folder)
    return logits(tuned)


@pytest.fixture
def ours(model: Path, tmp_path: Path) -> Path:
    """An adapter of ours, saved."""
    tuned = plain(model)
    add_lora(tuned, SECTION, seed=0)
    shaken(tuned)
    tensors = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    save_adapter(tensors, SECTION, str(model), tmp_path / "ours")
    return tmp_path / "ours"


def test_peft_reads_ours_and_computes_the_same(model: Path, ours: Path):
    mine = plain(model)
    load_adapter(mine, ours)
    theirs = PeftModel.from_pretrained(plain(model), str(ours)).eval()
    assert len(lora_layers(mine)) == 4 * 7
    assert (logits(mine) - logits(theirs)).abs().max() < 1e-5
    assert (logits(mine) - logits(plain(model))).abs().max() > 0.1, "the adapter does something"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": [0, 3]},
        {"r": 3, "lora_alpha": 5, "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    ],
)
def test_we_read_what_peft_wrote(model: Path, tmp_path: Path, options: dict[str, Any]):
    wanted = peft_saved(model, tmp_path, **options)
    mine = plain(model)
    load_adapter(mine, tmp_path)
    assert (logits(mine.eval()) - wanted).abs().max() < 1e-5


def test_merging_is_pefts(model: Path, ours: Path):
    mine = plain(model)
    load_adapter(mine, ours)
    merge_lora(mine)
    theirs = PeftModel.from_pretrained(plain(model), str(ours)).merge_and_unload()
    weights = dict(mine.named_parameters())
    assert weights.keys() == dict(theirs.named_parameters()).keys()
    for name, weight in theirs.named_parameters():
        assert (weights[name] - weight).abs().max() < 1e-6, name


def test_adapter_off_is_the_base_bit_for_bit(model: Path, ours: Path):
    tuned = plain(model)
    load_adapter(tuned, ours)
    before = logits(tuned)
    with adapter_off(tuned):
        assert torch.equal(logits(tuned), logits(plain(model)))
    with pytest.raises(KeyError), adapter_off(tuned):
        raise KeyError  # Ctrl-C in the middle of an answer is such a way out
    assert torch.equal(logits(tuned), before)


# --- what is refused


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text()) | changes
        values = {key: value for key, value in values.items() if value != "gone"}
        (folder / CONFIG).write_text(json.dumps(values))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut short": (cut, "no readable PEFT adapter"),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), "no readable PEFT adapter"),
    "config gone": (lambda f: (f / CONFIG).unlink(), "no readable PEFT adapter"),
    "config no JSON": (lambda f: (f / CONFIG).write_text("{"), "no readable PEFT adapter"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "no JSON object"),
    "no rank": (edit_config(r="gone"), "no LoRA configuration: 'r'"),
    "rank a word": (edit_config(r="many"), "no LoRA configuration"),
    "rank another": (edit_config(r=8), r"is \(4, \d+\), and the model wants \(8, \d+\)"),
    "not LoRA": (edit_config(peft_type="LOHA"), "uses peft_type LOHA"),
    "rsLoRA": (edit_config(use_rslora=True), "uses use_rslora"),
    "ranks by layer": (edit_config(rank_pattern={"q_proj": 8}), "uses rank_pattern"),
    "a variant to come": (edit_config(use_newest=True), "uses use_newest"),
    "biases": (edit_config(bias="all"), "uses bias all"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), "uses init_lora_weights pissa"),
    "transposed": (edit_config(fan_in_fan_out=True), "uses fan_in_fan_out"),
    "heads saved": (edit_config(modules_to_save=["lm_head"]), "uses modules_to_save"),
    "no tensors": (edit_tensors(dict.clear), "holds no tensors"),
    "an empty tensor": (edit_tensors(lambda t: t.update({B0: torch.zeros(0)})), "is empty"),
    "B missing": (
        edit_tensors(lambda t: t.pop(B0)),
        "lacks model.layers.0.self_attn.q_proj.lora_B",
    ),
    "a tensor more": (
        edit_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "holds base_model.model.lm_head.weight",
    ),
    "another model's": (
        edit_tensors(lambda t: t.update({A0.replace("layers.0", "layers.9"): t.pop(A0)})),
        "adapts model.layers.9.self_attn.q_proj, no linear layer here",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_plain_adapter_of_the_model_is_refused(model: Path, ours: Path, fault: str):
    spoil, message = REFUSED[fault]
    spoil(ours)
    target = plain(model)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(target, ours)
    assert not lora_layers(target), "the model is as it was"
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_a_dora_adapter_of_peft_is_refused(model: Path, tmp_path: Path):
    peft_saved(model, tmp_path, use_dora=True)
    with pytest.raises(CheckpointError, match="uses use_dora"):
        load_adapter(plain(model), tmp_path)


def test_an_empty_adapter_is_not_written(tmp_path: Path):
    for tensors in ({}, {"x.lora_A": torch.zeros(0)}):
        with pytest.raises(CheckpointError, match="would be empty"):
            save_adapter(tensors, SECTION, "base", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_saving_again_replaces_and_leaves_nothing_beside(ours: Path):
    stale = ours.with_name(ours.name + ".partial")
    stale.mkdir()
    (stale / "left by a killed writer").touch()
    save_adapter({"x.lora_A": torch.ones(4, 2)}, SECTION, "base", ours)
    assert {path.name for path in ours.iterdir()} == {CONFIG, WEIGHTS}
    assert list(load_file(ours / WEIGHTS)) == ["base_model.model.x.lora_A.weight"]
    assert [path.name for path in ours.parent.iterdir()] == [ours.name]


def test_an_old_folder_stays_where_the_new_one_is_not_there(ours: Path):
    with pytest.raises(FileNotFoundError):
        replace_folder(ours.with_name("nowhere"), ours)
    assert (ours / WEIGHTS).is_file()
