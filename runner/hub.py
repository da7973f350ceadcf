"""The one door to transformers: models and tokenizers. safetensors only, no remote code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimpot.runner.data.sandbox import Sandbox
from trimpot.runner.data.templates import Render
from trimpot.runner.errors import ModelError, StorageError
from trimpot.runner.gguf_header import check_gguf
from trimpot.runner.plan.facts import (
    ModelFacts,
    check_whole,
    facts_from,
    read_facts,
    read_json,
)
from trimpot.runner.reading import parse_json, read_bounded

if TYPE_CHECKING:
    import torch

TOKENIZER_BYTES = 128 * 2**20
"""Of a tokenizer's file; Gemma's have 33 MB."""
TOKENIZER_JSON = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
GROWTH = 64
"""Characters or tokens that a tokenizer may make of one."""
PROBE = "What does `textwrap.dedent` do?\n Größe 東京 12,5 % aaaaaaaa"
HUB_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


class Tokenizer:
    """A fast tokenizer with its chat template. Does not import torch."""

    def __init__(self, folder: Path):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        # AutoTokenizer imports torch (2 s); tokenizer.json needs nothing but this class (0.6 s).
        from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").exists():
            raise ModelError(
                f"{folder}/tokenizer.json is not there; save the model's fast tokenizer beside it"
            )
        with quiet(), _as_model_error(f"{folder} has no usable tokenizer"):
            for name in TOKENIZER_JSON:
                if (path := folder / name).exists():
                    said = parse_json(read_bounded(path, TOKENIZER_BYTES))
                    if name == "tokenizer.json":
                        _check_parts(said)
            self.inner = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            if type(self.inner.eos_token) is not str:
                raise ModelError(
                    f"the tokenizer in {folder} names no eos_token; set it in tokenizer_config.json"
                )
            if len(made := self.inner(PROBE, verbose=False)["input_ids"]) > GROWTH * len(PROBE):
                raise ValueError(f"it makes {len(made)} tokens of {len(PROBE)} characters")
        self.folder = folder

    @property
    def end(self) -> str:
        return str(self.inner.eos_token)

    @property
    def digest(self) -> str:
        """SHA-256 over what decides token ids: the tokenizer's file and its template."""
        digest = hashlib.sha256((self.folder / "tokenizer.json").read_bytes())
        digest.update(json.dumps([self.end, self.inner.chat_template], default=str).encode())
        return digest.hexdigest()

    def renderer(self, template: str | None) -> Render | None:
        """Renders conversations with `template`, or the tokenizer's own; None without one."""
        chosen = template if template is not None else self.inner.chat_template
        if isinstance(chosen, dict):  # several by name
            chosen = chosen.get("default")
            if chosen is None:
                raise ModelError(
                    f"the tokenizer in {self.folder} has several chat templates and no default; "
                    "set data.chat_template"
                )
        if chosen is None:
            return None
        return Sandbox(chosen, self.inner.special_tokens_map).render

    def encode(
        self, texts: Sequence[str], special: bool
    ) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, character offsets) of each text; `special` adds the tokenizer's BOS."""
        encoded = self.inner(
            list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)


def _check_parts(said: Any) -> None:
    """Whether what a tokenizer.json describes leaves texts about as long as they are: some
    replacements in a row double them each. Raises ValueError, before any of it is run."""
    growth, todo = 1.0, [said.get("normalizer"), said.get("post_processor")]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict):
            continue
        todo += part.get("normalizers") or part.get("processors") or []
        kind = part.get("type")
        if kind == "Prepend":
            growth *= max(1, len(part["prepend"]) / GROWTH)
        elif kind == "Replace":
            replaced = part["pattern"].get("String", "x")
            growth *= max(1, len(part["content"]) / max(1, len(replaced)))
        elif kind == "TemplateProcessing":
            growth *= max(1, len(part["single"]) / GROWTH)
    if growth > GROWTH:
        raise ValueError(f"it makes texts over {GROWTH} times as long as they are")


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Whatever a library says of a file of others: those can break it in any way there is."""
    with _no_panics():
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{what}: {_line(error)}") from error


@contextmanager
def _no_panics() -> Iterator[None]:
    """A panic of Rust code, which is no Exception and has told all of itself, as a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(_line(error)) from None


