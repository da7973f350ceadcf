"""What a run trained, written for others to use: the adapter, or base and adapter as one model.

Nothing is written before the merged model's logits are those of base + adapter, and nothing
stays before the written files were loaded again and say the same.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trimpot.runner import hub
from trimpot.runner.adapters import lora
from trimpot.runner.adapters.peft_io import CONFIG, WEIGHTS, read_adapter, write_adapter
from trimpot.runner.config import AdapterSection
from trimpot.runner.errors import CheckpointError, ExportError, ModelError, UserError
from trimpot.runner.folders import check_target, read_json, seal, staged
from trimpot.runner.logits import (
    Logits,
    Reference,
    check_sequences,
    distance,
    fingerprints,
    logits_of,
    rms_distance,
)
from trimpot.runner.plan.nf4_files import NF4
from trimpot.runner.tuned import (
    DTYPES,
    Trained,
    base_dtype,
    base_folder,
    checkpoint_weights,
    find_trained,
    load_tuned,
)
from trimpot.runner.types import Verdict

FP32_LIMIT = 1e-5
"""Of the logits' scale. Merging reorders sums: 2e-7 is usual of 2 layers, 2e-6 of 30."""
TINY = 1e-6
"""Of the logits' scale: what two correct computations in half precision may differ by for free."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


def export_run(run: Path, out: Path | None, *, merged: bool, dtype: str | None) -> dict[str, Any]:
    """Write a run's adapter, or its merged model, to `out` (RUN/export/adapter, …/merged).

    `dtype`: fp32 | bf16, of merged weights; the base's own without it.
    Returns {path, kind, dtype, verdict}. Raises ExportError where what would be written, or
    was, does not compute what was trained; UserError and its like for what the user can mend.
    """
    trained = find_trained(run)
    kind = _kind(trained, merged, dtype)
    target = (out or run / "export" / kind).absolute()
    target = target.parent.resolve() / target.name
    check_target(target)
    if trained.method == "lora":
        _check_adapter(trained)
    if kind == "merged":
        return _export_merged(trained, target, dtype or base_dtype(base_folder(trained.plan)))
    return _export_adapter(trained, target)


def _kind(trained: Trained, merged: bool, dtype: str | None) -> str:
    if dtype not in (None, "fp32", "bf16"):
        raise UserError(f"dtype {dtype} is not known; fp32 or bf16 is wanted")
    if not merged and trained.method != "lora":
        raise UserError(
            f"{trained.run} trained the model itself (method {trained.method}), so it has no "
            "adapter; export it with --merged"
        )
    if not merged and dtype is not None:
        raise UserError("dtype is of merged weights; add --merged, or leave --dtype out")
    return "merged" if merged else "adapter"


# --- the adapter


def _adapter(trained: Trained) -> tuple[AdapterSection, Tensors]:
    if trained.adapter is not None:
        return read_adapter(trained.adapter)
    return trained.plan.config.adapter, checkpoint_weights(trained)


def _check_adapter(trained: Trained) -> None:
    """Whether RUN/adapter is what the run trained. Raises CheckpointError, ExportError."""
    section, tensors = _adapter(trained)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise CheckpointError(f"{trained.source} holds values that are not finite; train it again")
    if not any(bool(t.any()) for name, t in tensors.items() if name.endswith(".lora_B")):
        raise ExportError(f"{trained.source} changes nothing: every lora_B is zero")
    wanted = trained.plan.config.adapter
    if (section.lora_rank, section.lora_alpha) != (wanted.lora_rank, wanted.lora_alpha):
        raise CheckpointError(
            f"{trained.source} has rank {section.lora_rank}, alpha {section.lora_alpha:g}; the "
            f"run trained rank {wanted.lora_rank}, alpha {wanted.lora_alpha:g}; "
            "put the run's own adapter back"
        )
    if trained.adapter is not None and trained.checkpoint is not None:
        _check_tensors(trained, tensors, checkpoint_weights(trained))


def _check_tensors(trained: Trained, tensors: Tensors, saved: Tensors) -> None:
    assert trained.checkpoint is not None
    if odd := _first_difference(tensors, saved):
        raise CheckpointError(
            f"{trained.adapter} is not what checkpoint {trained.checkpoint.path.name} holds "
            f"({odd} differs); remove it, and the checkpoint's is exported"
        )


def _first_difference(one: Tensors, other: Tensors) -> str | None:
    if odd := sorted(one.keys() ^ other.keys()):
        return odd[0]
    return next((name for name in one if not torch.equal(one[name], other[name])), None)


def _export_adapter(trained: Trained, target: Path) -> dict[str, Any]:
    section, tensors = _adapter(trained)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with staged(target, size) as partial:
        if trained.adapter is not None:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(trained.adapter / name, partial / name)
        else:
            write_adapter(tensors, section, trained.plan.model_path, partial)
        again_section, again = read_adapter(partial)
        odd = _first_difference(again, tensors)
        if odd or again_section.lora_alpha != section.lora_alpha:
            raise ExportError(f"the written adapter reads differently: {odd or 'lora_alpha'}")
        compared = f"checkpoint {trained.checkpoint.path.name}" if trained.checkpoint else "the run"
        reasons = [f"{len(tensors)} tensors, none empty, equal to those of {compared}"]
        if trained.plan.config.adapter.lora_init == "quantization_error":
            reasons.append(
                "it makes up for what NF4 took from the base: load it on the base in NF4, or merge"
            )
        scores = {"tensors": float(len(tensors)), "bytes": float(size)}
        verdict = Verdict(_digest(trained), True, scores, [*reasons, *_unfinished(trained)])
        return seal(partial, target, trained, "adapter", "fp32", verdict)


# --- the merged model


def _export_merged(trained: Trained, target: Path, dtype: str) -> dict[str, Any]:
    model, tokenizer, reference = _merge(trained, dtype)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    with staged(target, sum(sizes)) as partial:
        _save(model, tokenizer, trained, partial)
        before = fingerprints(model)
        del model
        _check_weights(partial, DTYPES[dtype], before, reference)
        _check_tokenizer(partial, tokenizer, trained.plan.config.data.chat_template)
        reasons = _reasons(trained, reference, dtype)
        verdict = Verdict(_digest(trained), True, reference.scores, reasons)
        return seal(partial, target, trained, "merged", dtype, verdict)


def _merge(trained: Trained, dtype: str) -> tuple[torch.nn.Module, hub.Tokenizer, Reference]:
    """The merged model in `dtype`, checked."""
    plan = trained.plan
    vocabulary = hub.model_facts(plan.model_path, plan.config.model.revision).vocab
    sequences, what = check_sequences(trained.run, vocabulary)
    low = None if dtype == "fp32" else _low_precision(trained, DTYPES[dtype], sequences)
    model, tokenizer = load_tuned(trained.run)
    reference = Reference(sequences, what, logits_of(model, sequences))
    lora.merge_lora(model)
    # In fp32 first, whatever is asked for: half precision would hide a scale that is off by 1 %.
    if reference.score(model, "error_fp32") > FP32_LIMIT:
        _decide_in_float64(trained, model, reference)
    if low is not None:
        logits, dtypes = low
        limit = 2 * rms_distance(logits, reference.exact) + TINY
        _cast(model, dtypes)
        error = reference.score(model, "error", rms_distance)
        reference.demand(error, limit, f"the merged model in {dtype}")
        reference.scores["allowed"] = limit
    return model, tokenizer, reference


def _decide_in_float64(trained: Trained, model: torch.nn.Module, reference: Reference) -> None:
    """Over FP32_LIMIT it may be the rounding of two orders of summation, or a wrong merge.

    SmolLM2-135M on random tokens is 1.4e-5 off in fp32, and 3e-6 with the same weights in float64.
    """
    unmerged, _ = load_tuned(trained.run)
    exact = logits_of(unmerged.double(), reference.sequences)
    del unmerged
    error = distance(logits_of(model.double(), reference.sequences), exact)
    model.float()  # loses nothing: the weights were fp32 before
    reference.scores["error_fp64"] = error
    reference.demand(error, FP32_LIMIT, "the merged model")


def _low_precision(
    trained: Trained, dtype: torch.dtype, sequences: list[torch.Tensor]
) -> tuple[Logits, dict[str, torch.dtype]]:
    """Logits of base + adapter as they run in `dtype`, and each parameter's dtype there: some
    models keep parts in fp32."""
    model, _ = load_tuned(trained.run, dtype)
    dtypes = {n.replace(".base_layer.", "."): p.dtype for n, p in model.named_parameters()}
    return logits_of(model, sequences), dtypes


def _cast(model: torch.nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Parameters only: rounding the rotary frequencies, which are buffers, costs accuracy."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def _save(model: torch.nn.Module, tokenizer: hub.Tokenizer, trained: Trained, folder: Path) -> None:
    """Weights, config, generation config, tokenizer, chat template, licence."""
    base = tokenizer.folder
    # Off while training; whoever generates with the exported model wants it as the base has it.
    config: Any = model.config
    config.use_cache = read_json(base / "config.json").get("use_cache", True)
    # transformers asks accelerate, which imports deepspeed, which complains of a missing GPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with hub.quiet():
        try:
            model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"transformers can't save this model: {error}") from error
    # Copied, not saved anew: these are the files that the run's tokens were made with.
    for path in base.iterdir():
        wanted = path.name in TOKENIZER_FILES or path.name.upper().startswith(("LICENSE", "NOTICE"))
        if wanted and _of_the_model(path, base):
            shutil.copyfile(path, folder / path.name)
    template = trained.plan.config.data.chat_template
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings = read_json(folder / "tokenizer_config.json")
        settings.pop("chat_template", None)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _of_the_model(path: Path, base: Path) -> bool:
    """Whether it is a file of the model's own: a link may lead to any file of whoever exports,
    and what is exported is given away. The hub's cache has links from snapshots/x to blobs."""
    top = base.parent.parent if base.parent.name == "snapshots" else base
    return path.is_file() and path.resolve().is_relative_to(top.resolve())


