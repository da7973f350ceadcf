"""Model folders: weights, indexes, code, sizes; tokenizers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import toy
from hostile_inputs import (
    CODE,
    HUGE,
    PICKLE,
    SHELL,
    Input,
    Make,
    both,
    edit,
    fifo,
    link,
    put,
    safetensors,
    zipped,
)


def reheaded(change: Callable[[dict[str, Any]], Any]) -> Make:
    """The toy's weights with a changed header."""

    def make(folder: Path) -> None:
        path = folder / "model/model.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        changed = change(header) or header
        path.write_bytes(safetensors(changed, raw[8 + length :]))

    return make


def set_entry(**values: Any) -> Make:
    def change(header: dict[str, Any]) -> None:
        header["model.norm.weight"] |= values

    return reheaded(change)


REMOTE = {
    "auto_map": {
        "AutoConfig": "evil.X",
        "AutoModelForCausalLM": "evil.X",
        "AutoModel": "evil.X",
        "AutoTokenizer": ["evil.X", "evil.X"],
    }
}
TAKE_QUANTIZED = ["train", "run.yaml", "model.quantization=nf4"]


def models() -> Iterator[Input]:
    weights = "model/model.safetensors"
    for name, raw in {
        "a pickle": PICKLE,
        "a torch checkpoint": zipped(),
        "nothing": b"",
        "eight bytes": b"\0" * 8,
        "a length of all": b"\xff" * 8 + b"{}",
        "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
        "a length of 100 MB": struct.pack("<Q", 10**8) + b"{}",
        "a length of nothing": struct.pack("<Q", 0),
        "deep JSON": safetensors(b"[" * 500_000),
        "deep JSON of maps": safetensors(b'{"a":' * 200_000),
        "many tensors": safetensors(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        ),
        "a list": safetensors([]),
        "a number": safetensors(b"9" * 10_000),
        "no UTF-8": safetensors(b"\xff\xfe{}"),
        "a list for an entry": safetensors({"a": []}),
        "no dtype": safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        "HDF5": b"\x89HDF\r\n\x1a\n" + b"\0" * 64,
        "a zip bomb's name": b"PK\x03\x04" + b"\0" * 64,
    }.items():
        yield Input(f"weights: {name}", put(weights, raw), action="worker")
    for name, values in {
        "negative dimensions": {"shape": [-1, -32]},
        "a huge dimension": {"shape": [HUGE]},
        "many huge dimensions": {"shape": [HUGE] * 1000},
        "a fraction for a dimension": {"shape": [1.5]},
        "text for a dimension": {"shape": ["x"]},
        "a very long dimension": {"shape": ["9" * 5000]},
        "no shape": {"shape": None},
        "overlapping offsets": {"data_offsets": [0, 128]},
        "offsets backwards": {"data_offsets": [128, 0]},
        "offsets beyond the end": {"data_offsets": [0, HUGE]},
        "negative offsets": {"data_offsets": [-128, 0]},
        "one offset": {"data_offsets": [0]},
        "an unknown dtype": {"dtype": "OBJ"},
        "another dtype": {"dtype": "F64"},
        "another shape": {"shape": [16]},
    }.items():
        yield Input(f"weights: {name}", set_entry(**values), action="worker")
    big = {"__metadata__": {"format": "x" * 10**6}}
    yield Input(
        "weights: long metadata", reheaded(lambda h: h | big), action="worker", ends="either"
    )
    odd = {"__metadata__": {"format": "pickle"}}
    kind = reheaded(lambda h: h | odd)
    yield Input("weights: of a pickle's format", kind, action="worker", ends="either")
    index = "model/model.safetensors.index.json"
    for name in (
        "../outside/bait", "../../outside/bait", "/etc/passwd", "/dev/zero", "..", ".", "",
        "model.safetensors/../../../outside/bait", "..\\outside\\bait", "a\0b", "\n", "config.json",
        "http://127.0.0.1:9/x.safetensors", "file:///etc/passwd", "~/bait", SHELL, "x" * 5000,
    ):  # fmt: skip
        make = put(index, json.dumps({"weight_map": {"model.norm.weight": name}}))
        yield Input(f"an index that names {name[:40]!r}", make, action="worker")
    for name, text in {
        "a list": "[]",
        "a map of lists": '{"weight_map": {"a": ["model.safetensors"]}}',
        "deep": "[" * 500_000,
        "a pickle": PICKLE,
    }.items():
        yield Input(f"an index that is {name}", put(index, text), action="worker")
    pickled = both(lambda f: (f / weights).unlink(), put("model/pytorch_model.bin", zipped()))
    yield Input("a model that is pickled", pickled, says=("pickled",), action="worker")
    pickled = both(lambda f: (f / weights).unlink(), put("model/model.pt", PICKLE))
    yield Input("a model that is pickled, .pt", pickled, says=("pickled",), action="worker")
    more = dict.fromkeys(
        ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.pkl"), PICKLE
    )
    beside = both(*(put(f"model/{name}", raw) for name, raw in more.items()))
    yield Input("pickles beside good weights", beside, ends="inert", action="worker")
    yield Input("weights on a device", link(weights, "/dev/zero"), action="worker")
    yield Input("weights in a pipe", both(lambda f: (f / weights).unlink(), fifo(weights)))

    settings = "model/config.json"
    code = both(put("model/evil.py", CODE), put("model/modeling_evil.py", CODE))
    for name, values in {
        "of its own type": {**REMOTE, "model_type": "evil"},
        "of its own type, without a map": {"model_type": "evil"},
        "in another repository": {
            "model_type": "evil", "auto_map": {"AutoConfig": "evil/evil--evil.X"}
        },
        "as custom generation": {"model_type": "evil", "custom_generate": "evil"},
        "up a folder": {"model_type": "evil", "auto_map": {"AutoConfig": "../evil.X"}},
        "for the text part": {"model_type": "evil", "text_config": {**REMOTE, "hidden_size": 32}},
    }.items():  # fmt: skip
        make = both(edit(settings, **values), code)
        yield Input(f"code {name}", make, action="worker")
        if name == "of its own type":
            args = tuple(TAKE_QUANTIZED)
            yield Input(f"code {name}, in 4 bits", make, args=args, action="worker")
    make = both(edit(settings, **REMOTE), code, edit("model/tokenizer_config.json", **REMOTE))
    yield Input("code beside a type we know", make, ends="inert", action="worker")
    args = tuple(TAKE_QUANTIZED)
    yield Input(
        "code beside a type we know, 4 bits", make, ends="inert", args=args, action="worker"
    )
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        make = edit(settings, **{key: "evil/evil-kernel"})
        yield Input(f"a kernel from the hub by {key}", make, action="worker", ends="either")
    for name, values in {
        "torch.load's": {"quant_method": "torchao", "quant_type": {"default": {"_type": "os"}}},
        "unknown": {"quant_method": "evil"},
        "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "dataset": "/etc/passwd"},
        "compressed": {"quant_method": "compressed-tensors", "config_groups": {}},
        "a list": [1],
        "4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }.items():
        make = edit(settings, quantization_config=values)
        ends = "either" if name in ("a list", "unknown") else "refused"
        yield Input(f"quantisation: {name}", make, action="worker", ends=ends)
    for base in ("../outside", "evil/evil", "/etc", "http://127.0.0.1:9/x"):
        values = {"peft_type": "LORA", "base_model_name_or_path": base}
        make = put("model/adapter_config.json", json.dumps(values))
        yield Input(f"a model that is an adapter on {base}", make, action="worker")
    for key in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "intermediate_size", "max_position_embeddings", "head_dim",
    ):  # fmt: skip
        for value in (HUGE, 10**40):
            ends = "either" if key == "max_position_embeddings" else "refused"
            make = edit(settings, **{key: value})
            yield Input(f"config.json: {key} {value:.0e}", make, action="worker", ends=ends)
    for name, values in {
        "layers": {"num_hidden_layers": 2_000_000},
        "a negative size": {"hidden_size": -32},
        "text for a size": {"hidden_size": "32"},
        "a list for a size": {"num_hidden_layers": [2]},
        "no size": {"hidden_size": None},
        "a number for the type": {"model_type": 7},
        "a path for the type": {"model_type": "../evil"},
        "odd architectures": {"architectures": [["x"]], "model_type": "evil"},
        "an odd activation": {"hidden_act": "os.system"},
        "an odd epsilon": {"rms_norm_eps": "x"},
        "odd rotary settings": {"rope_parameters": {"rope_type": "evil", "factor": HUGE}},
        "a dtype of its own": {"dtype": "os.system"},
        "an odd end token": {"eos_token_id": HUGE, "pad_token_id": -HUGE},
        "a text part that is a list": {"text_config": [1], "hidden_size": None},
    }.items():
        ends = (
            "either"
            if name in ("a dtype of its own", "odd architectures", "an odd end token")
            else "refused"
        )
        yield Input(f"config.json: {name}", edit(settings, **values), action="worker", ends=ends)
    for name, text in {
        "deep": "[" * 500_000,
        "deep maps": '{"a":' * 300_000,
        "a long number": '{"hidden_size": ' + "9" * 100_000 + "}",
        "not a number": '{"hidden_size": NaN, "model_type": "llama"}',
        "a pickle": PICKLE,
        "UTF-16": json.dumps(toy.MODEL_CONFIG).encode("utf-16"),
        "large": json.dumps(toy.MODEL_CONFIG)[:-1] + ', "x": "' + "x" * 50_000_000 + '"}',
        "empty maps": json.dumps(toy.MODEL_CONFIG)[:-1] + ', "x": [' + "{}," * 5_000_000 + "0]}",
    }.items():
        yield Input(f"config.json: {name}", put(settings, text), action="worker")
    yield Input("config.json: a device", link(settings, "/dev/zero"), action="worker")
    make = put("model/generation_config.json", json.dumps({"custom_generate": "evil", **REMOTE}))
    yield Input("code in generation_config.json", both(make, code), action="worker", ends="either")
    make = put("model/generation_config.json", "[" * 100_000)
    yield Input("a deep generation_config.json", make, action="worker", ends="either")


