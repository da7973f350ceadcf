"""run.yaml and `key=value` overrides → Config. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trimpot.runner.config import Config, check_config
from trimpot.runner.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without duplicate keys and without aliases (an alias bomb is 1 kB that fills memory)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):  # type: ignore[no-untyped-call]
            mark: Any = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)  # pyright: ignore[reportUnknownArgumentType]
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str | int | float | bool):
                continue  # refused later, as no key of ours
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 5e-4 as text; everyone who writes a learning rate means a number.
_UniqueKeyLoader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run.yaml, apply `key=value` overrides, check it.

    Relative paths in the file count from the file's own folder, so that a run directory can be
    moved as a whole; relative paths in overrides count from the current one.
    Raises ConfigError with one line a fault.
    """
    raw = read_yaml(path)
    resolve_paths(raw, path.resolve().parent)
    for override in overrides:
        apply_override(raw, override)
    return check_config(raw, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is not there; give the path of a run.yaml, or write one with `trimpot init`"
        ) from None
    except IsADirectoryError:
        inside = path / "run.yaml"
        hint = f"did you mean {inside}?" if inside.is_file() else "a run.yaml is wanted"
        raise ConfigError(f"{path} is a folder; {hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; a run.yaml is wanted") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    try:
        raw = yaml.load(text, _UniqueKeyLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_fault(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply; a run.yaml has two levels") from None
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path} is {kind}; a mapping with model, data, output_dir is wanted")
    return raw  # pyright: ignore[reportUnknownVariableType]


def _yaml_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{problem}"


PATH_KEYS = (("data", "train"), ("data", "eval"), ("model", "path"), (None, "output_dir"))


def resolve_paths(raw: dict[str, Any], base: Path) -> None:
    """Make the file's relative paths absolute, in place. A hub id that is no folder stays."""
    for section, key in PATH_KEYS:
        holder = raw if section is None else raw.get(section)
        if not isinstance(holder, dict) or not isinstance(value := holder.get(key), str):  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            continue
        if "\0" in value or "\n" in value:
            continue
        path = base / _expanded(value)
        if section != "model" or looks_local(value) or _exists(path):
            holder[key] = str(path)


def _expanded(value: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError:  # ~name of nobody here: a folder of that name is meant, if anything
        return Path(value)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False


def looks_local(model: str) -> bool:
    """Whether a model's path is a path for certain: a hub id is `name` or `org/name`."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def apply_override(raw: dict[str, Any], override: str) -> None:
    """`optim.learning_rate=1e-4` → raw["optim"]["learning_rate"] = 0.0001, in place."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{override!r} is no override; write it as section.key=value")
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not valid: {_yaml_fault(error)}") from None
    holder: dict[str, Any] = raw
    for depth, name in enumerate(names[:-1]):
        inner = holder.setdefault(name, {})
        if not isinstance(inner, dict):
            above = ".".join(names[: depth + 1])
            raise ConfigError(f"{override!r} goes into {above}, which is a value, not a section")
        holder = inner  # pyright: ignore[reportUnknownVariableType]
    holder[names[-1]] = value
    if (tuple(names[:-1]) or (None,), names[-1]) in {((s,), k) for s, k in PATH_KEYS}:
        resolve_paths(raw, Path.cwd())  # the file's own are absolute by now
