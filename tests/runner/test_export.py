"""Exports of runs that were really trained, held against PEFT and transformers themselves."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs import config, prepared, run_arrangements
from safetensors.torch import load_file, save_file
from tiny import chat_data, tiny_data
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from trimpot.cluster.cli import app
from trimpot.runner import folders
from trimpot.runner.adapters.lora import LoraLinear
from trimpot.runner.adapters.peft_io import CONFIG, WEIGHTS
from trimpot.runner.config import Config
from trimpot.runner.errors import (
    CheckpointError,
    ExportError,
    StorageError,
    TrimpotError,
    UserError,
)
from trimpot.runner.export import export_run
from trimpot.runner.journal import Journal
from trimpot.runner.manifest import seal_of, text_of
from trimpot.runner.tuned import load_base, load_tuned
from trimpot.runner.types import Event, StepReport

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TRAINED = "model.layers.2.*"
IDS = torch.randint(2048, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{method: run}, each of three steps on DeepSpeed."""
    folder = tmp_path_factory.mktemp("trained")
    steps: dict[str, Any] = {"optim": {"max_steps": 3, "batch_size": 4}}
    full: dict[str, Any] = {**steps, "adapter": None}
    full["optim"] = {**full["optim"], "learning_rate": 1e-3}
    data = tiny_data(folder)
    configs: dict[str, Config] = {
        "lora": config(model, data, folder / "lora", **steps),
        "full": config(model, data, folder / "full", method="full", **full),
        "freeze": config(
            model, data, folder / "freeze", method="freeze", freeze={"trainable": [TRAINED]}, **full
        ),
        "template": config(
            model,
            chat_data(folder),
            folder / "template",
            **{**steps, "data": {"chat_template": TEMPLATE}, "precision": "bf16"},
        ),
    }
    run_arrangements(1, [prepared(checked) for checked in configs.values()], folder)
    for name in configs:
        _write_journal(folder / name)
    return {name: folder / name for name in configs}


def _write_journal(run: Path) -> None:
    """What the worker tells its journal, with figures of our own."""
    journal = Journal(run)
    journal(Event("start", {"resumed_from": None, "versions": {"torch": "1.2.3"}}))
    for step, loss in ((0, 4.5), (4, 9.9)):
        journal(Event("eval", {"step": step, "loss": loss}))
    journal(Event("start", {"resumed_from": 1, "versions": {"torch": "4.5.6"}}))
    journal(StepReport(3, 1.0, 1e-3, 1.0, 9, 9, 0.1, 1))
    journal(Event("eval", {"step": 3, "loss": 3.25}))
    journal.close()
    with (run / "journal.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 4, "lo')


@pytest.fixture
def lora(trained: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained["lora"], tmp_path / "run"))


def hf(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().abs().max())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what is written is what was trained


def test_the_adapter_loads_in_peft_with_our_logits(model: Path, lora: Path):
    result = export_run(lora, None, merged=False, dtype=None)
    assert result["kind"] == "adapter" and result["path"] == str(lora / "export/adapter")
    assert result["verdict"]["passed"]
    manifest = json.loads(next(lora.glob("checkpoints/step-*/manifest.json")).read_text())
    assert manifest["step"] == 3
    theirs = PeftModel.from_pretrained(hf(model), result["path"]).eval()
    ours, _ = load_tuned(lora)
    assert error(logits(theirs), logits(ours)) < 1e-5
    assert error(logits(theirs), logits(hf(model))) > 1e-2, "it was trained"
    saved = load_file(next(lora.glob("checkpoints/step-*/state.safetensors")))
    exported = load_file(Path(result["path"], WEIGHTS))
    for name, tensor in exported.items():
        ours_name = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(tensor, saved[f"weight/{ours_name}"])


def test_the_merged_model_is_pefts_merge(model: Path, lora: Path):
    result = export_run(lora, None, merged=True, dtype=None)
    assert (result["kind"], result["dtype"]) == ("merged", "fp32")
    out = Path(result["path"])
    mine, peft = hf(out), PeftModel.from_pretrained(hf(model), str(lora / "adapter")).eval()
    assert error(logits(mine), logits(peft)) < 1e-5
    theirs = dict(peft.merge_and_unload().named_parameters())
    for name, weight in mine.named_parameters():
        assert error(weight, theirs[name]) < 1e-6, name
    stored = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in stored, "tied embeddings are stored once"
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert mine.config.use_cache, "off while training only"


