"""run.yaml → Config: numbers as people write them, paths, overrides, suggestions, schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import toy
import yaml
from pydantic import ValidationError

from trimpot.runner.config import Config, all_keys, check_config, json_schema
from trimpot.runner.errors import ConfigError
from trimpot.runner.run_yaml import load_config


def config(**sections: Any) -> Config:
    raw = {"model": {"path": "/m"}, "data": {"train": "/t.jsonl"}, "output_dir": "/r"}
    return check_config(raw | sections, "test")


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "here" / "run.yaml"
    path.write_text(yaml.safe_dump(toy.RUN))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return path


@pytest.mark.parametrize(
    "text", ["5e-4", "5E-4", "5.e-4", "5.0e-4", ".0005", "0.0005", "+5e-4", "5_0e-5", "50.0e-5"]
)
def test_a_rate_however_it_is_written(text: str, run_yaml: Path) -> None:
    run_yaml.write_text(f"{run_yaml.read_text()}\nadapter: {{lora_alpha: {text}}}\n")
    loaded = load_config(run_yaml, [f"optim.learning_rate={text}"])
    assert loaded.optim.learning_rate == float(text) == loaded.adapter.lora_alpha


def test_off_is_a_backend_though_yaml_calls_it_false(run_yaml: Path) -> None:
    run_yaml.write_text(f"{run_yaml.read_text()}\nkernels: {{default: off, rope: auto}}\n")
    loaded = load_config(run_yaml, ["kernels.swiglu=off"])
    assert (loaded.kernels.default, loaded.kernels.swiglu) == ("off", "off")
    assert (loaded.kernels.rope, loaded.kernels.geglu) == ("auto", None)
    with pytest.raises(ConfigError, match=r"kernels\.default is true: input should be"):
        load_config(run_yaml, ["kernels.default=on"])


@pytest.mark.parametrize("text", ["5e", "e-4", "5e-4x", "1e1e1", "one"])
def test_what_is_no_number_is_refused(text: str, run_yaml: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        load_config(run_yaml, [f"optim.learning_rate={text}"])


def test_paths_of_the_file_count_from_it_and_those_of_overrides_from_here(run_yaml: Path) -> None:
    here = run_yaml.parent
    loaded = load_config(run_yaml)
    assert loaded.model.path == str(here / "model")
    assert loaded.data.train == str(here / "train.jsonl")
    assert loaded.output_dir == str(here / "run")
    overridden = load_config(
        Path("../here/run.yaml"), ["data.eval=e.jsonl", "output_dir=mine", "seed=3"]
    )
    assert overridden.data.eval == str(Path.cwd() / "e.jsonl")
    assert overridden.output_dir == str(Path.cwd() / "mine")
    assert overridden.data.train == str(here / "train.jsonl")
    assert overridden.seed == 3


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("org/name", "org/name"),  # a hub id: there is no such folder
        ("model", "HERE/model"),  # a folder beside the file
        ("./other", "HERE/./other"),
        ("a/b/c", "HERE/a/b/c"),  # no hub id has two slashes
        ("/abs/m", "/abs/m"),
        ("~/m", str(Path.home() / "m")),
    ],
)
def test_a_models_path(given: str, wanted: str, run_yaml: Path) -> None:
    run_yaml.write_text(yaml.safe_dump(toy.RUN | {"model": {"path": given}}))
    path = load_config(run_yaml).model.path
    assert Path(path) == Path(wanted.replace("HERE", str(run_yaml.parent)))


def test_overrides_reach_lists_nothing_and_new_sections(run_yaml: Path) -> None:
    loaded = load_config(
        run_yaml,
        [
            "adapter.target_modules=[q_proj, v_proj]",
            "optim.max_grad_norm=null",
            "optim.betas=[0.8, 0.9]",
            "tracking.run_name=a=b",
            "data.system_prompt='yes'",
        ],
    )
    assert loaded.adapter.target_modules == ["q_proj", "v_proj"]
    assert loaded.optim.max_grad_norm is None
    assert loaded.optim.betas == (0.8, 0.9)
    assert loaded.tracking.run_name == "a=b"
    assert loaded.data.system_prompt == "yes"


def nested(key: str, value: Any) -> dict[str, Any]:
    """a.b, 1 → {"a": {"b": 1}}."""
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


@pytest.mark.parametrize("key", all_keys())
def test_a_slip_of_the_finger_is_told_from_any_key(key: str) -> None:
    """Two letters swapped: the suggestion is the key that was meant."""
    name = key.rpartition(".")[2]
    slip = name[:-2] + name[-1] + name[-2] if name[-1] != name[-2] else name[:-1]
    base = {"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": "r"}
    raw = base | nested(key.removesuffix(name) + slip, 1)
    with pytest.raises(ConfigError) as refused:
        check_config(raw, "test")
    assert f"did you mean {name}?" in str(refused.value)


def test_faults_beyond_three_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"\(and 2 more\)$") as refused:
        config(a=1, b=2, c=3, d=4, e=5)
    assert str(refused.value).count("unknown key") == 3
    assert "\n" not in str(refused.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        config().seed = 1  # type: ignore[misc]


def test_the_schema_is_valid_and_explains_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    sections = [schema, *schema["$defs"].values()]
    silent = [
        f"{section.get('title')}.{key}"
        for section in sections
        for key, value in section["properties"].items()
        if not value.get("description")
    ]
    assert silent == []


AGREED = [
    {},
    {"optim": {"batch_size": 0}},
    {"optim": {"micro_batch_size": "auto"}},
    {"optim": {"micro_batch_size": "few"}},
    {"optim": {"betas": [0.9]}},
    {"optim": {"max_grad_norm": None}},
    {"optim": {"learning_rate": 10}},
    {"adapter": {"target_modules": ["q_proj"]}},
    {"adapter": {"target_modules": "some"}},
    {"fleet": {"zero_stage": 4}},
    {"fleet": {"zero_stage": "auto"}},
    {"tracking": {"sinks": ["wandb"]}},
    {"tracking": {"sinks": ["excel"]}},
    {"precision": "fp16"},
    {"modle": {}},
    {"data": {"train": ""}},
    {"data": {}},
]


@pytest.mark.parametrize("sections", AGREED, ids=str)
def test_schema_and_config_agree(sections: dict[str, Any]) -> None:
    """What an editor marks is what the command refuses."""
    raw = {"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": "r"} | sections
    valid = jsonschema.Draft202012Validator(json_schema()).is_valid(raw)
    try:
        check_config(raw, "test")
    except ConfigError:
        assert not valid
    else:
        assert valid


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"fleet": {"zero_stage": 2}}, "set fleet.zero_stage 0 or auto; 2 is set"),
        ({"fleet": {"offload_optimizer": True}}, "set offload_optimizer: false"),
        ({"optim": {}}, "auto would make others .* set optim.micro_batch_size to a number"),
    ],
)
def test_deterministic_refuses_what_it_can_not_keep(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"test: deterministic is true, .*{said}") as error:
        config(**{"deterministic": True, "optim": {"micro_batch_size": 1}} | sections)
    assert "\n" not in str(error.value)
