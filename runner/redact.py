"""Secrets: none in a run.yaml, and blotted out of everything that is written or said.

A tracker or a hub reads its key from the environment by itself (HF_TOKEN, WANDB_API_KEY,
MLFLOW_TRACKING_PASSWORD, AWS_…), so no key of run.yaml takes one. What looks like one there is
refused. What comes by other ways, such as an exception of a tracker that quotes its URL, is found
by its looks, or because it is the value of a variable with a telling name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

BLOT = "***"
KINDS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b",
    "a W&B key": r"\b(?:wandb_v1_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40})\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+",
    "a private key": (
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]*-----END [A-Z ]*PRIVATE KEY-----)?"
    ),
    # One slash, too: a path library has taken the other away.
    "a password in a URL": r"(?:(?<=://)|(?<=:/)(?!/))[^/@\s'\"]+:[^/@\s'\"]+(?=@)",
}
"""What each kind looks like, as its maker documents it."""
MORE = (
    r"(?<=://)[^/@\s'\"]+(?=@)",
    r"(?<=[Bb]earer )[A-Za-z0-9._~+/-]{16,}=*",
    r"[?&](?i:[a-z_-]*(?:token|password|passwd|secret|key|signature))=[^&\s'\"]+",
    r"(?i:(?<=AccountKey=)|(?<=SharedAccessKey=))[A-Za-z0-9+/=]{16,}",
)
"""Blotted out as well, where being wrong costs no more than a word."""
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
_ANY = re.compile("|".join((*KINDS.values(), *MORE)))
_HEX_40 = re.compile(r"[0-9a-f]{40}")
"""W&B's older keys; a git commit looks the same, so only where a whole value is one."""
_NAMES = r"(^|_)(token|password|passwd|secret|(api|access|secret|private|account)?_?key"
_TELLING = re.compile(_NAMES + r"|credentials?)$", re.IGNORECASE)
_TELLING_VARIABLE = re.compile(_NAMES + r"|connection_string)$", re.IGNORECASE)
_HARMLESS = ("", "true", "false", "none", "null", "disabled")
LEAST = 8
"""Characters of a variable's value that is looked for: shorter ones stand in ordinary words."""


def kind_of(text: str) -> str | None:
    """What secret stands in a text, by its looks: "a Hugging Face token"; None without one."""
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(text)), None)


def redact(text: str) -> str:
    """The text, with `***` for each secret in it."""
    return _blot(text, _known())


def redacted(value: Any) -> Any:
    """A copy of what json can write, with `redact` applied to every text; keys stay."""
    return _copy(value, _known(), by_key=False)


def without_secrets(value: Any) -> Any:
    """`redacted`, and whatever stands under a key with a telling name."""
    return _copy(value, _known(), by_key=True)


def _blot(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, BLOT)
    return _ANY.sub(BLOT, text)


def _copy(value: Any, known: list[str], by_key: bool) -> Any:
    if isinstance(value, str):
        return _blot(value, known)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {
            key: BLOT
            if by_key and item and _TELLING.search(str(key))
            else _copy(item, known, by_key)
            for key, item in items
        }
    if isinstance(value, list | tuple):
        return [_copy(item, known, by_key) for item in cast(list[Any], value)]
    return value


def _known() -> list[str]:
    """Values of the environment's secrets, the longest first: one may be part of another."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= LEAST and _TELLING_VARIABLE.search(name) and value.lower() not in _HARMLESS
    }
    return sorted(values, key=len, reverse=True)


def find_secret(values: Any, at: str = "", spare: tuple[str, ...] = ()) -> tuple[str, str] | None:
    """(dotted key, kind) of the first secret in nested values. `spare`: keys that hold commits."""
    return next(_secrets(values, at, spare), None)


def _secrets(value: Any, at: str, spare: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in cast(Mapping[Any, Any], value).items():
            yield from _secrets(item, f"{at}.{key}" if at else str(key), spare)
            if kind := kind_of(str(key)):
                yield f"a key of {at or 'the file'}", kind
    elif isinstance(value, list | tuple):
        for number, item in enumerate(cast(list[Any], value)):
            yield from _secrets(item, f"{at}.{number}", spare)
    elif isinstance(value, str):
        if kind := kind_of(value):
            yield at, kind
        elif any(known in value for known in _known()):
            yield at, "the value of one of your environment's secrets"
        elif _HEX_40.fullmatch(value) and at not in spare:
            yield at, "a W&B key"


class Redacting(logging.Formatter):
    """A formatter whose lines, tracebacks included, have no secrets in them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_stderr(form: str) -> None:
    """Warnings and worse of all libraries go to stderr, in this form and without secrets."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting(form))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
