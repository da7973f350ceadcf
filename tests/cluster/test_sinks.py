import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimpot.cluster import sinks
from trimpot.cluster.sinks import Sinks, flat, open_sinks, without_secrets
from trimpot.runner.errors import UserError

pytestmark = pytest.mark.alone

CONFIG = {
    "method": "lora",
    "optim": {"learning_rate": 5e-4},
    "data": {"train": "https://me:hush@host/train.jsonl"},
    "hub_token": "hush",
}


def run(steps: int, first_step: int = 1) -> Iterator[dict[str, Any]]:
    """A run's events; its last step is evaluated, which the journal says twice."""
    yield {"kind": "start", "first_step": first_step}
    yield {"kind": "phase", "name": "model", "seconds": 1.0}
    if first_step == 1:
        yield {"kind": "eval", "step": 0, "loss": 4.0}
    for n in range(first_step, first_step + steps):
        last = n == first_step + steps - 1
        if last:
            yield {"kind": "eval", "step": n, "loss": 3.0}
        yield {
            "kind": "step",
            "step": n,
            "loss": 2.0 + 1.0 / n,
            "learning_rate": 5e-4,
            "grad_norm": 0.9,
            "tokens": 600,
            "seconds": 0.5,
            "memory_bytes": 1_000_000,
            "held_out_loss": 3.0 if last else None,
        }
    yield {"kind": "end", "status": "done"}


class Keeps:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.rows.append((step, values))

    def close(self) -> None:
        self.closed += 1


class Raises(Keeps):
    """Fails at its third value."""

    error: BaseException = RuntimeError("the server\nsaid 500 at https://me:hush@host")

    def log(self, step: int, values: dict[str, float]) -> None:
        super().log(step, values)
        if len(self.rows) == 3:
            raise self.error


class Exits(Raises):
    error = SystemExit(3)


