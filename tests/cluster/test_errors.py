"""A user's mistakes: each one line that says what is and what was wanted, exit code 2, no traces.

Every case is a toy run that would train, with one thing made wrong. It runs `trimpot` in this
process, except where the process itself matters.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy
import yaml
from rich.console import Console

from trimpot.cluster import cli, elastic, prepare, train
from trimpot.cluster.display import Display
from trimpot.cluster.prepare import prepare_run, run_lock
from trimpot.runner.errors import SaveError
from trimpot.runner.run_yaml import load_config
from trimpot.runner.types import Event, Fleet

pytestmark = pytest.mark.alone

Mischief = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    name: str
    says: tuple[str, ...]
    """Fragments that the line must have."""
    args: tuple[str, ...] = ("train", "run.yaml")
    merge: dict[str, Any] = field(default_factory=dict)
    """Into the toy's run.yaml; None takes a key out."""
    do: Mischief = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    """What may be new afterwards: compiled data, which a mended config will find again."""


def key(name: str, merge: dict[str, Any], *says: str) -> Case:
    return Case(name, says, merge=merge)


def given(name: str, override: str, *says: str) -> Case:
    return Case(name, says, args=("train", "run.yaml", override))


def text(name: str, content: str | bytes, *says: str) -> Case:
    """run.yaml with this content."""
    return Case(name, ("run.yaml", *says), do=put("run.yaml", content))


def rows(name: str, values: list[Any], *says: str, **merge: Any) -> Case:
    """train.jsonl with these rows, and these keys in the section data."""
    return Case(
        name,
        ("train.jsonl", *says),
        merge={"data": merge},
        do=lambda folder: toy.write_rows(folder / "train.jsonl", values),
    )


def data(name: str, file: str, content: str | bytes, *says: str) -> Case:
    """data.train is this file."""
    return Case(name, (file, *says), merge={"data": {"train": file}}, do=put(file, content))


def model(name: str, do: Mischief, *says: str) -> Case:
    return Case(name, says, do=lambda folder: do(folder / "model"))