def check_code(folder: Path) -> None:
    """Whether transformers has the model's code itself. What a model brings along is never run:
    not asked for, not here, not at any revision. Raises ModelError."""
    from transformers import CONFIG_MAPPING

    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    brings = "brings code of its own (auto_map)" if "auto_map" in config else "has no code here"
    raise ModelError(
        f"{folder} is of model_type {str(kind)[:60]!r}, which {brings}, and only transformers' own "
        "is run; take a model that it has, or a newer transformers"
    )


def find_model(path: str, revision: str | None) -> Path | None:
    """The local folder of a model, or None for a hub id that has to be fetched.

    Raises ModelError for a path that is not there.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"model.path {path} is a file; a folder with config.json is wanted")
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ModelError(
            f"model.path {path} is not there; give a folder with config.json and safetensors, "
            "or a Hugging Face id (org/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise ModelError(
            f"model.path {path!r} is neither a folder here nor a Hugging Face id; "
            "give a folder with config.json, or org/name"
        ) from None
    return folder if _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Whether a cached snapshot is whole: a download that was cut off leaves some files."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = set(read_json(index).get("weight_map", {}).values())
    return all((folder / shard).is_file() for shard in shards)


def fetch_model(path: str, revision: str | None, weights: bool = True) -> Path:
    """The local folder of a model, downloaded where it has to be; without `weights` at least
    its config and tokenizer. Raises ModelError."""
    if (folder := find_model(path, revision)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    files: list[str] = [*HUB_FILES, *(["*.safetensors"] if weights else [])]
    with _hub_errors(path):
        return Path(snapshot_download(path, revision=revision, allow_patterns=files))


@contextmanager
def _hub_errors(path: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        why = f"and the hub answers: {_line(error)}; check the name"
    except OSError:  # ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError among them
        if constants.HF_HUB_OFFLINE:
            why = "and HF_HUB_OFFLINE forbids to fetch it; unset that"
        else:
            why = "and the hub does not answer; check the network"
    else:
        return
    raise ModelError(f"model {path} is not in the local cache {why}, or give a local folder")


def model_facts(path: str, revision: str | None) -> ModelFacts:
    """Shapes of a model; of a hub model only its headers are fetched."""
    if (folder := find_model(path, revision)) is not None:
        return read_facts(folder)
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors(path):
        config = read_json(Path(hf_hub_download(path, "config.json", revision=revision)))
        if config.get("quantization_config"):  # the headers alone do not say the shapes
            return read_facts(fetch_model(path, revision))
        files = HfApi().get_safetensors_metadata(path, revision=revision).files_metadata
    tensors = {n: tuple(t.shape) for file in files.values() for n, t in file.tensors.items()}
    return facts_from(config, tensors, path)


def load_causal_lm(
    folder: Path, *, dtype: torch.dtype, attention: str = "sdpa", deepspeed: dict[str, Any] | None
) -> torch.nn.Module:
    """An AutoModelForCausalLM in train mode on the CPU, or partitioned as `deepspeed` says.

    `deepspeed`: a ZeRO-3 config, under which each worker builds only its share.
    """
    from transformers import AutoModelForCausalLM

    check_whole(folder)
    check_code(folder)
    holder = None
    if deepspeed is not None:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        # Must live while the model is built: collected early, sharded loading turns itself off.
        holder = HfDeepSpeedConfig(deepspeed)
    with quiet(), _as_model_error(f"{folder} can't be loaded for causal_lm"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    del holder
    model.config.use_cache = False
    return model.train()


def empty_causal_lm(folder: Path) -> torch.nn.Module:
    """The model of a folder on torch's meta device: its modules, without their weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_code(folder)
    with quiet(), _as_model_error(f"{folder} can't be loaded for causal_lm"):
        # trust_remote_code: where nothing is said, transformers asks whoever sits at a terminal.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")  # its weights are ours to read
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def fill_causal_lm(
    empty: Any,
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
) -> torch.nn.Module:
    """As load_causal_lm, of what `empty_causal_lm` gave, with these tensors for the folder's."""
    from transformers import GenerationConfig

    with quiet(), _as_model_error(f"{folder} can't be loaded for causal_lm"):
        model = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=attention,
        )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    model.config.use_cache = False
    return model.train()


