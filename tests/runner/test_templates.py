"""Which tokens are trained: the answers, told by hand and by transformers' own masks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import toy

from trimpot.runner.config import DataSection
from trimpot.runner.data.compile import _trained
from trimpot.runner.data.templates import Example, detect_format, make_example
from trimpot.runner.errors import DataError
from trimpot.runner.hub import Tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The toy's own template, with transformers' marks for what the assistant says."""

Made = tuple[Example, list[int], list[int]]
"""(example, token ids, which are trained)."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(toy.toy_model(tmp_path_factory.mktemp("t") / "model"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without a chat template, and with a token that begins each text."""
    return Tokenizer(toy.toy_model(tmp_path_factory.mktemp("b") / "model", template=None, bos=True))


def made(tokenizer: Tokenizer, row: dict[str, Any], **data: Any) -> Made:
    section = DataSection(train="t.jsonl", **data)
    render = tokenizer.renderer(section.chat_template)
    form = detect_format(section, row, "row 1")
    if form == "text":
        render = None
    example = make_example(section, form, row, "row 1", render, tokenizer.end)
    ((ids, offsets),) = tokenizer.encode([example.text], special=render is None)
    return example, ids, _trained(example, offsets).tolist()


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def tokens(text: str) -> list[int]:
    """By hand: a special token for [, ] and |, a token a byte for the rest."""
    special = {"[": toy.START, "]": toy.END, "|": toy.PAD}
    # GPT-2's alphabet: printable bytes are themselves, space and line break are Ġ and Ċ.
    odd = {" ": "Ġ", "\n": "Ċ"}
    return [
        toy.SPECIAL[special[c]] if c in special else toy.ALPHABET.index(odd.get(c, c)) for c in text
    ]


def test_two_turns_by_hand(tokenizer: Tokenizer) -> None:
    talk = [
        turn("user", "Hi"),
        turn("assistant", "Ho"),
        turn("user", "?"),
        turn("assistant", "No."),
    ]
    example, ids, trained = made(tokenizer, {"messages": talk})
    parts = [
        ("[user\nHi]\n[assistant\n", 0),
        ("Ho]", 1),
        ("\n[user\n?]\n[assistant\n", 0),
        ("No.]", 1),
        ("\n", 0),
    ]
    assert ids == [i for text, _ in parts for i in tokens(text)]
    assert trained == [mark for text, mark in parts for _ in tokens(text)]
    assert example.question == "?"
    assert example.answer == "No."
    assert example.prompt.endswith("<|im_start|>assistant\n")
    assert example.text.startswith(example.prompt + "No.<|im_end|>")


def talks(count: int) -> list[list[dict[str, str]]]:
    draw = random.Random(0)
    words = [
        "Hi",
        "é",
        "中文",
        " ",
        "\n",
        "<b>",
        "🙂🙂",
        "assistant",
        "x" * 20,
        "{{ 1 }}",
        "  end  ",
    ]

    def content() -> str:
        return "".join(draw.choice(words) for _ in range(draw.randint(1, 6)))

    found = []
    for _ in range(count):
        talk = [turn("system", content())] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 4)):
            talk += [turn("user", content()), turn("assistant", content())]
        found.append(talk)
    return found


