"""`trimpot bench step` from its command to its rows, and what it compares."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trimpot.kernels.bench.shapes import OPS, RANK, SHAPES
from trimpot.kernels.errors import KernelError
from trimpot.runner import bench_sides, bench_step
from trimpot.runner.bench_step import relative_error
from trimpot.runner.bench_work import step_work
from trimpot.runner.bench_workloads import (
    Method,
    find_workload,
    make_batch,
    trained_tokens,
    write_model,
)
from trimpot.runner.data.batch import IGNORED
from trimpot.runner.errors import TrainError
from trimpot.runner.plan.facts import read_facts

ROW_KEYS = {
    "workload", "peer", "ratio", "ratio_low", "ratio_high", "memory_ratio", "gradient_error",
    "bf16_gradient_error", "variant", "threads", "tokens_per_second", "peer_tokens_per_second",
}  # fmt: skip


def test_a_tiny_step_end_to_end(tmp_path: Path) -> None:
    """Ours in float32 against a peer, packed; each side is a process of its own."""
    page, plots = tmp_path / "step.html", tmp_path / "plots"
    command = [sys.executable, "-m", "trimpot.cluster.cli", "bench", "step", "--shape", "T-packed"]
    command += ["--tokens", "64", "--repeats", "1", "--variant", "fp32", "--json", "-"]
    command += ["--peer", "fp32", "--html", str(page), "--plots", str(plots)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    rows = result["rows"]
    assert [row["peer"] for row in rows] == ["transformers + PEFT, fp32 sdpa, dense mask"]
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert row["workload"] == "T-packed" and row["threads"] == 1
        assert row["ratio"] > 0 and 0 < row["memory_ratio"] < 3
        assert row["ratio_low"] <= row["ratio_high"]
        # The same batch and weights, whoever computes: float32 agrees, bf16 is far from it.
        assert 0 < row["gradient_error"] < 1e-5 < 1e-3 < row["bf16_gradient_error"] < 0.1
        assert row["loss"] == pytest.approx(row["peer_loss"], rel=1e-5)
    (part,) = result["shares"]
    assert part["workload"] == "T-packed"
    assert sum(part["shares"].values()) == pytest.approx(1, abs=0.01)
    assert part["shares"]["lora_linear"] > 0 and part["seconds"] > 0
    assert part["work"].keys() <= {*OPS} and part["roofline"]["gemm_tflops"]["fp32"] > 0
    drawn = {"ratios.png", "shares-T-packed.png", "roofline-T-packed.png"}
    assert {file.name for file in plots.iterdir()} == drawn
    for file in plots.iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    held = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(held) == 3 and "://" not in text
    assert "linear_cross_entropy" in text and "of roofline" in text


def test_a_side_far_behind_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind by anything at all, here: the slower of two sides has one step, the faster all."""
    monkeypatch.setattr(bench_step, "FAR_BEHIND", 1)
    said: list[str] = []
    (row,) = bench_step.bench_step(["T"], ["fp32"], ["fp32"], 64, 1, 2, said.append)["rows"]
    assert row["repeats"] == 1 and 0 < row["ratio_low"] <= row["ratio_high"]
    assert len([line for line in said if line.endswith("times slower: timed once")]) == 1
    assert said[-1] == "T: round 2 of 2"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_work_is_what_torch_counts(tmp_path: Path, method: Method) -> None:
    """Of matrix products in transformers + PEFT, less those that the first layer is spared where
    the embeddings, its inputs, want no gradient. Attention's are not causal there, and not
    recomputed in backward: six products of all pairs, where ours has seven of half of them."""
    shape, documents = SHAPES["T"], [64]
    write_model(shape, tmp_path / "T")
    peer = bench_sides.make_side("fp32", tmp_path / "T", documents, method)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        peer.backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    work = step_work(read_facts(tmp_path / "T"), documents, method)
    tokens, h, out = sum(documents), shape.hidden, shape.hidden + 2 * shape.kv_width
    linear, spared = work.get("lora_linear"), 2 * tokens * h * (out + 3 * RANK)
    if linear is None:
        linear, spared = work["GEMM (torch)"], 0
    assert products == linear.flops + work["linear_cross_entropy"].flops - spared
    attention = sum(n for op, n in counted.items() if str(op) == "aten.bmm")
    halves = 7 / 6 * (tokens + 1) / tokens / 2
    assert work["varlen_attention"].flops == pytest.approx(halves * attention)


