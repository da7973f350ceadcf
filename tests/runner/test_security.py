"""What a worker and the reading of files promise: no code of others, no secrets, no surprises."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from packaging.requirements import Requirement
from packaging.version import Version

from trimpot.runner.config import DataSection
from trimpot.runner.data.sandbox import Sandbox
from trimpot.runner.errors import ConfigError, DataError, ModelError, StorageError
from trimpot.runner.hub import Tokenizer, empty_causal_lm, load_causal_lm
from trimpot.runner.reading import check_contained, parse_json, read_bounded
from trimpot.runner.redact import KINDS, Redacting, find_secret, kind_of, redact, redacted
from trimpot.runner.run_yaml import load_config

ROOT = Path(__file__).resolve().parent.parent.parent
FLOORS = ("cluster", "runner", "kernels")

# --- what our own code may not contain

UNSAFE_MODULES = {
    "pickle": "unpickles", "cPickle": "unpickles", "_pickle": "unpickles", "dill": "unpickles",
    "cloudpickle": "unpickles", "joblib": "unpickles", "shelve": "unpickles",
    "marshal": "runs code", "code": "runs code", "runpy": "runs code", "imp": "runs code",
    "tarfile": "unpacks", "zipfile": "unpacks", "py7zr": "unpacks", "zipimport": "runs code",
    "http.server": "serves", "socketserver": "serves", "xmlrpc": "serves", "flask": "serves",
    "fastapi": "serves", "uvicorn": "serves", "aiohttp": "serves",
    "requests": "fetches", "urllib.request": "fetches", "httpx": "fetches", "ftplib": "fetches",
    "telnetlib": "fetches",
}  # fmt: skip
UNSAFE_CALLS = {
    "torch.load": "unpickles", "torch.jit.load": "runs code",
    "torch.package.PackageImporter": "runs code", "torch.hub.load": "runs code",
    "pandas.read_pickle": "unpickles",
    "eval": "runs code", "exec": "runs code", "compile": "runs code",
    "os.system": "starts a shell", "os.popen": "starts a shell",
    "subprocess.getoutput": "starts a shell", "subprocess.getstatusoutput": "starts a shell",
    "shutil.unpack_archive": "unpacks",
    "yaml.unsafe_load": "runs code", "yaml.full_load": "runs code", "yaml.load_all": "runs code",
    "datasets.load_dataset": "runs scripts", "load_dataset": "runs scripts",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(source: str) -> Iterator[str]:
    """What of a source could run, unpack, serve or fetch what others give."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            for module, why in UNSAFE_MODULES.items():
                if name == module or name.startswith(f"{module}."):
                    yield f"line {node.lineno}: {name} {why}"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in UNSAFE_CALLS:
            yield f"line {node.lineno}: {called} {UNSAFE_CALLS[called]}"
        if called == "yaml.load" and not (len(node.args) == 2 and "Loader" in dotted(node.args[1])):
            yield f"line {node.lineno}: yaml.load without a loader of ours"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "a variable"
            rule = {
                "shell": False,
                "trust_remote_code": False,
                "allow_pickle": False,
                "weights_only": True,
            }
            if keyword.arg in rule and value is not rule[keyword.arg]:
                yield f"line {node.lineno}: {keyword.arg} is {value}"


def test_no_pickle_no_shell_no_archive_no_server_no_remote_code() -> None:
    found = {
        str(path.relative_to(ROOT)): list(unsafe(path.read_text(encoding="utf-8")))
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
    }
    assert len(found) > 100
    assert {path: faults for path, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)", "np.load('x', allow_pickle=True)", "eval('1')",
        "import subprocess\nsubprocess.run('x', shell=True)", "f(shell=flag)", "import tarfile",
        "from zipfile import ZipFile", "shutil.unpack_archive('x')", "yaml.load(text)",
        "yaml.load(text, Loader)\nyaml.unsafe_load(text)", "f(trust_remote_code=True)",
        "f(trust_remote_code=config.trust)", "import http.server", "from urllib import request",
        "os.system('x')", "datasets.load_dataset('x')",
    ],
)  # fmt: skip
def test_the_checker_sees(source: str) -> None:
    assert list(unsafe(source))


