"""Talking with a run: the right model answers, and nothing raw reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from runs import config, prepared
from tiny import tiny_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from trimpot.cluster import chat as chats
from trimpot.cluster.chat import Chat, chat_with, visible
from trimpot.cluster.cli import app
from trimpot.runner import hub
from trimpot.runner.adapters.lora import add_lora
from trimpot.runner.adapters.peft_io import save_adapter
from trimpot.runner.checkpoint import save_checkpoint
from trimpot.runner.errors import UserError
from trimpot.runner.talk import Stream, Talker

SYSTEM = "You are terse."
QUESTION = "What does `os.path.join` do?"
TOKENS = 12


def made_run(model: Path, folder: Path, method: str, **sections: Any) -> Path:
    """A finished run whose weights are the base's, shaken: what is asked here needs no training."""
    checked = config(
        model,
        tiny_data(folder.parent),
        folder,
        method=method,
        adapter=None if method == "full" else {"lora_rank": 4, "lora_alpha": 8},
        **{"data": {"system_prompt": SYSTEM}, **sections},
    )
    plan = prepared(checked)
    tuned = hub.load_causal_lm(model, dtype=torch.float32, deepspeed=None)
    if method == "lora":
        add_lora(tuned, checked.adapter, seed=0)
    draw = torch.Generator().manual_seed(3)
    state = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw)
            weight = 0.2 * noise if "lora_" in name else parameter.detach() + 0.05 * noise
            state[name] = {"weight": weight}
    facts = {"plan_digest": plan.digest, "data_digest": "d", "method": method}
    save_checkpoint(folder / "checkpoints", state, step=20, cursor=0, complete=True, facts=facts)
    if method == "lora":
        tensors = {name: values["weight"] for name, values in state.items()}
        save_adapter(tensors, checked.adapter, str(model), folder / "adapter")
    (folder / "journal.jsonl").touch()
    return folder


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(model, tmp_path_factory.mktemp("chat") / "lora", "lora")


