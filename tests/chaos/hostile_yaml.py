"""run.yaml: tags, bombs, absurd numbers, secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator

import toy
import yaml
from hostile_inputs import HUGE, PICKLE, SHELL, Input, both, edit, fifo, link, merge, put, zipped


def yamls() -> Iterator[Input]:
    base = yaml.safe_dump(toy.RUN)
    calls = "[touch CANARY]"
    texts = {
        "os.system": f"!!python/object/apply:os.system {calls}",
        "subprocess": "!!python/object/apply:subprocess.Popen [[touch, CANARY]]",
        "a new object": "!!python/object/new:os.system {args: [touch CANARY]}",
        "a name": "!!python/name:os.system",
        "a module": "!!python/module:antigravity",
        "a tuple": "!!python/tuple [1, 2]",
        "an object of ours": "!!python/object:trimpot.runner.types.Fleet {}",
        "a state": "!!python/object/new:type {args: [z, !!python/tuple [], {}], state: {}}",
        "Ruby": "!ruby/object:Gem::Requirement {}",
        "Java": '!!javax.script.ScriptEngineManager [!!java.net.URL ["http://127.0.0.1:9/"]]',
        "an unknown tag": "!include ../outside/bait",
        "a set": "!!set {a, b}",
        "pairs": "!!pairs [a: 1]",
        "an ordered map": "!!omap [a: 1]",
        "odd binary": '!!binary "////=="',
        "long binary": "!!binary " + "QUFB" * 50_000,
        "a date out of the calendar": "2024-99-99",
        "a time out of the day": "2001-12-14 99:99:99",
        "a year of nothing": "0000-00-00",
        "a long number": "9" * 5000,
        "a long hexadecimal number": "0x" + "f" * 90_000,
        "a long octal number": "0" + "7" * 20_000,
        "a long binary number": "0b" + "1" * 90_000,
        "a number of sixties": ":".join(["1"] * 5000),
        "a float of sixties": ":".join(["1"] * 5000) + ".5",
        "an exponent": "1e999999999",
        "underscores": "1" + "_" * 50_000 + "e5",
        "an int tag on text": "!!int x",
        "a float tag on a list": "!!float [1]",
        "a bool tag on text": "!!bool perhaps",
        "a null tag": "!!null x",
        "an odd escape": '"\\UFFFFFFFF"',
        "half a character": '"\\ud800"',
    }
    for name, text in texts.items():
        yield Input(f"YAML: {name}", put("run.yaml", base + f"adapter: {text}\n"))
    yield Input("YAML: a Python object for the file", put("run.yaml", texts["os.system"]))
    laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    wholes = {
        "a billion laughs": "a0: &a0 [lol]\n" + laughs + base,
        "merge keys": base + "x: &x {seed: 1}\ny:\n  <<: *x\n",
        "merged in place": base + "<<: {seed: 3}\n",
        "a merge of merges": base + "<<: [" + "{seed: 1}, " * 5000 + "]\n",
        "an anchor of itself": "&a [*a]",
        "an anchor of nothing": "model: *nothing\n",
        "deep lists": "model: " + "[" * 100_000,
        "deep maps": "model: " + "{a: " * 50_000,
        "deep blocks": "".join(f"{' ' * i}a:\n" for i in range(1500)),
        "deep sequences": "- " * 50_000,
        "many keys": "".join(f"k{i}: 1\n" for i in range(100_000)) + base,
        "many items": base + "adapter: {target_modules: [" + "a," * 200_000 + "]}\n",
        "a long comment": "#" * 5_000_000 + "\n" + base,
        "many comments": "#\n" * 2_000_000 + base,
        "a long word": base + "adapter: " + "a" * 5_000_000 + "\n",
        "a long quoted word": base + 'adapter: "' + "a\\n" * 1_000_000 + '"\n',
        "a long block": base + "adapter: |\n" + "  x\n" * 1_000_000,
        "many spaces": base + "adapter:" + " " * 5_000_000 + "1\n",
        "many documents": "---\n" * 100_000,
        "many directives": "%TAG ! tag:x,2000:\n" * 5000 + "---\n" + base,
        "an odd version": "%YAML 9.9\n---\n" + base,
        "a question": "? " * 20_000,
        "a list for a key": base + "? [a, b]\n: 1\n",
        "a map for a key": base + "? {a: b}\n: 1\n",
        "a key twice": base + "model: {path: /etc}\n",
        "a key twice, once quoted": base + '"model": {path: /etc}\n',
        "a key twice, deep": base + "adapter: {lora_rank: 1, lora_rank: 2}\n",
        "a null byte": base + "seed: 1\0\n",
        "UTF-16": base.encode("utf-16"),
        "UTF-7": base.replace("seed", "+AHMAZQBlAGQ-") + "+ADw-: 1\n",
        "no UTF-8": b"\xfe\xff\xff" + base.encode(),
        "a pickle": PICKLE,
        "a zip": zipped(),
        "a terminal's escapes": base + '"\\e]0;x\\a\\e[2J": 1\n',
        "direction marks": base + '"\\u202eetirw": 1\n',
    }
    for name, text in wholes.items():
        yield Input(f"YAML: {name}", put("run.yaml", text))
    yield Input("YAML: a device", link("run.yaml", "/dev/zero"))
    yield Input("YAML: a pipe", both(lambda f: (f / "run.yaml").unlink(), fifo("run.yaml")))
    yield Input("YAML: a link to itself", link("run.yaml", "run.yaml"))
    for name in ("a date out of the calendar", "a long number", "os.system", "a long word"):
        text = texts.get(name) or "x" * 100_000
        args = ("train", "run.yaml", f"seed={text}")
        yield Input(f"an override: {name}", lambda f: None, args=args)
    for key in ("__class__.x", "model.__class__", "a" * 100_000, "a." * 20_000 + "b", SHELL):
        args = ("train", "run.yaml", f"{key}=1")
        yield Input(f"an override of {key[:30]}", lambda f: None, args=args)


def numbers() -> Iterator[Input]:
    absurd = {
        "optim.batch_size": (HUGE, 10**30, 2**63, -HUGE, 1e300, "1e400", "٣"),
        "optim.max_steps": (10**40, -1, 1e300, 0),
        "optim.learning_rate": (1e308, -1e-300, 1e-320, "0x1", "inf"),
        "optim.weight_decay": (-1,),
        "optim.warmup_steps": (HUGE,),
        "optim.micro_batch_size": (HUGE,),
        "optim.betas": ([0.9] * 100_000, [1e308, 0]),
        "fleet.workers": (HUGE, 10**30),
        "fleet.sequence_parallel_size": (HUGE, 7919),
        "fleet.memory_per_worker": (1, -1),
        "fleet.cpus_per_worker": (-1, 1.5),
        "fleet.start_timeout_s": (-1, "inf"),
        "data.max_length": (HUGE, 10**30, 0, -5),
        "data.eval_fraction": (0.9, -1e-9, 1e308),
        "adapter.lora_rank": (HUGE, 257),
        "adapter.lora_alpha": (0, "nan"),
        "checkpoint.keep": (HUGE, 10**30),
        "checkpoint.hours_between_failures": (0, "inf"),
        "samples.max_new_tokens": (HUGE,),
        "seed": (2**32, 10**30, -1),
    }
    for key, values in absurd.items():
        for value in values:
            section, _, name = key.rpartition(".")
            change = {section: {name: value}} if section else {name: value}
            if key == "optim.learning_rate" and value == 1e-320:
                continue
            yield Input(f"{key}: {value!r:.30}", merge(**change))
    for key in ("optim.epochs", "fleet.price_per_hour"):
        section, _, name = key.partition(".")
        more = {"max_steps": None} if section == "optim" else {}
        yield Input(f"{key}: 1e308", merge(**{section: {name: 1e308, **more}}), ends="either")
    yield Input("patterns", merge(method="freeze", freeze={"trainable": ["*a" * 60 + "b"]}))
    stars = {"trainable": ["[" * 200 + "*" * 200 + "x"]}
    yield Input("odd patterns", merge(method="freeze", freeze=stars))


# --- secrets

SECRETS = {
    "a Hugging Face token": "hf_" + "CaNaRy" * 5 + "wxyz",
    "an AWS key": "AKIA" + "CANARY7EXAMPLE42"[:16],
    "a W&B key": "0123456789abcdef" * 2 + "01234567",
    "a newer W&B key": "wandb_v1_" + "CaNaRy" * 6,
    "a GitHub token": "ghp_" + "CaNaRy" * 6,
    "an API key": "sk-proj-" + "CaNaRy" * 5,
    "a password in a URL": "https://me:CaNaRyPaSsWoRd@example.org/x",
    "a private key": "-----BEGIN RSA PRIVATE KEY----- CaNaRy",
    "a signed token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJDYU5hUnkifQ.CaNaRyCaNaRy",
    "a Google key": "AIza" + "CaNaRy7" * 5,
}


def secrets() -> Iterator[Input]:
    for kind, secret in SECRETS.items():
        hidden = (secret,) if "URL" not in kind else ("CaNaRyPaSsWoRd",)
        for name, change in {
            "tracking.project": {"tracking": {"project": secret}},
            "data.system_prompt": {"data": {"system_prompt": secret}},
            "an unknown key": {"tracking": {"token": secret}},
            "a section's place": {"tracking": secret},
        }.items():
            yield Input(f"{kind} in {name}", merge(**change), hidden=hidden)
        args = ("train", "run.yaml", f"tracking.run_name={secret}")
        yield Input(f"{kind} in an override", lambda f: None, args=args, hidden=hidden)
    secret = SECRETS["a Hugging Face token"]
    hidden = (secret,)
    yield Input("a secret for a path", merge(data={"train": f"/{secret}"}), hidden=hidden)
    yield Input("a secret for a model", merge(model={"path": f"org/{secret}"}), hidden=hidden)
    yield Input("a secret for output_dir", merge(output_dir=secret), hidden=hidden)
    yield Input("a secret for a key", merge(tracking={secret: 1}), hidden=hidden)
    args = ("train", secret)
    yield Input("a secret for run.yaml", lambda f: None, args=args, hidden=hidden)
    yield Input(
        "a secret for an option", lambda f: None, args=("train", f"--{secret}"), hidden=hidden
    )
    url = SECRETS["a password in a URL"]
    args = ("train", "run.yaml", "--address", url)
    yield Input("a secret for an address", lambda f: None, args=args, hidden=("CaNaRyPaSsWoRd",))
    args = ("train", "run.yaml", f"data.train={url}")
    yield Input("a secret in data's URL", lambda f: None, args=args, hidden=("CaNaRyPaSsWoRd",))
    text = f"model: {{path: {secret}\n"
    yield Input("a secret beside broken YAML", put("run.yaml", text), hidden=hidden)
    make = put("train.jsonl", json.dumps({secret: "x"}) + "\n")
    yield Input("a secret for a column", make, hidden=hidden)
    make = edit(
        "model/tokenizer_config.json", chat_template=f"{{{{ raise_exception('{secret}') }}}}"
    )
    yield Input("a secret in a template's complaint", make, hidden=hidden)