@pytest.mark.parametrize("talk", talks(40), ids=range(40))
def test_masks_are_those_of_transformers(tokenizer: Tokenizer, talk: list[Any]) -> None:
    wanted = tokenizer.inner.apply_chat_template(
        talk,
        chat_template=MARKED,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    _, ids, trained = made(tokenizer, {"messages": talk})
    assert ids == wanted["input_ids"]
    assert trained == wanted["assistant_masks"]
    assert any(trained)


def test_what_follows_the_last_answer_is_left_out(tokenizer: Tokenizer) -> None:
    talk = [turn("user", "a"), turn("assistant", "b")]
    longer = made(tokenizer, {"messages": [*talk, turn("user", "c")]})
    assert longer == made(tokenizer, {"messages": talk})


def test_prompt_and_completion_are_a_conversation_of_two(tokenizer: Tokenizer) -> None:
    pair = made(tokenizer, {"prompt": "a", "completion": "b"})
    assert pair == made(tokenizer, {"messages": [turn("user", "a"), turn("assistant", "b")]})


def test_the_system_prompt_stands_where_there_is_none(tokenizer: Tokenizer) -> None:
    talk = [turn("user", "a"), turn("assistant", "b")]
    with_one = made(tokenizer, {"messages": [turn("system", "Be brief."), *talk]})
    assert made(tokenizer, {"messages": talk}, system_prompt="Be brief.") == with_one
    other = [turn("system", "Be long."), *talk]
    kept = made(tokenizer, {"messages": other}, system_prompt="Be brief.")
    assert kept == made(tokenizer, {"messages": other})


def test_pairs_without_a_template(base: Tokenizer) -> None:
    _, ids, trained = made(base, {"prompt": "a b", "completion": " c"})
    assert ids == tokens("|a b c]")  # begins with the tokenizer's own token, ends with its end
    assert trained == [0, 0, 0, 0, 1, 1, 1]


def test_text_is_trained_but_for_its_first_token(base: Tokenizer, tokenizer: Tokenizer) -> None:
    _, ids, trained = made(base, {"text": "ab"})
    assert (ids, trained) == (tokens("|ab]"), [0, 1, 1, 1])
    _, ids, trained = made(tokenizer, {"text": "ab"})
    assert (ids, trained) == (tokens("ab]"), [0, 1, 1])


def test_a_character_of_many_tokens_is_trained_whole(base: Tokenizer) -> None:
    _, _, trained = made(base, {"prompt": "é", "completion": "中"})
    assert trained == [0, 0, 0, 1, 1, 1, 1]


def test_a_template_that_trims_its_messages(tokenizer: Tokenizer) -> None:
    """What is trained is found in the text as it is rendered, not as it was given."""
    trimming = toy.CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    talk = [turn("user", " a "), turn("assistant", "\n b \n")]
    _, ids, trained = made(tokenizer, {"messages": talk}, chat_template=trimming)
    assert ids == tokens("[user\na]\n[assistant\nb]\n")
    assert [i for i, mark in zip(ids, trained, strict=True) if mark] == tokens("b]")


def test_a_template_without_a_generation_prompt_of_its_own(tokenizer: Tokenizer) -> None:
    """Then the role's heading counts as part of the answer: the model must learn to write it."""
    bare = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
    talk = [turn("user", "a"), turn("assistant", "b")]
    _, ids, trained = made(tokenizer, {"messages": talk}, chat_template=bare)
    assert [i for i, mark in zip(ids, trained, strict=True) if mark] == tokens("assistant:b]")


def test_thoughts_that_a_template_drops_from_earlier_turns(tokenizer: Tokenizer) -> None:
    """As templates of reasoning models do; masks by prefix would be wrong, so it is refused."""
    dropping = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('!')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [turn("user", "a"), turn("assistant", "hm!b")]
    assert any(made(tokenizer, {"messages": talk}, chat_template=dropping)[2])
    with pytest.raises(DataError, match="row 1: the chat template rewrites earlier turns"):
        made(tokenizer, {"messages": talk * 2}, chat_template=dropping)


@pytest.mark.parametrize(
    ("row", "data", "form"),
    [
        ({"messages": 1, "prompt": 1, "completion": 1, "text": 1}, {}, "chat"),
        ({"prompt": 1, "completion": 1, "text": 1}, {}, "prompt_completion"),
        ({"prompt": 1, "text": 1}, {}, "text"),
        ({"q": 1, "a": 1}, {"prompt_column": "q", "completion_column": "a"}, "prompt_completion"),
        ({"messages": 1, "text": 1}, {"format": "text"}, "text"),
    ],
)
def test_format_goes_by_the_columns(row: Any, data: Any, form: str) -> None:
    assert detect_format(DataSection(train="t", **data), row, "row 1") == form
