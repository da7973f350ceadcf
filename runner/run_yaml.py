"""run.yaml and `key=value` overrides → Config. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trimpot.runner.config import Config, check_config
from trimpot.runner.errors import ConfigError
from trimpot.runner.reading import read_bounded

MAX_BYTES = 128 * 2**10
"""Of a run.yaml; the longest chat templates have 20 kB. PyYAML reads 0.3 MB a second."""
MAX_NODES, MAX_DEPTH = 5000, 12


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without duplicate keys and without aliases (an alias bomb is 1 kB that fills memory),
    and no more of it than a run.yaml can have."""

    nodes = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):  # type: ignore[no-untyped-call]
            mark: Any = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)  # pyright: ignore[reportUnknownArgumentType]
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_NODES or self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            what = "nested too deeply" if self.depth > MAX_DEPTH else f"over {MAX_NODES} values"
            raise yaml.constructor.ConstructorError(None, None, what, mark)  # pyright: ignore[reportUnknownArgumentType]
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        # What is tagged, or looks like, a date or a number, and is none.
        except (ValueError, KeyError, OverflowError, AttributeError, TypeError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from None

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
        text = read_bounded(path, MAX_BYTES).decode()
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
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
    raw = _parsed(text, f"{path} is not valid YAML")
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path} is {kind}; a mapping with model, data, output_dir is wanted")
    return raw  # pyright: ignore[reportUnknownVariableType]


def _parsed(text: str, what: str) -> Any:
    """Raises ConfigError that begins with `what`."""
    try:
        return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: {_yaml_fault(error)}") from None
    except RecursionError:
        raise ConfigError(f"{what}: nested too deeply; a run.yaml has two levels") from None
    except (ValueError, OverflowError) as error:  # of the scanner: an escape for no character
        raise ConfigError(f"{what}: {error}") from None


def _yaml_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or str(error).splitlines()[0])[:200]
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
    shown = repr(override if len(override) <= 100 else f"{override[:97]}...")
    if not equals or not all(names):
        raise ConfigError(f"{shown} is no override; write it as section.key=value")
    if len(names) > MAX_DEPTH or len(override) > MAX_BYTES:
        raise ConfigError(f"{shown} is too long; a key has two parts: section.key=value")
    value = _parsed(text, f"the value of {shown} is not valid")
    holder: dict[str, Any] = raw
    for depth, name in enumerate(names[:-1]):
        inner = holder.setdefault(name, {})
        if not isinstance(inner, dict):
            above = ".".join(names[: depth + 1])
            raise ConfigError(f"{shown} goes into {above}, which is a value, not a section")
        holder = inner  # pyright: ignore[reportUnknownVariableType]
    holder[names[-1]] = value
    if (tuple(names[:-1]) or (None,), names[-1]) in {((s,), k) for s, k in PATH_KEYS}:
        resolve_paths(raw, Path.cwd())  # the file's own are absolute by now