class Hangs(Keeps):
    """Never comes back from its first value, until the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def log(self, step: int, values: dict[str, float]) -> None:
        super().log(step, values)
        self.let_go.wait(30)


class HangsAtTheEnd(Hangs):
    def log(self, step: int, values: dict[str, float]) -> None:
        self.rows.append((step, values))

    def close(self) -> None:
        self.let_go.wait(30)


class Spoils(Keeps):
    """Writes into the values it is given, as trackers do."""

    def log(self, step: int, values: dict[str, float]) -> None:
        super().log(step, dict(values))
        values.clear()


def feed(
    given: dict[str, Any], steps: int = 20, timeout_s: float = 5.0, queue_events: int = 100
) -> tuple[list[str], float]:
    """(warnings, seconds that handling and closing took) of a run with these sinks."""
    warnings: list[str] = []
    openers = {name: (lambda first_step, sink=sink: sink) for name, sink in given.items()}
    all_sinks = Sinks(openers, warnings.append, queue_events)
    began = time.monotonic()
    for event in run(steps):
        all_sinks.handle(event)
    all_sinks.close(timeout_s)
    return warnings, time.monotonic() - began


def test_every_value_arrives_once_and_in_order() -> None:
    sink = Keeps()
    warnings, _ = feed({"keeps": sink})
    assert warnings == []
    assert sink.closed == 1
    assert sink.rows[0] == (0, {"held_out_loss": 4.0})
    assert sink.rows[1] == (
        1,
        {
            "loss": 3.0,
            "learning_rate": 5e-4,
            "grad_norm": 0.9,
            "memory": 1_000_000.0,
            "tokens_per_second": 1200.0,
        },
    )
    assert [step for step, _ in sink.rows] == [0, *range(1, 20), 20, 20]
    held_out = [(s, v["held_out_loss"]) for s, v in sink.rows if "held_out_loss" in v]
    assert held_out == [(0, 4.0), (20, 3.0)]


@pytest.mark.parametrize("sink", [Raises(), Exits()])
def test_sink_that_raises_is_dropped_with_one_warning(sink: Raises) -> None:
    good = Keeps()
    warnings, seconds = feed({"bad": sink, "good": good})
    assert len(warnings) == 1
    assert warnings[0].startswith("bad failed and gets no more values")
    assert "\n" not in warnings[0]
    assert "hush" not in warnings[0]
    assert len(sink.rows) == 3
    assert sink.closed == 0
    assert len(good.rows) == 22
    assert good.closed == 1
    assert seconds < 2


def test_failure_is_told_while_the_run_goes_on() -> None:
    warnings: list[str] = []

    def refuse(first_step: int) -> Keeps:
        raise ConnectionError("no route to the server")

    all_sinks = Sinks({"far": refuse}, warnings.append)
    events = run(10_000)
    deadline = time.monotonic() + 5
    while not warnings and time.monotonic() < deadline:
        all_sinks.handle(next(events))
        time.sleep(0.001)
    assert warnings == [
        "far failed and gets no more values; journal.jsonl has every one: "
        "ConnectionError: no route to the server"
    ]
    all_sinks.close(1.0)
    assert len(warnings) == 1


def test_warnings_come_from_the_thread_that_handles() -> None:
    threads: list[threading.Thread] = []
    all_sinks = Sinks(
        {"bad": lambda _: Raises()}, lambda _: threads.append(threading.current_thread())
    )
    for event in run(20):
        all_sinks.handle(event)
    all_sinks.close(5.0)
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("make", [Hangs, HangsAtTheEnd])
def test_sink_that_hangs_is_left_behind(make: Callable[[], Hangs]) -> None:
    bad, good = make(), Keeps()
    try:
        warnings, seconds = feed({"stuck": bad, "good": good}, timeout_s=0.5)
        assert seconds < 1.5
        assert warnings == [
            "stuck did not finish in 0.5 s and is left behind; journal.jsonl has every value"
        ]
        assert len(good.rows) == 22
        assert good.closed == 1
    finally:
        bad.let_go.set()


def test_hanging_sinks_share_one_timeout() -> None:
    stuck = {f"stuck{i}": Hangs() for i in range(5)}
    try:
        warnings, seconds = feed(stuck, timeout_s=0.4)
        assert len(warnings) == 5
        assert seconds < 1.2
    finally:
        for sink in stuck.values():
            sink.let_go.set()


def test_queue_of_a_hanging_sink_is_bounded_and_handling_stays_fast() -> None:
    bad = Hangs()
    all_sinks = Sinks({"stuck": lambda _: bad}, lambda _: None, queue_events=50)
    try:
        began = time.monotonic()
        for event in run(20_000):
            all_sinks.handle(event)
        assert time.monotonic() - began < 2  # 100 µs an event would be slow
        assert all_sinks._threads[0].items.qsize() == 50
        all_sinks.close(0.1)
    finally:
        bad.let_go.set()


def test_slow_sink_says_what_it_lost() -> None:
    class Slow(Keeps):
        def log(self, step: int, values: dict[str, float]) -> None:
            super().log(step, values)
            time.sleep(0.01)

    sink = Slow()
    warnings, _ = feed({"slow": sink}, steps=100, queue_events=10)
    lost = 102 - len(sink.rows)
    assert lost > 50
    assert sink.closed == 1
    assert warnings == [
        f"slow was too slow: {lost} of its values are missing; journal.jsonl has every value"
    ]


def test_no_sink_sees_what_another_does_to_its_values() -> None:
    good = Keeps()
    feed({"spoils": Spoils(), "good": good})
    assert all(values for _, values in good.rows)


def test_threads_do_not_keep_the_process() -> None:
    bad = Hangs()
    all_sinks = Sinks({"stuck": lambda _: bad}, lambda _: None)
    all_sinks.handle({"kind": "start", "first_step": 1})
    try:
        thread = next(t for t in threading.enumerate() if t.name == "sink-stuck")
        assert thread.daemon
    finally:
        bad.let_go.set()
        all_sinks.close(1.0)


def test_close_without_a_start_and_twice() -> None:
    made: list[int] = []
    all_sinks = Sinks({"one": lambda n: made.append(n) or Keeps()}, pytest.fail)
    all_sinks.close(1.0)
    all_sinks.close(1.0)
    all_sinks.handle({"kind": "end"})
    assert made == []


def opened(tmp_path: Path, names: list[str]) -> Sinks:
    return open_sinks(
        names, project="p", run_name=None, run_dir=tmp_path, config=CONFIG, warn=pytest.fail
    )


def test_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_KNOWN", {"wandb": ("no_such_package", sinks._WandB)})
    with pytest.raises(UserError, match=r"`pip install trimpot\[wandb\]`"):
        opened(tmp_path, ["wandb"])


def test_folder_of_the_same_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_package").mkdir()  # as W&B and MLflow leave behind
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sinks, "_KNOWN", {"wandb": ("no_such_package", sinks._WandB)})
    with pytest.raises(UserError, match="is not installed"):
        opened(tmp_path, ["wandb"])


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'comet'; known are tensorboard, mlflow, wandb, trackio"):
        opened(tmp_path, ["comet"])


def test_nothing_is_imported_that_was_not_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from trimpot.cluster.sinks import open_sinks\n"
        "open_sinks([], project='p', run_name=None, run_dir=pathlib.Path('.'), config={}, "
        "warn=print).close()\n"
        "assert not {'tensorboardX','mlflow','wandb','trackio','torch','ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would read: by tag, in order of the files and of the records in them."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import crc32c

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            # A record is its length, the length's checksum, the data, the data's checksum.
            length = int.from_bytes(raw[at : at + 8], "little")
            data = raw[at + 12 : at + 12 + length]
            checksum = crc32c(data)
            masked = (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF
            assert int.from_bytes(raw[at + 12 + length : at + 16 + length], "little") == masked
            at += 16 + length
            event = Event.FromString(data)
            if event.HasField("session_log"):
                found.setdefault("purged from", []).append((event.step, 0.0))
            for value in event.summary.value:
                text = b"".join(value.tensor.string_val).decode()
                row = found.setdefault(value.tag + text, [])
                row.append((event.step, value.simple_value))
    return found


def test_tensorboard_file_holds_the_run(tmp_path: Path) -> None:
    all_sinks = opened(tmp_path, ["tensorboard"])
    for event in run(20):
        all_sinks.handle(event)
    all_sinks.close()
    found = scalars(tmp_path / "tensorboard")
    loss = [(n, pytest.approx(2.0 + 1.0 / n)) for n in range(1, 21)]  # float32 in the file
    assert found["loss"] == loss
    assert found["held_out_loss"] == [(0, 4.0), (20, 3.0)]
    assert found["tokens_per_second"] == [(n, 1200.0) for n in range(1, 21)]
    assert {"learning_rate", "grad_norm", "memory"} <= set(found)
    config = [tag for tag in found if tag.startswith("config")]
    assert len(config) == 1
    assert "learning_rate: 0.0005" in config[0]
    assert "hush" not in config[0]


def test_tensorboard_of_a_resumed_run_hides_what_was_superseded(tmp_path: Path) -> None:
    for events in (run(20), run(10, first_step=16)):
        all_sinks = opened(tmp_path, ["tensorboard"])
        for event in events:
            all_sinks.handle(event)
        all_sinks.close()
        time.sleep(1.1)  # the file's name has the second in it
    found = scalars(tmp_path / "tensorboard")
    assert found["purged from"] == [(16, 0.0)]
    assert [step for step, _ in found["loss"]] == [*range(1, 21), *range(16, 26)]


def test_wandb_never_asks_for_a_key(tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    package = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")),
        login=lambda **given: calls.append(("login", given)) or False,
        init=lambda **given: calls.append(("init", given)),
    )
    tracking = sinks.Tracking("p", "r", tmp_path, {})
    with pytest.raises(RuntimeError, match="nobody is logged in; `wandb login`"):
        sinks._WandB(package, tracking, 1)  # type: ignore[arg-type]
    assert calls == [("login", {"prompt": False, "verify": False})]


def test_secrets_are_blotted_out() -> None:
    config = {
        "api_key": "k",
        "HF_TOKEN": "t",
        "nested": [{"password": "p", "url": "https://me:pw@host/x"}],
        "max_new_tokens": 48,
        "tokenizer": "x",
        "empty_token": None,
        "mail": "me@host",
    }
    assert without_secrets(config) == {
        "api_key": "***",
        "HF_TOKEN": "***",
        "nested": [{"password": "***", "url": "https://***@host/x"}],
        "max_new_tokens": 48,
        "tokenizer": "x",
        "empty_token": None,
        "mail": "me@host",
    }
    assert config["api_key"] == "k"


def test_flat() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