def test_all_that_a_model_needs_is_beside_the_weights(model: Path, lora: Path):
    out = Path(export_run(lora, None, merged=True, dtype=None)["path"])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).is_file()
    chat = [{"role": "user", "content": "What does `a.b` do?"}]
    base, ours = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(out)
    wanted = base.apply_chat_template(chat, add_generation_prompt=True)
    assert ours.apply_chat_template(chat, add_generation_prompt=True) == wanted
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1, "others may read the weights where they may read the config"


def test_the_card_says_where_it_comes_from(model: Path, lora: Path):
    card = Path(export_run(lora, None, merged=True, dtype=None)["path"], "README.md").read_text()
    manifest = json.loads(next(lora.glob("checkpoints/step-*/manifest.json")).read_text())
    for fact in (model.name, "LoRA, rank 4, alpha 8", "4.5000", "3.2500", "torch 4.5.6"):
        assert fact in card
    assert manifest["data_digest"] in card
    assert "9.9" not in card, "superseded when the run resumed"


def test_bf16_is_as_near_as_bf16_gets(model: Path, lora: Path):
    result = export_run(lora, None, merged=True, dtype="bf16")
    stored = load_file(Path(result["path"], "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    adapter = str(lora / "adapter")
    exact = logits(PeftModel.from_pretrained(hf(model), adapter).eval())
    low = PeftModel.from_pretrained(
        hf(model, torch.bfloat16), adapter, autocast_adapter_dtype=False
    ).eval()
    merged = hf(Path(result["path"]), torch.bfloat16)
    own = (logits(low.to(torch.bfloat16)) - exact).norm()
    assert 0 < (logits(merged) - exact).norm() <= 2 * own
    assert result["verdict"]["scores"]["error_fp32"] < 1e-5, "fp32 is checked all the same"


def test_a_bf16_run_on_its_own_template(trained: dict[str, Path], tmp_path: Path):
    result = export_run(trained["template"], tmp_path / "out", merged=True, dtype="bf16")
    tokenizer = AutoTokenizer.from_pretrained(result["path"])
    chat = [{"role": "user", "content": "x"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user: x<|im_end|>\n<|im_start|>assistant: "


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_run_without_adapters_exports_its_weights(
    trained: dict[str, Path], model: Path, tmp_path: Path, method: str
):
    run = trained[method]
    result = export_run(run, tmp_path / "out", merged=True, dtype=None)
    saved = load_file(next(run.glob("checkpoints/step-00000003/state.safetensors")))
    reference = hf(model)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    weights = {k.removeprefix("weight/"): v for k, v in saved.items() if k.startswith("weight/")}
    assert not reference.load_state_dict(weights, strict=False).unexpected_keys
    found = hf(tmp_path / "out")
    assert error(logits(found), logits(reference)) < 1e-5
    for name, weight in found.named_parameters():
        touched = method == "full" or name.startswith("model.layers.2.")
        assert torch.equal(weight, before[name]) != touched, name
    assert any("nothing to merge" in reason for reason in result["verdict"]["reasons"])
    with pytest.raises(UserError, match=f"method {method}.*--merged"):
        export_run(run, tmp_path / "adapter", merged=False, dtype=None)


def test_the_verdict_lies_beside_what_it_is_of(lora: Path):
    result = export_run(lora, None, merged=True, dtype="fp32")
    out = Path(result["path"])
    sealed = json.loads((out / "verdict.json").read_text())
    assert {key: sealed[key] for key in ("kind", "dtype", "verdict")} == {
        key: result[key] for key in ("kind", "dtype", "verdict")
    }
    assert {*sealed["files"], "verdict.json"} == {path.name for path in out.iterdir()}
    for name, facts in sealed["files"].items():
        assert facts["size"] == (out / name).stat().st_size
    assert set(result["verdict"]) == {"checkpoint_digest", "passed", "scores", "reasons"}
    assert 0 < result["verdict"]["scores"]["error_fp32"] < 1e-5


def test_without_data_random_tokens_serve(lora: Path):
    shutil.rmtree(lora / "data")
    reasons = export_run(lora, None, merged=True, dtype=None)["verdict"]["reasons"]
    assert any("512 random tokens" in reason for reason in reasons)


def test_real_tokens_are_held_out_ones(lora: Path):
    reasons = export_run(lora, None, merged=True, dtype=None)["verdict"]["reasons"]
    assert any("held-out tokens" in reason for reason in reasons)


def test_no_process_group_is_joined(lora: Path):
    load_base(lora)
    load_tuned(lora)
    assert not torch.distributed.is_initialized()


# --- planted faults


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_scale_in_the_merge_is_caught(
    lora: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    def merged_weight(self: LoraLinear) -> torch.Tensor:
        update = self.lora_B.double() @ self.lora_A.double()
        return (self.base_layer.weight.double() + 1.02 * self.scale * update).float()

    monkeypatch.setattr(LoraLinear, "merged_weight", merged_weight)
    before = tree(lora)
    with pytest.raises(ExportError, match="nothing is written") as caught:
        export_run(lora, None, merged=True, dtype=dtype)
    assert caught.value.exit_code == 1
    assert tree(lora) == before and not (lora / "export").exists()


def test_a_merge_that_is_not_finite_is_caught(lora: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        LoraLinear, "merged_weight", lambda self: self.base_layer.weight * float("nan")
    )
    with pytest.raises(ExportError):
        export_run(lora, None, merged=True, dtype=None)


def test_fp32_noise_is_told_from_a_wrong_merge(lora: Path, monkeypatch: pytest.MonkeyPatch):
    """Under a limit that fp32 does not keep, float64 decides; a wrong merge fails there too."""
    noise = export_run(lora, None, merged=True, dtype=None)["verdict"]["scores"]["error_fp32"]
    monkeypatch.setattr("trimpot.runner.export.FP32_LIMIT", 0.9 * noise)
    scores = export_run(lora, None, merged=True, dtype=None)["verdict"]["scores"]
    assert 0 < scores["error_fp64"] < 0.9 * noise < scores["error_fp32"]


def spoil_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_config(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_config, cut_weights])
def test_files_that_were_written_wrong_do_not_stay(
    lora: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
):
    honest = LlamaForCausalLM.save_pretrained

    def save_pretrained(self: Any, folder: Path) -> None:
        honest(self, folder)
        spoil(folder)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_pretrained)
    before = tree(lora)
    with pytest.raises(ExportError, match="written files"):
        export_run(lora, None, merged=True, dtype=None)
    assert tree(lora) == before and not (lora / "export").exists()


# --- the folder it goes to


def test_a_second_export_takes_the_place_of_the_first(lora: Path):
    first = export_run(lora, None, merged=True, dtype="bf16")
    second = export_run(lora, None, merged=True, dtype="fp32")
    assert first["path"] == second["path"]
    stored = load_file(Path(second["path"], "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert [path.name for path in (lora / "export").iterdir()] == ["merged"]


def test_an_export_that_fails_leaves_the_one_before(lora: Path, monkeypatch: pytest.MonkeyPatch):
    out = Path(export_run(lora, None, merged=False, dtype=None)["path"])
    before = tree(out)
    monkeypatch.setattr(folders, "seal", None)

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", broken)
    with pytest.raises(StorageError, match="No space left"):
        export_run(lora, None, merged=False, dtype=None)
    assert tree(out) == before
    assert [path.name for path in (lora / "export").iterdir()] == ["adapter"]


@pytest.mark.parametrize("merged", [False, True])
def test_other_peoples_folders_are_left_alone(lora: Path, tmp_path: Path, merged: bool):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not from an export") as caught:
        export_run(lora, out, merged=merged, dtype=None)
    assert caught.value.exit_code == 2
    assert tree(out) == {"chapter.tex": b"years of work"}
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is no folder"):
        export_run(lora, file, merged=merged, dtype=None)


def test_a_note_that_was_put_into_an_export_is_not_deleted(lora: Path, tmp_path: Path):
    export_run(lora, tmp_path / "out", merged=False, dtype=None)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt, which the export did not write"):
        export_run(lora, tmp_path / "out", merged=False, dtype=None)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_given_and_parents_are_made(lora: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    export_run(lora, tmp_path / "empty", merged=False, dtype=None)
    result = export_run(lora, tmp_path / "a" / "b" / "c", merged=False, dtype=None)
    assert (tmp_path / "a/b/c" / CONFIG).is_file() and result["path"] == str(tmp_path / "a/b/c")


def test_a_disk_that_fills_up_leaves_nothing(lora: Path, tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StorageError, match="can't be written"):
            export_run(lora, tmp_path / "new" / "out", merged=True, dtype=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_or_read_only_is_said(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(StorageError, match="can't be written"):
        export_run(lora, Path("/proc/nobody/out"), merged=False, dtype=None)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1 << 20))
    with pytest.raises(StorageError, match="has 1 MiB free and the export needs"):
        export_run(lora, tmp_path / "new" / "out", merged=False, dtype=None)
    assert not (tmp_path / "new").exists()


# --- runs that are not what they should be


def rewrite_manifest(run: Path, **changes: Any) -> None:
    """As a save of that content would have written it: sealed."""
    path = next(run.glob("checkpoints/step-*/manifest.json"))
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(text_of({**manifest, "seal": seal_of(manifest)}))


def test_an_unfinished_run_is_exported_from_its_checkpoint(
    lora: Path, model: Path, caplog: pytest.LogCaptureFixture
):
    finished = load_file(lora / "adapter" / WEIGHTS)
    shutil.rmtree(lora / "adapter")
    rewrite_manifest(lora, complete=False)
    with caplog.at_level(logging.WARNING):
        result = export_run(lora, None, merged=False, dtype=None)
    assert "has not finished: step 3 of 3" in caplog.text
    assert any("has not finished" in reason for reason in result["verdict"]["reasons"])
    exported = load_file(Path(result["path"], WEIGHTS))
    assert all(torch.equal(exported[name], finished[name]) for name in finished)
    PeftModel.from_pretrained(hf(model), result["path"])


def test_a_finished_adapter_needs_no_checkpoint(lora: Path):
    shutil.rmtree(lora / "checkpoints")
    result = export_run(lora, None, merged=True, dtype=None)
    assert "no checkpoint is left to compare with" in result["verdict"]["reasons"]


def bend_adapter(run: Path) -> None:
    tensors = load_file(run / "adapter" / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, run / "adapter" / WEIGHTS)


def other_alpha(run: Path) -> None:
    path = run / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}))


def foreign_checkpoint(run: Path) -> None:
    rewrite_manifest(run, plan_digest="0")


def untrained_adapter(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    tensors = load_file(run / "adapter" / WEIGHTS)
    for name, tensor in tensors.items():
        tensor *= "lora_A" in name
    save_file(tensors, run / "adapter" / WEIGHTS)


def nothing_trained(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "adapter")


def no_plan(run: Path) -> None:
    (run / "plan.json").unlink()


def torn_plan(run: Path) -> None:
    (run / "plan.json").write_text("{")


def damaged_adapter(run: Path) -> None:
    path = run / "adapter" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (bend_adapter, CheckpointError, "is not what checkpoint step-00000003 holds"),
        (other_alpha, CheckpointError, "alpha 16; the run trained rank 4, alpha 8"),
        (foreign_checkpoint, CheckpointError, "with other settings"),
        (untrained_adapter, ExportError, "every lora_B is zero"),
        (nothing_trained, CheckpointError, "has nothing trained yet"),
        (no_plan, CheckpointError, "plan.json can't be read"),
        (torn_plan, CheckpointError, "plan.json is damaged"),
        (damaged_adapter, CheckpointError, "no readable PEFT adapter"),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_what_was_not_trained_is_not_exported(
    lora: Path, spoil: Callable[[Path], None], kind: type[TrimpotError], message: str, merged: bool
):
    spoil(lora)
    before = tree(lora)
    with pytest.raises(kind, match=message) as caught:
        export_run(lora, None, merged=merged, dtype=None)
    assert "\n" not in str(caught.value)
    assert tree(lora) == before and not (lora / "export").exists()


@pytest.mark.parametrize(
    ("merged", "dtype", "message"),
    [(True, "fp64", "fp32 or bf16"), (True, "fp16", "fp32 or bf16"), (False, "bf16", "--merged")],
)
def test_options_that_say_nothing_are_refused(lora: Path, merged: bool, dtype: str, message: str):
    with pytest.raises(UserError, match=message):
        export_run(lora, None, merged=merged, dtype=dtype)


def test_the_command_ends_with_one_json_object(lora: Path):
    done = CliRunner().invoke(app, ["export", str(lora), "--merged", "--dtype", "bf16", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kind"] == "merged" and result["verdict"]["passed"]
    done = CliRunner().invoke(app, ["export", str(lora)])
    assert done.exit_code == 0 and "28 tensors" not in done.stdout and "56 tensors" in done.stdout