def _check_weights(
    folder: Path, dtype: torch.dtype, before: dict[str, str], reference: Reference
) -> None:
    """Load what was written, and compare it with what it was written from."""
    try:
        model = hub.load_causal_lm(folder, dtype=dtype, deepspeed=None).eval()
    except (ModelError, SafetensorError) as error:
        raise ExportError(f"the written files don't load: {error}") from error
    after = fingerprints(model)
    if odd := sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)):
        raise ExportError(f"the written files load differently: {len(odd)} weights, first {odd[0]}")
    # The weights are equal, so this asks whether the written config computes the same with them.
    low = "error" in reference.scores
    kept = reference.scores["error" if low else "error_fp32"]
    error = reference.score(model, "error_of_files", rms_distance if low else distance)
    reference.demand(error, max(FP32_LIMIT, 2 * kept), "the model of the written files")


def _check_tokenizer(folder: Path, tokenizer: hub.Tokenizer, template: str | None) -> None:
    again = hub.Tokenizer(folder)
    texts = ["What does `textwrap.dedent` do?\n", f"Größe 東京 12,5 % {tokenizer.end}"]
    chat = [{"role": "user", "content": texts[0]}]
    told: list[Any] = []
    for one, render in ((tokenizer, tokenizer.renderer(template)), (again, again.renderer(None))):
        told.append((list(one.encode(texts, special=True)), render and render(chat, True)))
    if told[0] != told[1]:
        raise ExportError("the written tokenizer or chat template differs from the run's")