def test_unknown_names_are_one_line() -> None:
    command = [sys.executable, "-m", "trimpot.cluster.cli", "bench", "step"]
    for arguments in (["--shape", "XL"], ["--shape", "T", "--peer", "me"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_workloads(tmp_path: Path) -> None:
    assert find_workload("S-packed", None).documents == [512, 384, 320, 256, 224, 160, 128, 64]
    assert find_workload("S", None).documents == [2048]
    assert sum(find_workload("S-packed", 1000).documents) == 1000
    assert find_workload("S-packed", None).method == "lora"
    full = find_workload("S-full-packed", None)
    assert full.method == "full" and full.packed and full.model == SHAPES["S"]
    folder = find_workload(f"{tmp_path}-packed", None)
    assert folder.model == tmp_path and folder.packed and folder.name == f"{tmp_path.name}-packed"
    own = tmp_path / "a-full"  # a folder of that name, not the folder a trained in full
    own.mkdir()
    assert find_workload(str(own), None).method == "lora"
    assert find_workload(f"{own}-full", None).model == own
    with pytest.raises(KernelError, match="there is no shape"):
        find_workload("XL", None)


def test_batches_keep_documents_apart() -> None:
    batch = make_batch(100, [5, 3])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert (batch["labels"] == IGNORED).nonzero()[:, 1].tolist() == [0, 5]
    assert trained_tokens(batch) == 4 + 2
    assert "position_ids" not in make_batch(100, [8])


def test_both_sides_have_the_same_adapters(tmp_path: Path) -> None:
    write_model(SHAPES["T"], tmp_path / "T")
    ours = bench_sides.make_side("ours:fp32", tmp_path / "T", [8])
    peer = bench_sides.make_side("fp32", tmp_path / "T", [8])
    assert ours.trained.keys() == peer.trained.keys()
    assert len(ours.trained) == 2 * 7 * SHAPES["T"].layers
    for name, parameter in ours.trained.items():
        assert torch.equal(parameter, peer.trained[name]), name
        assert parameter.abs().sum() > 0


def test_full_sides_train_the_same_weights(tmp_path: Path) -> None:
    """And know the same gradients of all of them, and move by the same step of AdamW."""
    write_model(SHAPES["T"], tmp_path / "T")
    moved, found = [], []
    for name in ("ours:fp32", "fp32"):
        side = bench_sides.make_side(name, tmp_path / "T", [9, 5, 2], "full")
        before = {n: p.detach().clone() for n, p in side.trained.items()}
        bench_sides.gradients(side, tmp_path / "found.npz")
        found.append(dict(np.load(tmp_path / "found.npz")))
        side.step()
        moved.append({n: (p.detach() - before[n]).numpy() for n, p in side.trained.items()})
    assert len(found[0]) == 9 * SHAPES["T"].layers + 2
    assert relative_error(found[0], found[1]) < 1e-5
    assert relative_error(moved[0], moved[1]) < 1e-2


def test_one_document_per_micro_batch_is_the_same_step(tmp_path: Path) -> None:
    write_model(SHAPES["T"], tmp_path / "T")
    losses, found = [], []
    for name in ("fp32", "fp32-documents"):
        side = bench_sides.make_side(name, tmp_path / "T", [9, 5, 2])
        losses.append(bench_sides.gradients(side, tmp_path / f"{name}.npz")["loss"])
        found.append(dict(np.load(tmp_path / f"{name}.npz")))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert relative_error(found[1], found[0]) < 1e-5


def test_gradients_of_other_tensors_are_not_compared() -> None:
    one = {"a": np.array([3.0, 4.0]), "b": np.zeros(2)}
    assert relative_error(one, one) == 0
    assert relative_error({"a": np.array([3.0, 4.5]), "b": np.zeros(2)}, one) == pytest.approx(0.1)
    with pytest.raises(TrainError, match="for b"):
        relative_error({"a": one["a"]}, one)


def test_parts_of_a_step() -> None:
    assert bench_sides.part_of("trimpot::lora_linear_backward") == "lora_linear"
    own = "GeneratedBackwardFor_trimpot_linear_cross_entropy_defaultBackward"
    assert bench_sides.part_of(own) == "linear_cross_entropy"
    assert bench_sides.part_of("aten::mm") == "GEMM (torch)"
    assert bench_sides.part_of("aten::mul").startswith("elementwise")
    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    assert bench_sides.part_of(name) == "attention (torch)"
    assert bench_sides.part_of("aten::_fused_adamw_") == "AdamW (torch)"
