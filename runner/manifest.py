"""manifest.json of a checkpoint: what it must say, and that it says what was written. No torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from trimpot.runner.errors import CheckpointError
from trimpot.runner.reading import parse_json

FORMAT = 2
"""1 had no seal over its manifest and no shards; it is still read."""
MANIFEST = "manifest.json"
KEYS = {
    "step": int,
    "cursor": int,
    "plan_digest": str,
    "data_digest": str,
    "complete": bool,
    "files": dict,
}


def seal_of(manifest: dict[str, Any]) -> str:
    """SHA-256 over everything else that a manifest says."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def text_of(manifest: dict[str, Any]) -> str:
    """The one way to write it down: no byte of the file can change unnoticed."""
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"


def digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that a manifest says, its seal too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def parse_manifest(content: bytes, where: object) -> dict[str, Any]:
    """What a manifest.json says, if that is what was written. `where`: its checkpoint, for the
    error. Raises CheckpointError."""
    try:
        text = content.decode()
        manifest = parse_json(text)
        if manifest["format"] not in (1, FORMAT):
            raise CheckpointError(
                f"checkpoint {where} has format {manifest['format']}, this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        sealed = manifest["format"] == 1 or manifest["seal"] == seal_of(manifest)
        if not sealed or (manifest["format"] > 1 and text != text_of(manifest)):
            raise CheckpointError(
                f"checkpoint {where} is damaged: its {MANIFEST} does not say what was written"
            )
        for key, kind in KEYS.items():
            if not isinstance(manifest[key], kind):
                raise CheckpointError(f"checkpoint {where}: {key} is {manifest[key]!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(where, error) from None
    return manifest


def broken(where: object, error: Exception) -> CheckpointError:
    fault = repr(error).splitlines()[0][:200]
    return CheckpointError(f"checkpoint {where} has a broken manifest: {fault}")