def _reasons(trained: Trained, reference: Reference, dtype: str) -> list[str]:
    scores = reference.scores
    over = f"over {scores['tokens']:.0f} {reference.what} tokens"
    rows = [f"there is nothing to merge: method {trained.method}"]
    if trained.method == "lora":
        precision = "fp64" if "error_fp64" in scores else "fp32"
        rows = [
            f"merged logits in {precision} within {scores['error_' + precision]:.1e} of "
            f"base + adapter {over} (allowed {FP32_LIMIT:.0e})"
        ]
    if trained.plan.config.model.quantization == NF4:
        rows.append(f"the base's linear layers are those of its 4 bits, dequantised to {dtype}")
    if "error" in scores:
        rows.append(
            f"in {dtype} within {scores['error']:.1e} of fp32 (allowed {scores['allowed']:.1e}: "
            f"twice the error of the unmerged model in {dtype})"
        )
    files = (
        f"the written files load with equal weights, logits within {scores['error_of_files']:.1e}"
    )
    return [*rows, f"{files} {over}", *_unfinished(trained)]


# --- both


def _digest(trained: Trained) -> str:
    return trained.checkpoint.digest if trained.checkpoint else ""


def _unfinished(trained: Trained) -> list[str]:
    if trained.checkpoint is None:
        return ["no checkpoint is left to compare with"]
    if trained.checkpoint.complete:
        return []
    step, total = trained.checkpoint.step, trained.plan.total_steps
    return [f"the run has not finished: step {step} of {total}"]
