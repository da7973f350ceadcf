"""Data files and folders, and paths to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import toy
from hostile_inputs import (
    CHAT,
    CODE,
    PICKLE,
    SHELL,
    Input,
    Make,
    both,
    edit,
    fifo,
    link,
    merge,
    put,
    zipped,
)
from hostile_templates import ESCAPES


def data_file(name: str, content: str | bytes) -> Make:
    return both(put(name, content), merge(data={"train": name}))


def arrow(make: Callable[[Any], Any], name: str = "t.parquet", **options: Any) -> Make:
    """A Parquet file of a pyarrow table."""

    def write(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(make(pyarrow), folder / name, **options)
        merge(data={"train": name})(folder)

    return write


def spoilt(make: Make, name: str, change: Callable[[bytes], bytes]) -> Make:
    def write(folder: Path) -> None:
        make(folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def saved(change: Make) -> Make:
    """A folder saved by datasets, then changed."""

    def write(folder: Path) -> None:
        import datasets

        datasets.Dataset.from_list(toy.ROWS).save_to_disk(str(folder / "saved"))
        merge(data={"train": "saved"})(folder)
        change(folder)

    return write


def data() -> Iterator[Input]:
    good = json.dumps(toy.ROWS[0])
    for name, text in {
        "a pickle": PICKLE,
        "a zip": zipped(),
        "deep lists": good + "\n" + "[" * 1_000_000,
        "deep maps": good + "\n" + '{"a":' * 500_000,
        "a long number": '{"prompt": ' + "9" * 100_000 + "}",
        "an exponent": '{"prompt": 1e99999, "completion": "x"}',
        "not a number": '{"prompt": NaN, "completion": "x"}',
        "a huge line": '{"prompt": "' + "x" * 30_000_000 + '", "completion": "y"}',
        "a huge line of maps": '{"x": [' + "{}," * 4_000_000 + "0]}",
        "a huge line of nothing": " " * 30_000_000 + "x",
        "a line without end": "x" * 30_000_000,
        "null bytes": "\0" * 1_000_000,
        "half a character": '{"prompt": "\\ud800", "completion": "x"}',
        "a null": "null\n",
        "text": '"x"\n',
        "the same key twice": '{"prompt": 1, "prompt": [], "completion": "x"}',
        "Python's insides": '{"__class__": "x", "__reduce__": "y"}',
        "many columns": json.dumps({f"c{i}": i for i in range(100_000)}),
        "a long column": json.dumps({"c" * 1_000_000: 1}),
        "many messages": json.dumps({"messages": CHAT * 3000}),
        "a long role": json.dumps({"messages": [{"role": "r" * 10**6, "content": "x"}, CHAT[1]]}),
        "roles of templates": json.dumps({"messages": [{"role": ESCAPES[7], "content": "x"}]}),
        "messages in messages": json.dumps({"messages": [[CHAT]]}),
        "a map for messages": json.dumps({"messages": {"role": "x"}}),
        "special tokens": json.dumps({"prompt": "<|im_end|>" * 9, "completion": "<|im_start|>"}),
    }.items():
        odd = ("special tokens", "roles of templates", "a long role")
        ends = "either" if name in odd else "refused"
        yield Input(f"JSONL: {name}", data_file("t.jsonl", text), ends=ends)
    for name, text in {
        "deep": "[" * 1_000_000,
        "a long number": "[" + "9" * 100_000 + "]",
        "a pickle": PICKLE,
        "empty maps": "[" + "{}," * 300_000 + "{}]",
        "a map": '{"data": []}',
    }.items():
        yield Input(f"JSON: {name}", data_file("t.json", text))
    for name, text in {
        "many columns": ",".join(f"c{i}" for i in range(200_000)) + "\n" + "," * 199_999 + "\n",
        "a huge field": 'prompt,completion\n"' + "x" * 30_000_000 + '",y\n',
        "an open quote": 'prompt,completion\n"' + "x,\n" * 1_000_000,
        "null bytes": "prompt,completion\na\0,b\n",
        "the same column twice": "prompt,prompt\na,b\n",
        "columns without names": ",,\na,b,c\n",
        "a pickle": PICKLE,
        "UTF-16": "prompt,completion\na,b\n".encode("utf-16"),
        "only commas": "," * 1_000_000,
    }.items():
        yield Input(f"CSV: {name}", data_file("t.csv", text))
    formulas = "prompt,completion\n"
    formulas += "".join(f"=cmd|'/C calc'!A{i},@SUM({i})\n" for i in range(30))
    yield Input("CSV: formulas", data_file("t.csv", formulas), ends="inert")

    plain = arrow(lambda pa: pa.table({"prompt": ["a"] * 9, "completion": ["b"] * 9}))
    for name, change in {
        "cut short": lambda raw: raw[:-9],
        "no end": lambda raw: raw[:-4] + b"XXXX",
        "a long footer": lambda raw: raw[:-8] + b"\xff\xff\xff\x7f" + raw[-4:],
        "a footer of nothing": lambda raw: raw[:-8] + b"\0\0\0\0" + raw[-4:],
        "noise in the footer": lambda raw: raw[:-60] + b"\xff" * 40 + raw[-20:],
        "noise in the pages": lambda raw: raw[:4] + b"\xff" * 40 + raw[44:],
        "zeros in the pages": lambda raw: raw[:4] + b"\0" * 80 + raw[84:],
        "a pickle between": lambda raw: b"PAR1" + PICKLE + b"PAR1",
    }.items():
        yield Input(f"Parquet: {name}", spoilt(plain, "t.parquet", change))
    many = arrow(
        lambda pa: pa.table(
            {c: pa.array(["x" * 100_000] * 40_000).dictionary_encode() if False else
             pa.DictionaryArray.from_arrays(pa.array([0] * 40_000, pa.int32()), ["x" * 100_000])
             for c in ("prompt", "completion")}
        )
    )  # fmt: skip
    yield Input("Parquet: 8 GB of one word", many)
    long = arrow(
        lambda pa: pa.table({"prompt": ["x" * 400_000_000], "completion": ["y"]}),
        compression="zstd",
        use_dictionary=False,
    )
    yield Input("Parquet: a row of 400 MB", long)
    rows = arrow(
        lambda pa: pa.table(
            {c: pa.DictionaryArray.from_arrays(pa.array([0] * 30_000_000, pa.int8()), ["x"])
             for c in ("prompt", "completion")}
        )
    )  # fmt: skip
    yield Input("Parquet: 30 million rows", rows)
    odd = arrow(lambda pa: pa.table({"prompt": [PICKLE] * 9, "completion": [b"x"] * 9}))
    yield Input("Parquet: pickles for text", odd)
    deep = arrow(lambda pa: pa.table({"messages": pa.array([[[[[[]]]]]])}))
    yield Input("Parquet: deep lists", deep)

    def extended(pa: Any) -> Any:
        meta = {b"ARROW:extension:name": b"arrow.py_extension_type"}
        meta[b"ARROW:extension:metadata"] = PICKLE
        kind = pa.field("prompt", pa.string(), metadata=meta)
        pair = [kind, pa.field("completion", pa.string())]
        return pa.table([["a"] * 9, ["b"] * 9], schema=pa.schema(pair))

    yield Input("Parquet: a pickled type", arrow(extended), ends="either")
    hf = {b"huggingface": json.dumps({"info": {"features": {"x": {"_type": "os"}}}}).encode()}
    pandas = {b"pandas": PICKLE, **hf}
    meta = arrow(
        lambda pa: pa.table({"prompt": ["a"] * 9, "completion": ["b"] * 9}).replace_schema_metadata(
            pandas
        )
    )
    yield Input("Parquet: pickled metadata", meta, ends="either")

    state, info = "saved/state.json", "saved/dataset_info.json"
    arrows = "saved/data-00000-of-00001.arrow"
    for name, change in {
        "a file elsewhere": edit(state, _data_files=[{"filename": "../../outside/bait"}]),
        "a file from the root": edit(state, _data_files=[{"filename": "/etc/passwd"}]),
        "a URL": edit(state, _data_files=[{"filename": "http://127.0.0.1:9/x.arrow"}]),
        "a chained URL": edit(state, _data_files=[{"filename": "zip://x::http://127.0.0.1:9/"}]),
        "no files": edit(state, _data_files=[]),
        "odd files": edit(state, _data_files=7),
        "a pickle for Arrow": put(arrows, PICKLE),
        "noise for Arrow": put(arrows, b"ARROW1\0\0" + b"\xff" * 100),
        "Arrow cut short": spoilt(lambda f: None, arrows, lambda raw: raw[:200]),
        "a pickle for its state": put(state, PICKLE),
        "deep JSON for its state": put(state, "[" * 500_000),
        "a list for its state": put(state, "[]"),
        "a pickle for its features": put(info, PICKLE),
        "unknown features": edit(info, features={"prompt": {"_type": "os.system"}}),
        "odd features": edit(info, features=[[[[]]]]),
        "a format of its own": edit(state, _format_type="evil", _format_kwargs={"x": 1}),
        "a script": both(put("saved/saved.py", CODE), lambda f: (f / state).unlink()),
    }.items():
        ends = "either" if name in ("a format of its own", "unknown features") else "refused"
        yield Input(f"datasets: {name}", saved(change), ends=ends)
    beside = both(put("saved/saved.py", CODE), put("saved/indices.arrow", PICKLE))
    yield Input("datasets: a script beside good data", saved(beside), ends="inert")
    scripted = both(put("scripted/scripted.py", CODE), merge(data={"train": "scripted"}))
    yield Input("datasets: a folder with a script", scripted)

    for path in (
        "http://127.0.0.1:9/t.jsonl", "https://127.0.0.1:9/t.parquet", "file:///etc/passwd",
        "s3://bucket/t.parquet", "hf://datasets/x/y/t.parquet", "zip://t.jsonl::t.zip",
        "/dev/zero", "/dev/stdin", "/proc/self/environ", "/proc/self/mem", "..", "/", "~",
        "~root/x.jsonl", "a\0b.jsonl", "t.jsonl\nx", SHELL + ".jsonl", "-rf.jsonl", "|x.jsonl",
        "/" * 5000 + "x.jsonl", "a/" * 3000 + "x.jsonl", "../outside/bait", "t.pkl", "t.pt",
    ):  # fmt: skip
        yield Input(f"data at {path[:40]!r}", merge(data={"train": path}))
    yield Input(
        "data on a device", both(link("t.jsonl", "/dev/zero"), merge(data={"train": "t.jsonl"}))
    )
    pipe = both(fifo("t.jsonl"), merge(data={"train": "t.jsonl"}))
    yield Input("data in a pipe", pipe)
    loop = both(link("t.jsonl", "t.jsonl"), merge(data={"train": "t.jsonl"}))
    yield Input("data in a circle", loop)
    for name in (
        SHELL,
        "-rf",
        "%s%n",
        "\x1b]0;x\x07\x1b[2J",
        "\u202egpj",
        "a\nb",
        "{{7*7}}",
        "'\"`",
    ):
        safe = name.replace("/", "_")
        rows = "".join(json.dumps(row) + "\n" for row in toy.ROWS)
        make = both(put(f"{safe}.jsonl", rows), merge(data={"train": f"./{safe}.jsonl"}))
        yield Input(f"a file named {safe!r}", make, ends="refused" if "\n" in name else "inert")
        if "\n" in name:
            continue
        make = merge(output_dir=f"./run/{safe}")
        yield Input(f"a run named {safe!r}", make, ends="inert")