def test_the_checker_lets_the_rest_pass() -> None:
    fine = "model.eval()\nsubprocess.run(['x'])\nyaml.load(t, _OwnLoader)\nre.compile('x')"
    assert list(unsafe(fine)) == []


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_versions_with_known_holes_are_not_accepted() -> None:
    stated = project()["project"]["dependencies"]
    needs = {r.name: r.specifier for r in map(Requirement, stated)}
    for name, holed in {
        "ray": "2.53.0",  # CVE-2023-48022, CVE-2025-62593: jobs without a token
        "torch": "2.9.1",  # CVE-2025-32434, CVE-2026-24747
        "datasets": "3.6.0",  # runs scripts
        "jinja2": "3.1.5",  # CVE-2024-56326, CVE-2025-27516: out of the sandbox
        "filelock": "3.20.0",  # CVE-2025-68146: follows a link and truncates
    }.items():
        assert not needs[name].contains(Version(holed)), name


def test_the_linter_forbids_shells() -> None:
    ruff = project()["tool"]["ruff"]["lint"]
    rules = {"S301", "S302", "S307", "S506", "S602", "S604", "S605", "S202"}
    assert rules <= set(ruff["select"])
    assert not rules & {
        rule for rules in ruff.get("per-file-ignores", {}).values() for rule in rules
    }


# --- models


def brings_code(folder: Path) -> Path:
    toy.toy_model(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(folder / 'CANARY')!r}, 'w')")
    return folder


def test_code_that_a_model_brings_is_never_run(tmp_path: Path, monkeypatch) -> None:
    """Nor is anybody asked: at a terminal, transformers would."""
    import torch

    folder = brings_code(tmp_path / "model")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (
        lambda: load_causal_lm(folder, dtype=torch.float32, deepspeed=None),
        lambda: empty_causal_lm(folder),
    ):
        with pytest.raises(ModelError, match="'evil', which brings code of its own"):
            load()
    assert not (folder / "CANARY").exists()


def test_code_beside_a_type_that_transformers_has_is_left_alone(tmp_path: Path) -> None:
    import torch

    folder = brings_code(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    model = load_causal_lm(folder, dtype=torch.float32, deepspeed=None)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert not (folder / "CANARY").exists()


def test_a_folder_that_names_another_model_is_refused(tmp_path: Path) -> None:
    """transformers would load that one, wherever it is."""
    import torch

    folder = toy.toy_model(tmp_path / "model")
    other = {"peft_type": "LORA", "base_model_name_or_path": "org/other"}
    (folder / "adapter_config.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match="an adapter of another model"):
        load_causal_lm(folder, dtype=torch.float32, deepspeed=None)


# --- chat templates

TEMPLATES = [
    toy.CHAT_TEMPLATE,
    "{{ bos_token }}{% for m in messages %}{{ m.role|upper }}: {{ m['content']|trim }}{% endfor %}",
    "{% for m in messages if m.role != 'system' %}{% if loop.index0 %}{% continue %}{% endif %}"
    "{{ loop.index }}{{ m | tojson }}{% endfor %}{{ tools }}{{ documents is none }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "{%- for m in messages %}\n  {%- if m.reasoning_content is defined %}{{ m.reasoning_content }}!"
    "{% endif %}{{ m.thinking }}{% generation %}{{ m.content }}{% endgeneration %}\n{%- endfor -%}",
    "{% macro say(m) %}[{{ m.role }}]{{ caller() }}{% endmacro %}{% for m in messages %}"
    "{% call say(m) %}{{ m.content }}{% endcall %}{% endfor %}{{ messages | tojson(indent=2) }}",
    "{{ dict(a=1, b=messages|length) | tojson }}{{ '%s-%s' % ('a', 'b') }}{{ range(3)|list }}",
    "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('') }}{% endif %}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ eos_token }}{{ undefined_thing }}{{ add_generation_prompt }}",
]
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [
        {"role": "system", "content": " Größe 東京 \n"},
        {"role": "user", "content": "<b> & \"q\" {{ 1 }}", "name": None},
        {"role": "assistant", "content": "x", "reasoning": "because"},
        {"role": "user", "content": "🙂"},
    ],
    [{"role": "assistant", "content": "y", "thinking": "t", "tool_calls": [{"a": [1, None, 2.5]}]}],
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_transformers_renders_them(template: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(toy.toy_model(tmp_path / "model", bos=True))
    render = tokenizer.renderer(template)
    assert render is not None
    for talk in TALKS:
        for prompt in (False, True):
            wanted = tokenizer.inner.apply_chat_template(
                talk, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
            assert render(talk, prompt) == wanted


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "over 0.3 s",
        ),
        ("{{ 'x' * 10**9 }}", "MiB of memory"),
        ("{{ 'x'|center(10**9) }}", "MiB of memory"),
        ("{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}", "characters for this row"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('own words') }}", "own words"),
        ("{% for", "unexpected"),
    ],
)
def test_a_template_has_limits(template: str, says: str) -> None:
    sandbox = Sandbox(template, {})
    for _ in range(2):  # and one that was ended starts again
        with pytest.raises(ValueError, match=says):
            sandbox.render(TALKS[0], False)