def recompute_layers(model: Any) -> list[torch.nn.Module]:
    """Activation checkpointing per layer, in place → those layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Not reentrant: the reentrant form needs inputs with gradients, which frozen embeddings
    # do not give.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def family_of(module: object) -> str | None:
    """The family whose code in transformers a module's class is of: "llama", "qwen3" …"""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 3 else None


@dataclass(frozen=True)
class AttentionCode:
    """What a family's attention layer calls in transformers."""

    functions: Any
    eager: Callable[..., Any]
    rotate: Callable[..., Any]

    def function(self, config: Any) -> Callable[..., Any]:
        """The attention function that the model's config names: sdpa, flash_attention_2 …"""
        return self.functions.get_interface(config._attn_implementation, self.eager)


def attention_code(attention: object) -> AttentionCode:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    code = sys.modules[type(attention).__module__]
    return AttentionCode(
        ALL_ATTENTION_FUNCTIONS, code.eager_attention_forward, code.apply_rotary_pos_emb
    )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars and advice off: the run's display is the one that speaks."""
    from transformers.utils import logging as speech

    level = speech.get_verbosity()
    speech.set_verbosity_error()
    speech.disable_progress_bar()
    try:
        yield
    finally:
        speech.set_verbosity(level)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model and tokenizer as safetensors, config.json and tokenizer.json.

    The weights are written in float32: of dequantised Q4_1 weights (4 bits × a float16 scale +
    a float16 offset) bfloat16 holds a fifth exactly and would round the others a second time.
    Raises ModelError where the file can't be read or does not make a working chat model,
    StorageError where `out` can't be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _silent():
        with _as_model_error(f"{gguf} can't be converted"):
            check_gguf(gguf)
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
            )
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
                trust_remote_code=False,
            ).eval()
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")  # the weights are dense from here on
        tokenizer.model_max_length = model.config.max_position_embeddings
        _check_converted(model, tokenizer, gguf)
        try:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{out} can't be written: {_line(error)}") from None


REPEATED = "My name is Zorblax Quindel. I live in Veltrope. " * 4


def _check_converted(model: Any, tokenizer: Any, gguf: Path) -> None:
    """Raises ModelError unless turns end with the EOS token and the model copies what it read.

    Loss as a share of chance, ln(vocabulary), SmolLM2-135M on REPEATED: 0.16 as it should be,
    0.45 to 0.47 with the rows of q and k in a wrong order, 1.12 with every o_proj transposed.
    Plain prose tells these apart badly (0.51 against 0.47 on eight tokens). One transposed
    matrix of one layer is not seen (0.17).
    """
    import torch

    end = tokenizer.eos_token_id
    if tokenizer.chat_template is None or end is None:
        raise ModelError(f"{gguf} has no chat template or no end token; a chat model is wanted")
    if end != model.generation_config.eos_token_id:
        raise ModelError(f"{gguf} names two end-of-text tokens; its tokenizer and model must agree")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    template = Sandbox(tokenizer.chat_template, tokenizer.special_tokens_map)
    with _as_model_error(f"{gguf}: its chat template fails"):
        text = template.render(turns, False).rstrip()
        question = template.render(turns[:1], True)
    if tokenizer(text, add_special_tokens=False).input_ids[-1] != end:
        raise ModelError(f"{gguf}: its chat template ends a turn without {tokenizer.eos_token}")
    ids = tokenizer(REPEATED, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
        prompt = tokenizer(question, add_special_tokens=False, return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    chance = math.log(model.config.vocab_size)
    if not loss < 0.3 * chance or answer.shape[1] <= prompt["input_ids"].shape[1]:
        raise ModelError(
            f"{gguf} converts to a model with loss {loss:.2f} on a text that repeats itself, "
            f"under {0.3 * chance:.2f} was wanted; the file is damaged, or not of a kind that "
            "transformers can read"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """quiet, and also what libraries log or draw past transformers' switches.

    The GGUF reader's bar is a bare tqdm on stderr, and DeepSpeed, which save_pretrained
    imports, warns of a machine without a GPU. Errors pass as exceptions.
    """
    disabled = logging.root.manager.disable
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
