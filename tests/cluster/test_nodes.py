"""A Ray head and two raylets as nodes with addresses of their own; training across them."""

from __future__ import annotations

import json

import pytest
from nodes import ray_nodes
from runs import config, prepared, run_arrangements, settings, write_yaml
from tiny import tiny_data

pytestmark = pytest.mark.alone


@pytest.mark.slow
def test_training_across_nodes_equals_one_process(model, tmp_path):
    data = tiny_data(tmp_path, 60)
    optim = {"batch_size": 8, "max_steps": 10, "learning_rate": 1e-2}
    alone = config(model, data, tmp_path / "alone", optim=optim)
    (expected,) = run_arrangements(1, [prepared(alone)], tmp_path)

    fleet = {"workers": 2, "zero_stage": 3, "nodes": 2}
    values = settings(model, data, tmp_path / "across", optim=optim, fleet=fleet)
    yaml = write_yaml(tmp_path / "across.yaml", values)
    with ray_nodes(3, tmp_path) as cluster:
        cluster.add()
        cluster.add()
        process = cluster.train(yaml)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    events = [
        json.loads(line) for line in (tmp_path / "across/journal.jsonl").read_text().splitlines()
    ]
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert losses == pytest.approx(expected, rel=1e-4)
    # Two workers of one CPU, two nodes of one CPU, none on the head: each had a node of its own.
    (start,) = (event for event in events if event["kind"] == "start")
    assert len({*start["nodes"]}) == 2