# --- tokenizers


def tokenizers() -> Iterator[Input]:
    file = "model/tokenizer.json"
    good = json.loads(toy.tokenizer().to_str())

    def changed(**values: Any) -> str:
        return json.dumps(good | values)

    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    shapes = {
        "a growing normaliser": {"normalizer": {"type": "Sequence", "normalizers": [growing] * 40}},
        "a normaliser that writes much": {
            "normalizer": {**growing, "pattern": {"String": "e"}, "content": "x" * 10**6}
        },
        "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**7}},
        "a slow expression": {
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": "(([a-z ])+.)+[A-Z]([a-z ])+$"},
                "behavior": "Isolated", "invert": False,
            }
        },
        "another slow expression": {
            "normalizer": {**growing, "pattern": {"Regex": "(?:(?:[^z]+)+)+z"}, "content": ""}
        },
        "an expression that is none": {
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": "(" * 1000},
                "behavior": "Isolated", "invert": False,
            }
        },
        "a template that repeats": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000,
                "pair": [], "special_tokens": {},
            }
        },
        "odd parts": {"decoder": {"type": "Evil"}},
        "no model": {"model": None},
        "an unknown model": {"model": {"type": "Pickle", "path": "evil.pkl"}},
        "another's ids": {"added_tokens": [dict(good["added_tokens"][0], id=HUGE)]},
        "negative ids": {"added_tokens": [dict(good["added_tokens"][0], id=-1)]},
        "an empty token": {"added_tokens": [dict(good["added_tokens"][0], content="")]},
        "a long token": {"added_tokens": [dict(good["added_tokens"][0], content="x" * 10**6)]},
        "padding without end": {
            "padding": {
                "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
            }
        },
        "truncation to nothing": {
            "truncation": {
                "max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"
            }
        },
        "a huge vocabulary id": {
            "model": dict(good["model"], vocab={**good["model"]["vocab"], "zz": 2**32 - 1})
        },
        "merges of nothing": {"model": dict(good["model"], merges=[["no", "thing"]])},
        "a cache of its own": {"model": dict(good["model"], cache_capacity=HUGE)},
        "dropout of all": {"model": dict(good["model"], dropout=1e300)},
        "another version": {"version": "9.9"},
    }  # fmt: skip
    for name, values in shapes.items():
        yield Input(f"tokenizer: {name}", put(file, changed(**values)), ends="either")
    for name, text in {
        "deep": "[" * 500_000,
        "a pickle": PICKLE,
        "a zip": zipped(),
        "a list": "[]",
        "nothing": "",
        "no UTF-8": b"\xff" * 64,
    }.items():
        yield Input(f"tokenizer: {name}", put(file, text))
    yield Input("tokenizer: a device", link(file, "/dev/zero"))
    config = "model/tokenizer_config.json"
    code = put("model/evil.py", CODE)
    for name, values in {
        "code": REMOTE,
        "a class by its name": {"tokenizer_class": "os.system"},
        "files elsewhere": {"tokenizer_file": "/etc/passwd", "vocab_file": "../../outside/bait"},
        "a module": {"processor_class": "antigravity", "auto_map": {"AutoTokenizer": ["x", "y"]}},
        "an object for a token": {"bos_token": {"__type": "AddedToken", "content": "x" * 10**6}},
        "odd tokens": {"added_tokens_decoder": {"x": {"content": "y"}}},
        "a token far away": {"added_tokens_decoder": {str(HUGE): {"content": "y"}}},
        "a number for the end": {"eos_token": 7},
        "a list for the end": {"eos_token": ["x"]},
        "a length of nothing": {"model_max_length": -HUGE},
        "methods for settings": {"encode": "x", "__class__": "y", "_tokenizer": "z"},
    }.items():
        yield Input(
            f"tokenizer_config.json: {name}", both(edit(config, **values), code), ends="either"
        )
    for name, text in {"deep": "[" * 500_000, "a list": "[]", "a pickle": PICKLE}.items():
        yield Input(f"tokenizer_config.json: {name}", put(config, text))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        for what, text in {"deep": "[" * 500_000, "a list": "[]", "a pickle": PICKLE}.items():
            yield Input(f"{name}: {what}", put(f"model/{name}", text), ends="either")
    yield Input("vocab.txt of another kind", put("model/vocab.txt", PICKLE), ends="inert")
