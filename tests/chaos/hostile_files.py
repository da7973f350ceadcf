"""Adapters, GGUF files, what recipes read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

from hostile_inputs import HUGE, PICKLE, SHELL, Input, both, put, safetensors, zipped
from hostile_templates import ESCAPES


def adapters() -> Iterator[Input]:
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    a = safetensors(
        {
            "base_model.model.x.q_proj.lora_A.weight": {
                "dtype": "F32",
                "shape": [1],
                "data_offsets": [0, 4],
            }
        },
        b"\0" * 4,
    )
    for name, (config, weights) in {
        "pickled weights": (json.dumps(good), PICKLE),
        "a torch checkpoint": (json.dumps(good), zipped()),
        "a pickled configuration": (PICKLE, a),
        "a deep configuration": ("[" * 500_000, a),
        "a list": ("[]", a),
        "code": (json.dumps(good | {"auto_mapping": {"base_model_class": "os"}, "r": "x"}), a),
        "a huge rank": (json.dumps(good | {"r": HUGE}), a),
        "a rank of text": (json.dumps(good | {"r": "4; touch CANARY"}), a),
        "another method": (json.dumps(good | {"peft_type": "EVIL"}), a),
        "a header of all": (json.dumps(good), b"\xff" * 8 + b"{}"),
        "names that lead away": (
            json.dumps(good),
            safetensors(
                {"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000"
            ),
        ),
    }.items():  # fmt: skip
        make = both(
            put("a/adapter_config.json", config), put("a/adapter_model.safetensors", weights)
        )
        yield Input(f"adapter: {name}", make, args=("a",), action="adapter")
    pickled = both(
        put("a/adapter_config.json", json.dumps(good)), put("a/adapter_model.bin", zipped())
    )
    yield Input("adapter: .bin alone", pickled, args=("a",), action="adapter")


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def ggufs() -> Iterator[Input]:
    arch = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    numbers = {
        "nothing": b"",
        "a pickle": PICKLE,
        "only its name": b"GGUF",
        "another version": header(0, 0, version=99),
        "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 1, 1),
        "many tensors": header(2**60, 0),
        "many keys": header(0, 2**60),
        "nothing in it": header(0, 0),
        "a long key": header(0, 1, struct.pack("<Q", 2**62) + b"x"),
        "a key of noise": header(0, 1, struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc" + b"\0" * 12),
        "an unknown type": header(0, 1, text("k") + struct.pack("<I", 99)),
        "a long text": header(0, 1, text("k") + struct.pack("<IQ", 8, 2**62)),
        "a long list": header(0, 1, text("k") + struct.pack("<IIQ", 9, 0, 2**60)),
        "a long list of texts": header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, 2**60)),
        "lists in lists": header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1) * 20_000),
        "a tensor of many dimensions": header(1, 1, arch + text("t") + struct.pack("<I", 2**31)),
        "a huge tensor": header(
            1, 1, arch + text("t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)
        ),
        "a tensor far away": header(1, 1, arch + text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**62)),
        "a tensor of an unknown type": header(
            1, 1, arch + text("t") + struct.pack("<IQIQ", 1, 4, 999, 0)
        ),
        "the same key twice": header(0, 2, arch + arch),
        "an alignment of nothing": header(
            0, 2, arch + text("general.alignment") + struct.pack("<II", 4, 0)
        ),
        "a template that executes": header(
            0, 2, arch + text("tokenizer.chat_template") + struct.pack("<I", 8) + text(ESCAPES[7])
        ),
    }
    for name, raw in numbers.items():
        make = put("m.gguf", raw)
        yield Input(f"GGUF: {name}", make, args=("m.gguf", "run"), action="gguf")


def recipes() -> Iterator[Input]:
    for name, content in {
        "a pickle": PICKLE,
        "deep": "[" * 500_000,
        "a list": "[]",
        "of files elsewhere": json.dumps(
            {"recipe": "legal", "files": {"../outside/bait": "x", "/etc/passwd": "y"}}
        ),
        "of numbers": json.dumps({"recipe": 7, "files": [[1, 2]]}),
    }.items():
        make = put("run/manifest.json", content)
        args = ("recipe", "legal", "-o", "run", "--source", "nowhere")
        yield Input(f"a recipe's manifest that is {name}", make, args=args)
    for name in (SHELL, "../../etc", "technical;id"):
        yield Input(f"a recipe named {name[:20]}", lambda f: None, args=("recipe", name))
    for file in ("data.noun", "index.sense"):
        make = put(f"w/dict/{file}", PICKLE * 100)
        args = ("recipe", "legal", "-o", "run", "--source", "w")
        yield Input(f"WordNet with a {file} that is a pickle", make, args=args)
