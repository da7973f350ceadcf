"""`trimpot init`: what it makes of models and data, and that what it writes can be trained."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
import yaml

from trimpot.cluster import init
from trimpot.cluster.fleet import local_fleet
from trimpot.cluster.init import write_config
from trimpot.cluster.prepare import check_inputs, draft_plan, prepare_run, run_lock
from trimpot.runner.config import Config, all_keys
from trimpot.runner.errors import ConfigError, DataError, ModelError
from trimpot.runner.run_yaml import load_config
from trimpot.runner.types import Fleet

PAIR = "prompt_completion"
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy.toy_run(tmp_path)
    (tmp_path / "run.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "find_gpus", lambda: ([], ""))
    return tmp_path


def plan_of(path: Path) -> Config:
    """What `trimpot plan` does with a file; fails as it would."""
    config = load_config(path, ["fleet.memory_per_worker=1e12", "fleet.gpus_per_worker=0"])
    check_inputs(config)
    draft_plan(config, local_fleet(config))
    return config


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "a", "completion": "b"}, (PAIR, "prompt", "completion")),
        ({"instruction": "a", "input": "", "output": "b"}, (PAIR, "instruction", "output")),
        ({"id": "1", "Question": "a", "Answer": "b"}, (PAIR, "Question", "Answer")),
        ({"response": "b", "input": "a"}, (PAIR, "input", "response")),
        ({"prompt": "x", "question": "a", "answer": "b"}, (PAIR, "prompt", "answer")),
        ({"messages": TALK, "text": "c"}, ("chat", "messages")),
        ({"conversation": TALK}, ("chat", "conversation")),
        ({"text": "a", "label": "b"}, ("text", "text")),
        ({"line": "a"}, ("text", "line")),
        ({"title": "a", "content": "b"}, ("text", "content")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_columns(row: dict[str, Any], wanted: tuple[str, ...], place: Path) -> None:
    toy.write_rows(place / "d.jsonl", [row] * 3)
    config = plan_of(write_config("./model", Path("d.jsonl"), Path("run.yaml"), force=False))
    data = config.data
    columns = {
        "chat": (data.messages_column,),
        PAIR: (data.prompt_column, data.completion_column),
        "text": (data.text_column,),
    }[data.format]
    assert (data.format, *columns) == wanted
    unused = [name for name in row if name not in columns]
    assert all(name in (place / "run.yaml").read_text() for name in unused)


def test_what_it_writes_trains_as_far_as_the_workers(place: Path) -> None:
    """Prepared as `trimpot train` would, with all rows trained whole."""
    with (place / "t.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows([f"What is {i}?", "It is " + "very " * (i % 7) + "odd."] for i in range(40))
    path = write_config("./model", Path("t.csv"), Path("run.yaml"), force=False)
    config = load_config(path)
    with run_lock(Path(config.output_dir)):
        prepared = prepare_run(config, Fleet(memory_bytes=2**40), fresh=False)
    assert not any("cut" in note for note in prepared.notes)
    assert prepared.plan.total_steps == round(36 * 3 / 4)  # a tenth held out, 3 epochs, batch 4
    assert config.output_dir == str(place / "run")


def test_paths_count_from_the_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "conf").mkdir()
    inside = write_config("model", Path("train.jsonl"), Path("run.yaml"), force=False)
    outside = write_config("model", Path("train.jsonl"), Path("conf/run.yaml"), force=False)
    assert yaml.safe_load(inside.read_text())["model"]["path"] == "./model"
    assert yaml.safe_load(inside.read_text())["data"]["train"] == "./train.jsonl"
    files = [place / inside, place / outside]
    monkeypatch.chdir("/")
    for path in files:
        config = plan_of(path)
        assert config.model.path == str(place / "model")
        assert config.data.train == str(place / "train.jsonl")
        assert config.output_dir == str(path.parent / "run")


def test_max_length_holds_the_longest_row_within_the_models_positions(place: Path) -> None:
    def length(answer: int) -> tuple[int, str]:
        rows = [{"prompt": "a", "completion": "b" * n} for n in (1, answer)]
        toy.write_rows(place / "d.jsonl", rows)
        path = write_config("model", Path("d.jsonl"), Path("n.yaml"), force=True)
        return plan_of(path).data.max_length, path.read_text()

    around = len("<user\na>\n<assistant\n>\n")  # one token for < and for >
    assert length(64 - around)[0] == 64
    assert length(65 - around)[0] == 128
    cut, text = length(400)
    assert cut == toy.POSITIONS
    assert "and is cut: the model has 128 positions" in text


def test_rows_beyond_those_looked_at_get_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "LOOKED_AT", 2)
    toy.write_rows(place / "d.jsonl", [{"text": "a" * 60}] * 3)
    path = write_config("model", Path("d.jsonl"), Path("n.yaml"), force=True)
    assert load_config(path).data.max_length == 128
    assert "at least 2 rows" in path.read_text()


def test_chat_without_a_template_gets_one(place: Path) -> None:
    toy.toy_model(place / "base", template=None)
    toy.write_rows(place / "d.jsonl", [{"messages": TALK}] * 3 + [{"messages": TALK * 2}] * 3)
    path = write_config("base", Path("d.jsonl"), Path("n.yaml"), force=True)
    config = load_config(path)
    with run_lock(Path(config.output_dir)):
        prepare_run(config, Fleet(memory_bytes=2**40), fresh=False)
    assert config.data.chat_template == init.PLAIN_TEMPLATE


def test_a_hub_model_that_is_not_here(place: Path) -> None:
    path = write_config("org/name", Path("train.jsonl"), Path("run.yaml"), force=False)
    text = path.read_text()
    assert load_config(path).model.path == "org/name"
    assert "not in this machine's cache" in text
    assert "has about" in text  # guessed, not counted


def test_batch_divides_over_the_gpus(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "find_gpus", lambda: ([{}] * 6, ""))
    path = write_config("model", Path("train.jsonl"), Path("run.yaml"), force=False)
    assert load_config(path).optim.batch_size == 6
    assert load_config(path).precision == "bf16"


def test_each_value_says_what_it_is(place: Path) -> None:
    path = write_config("model", Path("train.jsonl"), Path("run.yaml"), force=False)
    values = [line for line in path.read_text().splitlines() if ":" in line.partition("#")[0]]
    assert values
    for line in values:
        key, _, rest = line.partition(":")
        assert rest == "" or " # " in rest, f"{key} is not explained"
        assert key.strip() in {part for name in all_keys() for part in name.split(".")}


def test_overwrites_only_when_told(place: Path) -> None:
    mine = place / "run.yaml"
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=r"run\.yaml is there already.*--force"):
        write_config("model", Path("train.jsonl"), mine, force=False)
    assert mine.read_text() == "mine"
    (place / "run").mkdir()
    assert load_config(write_config("model", Path("train.jsonl"), mine, force=True))
    # An earlier run's folder is left to it.
    assert load_config(mine).output_dir == str(place / "run-2")


@pytest.mark.parametrize(
    ("model", "data", "error", "says"),
    [
        ("./no", "train.jsonl", ModelError, "no is not there"),
        ("train.jsonl", "train.jsonl", ModelError, "is a file"),
        ("model", "no.jsonl", DataError, "no.jsonl is not there"),
        ("model", "model", DataError, "dataset_info.json"),
        ("model", "odd.jsonl", DataError, "row 2 completion is int"),
        ("model", "share.jsonl", DataError, "message 1 has no role"),
        ("model", "none.jsonl", DataError, "columns a, b"),
    ],
)
def test_mistakes(model: str, data: str, error: type[Exception], says: str, place: Path) -> None:
    toy.write_rows(place / "odd.jsonl", [toy.ROWS[0], toy.ROWS[0] | {"completion": 3}])
    toy.write_rows(place / "share.jsonl", [{"conversations": [{"from": "human", "value": "a"}]}])
    toy.write_rows(place / "none.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(error, match=says):
        write_config(model, Path(data), Path("run.yaml"), force=False)
    assert not (place / "run.yaml").exists()


def test_the_command(place: Path) -> None:
    code = (
        "import sys; from trimpot.cluster import cli\n"
        "sys.argv = ['trimpot', 'init', 'model', 'train.jsonl', '--json']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, heavy = done.stdout.splitlines()
    assert json.loads(said) == {"config": "run.yaml"}
    assert heavy == "[]"
    plan_of(place / "run.yaml")
