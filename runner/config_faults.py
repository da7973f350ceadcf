"""What pydantic finds wrong with a config, in one line each: with the key that was meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel


def describe(fault: Any, model: type[BaseModel]) -> str:
    """One line of a pydantic error of `model`: where, what is, what was wanted."""
    given: tuple[Any, ...] = fault["loc"]
    own = given[-1:] if fault["type"] in ("extra_forbidden", "invalid_key") else ()
    # pydantic names the branches of a union on the way; a key that is unknown is the file's own.
    loc = tuple(
        part
        for part in given[: len(given) - len(own)]
        if part not in ("int", "float", "constrained-int", "count", "range")
        and not (isinstance(part, str) and ("[" in part or "-" in part))
    )
    loc += own
    where = _cut(".".join(str(part) for part in loc))
    match fault["type"]:
        case "extra_forbidden":
            known = sorted(_keys_at(loc[:-1], model))
            close = difflib.get_close_matches(str(loc[-1])[:64], known, n=1, cutoff=0.6)
            elsewhere = [key for key in keys_of(model) if key.split(".")[-1] == str(loc[-1])]
            hint = (
                f"did you mean {elsewhere[0]}?"
                if elsewhere
                else f"did you mean {close[0]}?"
                if close
                else f"known here: {', '.join(known)}"
            )
            return f"unknown key {where}; {hint}"
        case "invalid_key":
            known = ", ".join(sorted(_keys_at(loc[:-1], model)))
            return f"unknown key {where}; keys are words: {known}"
        case "missing":
            return f"{where} is missing; it must be set"
        case "value_error":
            message = str(fault["msg"]).removeprefix("Value error, ")
            return f"{where}: {message}" if where else message
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{where} is {_show(fault['input'])}; a section with keys is wanted"
        case _:
            message = str(fault["msg"])
            message = message[:1].lower() + message[1:]
            return f"{where} is {_show(fault['input'])}: {message}"


def _show(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a number of {value.bit_length()} bits"
    return _cut(json.dumps(value, default=str, ensure_ascii=False))


def _cut(text: str) -> str:
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:120])
    return text if len(text) <= 60 else text[:57] + "..."


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel] | None]]:
    for name, info in model.model_fields.items():
        given: tuple[Any, ...] = (info.annotation, *getattr(info.annotation, "__args__", ()))
        options = [getattr(one, "__origin__", one) for one in given]  # without Annotated
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        yield name, inner[0] if inner else None


def _keys_at(loc: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    at: type[BaseModel] | None = model
    for part in loc:
        at = dict(_sections(at)).get(str(part)) if at else None
    return [name for name, _ in _sections(at)] if at else []


def keys_of(model: type[BaseModel]) -> list[str]:
    """Every key of a model and its sections, dotted."""
    keys: list[str] = []
    for name, section in _sections(model):
        keys += [f"{name}.{key}" for key, _ in _sections(section)] if section else [name]
    return keys
