"""A toy run without torch: a random Llama of 30,000 parameters whose tokens are single bytes.

For tests of what comes before training. What a token is can be told by hand: token i of the
vocabulary is the i-th byte of `ALPHABET`, and the three special ones follow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = {text: 256 + i for i, text in enumerate((START, END, PAD))}
VOCABULARY = 256 + len(SPECIAL)
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, POSITIONS = 32, 48, 2, 4, 2, 128
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "eos_token_id": SPECIAL[END],
    "pad_token_id": SPECIAL[PAD],
}
ROWS = [{"prompt": f"What is {i}?", "completion": f"The number {i}."} for i in range(24)]
RUN: dict[str, Any] = {
    "model": {"path": "./model"},
    "precision": "fp32",
    "output_dir": "run",
    "data": {"train": "train.jsonl", "max_length": 96},
    "optim": {"batch_size": 4, "max_steps": 3},
    # Said, so that no test looks for GPUs or depends on how much memory is free.
    "fleet": {"gpus_per_worker": 0, "memory_per_worker": 2**30},
}


def toy_run(folder: Path) -> Path:
    """A folder with model/, train.jsonl and a run.yaml that can be trained → the run.yaml."""
    toy_model(folder / "model")
    write_rows(folder / "train.jsonl", ROWS)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toy_model(folder: Path, template: str | None = CHAT_TEMPLATE, bos: bool = False) -> Path:
    """Config, random weights and tokenizer, as save_pretrained would leave them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG), encoding="utf-8")
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(bos).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        **({"bos_token": PAD} if bos else {}),
        **({"chat_template": template} if template is not None else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def weights() -> dict[str, np.ndarray]:
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qo"}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (kv, HIDDEN) for n in "kv"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    draw = np.random.default_rng(0)
    return {n: 0.05 * draw.standard_normal(s, np.float32) for n, s in shapes.items()}


def tokenizer(bos: bool = False) -> Tokenizer:
    """One token a byte, and the special ones whole. `bos`: special tokens begin with PAD."""
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    if bos:
        inner.post_processor = TemplateProcessing(
            single=f"{PAD} $A", special_tokens=[(PAD, SPECIAL[PAD])]
        )
    return inner
