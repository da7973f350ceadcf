"""An error of code is tried once more, and then taken for what it is; a failed start gives back
what it held."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import settings, write_yaml
from tiny import chat_data

from trimpot.cluster import journal as journals

pytestmark = pytest.mark.alone

PLANT = """
# Every Python process of the run starts with this: the loop's learning rate raises at step 9.
import sys, threading, time

def plant():
    while "trimpot.runner.loop" not in sys.modules or not hasattr(
        sys.modules["trimpot.runner.loop"], "run_loop"
    ):
        time.sleep(0.05)
    loop = sys.modules["trimpot.runner.loop"]
    real = loop.learning_rate

    def learning_rate(optim, step, total):
        if step == 9:
            raise ValueError("planted")
        return real(optim, step, total)

    loop.learning_rate = learning_rate

threading.Thread(target=plant, daemon=True).start()
"""

HOLD = """
import sys
from pathlib import Path
from runs import config, prepared
from trimpot.cluster.launch import ray_cluster
from trimpot.cluster.rooms import Rooms

model, data, run = map(Path, sys.argv[1:])
with ray_cluster(None, 2) as ray:
    from ray.util import placement_group

    rooms = Rooms(ray, prepared(config(model, data, run)))
    held = placement_group([{"CPU": 2}])
    assert held.wait(20)
    another = placement_group([{"CPU": 2}])
    assert not another.wait(1)
    rooms.release()
    assert placement_group([{"CPU": 2}]).wait(20)
"""


def test_what_a_failed_start_held_is_free_again(model: Path, tmp_path: Path) -> None:
    arguments = [str(model), str(chat_data(tmp_path, 20)), str(tmp_path / "run")]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", HOLD, *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_same_error_twice_is_a_bug(model: Path, tmp_path: Path) -> None:
    run, planted = tmp_path / "run", tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANT)
    values = settings(
        model, chat_data(tmp_path, 40), run, checkpoint={"every_steps": 2}, fleet={"workers": 1}
    )
    yaml = write_yaml(tmp_path / "run.yaml", values)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "trimpot.cluster.cli", "train", str(yaml)],
        env=environment | {"PYTHONPATH": str(planted)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: worker 0 failed: ValueError: planted; the same error twice")
    assert "after step 8" in line
    assert str(run / "failure.log") in line
    history = journals.history(journals.read(run))
    assert [s.start["resumed_from"] for s in history.sessions] == [None, 8]
    told = [(f["verdict"], f["restart"], f["step"]) for f in history.failures]
    assert told == [("exception", True, 8), ("exception", False, 8)]
    assert "exception after step 8" in done.stdout
    assert "ValueError: planted" in (run / "failure.log").read_text()
    assert "ValueError: planted" in (run / "report.html").read_text()
