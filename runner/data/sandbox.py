"""A chat template in a process of its own, with limits of time, memory and output.

A template comes with a model and is a program. jinja2's sandbox keeps it from Python's insides,
but not from `{% for … %}` in `{% for … %}`, nor from `'x' * 10**9`, which nothing in the same
process can interrupt. So it runs in a child without environment, files or sockets (`render.py`),
which the kernel ends when a row takes too long; what that row is, is then known.
"""

from __future__ import annotations

import contextlib
import json
import signal
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from trimpot.runner.data.templates import Message

CHILD = Path(__file__).with_name("render.py")
SECONDS = 0.3
"""CPU time of one row, and of compiling; a conversation of ten turns takes 0.0001."""
SECONDS_PER_CHARACTER = 1e-6
CHARACTERS = 2**17
"""That a template may write of its own around a row: system prompts have some thousands."""
TIMES = 16
"""How often it may repeat what it is given."""


class Sandbox:
    """One template. Raises ValueError where it is none, or breaks a limit."""

    def __init__(self, template: str, variables: dict[str, Any]):
        """`variables`: what it sees besides the conversation: bos_token and its like."""
        self.first = {"template": template, "variables": variables, "seconds": SECONDS}
        self.child: subprocess.Popen[bytes] | None = None

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The conversation as text."""
        said = json.dumps(messages)
        asked = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "seconds": SECONDS + SECONDS_PER_CHARACTER * len(said),
            "characters": CHARACTERS + TIMES * len(said),
        }
        if self.child is None:
            self._start()
        return self._ask(asked)

    def _start(self) -> None:
        # -I: nothing of the user's reaches it, neither variables nor a module in this folder.
        self.child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
        )
        weakref.finalize(self, _end, self.child)
        self._ask(self.first)

    def _ask(self, frame: dict[str, Any]) -> str:
        child = self.child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        raw = json.dumps(frame).encode()
        reply: dict[str, str] = {}
        try:
            child.stdin.write(struct.pack("<Q", len(raw)) + raw)
            child.stdin.flush()
            size = child.stdout.read(8)
            if len(size) == 8:
                reply = json.loads(child.stdout.read(struct.unpack("<Q", size)[0]))
        except (OSError, ValueError):
            reply = {}
        if "text" in reply:
            return reply["text"]
        self.child = None
        code = _end(child)
        if "error" not in reply and code == -signal.SIGPROF:
            raise ValueError(f"it takes over {frame['seconds']:.1f} s for this row")
        raise ValueError(reply.get("error") or f"its process ended with code {code}")


def _end(child: subprocess.Popen[bytes]) -> int:
    """End the child, if it has not ended by itself → its exit code."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(OSError):  # what was still to be written to one that is dead
        child.stdin.close()
    child.stdout.close()
    try:
        return child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