@pytest.fixture(scope="module")
def full(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(model, tmp_path_factory.mktemp("chat") / "full", "full")


def plain(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def greedy(model: Any, folder: Path, messages: list[dict[str, str]], tokens: int = TOKENS) -> str:
    """An answer from transformers alone: its own template, and argmax without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


# --- what is answered


def test_the_tuned_model_and_its_base_answer(
    model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
):
    loads: list[Path] = []
    honest = hub.load_causal_lm
    monkeypatch.setattr(
        hub, "load_causal_lm", lambda folder, **o: loads.append(folder) or honest(folder, **o)
    )
    found = chat_with(lora, [QUESTION, "And `len`?"], True, TOKENS, quiet=True)
    assert len(loads) == 1, "the base is the tuned model with its adapter off"
    base, tuned = plain(model), PeftModel.from_pretrained(plain(model), str(lora / "adapter"))
    for answer, question in zip(found, (QUESTION, "And `len`?"), strict=True):
        assert answer["prompt"] == question
        assert answer["base"] == greedy(base, model, asked(question))
        assert answer["tuned"] == greedy(tuned.eval(), model, asked(question))
        assert answer["base"] != answer["tuned"]
    assert chat_with(lora, [QUESTION], False, TOKENS, quiet=True) == [{**found[0], "base": None}]


def test_a_full_run_is_compared_with_its_base(model: Path, full: Path):
    found = chat_with(full, [QUESTION, QUESTION], True, TOKENS, quiet=True)
    assert found[0] == found[1], "base and tuned weights change places and back"
    from safetensors.torch import load_file

    tuned = plain(model)
    state = load_file(full / "checkpoints/step-00000020/state.safetensors")
    tuned.load_state_dict({k.removeprefix("weight/"): v for k, v in state.items()}, strict=False)
    assert found[0]["base"] == greedy(plain(model), model, asked(QUESTION))
    assert found[0]["tuned"] == greedy(tuned, model, asked(QUESTION))
    assert found[0]["base"] != found[0]["tuned"]


def hear_nothing(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def talker(lora: Path) -> Talker:
    return Talker(lora, compare=True)


def test_a_conversation_goes_on_from_what_was_said(model: Path, talker: Talker):
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Joins."},
        {"role": "user", "content": "More?"},
    ]
    wanted = greedy(plain(model), model, [asked("")[0], *turns])
    assert talker.answer(turns, TOKENS, base=True, emit=hear_nothing) == wanted


def test_the_oldest_turns_make_room(talker: Talker):
    long = {"role": "user", "content": "word " * 300}
    turns = [long, {"role": "assistant", "content": "Yes."}, asked(QUESTION)[1]]
    wanted = talker.answer(turns[2:], TOKENS, emit=hear_nothing)
    assert talker.answer([*turns[:2], *turns], TOKENS, emit=hear_nothing) == wanted
    with pytest.raises(UserError, match="tokens and the model takes 512"):
        talker.answer([{"role": "user", "content": "word " * 900}], TOKENS, emit=hear_nothing)


def test_an_answer_ends_where_the_model_does(talker: Talker):
    near = [{"role": "user", "content": "word " * 230}]
    room = talker.positions - len(talker._fit(near))
    assert room < 100
    text = talker.answer(near, 5000, emit=hear_nothing)
    assert len(next(iter(talker.tokenizer.encode([text], special=False)))[0]) <= room


def test_an_answer_ends_with_the_turn(lora: Path):
    """A template whose end of turn is not the tokenizer's end of sequence."""
    talker = Talker(lora, compare=False)
    inner = talker.tokenizer.inner
    end = inner.convert_tokens_to_ids("<|im_end|>")
    inner.eos_token = "<|endoftext|>"
    talker.model.generation_config.eos_token_id = inner.eos_token_id
    assert talker._ends() == sorted({inner.eos_token_id, end})


def test_text_is_continued_without_a_template(model: Path, tmp_path: Path):
    rows = tmp_path / "text.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"Row {i} of some text."}) + "\n" for i in range(40))
    )
    run = made_run(model, tmp_path / "run", "lora", data={"train": str(rows)})
    found = chat_with(run, ["The first row"], True, TOKENS, quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("The first row", return_tensors="pt").input_ids
    output = plain(model).generate(ids, max_new_tokens=TOKENS, do_sample=False)
    wanted = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert found[0]["base"] == wanted


def test_characters_are_whole_when_they_come(talker: Talker):
    text = "naïve 東京 👩‍👧 end"
    ids = next(iter(talker.tokenizer.encode([text], special=False)))[0]
    assert len(ids) > len(text.split()), "some characters take several tokens"
    pieces: list[str] = []
    stream = Stream(talker.tokenizer.decode, pieces.append, skip=3)
    stream.put(torch.tensor([[7, 8, 9]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.finish(text)
    assert "".join(pieces) == text
    assert len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces)


# --- how it is asked


def command(run: Path, *options: str, stdin: str = "") -> Any:
    arguments = ["chat", str(run), "--max-new-tokens", "4", *options]
    return CliRunner().invoke(app, arguments, input=stdin)


def test_json_is_all_that_is_printed(lora: Path):
    done = command(lora, "--json", "--compare", "-p", QUESTION, "-p", "b")
    assert done.exit_code == 0, done.output
    answers = json.loads(done.stdout)["answers"]
    assert [set(answer) for answer in answers] == [{"prompt", "tuned", "base"}] * 2


def test_each_line_of_stdin_is_a_question_for_itself(lora: Path):
    done = command(lora, "--json", stdin=f"{QUESTION}\n\n  \nAnd this?\n")
    answers = json.loads(done.stdout)["answers"]
    assert [answer["prompt"] for answer in answers] == [QUESTION, "And this?"]
    again = command(lora, "--json", "-p", "And this?")
    assert json.loads(again.stdout)["answers"] == answers[1:], "no question hears the one before"


def test_one_prompt_prints_its_answer_and_nothing_else(lora: Path):
    answer = chat_with(lora, [QUESTION], False, 4, quiet=True)[0]["tuned"]
    assert command(lora, "-p", QUESTION).stdout == answer + "\n"


@pytest.mark.parametrize(
    ("options", "stdin", "message"),
    [((), "", "no question is asked"), ((), " \n", "no question"), (("-p", ""), "", "empty")],
)
def test_no_question_is_the_users_mistake(
    model: Path, lora: Path, options: tuple[str, ...], stdin: str, message: str
):
    done = command(lora, *options, stdin=stdin)
    if options:  # the template makes a whole prompt of an empty question
        assert done.exit_code == 0
    else:
        assert isinstance(done.exception, UserError) and message in str(done.exception)


# --- what is shown, and a conversation, with a model that says what the test wants


class Parrot:
    """Says what it is told to, in given pieces, and keeps what it was asked."""

    def __init__(self, *answers: list[str | type[BaseException]]):
        self.answers = list(answers)
        self.heard: list[tuple[bool, list[str]]] = []

    def answer(
        self, turns: list[dict[str, str]], max_new_tokens: int, *, base: bool = False, emit: Any
    ) -> str:
        self.heard.append((base, [turn["content"] for turn in turns]))
        said = self.answers.pop(0) if self.answers else ["fine"]
        for piece in said:
            if not isinstance(piece, str):
                raise piece("no")
            emit(piece)
        return "".join(map(str, said))


def sitting(
    parrot: Parrot, monkeypatch: pytest.MonkeyPatch, lines: list[Any], compare: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """(answers, what was shown) of a conversation in which a person types `lines`."""
    typed = iter([*lines, EOFError])

    def read(_: str = "") -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    shown = io.StringIO()
    console = Console(file=shown, width=300, highlight=False)
    chat = Chat(console, parrot, 8, compare)  # pyright: ignore[reportArgumentType]
    return chat.converse(), shown.getvalue()


def test_a_conversation_is_remembered_until_it_is_cleared(monkeypatch: pytest.MonkeyPatch):
    parrot = Parrot(["1"], ["2"], ["3"])
    answers, shown = sitting(
        parrot, monkeypatch, ["a", "", "b", "/clear", "c", "/what", "/quit", "d"]
    )
    assert [turns for _, turns in parrot.heard] == [["a"], ["a", "1", "b"], ["c"]]
    assert [answer["tuned"] for answer in answers] == ["1", "2", "3"]
    assert "/what is no command" in shown


def test_base_and_tuned_remember_their_own_answers(monkeypatch: pytest.MonkeyPatch):
    parrot = Parrot(["base1"], ["tuned1"], ["base2"], ["tuned2"])
    answers, shown = sitting(parrot, monkeypatch, ["a", "b"], compare=True)
    assert parrot.heard == [
        (True, ["a"]), (False, ["a"]),
        (True, ["a", "base1", "b"]), (False, ["a", "tuned1", "b"]),
    ]  # fmt: skip
    assert [(answer["base"], answer["tuned"]) for answer in answers] == [
        ("base1", "tuned1"), ("base2", "tuned2"),
    ]  # fmt: skip
    assert any("base2" in line and "tuned2" in line for line in shown.splitlines())


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_conversation(monkeypatch: pytest.MonkeyPatch):
    parrot = Parrot(["half an ", KeyboardInterrupt], ["whole"])
    answers, shown = sitting(parrot, monkeypatch, ["a", KeyboardInterrupt, "b"])
    assert "(stopped)" in shown
    assert parrot.heard[1][1] == ["a", "half an ", "b"], "what was said is remembered"
    assert [answer["tuned"] for answer in answers] == ["whole"]


def test_a_question_that_is_too_long_ends_no_conversation(monkeypatch: pytest.MonkeyPatch):
    parrot = Parrot([UserError], ["fine"])
    answers, shown = sitting(parrot, monkeypatch, ["a", "b"])
    assert parrot.heard[1][1] == ["b"] and len(answers) == 1 and "no" in shown


EVIL = [
    "\x1b", "]0;owned\x07", "\x1b]52;c;cm0gLXJm\x1b\\", "\x9b31m", "\r", "\x08\x08", "\u202e",
    "[bold]not markup[/bold] :smile: ", "café\u00a0東京\u3000👩\u200d👧",
]  # fmt: skip


@pytest.mark.parametrize("compare", [False, True])
def test_escape_sequences_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch, compare: bool):
    parrot = Parrot(EVIL, EVIL)
    _, shown = sitting(parrot, monkeypatch, ["\x1b[2Jq", "/\x1b[2J"], compare)
    assert not {"\x1b", "\x07", "\x9b", "\r", "\x08", "\u202e"} & set(shown)
    flat = "".join(shown.split())
    assert "[bold]notmarkup[/bold]:smile:café東京👩\u200d👧" in flat


def test_a_question_is_filtered_where_it_is_repeated(
    lora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(chats, "_talker", lambda *_: Parrot(EVIL, EVIL))
    answers = chat_with(lora, ["\x1b[2Ja", "b\x9b"], False, 4, quiet=False)
    assert not {"\x1b", "\x9b"} & set(capsys.readouterr().out)
    assert "\x9b" not in json.dumps(answers, ensure_ascii=False), "JSON escapes ESC, but not C1"


def test_what_is_visible_stays():
    assert visible("a\tb\r\nc\n") == "a\tb\nc\n"
    assert visible("é ß 東京 ±½ ́ 👍🏽") == "é ß 東京 ±½ ́ 👍🏽"
    assert visible("a\u2028b\u00a0c\x00\x7f\x85\ud800d") == "a\nb cd"


def test_two_answers_stand_in_columns_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, lora: Path, capsys: pytest.CaptureFixture[str]
):
    def shown(width: int) -> list[str]:
        monkeypatch.setattr(chats, "_talker", lambda *_: Parrot(["left"], ["right"]))
        monkeypatch.setenv("COLUMNS", str(width))
        chat_with(lora, ["q"], True, 4, quiet=False)
        return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]

    assert [line.split() for line in shown(80)] == [
        [">", "q"],
        ["base", "tuned"],
        ["left", "right"],
    ]
    assert shown(79) == ["> q", "base", "left", "tuned", "right"]


def test_a_terminal_that_knows_only_ascii_is_served(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    chat = Chat(Console(file=file), Parrot(["caf", "é"]), 4, False)  # pyright: ignore
    chat.ask("q")
    assert raw.getvalue().startswith(b"caf?")


# --- a real terminal


@pytest.fixture
def terminal(lora: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str]]]:
    """`trimpot chat` on a pseudo-terminal, and a function that waits for text on it."""
    leader, follower = pty.openpty()
    arguments = [sys.executable, "-m", "trimpot.cluster.cli", "chat", str(lora)]
    process = subprocess.Popen(
        [*arguments, "--max-new-tokens", "4"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
    )
    os.close(follower)
    seen = ""

    def wait_for(text: str) -> str:
        nonlocal seen
        until = time.monotonic() + 90
        while text not in seen:
            assert time.monotonic() < until, f"{text!r} did not come: {seen!r}"
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 4096).decode()
        before, _, seen = seen.partition(text)
        return before

    wait_for.leader = leader  # type: ignore[attr-defined]
    yield process, wait_for
    process.kill()
    process.wait()
    os.close(leader)


def test_a_person_at_a_terminal(lora: Path, terminal: Any):
    process, wait_for = terminal
    wanted = chat_with(lora, [QUESTION], False, 4, quiet=True)[0]["tuned"]
    wait_for("/quit or Ctrl-D ends")
    wait_for("> ")
    os.write(wait_for.leader, f"{QUESTION}\n".encode())
    wait_for(QUESTION)
    assert wait_for("> ").split() == wanted.split()
    os.write(wait_for.leader, b"\x04")
    assert process.wait(timeout=30) == 0
