"""Feed anything, run nothing: hostile models, data, configs, run folders, one process each.

Of each: nothing of it is executed, nothing is written but below the run's folder, nothing goes to
a network, and it ends in one line or as if it were any other; in a second of CPU time and 256 MB.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import toy
from hostile_all import all_inputs
from hostile_inputs import Input

pytestmark = pytest.mark.alone

HERE = Path(__file__).parent
SECONDS, MEMORY_BYTES = 1.0, 256 << 20
QUICK = 5
"""One input in so many runs with `make test`."""


def make(given: Input, good: Path, top: Path) -> dict[str, Any]:
    """The folders of one input → its job."""
    home = top / "home"
    shutil.copytree(good, home)
    (top / "outside").mkdir()
    (top / "outside/bait").write_text("bait\n")
    given.make(home)
    return {
        "name": given.name,
        "folder": str(home),
        "action": given.action,
        "args": given.args,
        "writes": [os.path.abspath(home / path) for path in given.writes],  # noqa: PTH100
    }


def feed(inputs: Sequence[Input], top: Path) -> dict[str, dict[str, Any]]:
    """{name: what it did}"""
    good = top / "good"
    good.mkdir()
    toy.toy_run(good)
    jobs = [make(given, good, top / str(i)) for i, given in enumerate(inputs)]
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "RAY_ADDRESS")}
    environment = kept | {
        "HF_HOME": str(top / "hub"),
        "MPLCONFIGDIR": str(top / "matplotlib"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "hostile.py")],
        input=json.dumps(jobs), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {result["name"]: result for result in json.loads(done.stdout)}


def told(given: Input, top: Path) -> list[str]:
    """Files below the run's folder in which a secret stands."""
    found = []
    for path in top.rglob("*"):
        if path.is_file() and path.name not in ("run.yaml", "train.jsonl", "tokenizer_config.json"):
            text = path.read_bytes()
            found += [f"secret in {path.name}" for word in given.hidden if word.encode() in text]
    return found


def faults(given: Input, did: dict[str, Any]) -> list[str]:
    """What an input did that it must not."""
    found = list(did["effects"])
    lines = did["err"].splitlines()
    start = "" if given.action == "run_worker" else "error: "
    refused = len(lines) == 1 and lines[0].startswith(start) and did["code"] in (1, 2)
    refused = refused and len(lines[0]) < 900
    inert = did["code"] == 0 and not lines
    if not {"refused": refused, "inert": inert, "either": refused or inert}[given.ends]:
        found.append(f"ends with code {did['code']}, {len(lines)} lines: {did['err'][-400:]!r}")
    if refused:
        found += [f"does not say {s!r}: {lines[0]}" for s in given.says if s not in lines[0]]
    if did["seconds"] > SECONDS:
        found.append(f"took {did['seconds']:.2f} CPU-seconds")
    if did["bytes"] > MEMORY_BYTES:
        found.append(f"took {did['bytes'] >> 20} MiB")
    found += ["tells its secret" for word in given.hidden if word in did["err"] + did["out"]]
    return found


def sweep(inputs: Sequence[Input], top: Path) -> dict[str, list[str]]:
    """{name: faults} of those that have any."""
    results = feed(inputs, top)
    found = {}
    for number, given in enumerate(inputs):
        wrong = faults(given, results[given.name])
        if given.hidden:
            wrong += told(given, top / str(number))
        if wrong:
            found[given.name[:100]] = wrong
    return found


INPUTS = all_inputs()


def test_there_are_enough() -> None:
    assert len(INPUTS) >= 300
    assert len({given.name for given in INPUTS}) == len(INPUTS)


def test_hostile_inputs_do_nothing(tmp_path: Path) -> None:
    chosen = [given for given in INPUTS if zlib.crc32(given.name.encode()) % QUICK == 0]
    assert {given.kinds for given in chosen} == {given.kinds for given in INPUTS}
    assert sweep(chosen, tmp_path) == {}


@pytest.mark.chaos
def test_all_hostile_inputs_do_nothing(tmp_path: Path, count) -> None:
    found = sweep(INPUTS, tmp_path)
    count(hostile_inputs=len(INPUTS), hostile_effects=len(found))
    assert found == {}


PLANTS = {
    "a command": ("import os; os.system('true')", "executed: os.system"),
    "a process": ("import subprocess; subprocess.run(['true'])", "executed: ['true']"),
    "a pickle": ("import pickle, hostile_inputs as h; pickle.loads(h.PICKLE)", "pickle.find_class"),
    "a module of the input": ("import sys; sys.path.insert(0, '.'); import evil", "executed"),
    "a connection": (
        "import socket; socket.socket().connect_ex(('127.0.0.1', 9))", "network: socket.connect"
    ),
    "a look-up": ("import socket; socket.getaddrinfo('localhost', 9)", "socket.getaddrinfo"),
    "a file beside the run": ("open('x', 'w').close()", "wrote: "),
    "a file changed natively": (
        "import numpy; numpy.memmap('../outside/bait', mode='r+', shape=1)[0] = 7", "wrote: "
    ),
    "a folder": ("import os; os.mkdir('../outside/x')", "wrote: "),
    "a link followed": ("open('run/x', 'a').close()", "wrote: "),
    "much memory": ("b'x' * (300 << 20)", "MiB"),
    "much time": ("for i in range(10**9): pass", "died: "),
    "a second": ("while time.process_time() - t < 1.2: pass", "CPU-seconds"),
    "a traceback": ("1 / 0", "ends with code -1"),
    "two lines": ("import sys; print('a\\nb', file=sys.stderr)", "2 lines"),
    "a crash": ("import os; os.abort()", "died: "),
    "a secret": ("print('hf_secret')", "tells its secret"),
}  # fmt: skip


def test_the_harness_sees(tmp_path: Path) -> None:
    """Each plant is found, and what does nothing is not."""

    def planted(folder: Path) -> None:
        (folder / "evil.py").write_text("")
        (folder / "run").mkdir()
        (folder / "run/x").symlink_to("../../outside/x")

    clock = "import time; t = time.process_time()\n"
    codes = {name: code for name, (code, _) in PLANTS.items()}
    codes["nothing"] = "open('run/y', 'w')"
    inputs = [
        Input(name, planted, "plant", (clock + code,), ends="inert", hidden=("hf_secret",))
        for name, code in codes.items()
    ]
    found = sweep(inputs, tmp_path)
    assert "nothing" not in found, found["nothing"]
    for name, (_, says) in PLANTS.items():
        assert any(says in fault for fault in found.get(name, [])), (name, found.get(name))
