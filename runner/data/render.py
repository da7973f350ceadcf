"""Renders one chat template for whoever started this file, who trusts neither it nor the data.

Frames on stdin and stdout: 8 bytes of length, little-endian, then JSON. The first holds the
template and its variables, each further one a conversation; `sandbox.py` is the other side. No
import from trimpot: the process lives under limits, and starts in 0.1 s.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import struct
import sys
from typing import Any

import jinja2
import jinja2.debug  # what it would import only to tell of an error
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY_BYTES = 192 * 2**20
"""Beyond what the process has when it starts."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that data sets give a message's reasoning; templates read the first or the second."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model says; here it only encloses it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Names(jinja2.utils.Namespace):  # type: ignore[name-defined]
    """jinja2's namespace(), but for names with which Python's own insides begin."""

    def __init__(self, *given: Any, **names: Any):
        super().__init__()
        for name, value in dict(*given, **names).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name}")
        super().__setitem__(name, value)


def complain(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """jinja2's own writes for HTML; a model is to read what stands in the data."""
    allowed = ("indent", "separators", "sort_keys")
    chosen = {name: options[name] for name in allowed if name in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, **chosen)


def environment() -> jinja2.Environment:
    """What templates of models count on, in jinja2's sandbox: nothing they get can be changed."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    made.filters["tojson"] = to_json
    made.globals |= {
        "raise_exception": complain,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *given, **names: dict(*given, **names),  # the type itself has ways out
        "namespace": Names,
    }
    return made


WARM = r"""{% generation %}{{ "\u00e9\n" | trim | tojson }}{% endgeneration %}
{{- strftime_now("%d %b") }}
{%- for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | length }}{% endfor %}
{{- raise_exception("x") }}"""
"""Has Python import what it imports late: for literals, errors, dates."""


def warm(made: jinja2.Environment) -> None:
    try:
        made.from_string(WARM).render(messages=[{}, {}])
    except jinja2.TemplateError as error:
        str(error)


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is null, which templates would print; reasoning under the names they read."""
    found = {key: value for key, value in message.items() if value is not None}
    if reasoning := next((found[key] for key in REASONING if key in found), None):
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def render(template: jinja2.Template, asked: dict[str, Any], variables: dict[str, Any]) -> str:
    """The conversation as text. Raises whatever a template can raise."""
    parts, length = [], 0
    pieces = template.generate(
        messages=[plain(message) for message in asked["messages"]],
        tools=None,
        documents=None,
        add_generation_prompt=asked["add_generation_prompt"],
        **variables,
    )
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length > asked["characters"]:
            raise ValueError(f"it writes over {asked['characters']} characters for this row")
    return "".join(parts)


def limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def confine() -> None:
    """From here on: so much memory, no file or socket opened, no byte of a file written."""
    with open("/proc/self/statm" if sys.platform == "linux" else "/dev/null") as file:  # noqa: PTH123
        pages = file.read().split()
    has = int(pages[0]) * resource.getpagesize() if pages else 2**30
    limit(resource.RLIMIT_AS, has + MEMORY_BYTES)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 3)


def receive() -> dict[str, Any] | None:
    size = sys.stdin.buffer.read(8)
    if len(size) < 8:
        return None
    return json.loads(sys.stdin.buffer.read(struct.unpack("<Q", size)[0]))


def send(value: dict[str, Any]) -> None:
    raw = json.dumps(value).encode()  # ASCII: a template can make halves of characters
    sys.stdout.buffer.write(struct.pack("<Q", len(raw)) + raw)
    sys.stdout.buffer.flush()


def answer(work: Any, seconds: float) -> dict[str, Any]:
    """What `work` returns, or its complaint. Longer than so many CPU-seconds: SIGPROF ends us,
    in the midst of whatever call of C it is."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return {"text": work()}
    except MemoryError:
        return {"error": f"it takes over {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template is a program: it can fail in any way there is
        line = (str(error).strip().splitlines() or [""])[0]
        return {"error": line[:300] or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    first = receive()
    if first is None:
        return
    made = environment()
    warm(made)
    confine()
    compiled: list[jinja2.Template] = []

    def compile_it() -> str:
        compiled.append(made.from_string(first["template"]))
        return ""

    send(answer(compile_it, first["seconds"]))
    while (asked := receive()) is not None:
        send(
            answer(
                lambda asked=asked: render(compiled[0], asked, first["variables"]),
                asked["seconds"],
            )
        )


if __name__ == "__main__":
    main()
