"""A real model small enough for tests, trained here on the Python library's docstrings.

A random model hides faults: its logits are flat, its loss does not fall for the right reasons.
This one has about a million parameters, grouped heads and tied embeddings as its big
relatives have, and takes some 20 seconds once per cache folder.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimpot.runner.recipes import prepare, technical

VERSION = "2"
"""Raise it when anything here changes what is trained: caches outlive a checkout."""
VOCABULARY, LENGTH, BATCH, STEPS, LEARNING_RATE = 2048, 96, 16, 100, 4e-3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(cache: Path) -> Path:
    """The folder of the trained model under `cache`: safetensors, config, tokenizer.

    Made on the first call; processes that ask at the same time wait for the one that makes it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"tiny-{VERSION}"
    with FileLock(cache / f"tiny-{VERSION}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as stage:
                made = Path(stage) / "model"
                tokenizer = _train_tokenizer()
                _train_model(tokenizer).save_pretrained(made)
                tokenizer.save_pretrained(made)
                made.replace(folder)
    return folder


def tiny_data(folder: Path, rows: int = 64) -> Path:
    """A JSONL file of `rows` prompt/completion rows that the tiny model has not seen."""
    path = folder / f"prompts-{rows}.jsonl"
    return _write(path, [{"prompt": p, "completion": c} for p, c in _unseen(rows)])


def chat_data(folder: Path, rows: int = 64) -> Path:
    """The rows of `tiny_data` as conversations: a `messages` column."""
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
        for p, c in _unseen(rows)
    ]
    return _write(folder / f"chat-{rows}.jsonl", [{"messages": messages} for messages in turns])


@functools.cache
def _halves() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(seen while pretraining, left for the tests), as prompt and completion."""
    seen, unseen = prepare.split(technical.rows(None, lambda _: None), 0.5)
    return [row[:2] for row in seen], [row[:2] for row in unseen]


def _unseen(rows: int) -> list[tuple[str, str]]:
    unseen = _halves()[1]
    assert rows <= len(unseen), f"{rows} rows wanted, {len(unseen)} are left unseen"
    return unseen[:rows]


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _texts() -> list[str]:
    """Each seen row as a conversation and as plain text."""
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    seen = _halves()[0]
    return [chat.format(*row) for row in seen] + [f"{answer}<|endoftext|>" for _, answer in seen]


def _train_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ids = torch.tensor([i for text in tokenizer(_texts()).input_ids for i in text])
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_num_threads(1)  # no quarrel over cores with other tests
        try:
            return _fit(LlamaForCausalLM(_config(tokenizer)), ids)
        finally:
            torch.set_num_threads(threads)


def _fit(model: LlamaForCausalLM, ids: torch.Tensor) -> LlamaForCausalLM:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1
    )
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1))
        batch_BT = ids[starts + torch.arange(LENGTH)]
        model(input_ids=batch_BT, labels=batch_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()