def test_a_template_sees_nothing_of_its_process(tmp_path: Path, monkeypatch) -> None:
    """Were it to find a way out of jinja2's sandbox: no variable, no file, no socket."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "CaNaRy" * 6)
    sandbox = Sandbox("{{ messages[0].content }}", {})
    assert sandbox.render(TALKS[0], False) == "a"
    assert sandbox.child is not None
    process = Path(f"/proc/{sandbox.child.pid}")
    assert process.joinpath("environ").read_bytes() == b""
    limits = process.joinpath("limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert (rows["Max open files"], rows["Max file size"], rows["Max core file size"]) == (
        "3",
        "0",
        "0",
    )
    assert int(rows["Max address space"]) < 512 << 20


# --- files


def test_a_device_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(OSError, match="no file but a device or a pipe"):
            read_bounded(path, 10)
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="larger than"):
        read_bounded(tmp_path / "long", 10)
    for text in ("[" * 100 + "]" * 100, "[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError, match=r"deep|digits"):
            parse_json(text)


def test_a_run_folder_that_leads_outside_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "here").write_text("x")
    (run / "within").symlink_to("here")
    check_contained(run)
    (run / "data/journal").symlink_to("../../outside")
    with pytest.raises(StorageError, match="leads out of the run"):
        check_contained(run)


def test_a_link_in_a_model_is_not_exported(tmp_path: Path) -> None:
    """A model's LICENSE may lead to a key of whoever publishes what they made of it."""
    from trimpot.runner.export import _of_the_model

    cached = tmp_path / "models--org--name/snapshots/0123"
    cached.mkdir(parents=True)
    (tmp_path / "models--org--name/blobs").mkdir()
    (tmp_path / "models--org--name/blobs/abc").write_text("Apache")
    (tmp_path / "key").write_text("private")
    (cached / "NOTICE").write_text("own")
    (cached / "LICENSE").symlink_to("../../blobs/abc")
    (cached / "LICENSE.txt").symlink_to(tmp_path / "key")
    found = {path.name for path in cached.iterdir() if _of_the_model(path, cached)}
    assert found == {"LICENSE", "NOTICE"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/LICENSE").symlink_to("../key")
    assert not _of_the_model(tmp_path / "plain/LICENSE", tmp_path / "plain")


def test_rows_are_bounded(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from trimpot.runner.data.sources import read_rows

    (tmp_path / "t.jsonl").write_text('{"text": "' + "x" * (8 << 20) + '"}\n')
    with pytest.raises(DataError, match="line 1 has over 8 MiB"):
        read_rows(tmp_path / "t.jsonl")
    words = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 9000, pyarrow.int32()), ["x" * 99_999]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 1 << 20
    with pytest.raises(DataError, match="expands to over 96 MiB"):
        read_rows(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", "stands twice"),
        ("seed: &a 1\nx: *a\n", "aliases are not allowed"),
        ("seed: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("seed: 2024-99-99\n", "month must be"),
        ("seed: " + "[" * 50 + "]" * 50, "nested too deeply"),
        ("adapter: {target_modules: [" + "a," * 6000 + "]}\n", "over 5000 values"),
        ("#" * 200_000, "larger than 128 KiB"),
    ],
)
def test_a_yaml_file_is_bounded(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path)


# --- secrets

CANARIES = {
    "a Hugging Face token": "hf_" + "CaNaRy" * 5 + "wxyz",
    "an AWS key": "AKIACANARY7EXAMPLE42",
    "a W&B key": "wandb_v1_" + "CaNaRy" * 5,
    "a GitHub token": "ghp_" + "CaNaRy" * 6,
    "a GitLab token": "glpat-" + "CaNaRy" * 4,
    "an API key": "sk-ant-" + "CaNaRy" * 5,
    "a Google key": "AIza" + "CaNaRy7" * 5,
    "a Slack token": "xoxb-1234567890-CaNaRy",
    "a signed token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJDYU5hUnkifQ.CaNaRyCaNaRy",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\nCaNaRy\n-----END RSA PRIVATE KEY-----",
    "a password in a URL": "https://me:CaNaRy@example.org/x",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_in_a_config_is_refused_and_never_said(kind: str, tmp_path: Path) -> None:
    secret = CANARIES[kind]
    assert kind_of(f"x {secret}.") == kind
    assert "CaNaRy" not in redact(f"x {secret} y").replace("AKIACANARY", "CaNaRy")
    path = toy.toy_run(tmp_path)
    path.write_text(path.read_text() + json.dumps({"tracking": {"project": secret}})[1:-1] + "\n")
    with pytest.raises(ConfigError, match=f"tracking.project looks like {kind}") as error:
        load_config(path)
    assert secret not in str(error.value) and "CaNaRy" not in str(error.value)


def test_values_of_telling_variables_are_blotted_out(monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse battery")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("MY_TOKEN", "short")
    monkeypatch.setenv("HOME_TOWN", "somewhere else")
    text = (
        "a correct horse battery b wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY "
        "0123456789abcdef0123456789abcdef01234567 short somewhere else"
    )
    assert redact(text) == "a *** b *** *** short somewhere else"
    assert redacted({"a": [text, 1, None, (2.5, text)]})["a"][0] == redact(text)
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (text,), None)
    assert Redacting("%(message)s").format(record) == redact(text)
    assert find_secret({"tracking": {"project": "correct horse battery"}}) is not None


def test_ordinary_words_are_no_secrets() -> None:
    for text in (
        "a task-oriented assistant that answers sk-questions", "meta-llama/Llama-3.2-1B",
        "/data/runs/2026-11-26/train.jsonl", "me@example.org", "https://example.org/a:b/c",
        "{{ bos_token }}{% for m in messages %}", "0123456789abcdef" * 4, "s3://bucket/x",
        "What is a password=? parameter", "model.layers.29.*", "git@github.com:org/name",
    ):  # fmt: skip
        assert (redact(text), kind_of(text), find_secret({"a": text})) == (text, None, None)
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert find_secret({"model": {"revision": commit}}, spare=("model.revision",)) is None
    assert find_secret({"tracking": {"project": commit}}) == ("tracking.project", "a W&B key")


# --- telemetry

SHOW = """
import json, os, sys
sys.argv = ["trimpot", "schema"]
from trimpot.cluster import cli
try:
    cli.main()
except SystemExit:
    pass
from trimpot.runner.telemetry import OFF
print(json.dumps({name: os.environ.get(name) for name in OFF}))
"""


def test_telemetry_is_off_unless_asked_for() -> None:
    from trimpot.runner.telemetry import OFF

    plain = {name: value for name, value in os.environ.items() if name not in OFF}
    for asked in ({}, {"HF_HUB_DISABLE_TELEMETRY": "0"}):
        done = subprocess.run(
            [sys.executable, "-c", SHOW],
            env=plain | asked,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout.splitlines()[-1]) == OFF | asked


def test_the_trackers_know_these_variables() -> None:
    """That a variable is spelt as its library reads it."""
    import huggingface_hub.constants
    import ray._common.usage.usage_constants as usage

    assert "HF_HUB_DISABLE_TELEMETRY" in Path(str(huggingface_hub.constants.__file__)).read_text()
    assert usage.USAGE_STATS_ENABLED_ENV_VAR == "RAY_USAGE_STATS_ENABLED"


def test_data_section_takes_no_url(tmp_path: Path) -> None:
    from trimpot.runner.data.sources import check_source

    for url in (
        "https://example.org/t.jsonl",
        "s3://b/t.parquet",
        "hf://datasets/x",
        "zip://a::b.zip",
    ):
        with pytest.raises(DataError, match="is not there"):
            check_source(Path(DataSection(train=url).train))