def put(name: str, content: str | bytes) -> Mischief:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def edit_json(name: str, **values: Any) -> Mischief:
    """Set keys of a JSON file; None takes one out."""

    def do(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return do


def cut(name: str, size: int) -> Mischief:
    """Keep the first `size` bytes; below zero, all but so many."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(name: str) -> Mischief:
    return lambda folder: (folder / name).unlink()


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_run(folder: Path) -> None:
    """What `trimpot train` leaves before workers start, of other settings."""
    config = load_config(folder / "run.yaml", ["optim.learning_rate=0.5"])
    with run_lock(folder / "run"):
        prepare_run(config, Fleet(memory_bytes=2**30), fresh=False)


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


ASK = {"role": "user", "content": "What is 1?"}
ANSWER = {"role": "assistant", "content": "The number 1."}
GOOD = toy.ROWS[0]
BASE = yaml.safe_dump(toy.RUN)
COMPILED = tuple(
    f"run{p}"
    for p in ("", "/.lock", "/data", *(f"/data/{s}.safetensors" for s in ("train", "eval")))
)
LONG = "x" * 300
RUN_LINE = ("no journal.jsonl", "output_dir")


CONFIG = [
    key("unknown section", {"modle": {}}, "unknown key modle", "did you mean model?"),
    key("unknown key of model", {"model": {"pth": "x"}}, "model.pth", "did you mean path?"),
    key("unknown key of data", {"data": {"max_len": 9}}, "data.max_len", "max_length?"),
    key("unknown key of optim", {"optim": {"bath_size": 8}}, "optim.bath_size", "batch_size?"),
    key("unknown key of fleet", {"fleet": {"zero": 2}}, "fleet.zero", "zero_stage"),
    key("unknown key of adapter", {"adapter": {"rank": 8}}, "adapter.rank", "lora_rank"),
    key("unknown key of checkpoint", {"checkpoint": {"evry": 1}}, "checkpoint.evry", "every_steps"),
    key("key of a section at the top", {"learning_rate": 1e-4}, "did you mean optim.learning_rate"),
    key("unknown key like nothing", {"data": {"zzz": 1}}, "data.zzz", "known here:", "train"),
    key(
        "text for a number", {"optim": {"batch_size": "many"}}, 'optim.batch_size is "many"', "int"
    ),
    key("a fraction for a count", {"optim": {"batch_size": 2.5}}, "optim.batch_size is 2.5", "int"),
    key(
        "yes and no for a count", {"optim": {"max_steps": [3]}}, "optim.max_steps is [3]", "integer"
    ),
    key("number for a path", {"data": {"train": 3}}, "data.train is 3", "string"),
    key("list for a section", {"optim": [1]}, "optim is [1]", "a section with keys is wanted"),
    key("nothing for a section", {"data": {"train": None}}, "data.train is missing"),
    key("no model", {"model": None}, "model is missing"),
    key("no output_dir", {"output_dir": None}, "output_dir is missing"),
    key("batch of none", {"optim": {"batch_size": 0}}, "optim.batch_size is 0", "greater than 0"),
    key("negative rate", {"optim": {"learning_rate": -1}}, "learning_rate is -1", "greater than 0"),
    key("rate out of all reason", {"optim": {"learning_rate": 50}}, "is 50", "less than 10"),
    key(
        "rate not a number",
        {"optim": {"learning_rate": float("nan")}},
        "learning_rate",
        "finite number",
    ),
    key(
        "endless epochs",
        {"optim": {"max_steps": None, "epochs": float("inf")}},
        "optim.epochs",
        "finite",
    ),
    key("seed below zero", {"seed": -1}, "seed is -1", "greater than or equal to 0"),
    key("rank over the limit", {"adapter": {"lora_rank": 1000}}, "lora_rank is 1000", "256"),
    key("dropout of all", {"adapter": {"lora_dropout": 1}}, "lora_dropout is 1", "less than 1"),
    key("beta of one", {"optim": {"betas": [0.9, 1.0]}}, "optim.betas.1 is 1.0", "less than 1"),
    key("one beta", {"optim": {"betas": [0.9]}}, "optim.betas", "missing"),
    key("unknown method", {"method": "qlora"}, 'method is "qlora"', "'lora', 'freeze' or 'full'"),
    key("unknown schedule", {"optim": {"schedule": "cos"}}, "optim.schedule", "'cosine'"),
    key("unknown precision", {"precision": "fp16"}, "precision", "'bf16' or 'fp32'"),
    key("unknown ZeRO stage", {"fleet": {"zero_stage": 4}}, "fleet.zero_stage is 4", "0, 1, 2"),
    key(
        "a row over no worker",
        {"fleet": {"sequence_parallel_size": 0}},
        "fleet.sequence_parallel_size is 0",
        "greater than 0",
    ),
    key("unknown sink", {"tracking": {"sinks": ["excel"]}}, "tracking.sinks.0", "'wandb'"),
    key("epochs and max_steps", {"optim": {"epochs": 1}}, "epochs and max_steps", "keep one"),
    key(
        "eval twice",
        {"data": {"eval": "e", "eval_fraction": 0.1}},
        "eval and eval_fraction",
        "keep one",
    ),
    key(
        "adapter without lora", {"method": "full", "adapter": {"lora_rank": 4}}, "adapter", "method"
    ),
    key(
        "unknown quantization",
        {"model": {"quantization": "fp4"}},
        'model.quantization is "fp4"',
        "'none' or 'nf4'",
    ),
    key(
        "4 bits and all trained",
        {"model": {"quantization": "nf4"}, "method": "full"},
        "quantization is nf4",
        "method is full; set method: lora",
    ),
    key(
        "4 bits in parts",
        {"model": {"quantization": "nf4"}, "fleet": {"zero_stage": 3}},
        "ZeRO-3 can't partition",
        "fleet.zero_stage 0, 1, 2",
    ),
    key(
        "double_quant of nothing",
        {"model": {"double_quant": True}},
        "double_quant is set, but quantization is none",
        "set quantization: nf4",
    ),
    key("freeze without names", {"method": "freeze"}, "freeze.trainable"),
    key("freeze without method", {"freeze": {"trainable": ["x"]}}, "method: freeze"),
    key("all steps warm-up", {"optim": {"warmup_steps": 3}}, "warmup_steps 3", "fewer"),
    key(
        "odd micro-batch",
        {"optim": {"micro_batch_size": 3}},
        "batch_size 4",
        "micro_batch_size 3",
        "6",
    ),
    key("line break in a path", {"output_dir": "a\nb"}, "output_dir", "one line"),
    key("a long name for data", {"data": {"train": LONG}}, "data.train", "300 bytes", "255"),
    key("a long name for a model", {"model": {"path": LONG}}, "model.path", "300 bytes", "255"),
    text("half a character in a path", BASE.replace("train.jsonl", '"\\ud800"'), "data.train"),
    text("empty run.yaml", "", "is empty", "model, data, output_dir"),
    text("run.yaml of one word", "train", "is a str", "mapping"),
    text("broken YAML", "model: [", "not valid YAML", "line 1"),
    text("tabs in YAML", "model:\n\tpath: x\n", "not valid YAML", "line 2"),
    text("a key twice", BASE + "seed: 1\nseed: 2\n", "'seed' stands twice", "line"),
    text("an alias of itself", BASE.replace("  path: ./model", "  &a path: *a"), "not valid YAML"),
    text(
        "a list in itself", BASE + "adapter: {target_modules: &a [*a]}\n", "aliases are not allowed"
    ),
    text(
        "an alias of aliases",
        BASE
        + "adapter:\n  target_modules:\n  - &a0 [x]\n"
        + "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "aliases are not allowed",
    ),
    text("deep nesting", "model: " + "[" * 5000, "too deep"),
    text("deep mapping", "model: " + "{a: " * 2000 + "1" + "}" * 2000, "too deep"),
    text("bytes for YAML", b"\x00\x01\x02\xff\xfe", "not UTF-8"),
    text("control characters in YAML", b"model: \x01", "not valid YAML"),
    text("a Python object in YAML", "model: !!python/object:os.system {}", "not valid YAML"),
    text("numbers for keys", BASE + "3: 4\n", "unknown key 3"),
    text(
        "an object for a date", BASE.replace("seed: 0", "") + "seed: 2024-01-01\n", "seed", "2024"
    ),
    given("override without a value", "optim.batch_size", "'optim.batch_size' is no override", "="),
    given("override without a key", "=3", "is no override", "section.key=value"),
    given("override of an unknown key", "optim.bath=3", "unknown key optim.bath"),
    given("override through a value", "precision.x=3", "goes into precision", "not a section"),
    given("override of broken YAML", "optim.betas=[1", "'optim.betas=[1'", "not valid"),
    given("override of a wrong type", "optim.batch_size=few", 'optim.batch_size is "few"'),
    given("override with two documents", "seed=1\n--- 2", "not valid"),
    Case(
        "run.yaml not there",
        ("nowhere.yaml is not there", "trimpot init"),
        ("train", "nowhere.yaml"),
    ),
    Case("a folder for run.yaml", ("is a folder", "did you mean run.yaml?"), ("train", ".")),
    Case("another folder for run.yaml", ("model is a folder", "a run.yaml"), ("plan", "model")),
    Case("a file for a folder", ("run.yaml/x", "Not a directory"), ("plan", "run.yaml/x")),
]

DATA = [
    key("data not there", {"data": {"train": "no.jsonl"}}, "no.jsonl is not there", ".parquet"),
    key("eval not there", {"data": {"eval": "no.jsonl"}}, "no.jsonl is not there", ".parquet"),
    key("model for data", {"data": {"train": "model"}}, "model", "dataset_info.json", ".jsonl"),
    data("no suffix", "train", "x", "no suffix", ".jsonl"),
    data("an unknown suffix", "train.xlsx", "x", "ends in .xlsx", ".jsonl"),
    data("empty JSONL", "t.jsonl", "", "has no rows"),
    data("blank JSONL", "t.jsonl", "\n \n", "has no rows"),
    data(
        "broken JSONL", "t.jsonl", json.dumps(GOOD) + '\n{"prompt": "x", "compl', "line 2", "JSON"
    ),
    data("numbers in JSONL", "t.jsonl", "1\n2\n", "line 1", "an object is wanted"),
    data("Latin-1 in JSONL", "t.jsonl", b'{"prompt": "caf\xe9"}', "line 1", "UTF-8"),
    data("UTF-16 in JSONL", "t.jsonl", json.dumps(GOOD).encode("utf-16"), "line 1", "UTF-8"),
    data("deep JSON", "t.jsonl", "[" * 200_000, "line 1", "nested too deeply"),
    data("JSON that is no list", "t.json", "{}", "a list of objects"),
    data("JSON of numbers", "t.json", "[1]", "item 1", "an object is wanted"),
    data("broken JSON", "t.json", "[{]", "not valid JSON"),
    data("empty JSON", "t.json", "", "not valid JSON"),
    data("empty CSV", "t.csv", "", "has no rows"),
    data("a CSV of titles", "t.csv", "prompt,completion\n", "has no rows"),
    data(
        "CSV with a field too many", "t.csv", "prompt,completion\na,b\na,b,c\n", "line 3", "quote"
    ),
    data("CSV with a field too few", "t.csv", "prompt,completion\na\n", "line 2", "2 fields"),
    data("CSV with an open quote", "t.csv", 'prompt,completion\n"a,b\n', "line", "not valid CSV"),
    data("Latin-1 in CSV", "t.csv", b"prompt,completion\ncaf\xe9,b\n", "UTF-8"),
    data("garbage Parquet", "t.parquet", b"PAR1" + b"\0" * 64 + b"PAR1", "not valid Parquet"),
    data("empty Parquet", "t.parquet", b"", "not valid Parquet"),
    Case(
        "a datasets folder of splits",
        ("saved", "DatasetDict", "one of its splits"),
        merge={"data": {"train": "saved"}},
        do=lambda f: ((f / "saved").mkdir(), put("saved/dataset_dict.json", "{}")(f)),
    ),
    Case(
        "a broken datasets folder",
        ("saved", "can't be opened by datasets"),
        merge={"data": {"train": "saved"}},
        do=lambda f: ((f / "saved").mkdir(), put("saved/dataset_info.json", "{}")(f)),
    ),
    rows("no known columns", [{"q": "a", "a": "b"}], "columns q, a", "prompt + completion"),
    rows("a row without columns", [GOOD, {"prompt": "x"}], "row 2 completion", "text is wanted"),
    rows("a number for an answer", [GOOD, GOOD | {"completion": 4}], "row 2", "int", "text"),
    rows("half a character", [GOOD] * 4 + [GOOD | {"prompt": "\ud800"}], "row 5 prompt", "Unicode"),
    rows(
        "half a character in a message",
        [chat(ASK, ANSWER | {"content": "\udfff"})],
        "row 1",
        "Unicode",
    ),
    rows("columns that are not there", [GOOD], "columns prompt, completion", "text", format="text"),
    rows("answers cut away", [GOOD] * 4, "none of 4 rows", "max_length", max_length=16),
    rows("empty answers", [{"text": ""}] * 4, "none of 4 rows", "token to train on"),
    rows("all too long", [GOOD] * 4, "4 over max_length", max_length=16, overlong="drop"),
    rows(
        "one too long",
        [GOOD] * 4,
        "row 1",
        "over data.max_length 16",
        max_length=16,
        overlong="error",
    ),
    rows("too few to hold out", [GOOD], "too few to hold any out", "data.eval_fraction=0"),
    rows("all the same", [GOOD] * 9, "too few to hold any out"),
    rows("messages no list", [{"messages": "hi"}], "row 1 messages is str", "role, content"),
    rows("no messages", [chat()], "row 1 messages is an empty list"),
    rows("a message without role", [chat({"content": "x"}, ANSWER)], "message 1 has no role"),
    rows(
        "a message in parts", [chat(ASK | {"content": [{}]}, ANSWER)], "message 1 has list content"
    ),
    rows("no assistant", [chat(ASK, ANSWER), chat(ASK)], "row 2", "no assistant message"),
    rows(
        "a template that refuses",
        [chat(ASK, ANSWER)],
        "row 1",
        "template fails: roles!",
        chat_template="{{ raise_exception('roles!') }}",
    ),
    rows(
        "a template of broken Jinja",
        [chat(ASK, ANSWER)],
        "template",
        chat_template="{% for %}",
    ),
    rows(
        "a template that looks outside",
        [chat(ASK, ANSWER)],
        "row 1",
        "template",
        "unsafe",
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ),
    rows(
        "a template that divides by zero",
        [chat(ASK, ANSWER)],
        "row 1",
        "template",
        "zero",
        chat_template="{{ 1 / 0 }}",
    ),
    rows(
        "a template without end",
        [chat(ASK, ANSWER)],
        "row 1",
        "template",
        chat_template="{% for i in range(10**9) %}x{% endfor %}",
    ),
    rows(
        "a template that rewrites",
        [chat(ASK, ANSWER, ASK, ANSWER)],
        "row 1",
        "rewrites",
        chat_template="{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ),
    rows(
        "a template that ignores all",
        [chat(ASK, ANSWER)] * 4,
        "none of 4 rows",
        "token",
        chat_template="the same for all",
    ),
    Case(
        "chat without a template",
        ("no chat template", "data.chat_template"),
        do=lambda f: (
            edit_json("tokenizer_config.json", chat_template=None)(f / "model"),
            toy.write_rows(f / "train.jsonl", [chat(ASK, ANSWER)] * 4),
        ),
    ),
]

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MODEL = [
    key("model not there", {"model": {"path": "./no"}}, "no is not there", "Hugging Face id"),
    key("a file for a model", {"model": {"path": "train.jsonl"}}, "is a file", "config.json"),
    key("an odd model name", {"model": {"path": "what is this?"}}, "neither a folder", "org/name"),
    key(
        "a hub model, offline",
        {"model": {"path": "org/none"}},
        "org/none",
        "not in the local cache",
        "local folder",
    ),
    model("no config.json", remove("config.json"), "config.json is not there", "save_pretrained"),
    model("broken config.json", put("config.json", "{"), "config.json is not valid JSON"),
    model("a list for config.json", put("config.json", "[]"), "config.json holds no JSON object"),
    model("config.json of another", put("config.json", "{}"), "no model_type", "save_pretrained"),
    model(
        "odd shapes",
        edit_json("config.json", num_attention_heads=0),
        "config.json: num_attention_heads is 0",
        "again",
    ),
    model(
        "4 bits of another kind",
        edit_json("config.json", quantization_config={**BNB, "bnb_4bit_quant_type": "fp4"}),
        "quantised by bitsandbytes to fp4",
        "nf4 in uint8",
    ),
    model(
        "in 4 bits already",
        edit_json("config.json", quantization_config=BNB),
        "is in 4 bits already (nf4)",
        "set model.quantization=nf4",
    ),
    model("no weights", remove("model.safetensors"), "model.safetensors is not there"),
    model("pickled weights", pickled_only, "pytorch_model.bin is pickled", "safetensors"),
    model("empty weights", put("model.safetensors", b""), "no safetensors file", "again"),
    model("weights of noise", put("model.safetensors", b"\xff" * 64), "no safetensors file"),
    model(
        "a damaged header",
        put("model.safetensors", (8).to_bytes(8, "little") + b"{notjson"),
        "damaged header",
        "again",
    ),
    model(
        "weights cut short",
        cut("model.safetensors", -100),
        "model.safetensors",
        "100 bytes",
        "again",
    ),
    model(
        "an index of files not there",
        put("model.safetensors.index.json", '{"weight_map": {"a": "part-1.safetensors"}}'),
        "part-1.safetensors is not there",
    ),
    model(
        "an index that leads outside",
        put("model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}'),
        "index.json",
        "outside",
    ),
    model("an index without map", put("model.safetensors.index.json", "{}"), "weight_map"),
    model("no tokenizer.json", remove("tokenizer.json"), "tokenizer.json is not there"),
    model("broken tokenizer.json", put("tokenizer.json", "{}"), "no usable tokenizer"),
    model("tokenizer.json cut short", cut("tokenizer.json", 500), "no usable tokenizer"),
    model("no end token", edit_json("tokenizer_config.json", eos_token=None), "eos_token"),
    model(
        "GPT-2's layers", edit_json("config.json", architectures=["GPT2LMHeadModel"]), "no linear"
    ),
    Case(
        "a tokenizer of another model",
        ("gives token", "vocab_size is 200"),
        do=lambda f: edit_json("config.json", vocab_size=200)(f / "model"),
        leaves=COMPILED,
    ),
]

PLAN = [
    key("over the positions", {"data": {"max_length": 4096}}, "4096", "128 positions", "=128"),
    key("unknown target", {"adapter": {"target_modules": ["query"]}}, "query", "q_proj"),
    key(
        "one unknown target",
        {"adapter": {"target_modules": ["q_proj", "query"]}},
        "query",
        "q_proj",
    ),
    key(
        "a name that freezes all",
        {"method": "freeze", "freeze": {"trainable": ["model.norm.*", "modle.*"]}},
        "freeze.trainable 'modle.*'",
        "model.",
    ),
    key("fewest over most workers", {"fleet": {"workers": {"min": 3, "max": 2}}}, "min 3", "max 2"),
    key("a range without its top", {"fleet": {"workers": {"min": 3}}}, "fleet.workers.max", "must"),
    key(
        "a range with a key of its own",
        {"fleet": {"workers": {"min": 1, "max": 2, "foo": 3}}},
        "unknown key fleet.workers.foo",
        "known here: max, min",
    ),
    key("no workers", {"fleet": {"workers": 0}}, "fleet.workers is 0", "greater than 0"),
    key(
        "more workers than work",
        {"fleet": {"workers": {"min": 9, "max": 20}}},
        "9 to 20",
        "4 micro-batches a step keep 4 busy",
        "fleet.workers.min=4",
    ),
    key("batch over workers", {"fleet": {"workers": 3}}, "batch_size 4", "3 workers", "is 6"),
    key(
        "micro-batch over workers",
        {"fleet": {"workers": 2}, "optim": {"micro_batch_size": 4}},
        "2 workers × micro_batch_size 4",
        "8",
    ),
    key(
        "workers that make no whole groups",
        {"fleet": {"workers": 3, "sequence_parallel_size": 2}},
        "3 workers do not divide into groups of fleet.sequence_parallel_size 2",
        "fleet.workers=4",
    ),
    key(
        "batch over groups of workers",
        {"fleet": {"workers": 6, "sequence_parallel_size": 2}},
        "batch_size 4 does not divide over 3 groups of 2 workers",
        "is 6",
    ),
    key(
        "micro-batch over groups of workers",
        {
            "fleet": {"workers": 4, "sequence_parallel_size": 2},
            "optim": {"micro_batch_size": 4},
        },
        "2 groups of 2 workers × micro_batch_size 4",
        "8",
    ),
    key(
        "heads over the workers of a row",
        {"fleet": {"workers": 3, "sequence_parallel_size": 3}},
        "sequence_parallel_size 3 does not divide the 4 attention heads of LlamaForCausalLM",
        "1, 2, 4",
    ),
    key(
        "a row over workers without its kernel",
        {
            "fleet": {"workers": 2, "sequence_parallel_size": 2},
            "kernels": {"varlen_attention": "off"},
        },
        "sequence_parallel_size 2",
        "kernels.varlen_attention is off",
        "auto",
    ),
    key(
        "a row over workers without kernels",
        {"fleet": {"workers": 2, "sequence_parallel_size": 2}, "kernels": {"default": "off"}},
        "kernels.varlen_attention is off",
        "auto",
    ),
    key("too little memory", {"fleet": {"memory_per_worker": 1000}}, "GiB", "data.max_length"),
    key(
        "a GPU nobody sells",
        {"fleet": {"gpu": "H1000", "memory_per_worker": None}},
        "H1000",
        "H100-80GB",
        "memory_per_worker",
    ),
    Case(
        "warm-up over an epoch",
        ("warmup_steps 50", "fewer"),
        merge={"optim": {"max_steps": None, "warmup_steps": 50}},
        leaves=COMPILED,
    ),
]

STORAGE = [
    Case("a file for output_dir", ("output_dir", "run", "a file"), do=put("run", "x")),
    Case(
        "output_dir under a file",
        ("output_dir", "Not a directory"),
        merge={"output_dir": "run.yaml/run"},
    ),
    Case(
        "output_dir that can't be made",
        ("output_dir /proc/run",),
        merge={"output_dir": "/proc/run"},
    ),
    Case(
        "output_dir of a long name", ("output_dir", "300 bytes", "255"), merge={"output_dir": LONG}
    ),
    Case(
        "another run's folder",
        ("other settings", "optim.learning_rate was 0.5", "--fresh"),
        do=a_run,
    ),
    Case(
        "a broken plan.json",
        ("plan.json is damaged", "--fresh"),
        do=lambda f: (a_run(f), put("run/plan.json", "{")(f)),
    ),
    Case(
        "a plan.json of noise",
        ("plan.json is damaged", "--fresh"),
        do=lambda f: (a_run(f), put("run/plan.json", b"\xff\xfe")(f)),
    ),
    Case("report of no run", ("model", *RUN_LINE), ("report", "model")),
    Case("report of nothing", ("nowhere is not there", "output_dir"), ("report", "nowhere")),
    Case("export of no run", ("model", *RUN_LINE), ("export", "model")),
    Case("chat with no run", ("model", *RUN_LINE), ("chat", "model")),
]

RAY = [
    Case(
        "an address without port",
        ("'nowhere'", "host:port"),
        ("train", "run.yaml", "--address", "nowhere"),
    ),
    Case("an odd port", ("'a:99999'", "host:port"), ("train", "run.yaml", "--address", "a:99999")),
    Case("an odd RAY_ADDRESS", ("'what'", "host:port"), environment={"RAY_ADDRESS": "what"}),
    Case(
        "an address of no host",
        ("no Ray cluster answers at host.invalid:6379", "leave it out"),
        ("train", "run.yaml", "--address", "host.invalid:6379"),
    ),
    Case("an empty address", ("''", "host:port"), ("train", "run.yaml", "--address", "")),
]

INIT = [
    Case(
        "init over a run.yaml", ("run.yaml is there", "--force"), ("init", "model", "train.jsonl")
    ),
    Case(
        "init without model",
        ("no is not there", "org/name"),
        ("init", "./no", "train.jsonl", "-o", "n.yaml"),
    ),
    Case(
        "init without data",
        ("no.csv is not there", ".jsonl"),
        ("init", "model", "no.csv", "-o", "n.yaml"),
    ),
    Case(
        "init into nowhere",
        ("no/n.yaml", "can't be written"),
        ("init", "model", "train.jsonl", "-o", "no/n.yaml"),
    ),
    Case(
        "init into a folder",
        ("model is a folder",),
        ("init", "model", "train.jsonl", "-o", "model"),
    ),
    Case(
        "init of unknown columns",
        ("t.csv row 1", "columns a, b", "prompt + completion"),
        ("init", "model", "t.csv", "-o", "n.yaml"),
        do=put("t.csv", "a,b\nc,d\n"),
    ),
]

USAGE = [
    Case("an unknown command", ("No such command 'trian'",), ("trian", "run.yaml")),
    Case("an unknown option", ("No such option", "--fast"), ("train", "run.yaml", "--fast")),
    Case("no run.yaml given", ("Missing argument", "config"), ("train",)),
    Case(
        "an option's odd value",
        ("--max-new-tokens", "integer"),
        ("chat", "run", "--max-new-tokens", "few"),
    ),
]

TABLE = [*CONFIG, *DATA, *MODEL, *PLAN, *STORAGE, *RAY, *INIT, *USAGE]


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in change.items():
        if value is None:
            out.pop(name, None)
        elif isinstance(value, dict) and isinstance(out.get(name), dict):
            out[name] = merged(out[name], value)
        else:
            out[name] = value
    return out


def tree(folder: Path) -> dict[str, bytes | None]:
    """Content of everything under a folder; None for folders."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy.toy_run(folder)
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the toy run, which is also the current folder."""
    folder = tmp_path / "toy"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    for name in (
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_USAGE_STATS_ENABLED",
        "RAY_AUTH_TOKEN",
        "RAY_TRAIN_V2_ENABLED",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
        "RAY_ADDRESS",
    ):
        monkeypatch.setenv(name, "0" * 64)  # train sets them; this puts them back afterwards
        if name == "RAY_ADDRESS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def arrange(case: Case, folder: Path) -> None:
    if case.merge:
        raw = merged(toy.RUN, case.merge)
        (folder / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    case.do(folder)


def trimpot(args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["trimpot", *args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def check_line(case: Case, stderr: str) -> None:
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n"), stderr
    assert "Traceback" not in stderr, stderr
    assert len(stderr) < 700, stderr
    for fragment in case.says:
        assert fragment in stderr, f"{fragment!r} is not in {stderr!r}"


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_one_line(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_cluster(*_: Any) -> None:
        pytest.fail("the mistake got as far as the workers")

    monkeypatch.setattr(elastic, "run_plan", no_cluster)
    started = train.ray_cluster
    monkeypatch.setattr(
        train, "ray_cluster", lambda at, cpus: started(at, cpus) if at is not None else no_cluster()
    )
    arrange(case, place)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    before = tree(place)
    capfd.readouterr()
    code = trimpot(case.args, monkeypatch)
    out, err = capfd.readouterr()
    check_line(case, err)
    assert code == 2
    assert out == ""
    after = tree(place)
    assert {k: after.get(k) for k in before} == before
    assert set(after) - set(before) <= set(case.leaves)


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 60
    assert len({case.name for case in TABLE}) == len(TABLE)


# --- what a table can't hold


def fails(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: Case
) -> None:
    """Run a case on a folder that is arranged already; nothing in it may change."""
    before = tree(place)
    capfd.readouterr()
    assert trimpot(case.args, monkeypatch) == 2
    check_line(case, capfd.readouterr().err)
    assert tree(place) == before


HOLD = (
    "import sys; from filelock import FileLock\n"
    "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()\n"
)


def test_a_run_that_another_process_holds(place: Path, monkeypatch, capfd) -> None:
    (place / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(place / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        case = Case("", (f"{place / 'run'} is in use by another trimpot", "another output_dir"))
        fails(place, monkeypatch, capfd, case)
        other.communicate()


def test_a_full_disk(place: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    case = Case("", ("has 0 MiB free", "MiB; free some", "another output_dir"))
    fails(place, monkeypatch, capfd, case)


def test_a_disk_that_fills_up_while_the_data_are_written(place: Path) -> None:
    """The limit on a file's size stands for the disk's: the same write fails in the same way."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    before = tree(place)
    done = elsewhere("train", "run.yaml", preexec_fn=limit)
    check_line(Case("", ("safetensors can't be written",)), done.stderr)
    assert done.returncode == 2
    assert tree(place) == before


def test_fresh_keeps_an_earlier_run_until_the_new_one_is_sound(
    place: Path, monkeypatch, capfd
) -> None:
    a_run(place)
    (place / "run" / "adapter").mkdir()
    put("run/adapter/adapter_model.safetensors", b"a night's work")(place)
    put("train.jsonl", "{")(place)
    case = Case("", ("train.jsonl line 1",), ("train", "run.yaml", "--fresh"))
    fails(place, monkeypatch, capfd, case)


def test_fresh_then_removes_what_was_of_the_earlier_run(place: Path) -> None:
    a_run(place)
    for part in ("checkpoints/step-00000002", "adapter", "of my own"):
        (place / "run" / part).mkdir(parents=True)
    put("run/journal.jsonl", "{}")(place)
    with run_lock(place / "run"):
        prepare_run(load_config(place / "run.yaml"), Fleet(memory_bytes=2**30), fresh=True)
    left = {path.name for path in (place / "run").iterdir()}
    assert left == {"data", "plan.json", "of my own", ".lock"}
    plan = json.loads((place / "run" / "plan.json").read_text())
    assert "learning_rate" not in plan["config"]["optim"]  # a_run's setting


def test_data_that_changed_since_the_checkpoint(place: Path, monkeypatch, capfd) -> None:
    with run_lock(place / "run"):
        prepare_run(load_config(place / "run.yaml"), Fleet(memory_bytes=2**30), fresh=False)
    saved = place / "run" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"data_digest": "of other data"}))
    fails(place, monkeypatch, capfd, Case("", ("the data changed", str(saved), "--fresh")))


