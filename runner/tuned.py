"""A run's folder → its model: the base, or the base with what was trained put on."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from trimpot.runner import hub
from trimpot.runner.adapters.peft_io import load_adapter, put_adapter
from trimpot.runner.checkpoint import load_state, newest_checkpoint
from trimpot.runner.copies import look
from trimpot.runner.errors import CheckpointError, TrimpotError
from trimpot.runner.fetch import fetch_newest
from trimpot.runner.plan.plan import plan_from_json
from trimpot.runner.quantized import dequantise_layers, load_nf4
from trimpot.runner.store import Store
from trimpot.runner.types import Checkpoint, Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CONFIG_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run has trained so far, as it lies on disk."""

    run: Path
    plan: Plan
    adapter: Path | None
    """RUN/adapter, of a LoRA run that has finished."""
    checkpoint: Checkpoint | None
    """The newest good one; None of a finished run whose checkpoints were removed."""

    @property
    def method(self) -> str:
        return self.plan.config.method

    @property
    def source(self) -> Path:
        """Where the weights are read from."""
        if self.adapter is not None:
            return self.adapter
        assert self.checkpoint is not None
        return self.checkpoint.path


def find_trained(run: Path) -> Trained:
    """Look for a run's adapter or newest good checkpoint. Raises CheckpointError.

    Says through the log when the run has not finished, and which checkpoints are damaged.
    """
    plan = _read_plan(run)
    found = newest_checkpoint(run / "checkpoints", log.warning, set_aside=False)
    checkpoint = found[0] if found else None
    adapter = run / "adapter" if plan.config.method == "lora" else None
    adapter = adapter if adapter is not None and adapter.is_dir() else None
    if adapter is None and checkpoint is None:
        checkpoint = _fetched(run, plan)
    if checkpoint is not None and checkpoint.plan_digest != plan.digest:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of a run with other settings than {run}/plan.json; "
            "remove it, or train again with --fresh"
        )
    if adapter is None and checkpoint is None:
        raise CheckpointError(
            f"{run} has nothing trained yet: no good checkpoint; train it with `trimpot train`"
        )
    if adapter is None and checkpoint is not None and not checkpoint.complete:
        log.warning(
            "%s has not finished: step %s of %s is used", run, checkpoint.step, plan.total_steps
        )
    return Trained(run, plan, adapter, checkpoint)


def _fetched(run: Path, plan: Plan) -> Checkpoint | None:
    """The newest good checkpoint of the run's object store, brought into RUN/checkpoints."""
    if plan.config.checkpoint.copy_to is None:
        return None
    store = Store(plan.config.checkpoint.copy_to)
    token = f"fetched-{os.getpid()}"
    return fetch_newest(store, look(store), run / "checkpoints", 0, token, log.warning)[0]


def _read_plan(run: Path) -> Plan:
    path = run / "plan.json"
    try:
        return plan_from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror}); give the folder of a run (its output_dir)"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, TrimpotError) as error:
        fault = str(error).replace("\n", " ")[:200]
        raise CheckpointError(
            f"{path} is damaged or of another version ({fault}); train again with --fresh"
        ) from None


def base_folder(plan: Plan) -> Path:
    """The local folder of the base model. Raises ModelError."""
    return hub.fetch_model(plan.model_path, plan.config.model.revision)


def base_dtype(folder: Path) -> str:
    """The base's own dtype as its config.json says it: fp32 | bf16 | fp16; fp32 if it does not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for section in (config, config.get("text_config") or {}):
        name = section.get("dtype") or section.get("torch_dtype")
        if name in _CONFIG_DTYPES:
            return _CONFIG_DTYPES[name]
    return "fp32"


def load_base(
    run: Path, dtype: torch.dtype | None = torch.float32
) -> tuple[nn.Module, hub.Tokenizer]:
    """The run's base model in eval mode on the CPU, with its tokenizer.

    `dtype` None: the base's own. Raises CheckpointError, ModelError.
    """
    return _load_base(_read_plan(run), dtype)


def load_tuned(
    run: Path, dtype: torch.dtype | None = torch.float32
) -> tuple[nn.Module, hub.Tokenizer]:
    """The base with what the run trained; else as `load_base`. Adapters are put on, not merged."""
    trained = find_trained(run)
    model, tokenizer = _load_base(trained.plan, dtype)
    put_trained(model, trained)
    return model, tokenizer


def _load_base(plan: Plan, dtype: torch.dtype | None) -> tuple[nn.Module, hub.Tokenizer]:
    folder = base_folder(plan)
    # flash_attention_2 runs on GPUs in half precision only; here it may be neither.
    attention = "eager" if plan.config.model.attention == "eager" else "sdpa"
    dtype = dtype or DTYPES[base_dtype(folder)]
    section = plan.config.model
    if section.quantization == "none":
        model = hub.load_causal_lm(folder, dtype=dtype, attention=attention, deepspeed=None)
    else:  # what was trained on: the weights that its 4 bits stand for
        model = load_nf4(
            folder, dtype=dtype, attention=attention, double_quant=section.double_quant
        )
        dequantise_layers(model, dtype)
    return model.requires_grad_(False).eval(), hub.Tokenizer(folder)


def put_trained(model: nn.Module, trained: Trained) -> None:
    """Put what was trained on the base model, in place. Raises CheckpointError."""
    if trained.adapter is not None:
        load_adapter(model, trained.adapter)
    elif trained.method == "lora":
        section, tensors = trained.plan.config.adapter, checkpoint_weights(trained)
        put_adapter(model, section, tensors, trained.source)
    else:
        _put_weights(model, trained)
    model.requires_grad_(False).eval()


def trained_names(model: nn.Module, trained: Trained) -> list[str]:
    """Names of the parameters that a freeze or full run trains."""
    names = [name for name, _ in model.named_parameters()]
    if trained.plan.config.freeze is None:
        return names
    patterns = trained.plan.config.freeze.trainable
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def _put_weights(model: nn.Module, trained: Trained) -> None:
    weights = checkpoint_weights(trained)
    names = trained_names(model, trained)
    if odd := sorted(weights.keys() ^ set(names)):
        raise CheckpointError(
            f"checkpoint {trained.source} is of another model: {len(odd)} parameters differ, "
            f"first {odd[0]}"
        )
    parameters = dict(model.named_parameters())
    for name in names:
        if weights[name].shape != parameters[name].shape:
            raise CheckpointError(
                f"checkpoint {trained.source}: {name} is {tuple(weights[name].shape)}, "
                f"and the model wants {tuple(parameters[name].shape)}"
            )
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(weights.pop(name))


def checkpoint_weights(trained: Trained) -> dict[str, torch.Tensor]:
    """{parameter: fp32 weight} of the run's checkpoint, without the optimizer's moments."""
    assert trained.checkpoint is not None
    state = load_state(trained.checkpoint, keys=("weight",))
    return {name: values["weight"] for name, values in state.items()}
