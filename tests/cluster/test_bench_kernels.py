"""`trimpot bench kernels` as a command: its JSON, files, page, exit codes, and --dry."""

from __future__ import annotations

import base64
import csv
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trimpot.cluster import bench_kernels, cli
from trimpot.cluster.bench_kernels import DRY_KEYS, exit_code
from trimpot.cluster.kernel_plots import draw_all
from trimpot.kernels.bench import measure, roofline
from trimpot.kernels.bench.stats import Change

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--op", "swiglu", "--shape", "T", "--tokens", "16", "--repeats", "2",
         "--backend", "torch")  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(measure, "ENOUGH_S", 0.0)
    monkeypatch.setattr(roofline, "GEMM_N", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 20})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trimpot(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trimpot", "bench", "kernels", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_json_is_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trimpot(monkeypatch, *SMALL, "--json", "-") == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert [row["mode"] for row in result["rows"]] == ["fwd", "bwd", "fwd+bwd"]
    assert result["rows"][0]["p50"] > 0


def test_the_table_has_ratios_and_no_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trimpot(monkeypatch, *SMALL) == 0
    out = capsys.readouterr().out
    assert re.search(r"swiglu .* fwd\+bwd .* \d\.\d\d ×", out)
    assert not re.search(r"\d (s|ms|µs|us)\b", out)


def test_files_and_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "j" / "a.json"), "--csv", str(tmp_path / "a.csv"),
             "--plots", str(tmp_path / "plots"), "--html", str(tmp_path / "a.html"))  # fmt: skip
    assert trimpot(monkeypatch, *SMALL, *files) == 0
    rows = json.loads((tmp_path / "j" / "a.json").read_text())["rows"]
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [float(r["p50"]) for r in csv.DictReader(file)] == [r["p50"] for r in rows]
    plots = {path.stem: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert plots.keys() == {"ratios", "roofline", "bytes"}
    assert all(data.startswith(PNG) and len(data) > 5000 for data in plots.values())
    page = (tmp_path / "a.html").read_text()
    held = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert {base64.b64decode(data) for data in held} == set(plots.values())
    assert "://" not in page  # it asks nothing of any network
    assert page.count("<tr>") > len(rows) and "swiglu" in page
    assert not list(tmp_path.rglob("*.draft"))


def test_compare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "base.json"
    assert trimpot(monkeypatch, *SMALL, "--json", str(path)) == 0
    base = json.loads(path.read_text())

    def scaled(by: float) -> str:
        rows = [r | {p: r[p] * by for p in ("p20", "p50", "p80")} for r in base["rows"]]
        path.write_text(json.dumps({"rows": rows}))
        return str(path)

    common = ("--compare", str(path), "--fail-under", "0.95")
    scaled(100)
    assert trimpot(monkeypatch, *SMALL, *common) == 1
    assert "SLOW" in capsys.readouterr().out
    scaled(0.0001)
    assert trimpot(monkeypatch, *SMALL, *common) == 0
    assert "FAST" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"row": 1}'])