def test_an_address_where_nobody_listens(place: Path, monkeypatch, capfd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, so that nobody else is there; and it doesn't listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        args = ("train", "run.yaml", "--address", address)
        fails(place, monkeypatch, capfd, Case("", (address, "refused", "leave it out"), args))


def elsewhere(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimpot.cluster.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


IN_A_PROCESS = (
    "run.yaml not there",
    "unknown key of optim",
    "broken JSONL",
    "answers cut away",
    "weights cut short",
    "batch over workers",
    "output_dir that can't be made",
    "an address without port",
)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_the_command_itself(name: str, place: Path) -> None:
    """As a person sees it, with whatever libraries would write to the terminal by themselves."""
    case = next(case for case in TABLE if case.name == name)
    arrange(case, place)
    before = tree(place)
    done = elsewhere(*case.args)
    check_line(case, done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    assert tree(place) == before


MANY = """
import io, json, os, sys
from contextlib import redirect_stderr
from trimpot.cluster import cli
codes = {}
for name, folder, args in json.load(sys.stdin):
    os.chdir(folder)
    sys.argv = ["trimpot", *args]
    with redirect_stderr(io.StringIO()):
        try:
            cli.main()
        except SystemExit as end:
            codes[name] = end.code
heavy = [m for m in ("torch", "ray", "transformers", "deepspeed", "datasets") if m in sys.modules]
print(json.dumps([codes, heavy]))
"""


@pytest.mark.parametrize(
    ("cases", "allowed"),
    [
        ([*CONFIG, *PLAN[:-1], *STORAGE[:4]], set()),
        ([c for c in DATA if "datasets" not in c.name], {"transformers"}),
    ],
    ids=["config", "data"],
)
def test_no_heavy_import(cases: list[Case], allowed: set[str], good: Path, tmp_path: Path) -> None:
    """Mistakes are told before Ray or torch is imported, which takes seconds."""
    todo = []
    for i, case in enumerate(cases):
        folder = tmp_path / str(i)
        shutil.copytree(good, folder)
        arrange(case, folder)
        todo.append((case.name, str(folder), case.args))
    done = subprocess.run(
        [sys.executable, "-c", MANY], input=json.dumps(todo), capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, heavy = json.loads(done.stdout)
    assert codes == {case.name: 2 for case in cases}
    assert set(heavy) <= allowed


def test_a_report_that_cannot_be_written_does_not_hide_how_the_run_ended(place: Path) -> None:
    """As on a disk that is full: the error of the run is what must be seen."""
    with run_lock(place / "run"):
        plan = prepare_run(load_config(place / "run.yaml"), Fleet(memory_bytes=2**30), False).plan
    for name in ("report.html", "failure.log"):
        (place / "run" / name / "in the way").mkdir(parents=True)
    display = Display(Console(file=io.StringIO()))
    watcher = train.Watcher(plan, display, started=0.0)
    watcher.tell(Event("start", {"run_dir": plan.run_dir, "resumed_from": None}))
    watcher._keep_failure(SaveError("no room"))
    history = watcher._end("failed", 3, "no room")
    assert history.end is not None
    assert (history.end["status"], history.end["error"]) == ("failed", "no room")
    assert any("report.html can't be written" in event["text"] for event in history.warnings)
