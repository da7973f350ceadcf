"""What is said of paired times: ratios, spreads, verdicts, and rows of two runs side by side."""

from __future__ import annotations

from typing import Any

import pytest

from trimpot.kernels.bench.shapes import OPS, SHAPES, calls, find_shape
from trimpot.kernels.bench.stats import Spread, changed, compare, paired_ratio, spread, verdict
from trimpot.kernels.errors import KernelError


def test_quantiles_are_those_of_the_values() -> None:
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert found.p20 == pytest.approx(2.0)
    assert found.p50 == pytest.approx(3.5)
    assert found.p80 == pytest.approx(5.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_is_taken_within_a_round() -> None:
    """The machine slows down threefold in the last rounds: paired, that is not seen."""
    ours = [1.0, 1.0, 3.0, 3.0, 3.0]
    peer = [2.0, 2.0, 6.0, 6.0, 6.0]
    assert paired_ratio(ours, peer) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="argument 2"):
        paired_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Spread(1.1, 1.2, 1.3), "FAST"),
        (Spread(0.7, 0.8, 0.9), "SLOW"),
        (Spread(0.9, 1.2, 1.3), "SAME"),  # the spread reaches below 1
        (Spread(0.7, 0.8, 1.0), "SAME"),
        (Spread(1.01, 1.01, 1.01), "SAME"),  # within the margin
        (Spread(0.99, 0.99, 0.99), "SAME"),
    ],
)
def test_verdicts(ratio: Spread, said: str) -> None:
    assert verdict(ratio) == said


def test_changes_are_told_from_the_spreads() -> None:
    base = Spread(1.4, 1.5, 1.6)
    assert changed(Spread(1.7, 1.8, 1.9), base) == "FAST"
    assert changed(Spread(1.0, 1.1, 1.2), base) == "SLOW"
    assert changed(Spread(1.2, 1.3, 1.45), base) == "SAME"


def row(**changes: Any) -> dict[str, Any]:
    return {
        "op": "swiglu", "shape": "S", "case": "mlp", "mode": "fwd", "dtype": "fp32",
        "wanted": "auto", "peer": "torch", "device": "cpu", "threads": 1,
        "p20": 1.9, "p50": 2.0, "p80": 2.1,
    } | changes  # fmt: skip


def test_rows_of_two_runs_are_paired_by_what_they_measure() -> None:
    base = [row(), row(mode="bwd", p20=3.0, p50=3.0, p80=3.0), row(threads=2)]
    now = [
        row(p20=0.9, p50=1.0, p80=1.1),
        row(mode="bwd", p20=3.3, p50=3.3, p80=3.3),
        row(dtype="bf16"),  # was not there
        row(threads=2, p20=None, p50=None, p80=None),  # has no time now
    ]
    changes = compare(now, base)
    assert [(c.ratio, c.verdict) for c in changes] == [
        (0.5, "SLOW"),
        (pytest.approx(1.1), "FAST"),
    ]
    assert changes[0].key[:4] == ("swiglu", "S", "mlp", "fwd")


def test_a_shape_stands_for_the_calls_of_a_layer() -> None:
    s = SHAPES["S"]
    linears = {call.case: (call.width, call.outs) for call in calls("lora_linear", s)}
    assert linears == {
        "qkv": (576, (576, 192, 192)),
        "o": (576, (576,)),
        "gate_up": (576, (1536, 1536)),
        "down": (1536, (576,)),
    }
    assert s.layer_parameters == 576 * (576 * 2 + 192 * 2) + 3 * 576 * 1536
    assert {call.op for op in OPS for call in calls(op, s)} == set(OPS)


def test_unknown_names_are_told_with_what_was_meant() -> None:
    with pytest.raises(KernelError, match="did you mean swiglu"):
        calls("swiglo", SHAPES["S"])
    with pytest.raises(KernelError, match="did you mean llama3-8b"):
        find_shape("llama-8b")