def test_a_base_that_is_none(
    text: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "base.json"
    if text is not None:
        path.write_text(text)
    assert trimpot(monkeypatch, *SMALL, "--compare", str(path)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "base.json" in err


def test_exit_codes() -> None:
    good = {"verdict": "FAST", "p50": 1.5}
    slow = {"verdict": "SLOW", "p50": 0.8}
    wrong = {"verdict": "WRONG", "p50": None}
    missing = {"verdict": "MISSING", "p50": None}
    assert exit_code([good, slow], [], False, None) == 0
    assert exit_code([good, slow], [], False, 0.95) == 1
    assert exit_code([good], [], False, 0.95) == 0
    assert exit_code([good, wrong], [], False, None) == 1
    assert exit_code([good, missing], [], False, None) == 0
    assert exit_code([missing], [], False, None) == 1
    lost, kept = Change(("a",), 0.9, "SAME"), Change(("b",), 0.96, "SAME")
    assert exit_code([slow], [kept], True, 0.95) == 0  # held against then, not against the peer
    assert exit_code([slow], [kept, lost], True, 0.95) == 1


def test_no_gpu_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trimpot(monkeypatch, *SMALL, "--device", "cuda") == 2
    assert "no GPU" in capsys.readouterr().err
    assert trimpot(monkeypatch, *SMALL, "--device", "tpu") == 2
    assert "--device tpu" in capsys.readouterr().err


def test_plots_of_nothing() -> None:
    assert draw_all({"rows": [{"p50": None, "verdict": "WRONG"}], "roofline": {}}) == {}


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A proof ladder that answers at once; the real one compiles for minutes."""
    module: Any = ModuleType("trimpot.kernels.proof.ladder")
    row: dict[str, Any] = dict.fromkeys(DRY_KEYS) | {"op": "swiglu", "spills": 0, "complaints": []}
    module.dry_rows = lambda ops, say: [row | {"target": "sm_90"}, row | {"target": "gfx942"}]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        importlib.import_module("trimpot.kernels.proof"), "ladder", module, raising=False
    )
    return module


def test_dry_rows_have_exactly_their_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ladder: ModuleType
) -> None:
    assert trimpot(monkeypatch, "--dry", "--json", "-") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [tuple(row) for row in result["rows"]] == [DRY_KEYS, DRY_KEYS]
    assert trimpot(monkeypatch, "--dry") == 0
    assert "sm_90" in capsys.readouterr().out


def test_dry_tells_of_broken_limits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ladder: Any
) -> None:
    row = dict.fromkeys(DRY_KEYS) | {"complaints": ["swiglu forward bf16 sm_90: f spills 8"]}
    ladder.dry_rows = lambda ops, say: [row]
    assert trimpot(monkeypatch, "--dry") == 1
    assert "f spills 8" in capsys.readouterr().err


RIGHT = {
    "op": "swiglu", "direction": "forward", "variant": "", "dtype": "bf16", "gpu": "H100",
    "right": True, "why": "", "p20_s": 1e-5, "p50_s": 2e-5, "p80_s": 3e-5, "bandwidth": 2e12,
    "roofline": 0.9, "ratio": 2.5,
}  # fmt: skip
WRONG = {**dict.fromkeys(RIGHT), **{k: RIGHT[k] for k in ("op", "direction", "variant", "gpu")}}
WRONG |= {"dtype": "fp16", "right": False, "why": "large result 0: error 1.0, allowed 0.1 [m]"}


def test_prove_keeps_the_gpu_beside_times(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    ladder: Any,
) -> None:
    ladder.prove = lambda ops, say: [RIGHT]
    assert trimpot(monkeypatch, "--prove", "--json", str(tmp_path / "rows.json")) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == {"rows": [RIGHT]}
    out = capsys.readouterr().out
    assert "20.0 us" in out and "90%" in out and "2.50" in out and "H100" in out
    ladder.prove = lambda ops, say: [RIGHT, WRONG]
    assert trimpot(monkeypatch, "--prove", "--json", "-") == 1
    *table, line = capsys.readouterr().out.splitlines()
    assert any("WRONG" in row and "allowed 0.1 [m]" in row for row in table)
    assert json.loads(line) == {"rows": [RIGHT, WRONG]}


def test_what_can_not_be_proven_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line_of(*options: str) -> str:
        assert trimpot(monkeypatch, *options) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees none here" in line_of("--prove", "--op", "swiglu")
    for rung in ("--dry", "--prove"):
        assert "'silu' has no Triton kernels; adamw_step, " in line_of(rung, "--op", "swiglu,silu")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name)
    )
    assert "triton is not installed" in line_of("--dry")


def test_lists_are_split() -> None:
    assert bench_kernels.split(" a, b,,c ") == ["a", "b", "c"]
    assert bench_kernels.split("") == []
