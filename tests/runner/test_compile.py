"""Rows → arrays: the same every time, every document once, equal ones on one side."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from trimpot.runner.config import DataSection
from trimpot.runner.data import compile as compiling
from trimpot.runner.data.compile import Compiled, compile_splits, load_splits
from trimpot.runner.errors import DataError
from trimpot.runner.hub import Tokenizer

Document = tuple[tuple[int, ...], tuple[int, ...]]
"""(tokens, which are trained)."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(toy.toy_model(tmp_path_factory.mktemp("t") / "model"))


class Spy:
    """A tokenizer that counts how often it is used."""

    def __init__(self, inner: Tokenizer):
        self.inner, self.used = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, texts: Any, special: bool) -> Any:
        self.used += 1
        return self.inner.encode(texts, special)


def words(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 1 to 60 letters, all different."""
    draw = random.Random(seed)
    letters = "abcdefgh "
    return [
        {"text": f"{i} " + "".join(draw.choices(letters, k=draw.randint(1, 60)))}
        for i in range(count)
    ]


def compiled(
    folder: Path, rows: list[Any], tokenizer: Any, seed: int = 0, **data: Any
) -> tuple[Compiled, Compiled | None]:
    folder.mkdir(exist_ok=True)
    path = toy.write_rows(folder / "rows.jsonl", rows)
    section = DataSection(train=str(path), **data)
    return compile_splits(section, seed, folder / "data", tokenizer)


def documents(split: Compiled | None) -> list[Document]:
    if split is None:
        return []
    parts = [part for sample in range(len(split)) for part in split.parts(sample)]
    return [(tuple(tokens.tolist()), tuple(trained.tolist())) for tokens, trained in parts]


def by_hand(row: dict[str, str]) -> Document:
    """A text row of plain letters: one token each and the end; the first is not trained."""
    ids = [toy.ALPHABET.index("Ġ" if c == " " else c) for c in row["text"]]
    return (*ids, toy.SPECIAL[toy.END]), (0, *[1] * len(ids))


def test_every_row_stands_once_as_told_by_hand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = words(50)
    train, held_out = compiled(tmp_path / "a", rows, tokenizer)
    assert Counter(documents(train) + documents(held_out)) == Counter(map(by_hand, rows))
    assert held_out is not None
    # Order of the file within each split, and the shown rows are the held-out ones.
    order = {document: i for i, document in enumerate(map(by_hand, rows))}
    for split in (train, held_out):
        places = [order[document] for document in documents(split)]
        assert places == sorted(places)
    for (prompt, question, answer), document in zip(
        held_out.shown, documents(held_out), strict=False
    ):
        text = rows[order[document]]["text"]
        assert question + answer == text + toy.END
        assert tuple(prompt) == document[0][: min(len(question), len(text))]  # END is one token
    assert len(held_out.shown) == min(16, len(documents(held_out)))


def test_lengths_are_those_of_the_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    talks = [{"prompt": r["text"], "completion": r["text"][:9]} for r in words(40)]
    train, _ = compiled(tmp_path / "a", talks, tokenizer, packing=True, max_length=256)
    for sample in range(len(train)):
        parts = train.parts(sample)
        assert train.lengths[sample] == sum(len(tokens) for tokens, _ in parts)
        assert train.trained_lengths[sample] == sum(int(marks.sum()) for _, marks in parts)
    assert (train.trained_lengths < train.lengths).all()
    assert train.trained_lengths.min() > 0


def test_the_same_arrays_every_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    splits = [compiled(tmp_path / name, words(40), tokenizer, packing=True) for name in "ab"]
    assert all(same(one, other) for one, other in zip(*splits, strict=True))


def test_rows_in_chunks_are_the_rows(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compiled(tmp_path / "a", words(40), tokenizer)[0]
    monkeypatch.setattr(compiling, "CHUNK", 7)
    assert compiled(tmp_path / "b", words(40), tokenizer)[0].digest == whole.digest
    odd = [*words(30), {"text": 3}]
    with pytest.raises(DataError, match="row 31 text is int"):
        compiled(tmp_path / "c", odd, tokenizer)


def same(a: Compiled | None, b: Compiled | None) -> bool:
    if a is None or b is None:
        return a is b
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in compiling.ARRAYS)
    return arrays and (a.digest, a.notes, a.shown) == (b.digest, b.notes, b.shown)


@pytest.mark.parametrize("fraction", [0.1, 0.0])
def test_the_second_time_is_read_from_disk(
    tmp_path: Path, tokenizer: Tokenizer, fraction: float
) -> None:
    spy = Spy(tokenizer)
    options: dict[str, Any] = {"eval_fraction": fraction, "max_length": 40}
    first = compiled(tmp_path / "a", words(40), spy, **options)
    assert first[0].notes  # some are cut, and that is told the second time too
    used = spy.used
    second = compiled(tmp_path / "a", words(40), spy, **options)
    assert spy.used == used
    for one, other in zip(first, second, strict=True):
        assert same(one, other)
    workers = load_splits(tmp_path / "a" / "data")
    assert workers is not None
    assert all(same(one, other) for one, other in zip(first, workers, strict=True))
    assert (first[1] is None) == (fraction == 0)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"max_length": 41}, {"packing": True}, {"eval_fraction": 0.2}, {"rows": 41}],
    ids=str,
)
def test_what_changes_them_compiles_again(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    spy = Spy(tokenizer)
    options: dict[str, Any] = {"max_length": 40, "eval_fraction": 0.1}
    compiled(tmp_path / "a", words(40), spy, **options)
    used = spy.used
    rows = words(change.pop("rows", 40))
    again = compiled(tmp_path / "a", rows, spy, **(options | change))
    assert spy.used > used
    fresh = compiled(tmp_path / "b", rows, tokenizer, **(options | change))
    assert same(again[0], fresh[0])
    assert same(again[1], fresh[1])


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("harm", ["cut", "gone", "other"])
def test_damaged_files_are_made_again(
    tmp_path: Path, tokenizer: Tokenizer, name: str, harm: str
) -> None:
    whole = compiled(tmp_path / "a", words(40), tokenizer)
    path = tmp_path / "a" / "data" / f"{name}.safetensors"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif harm == "gone":
        path.unlink()
    else:
        compiled(tmp_path / "b", words(41, seed=1), tokenizer)
        path.write_bytes((tmp_path / "b" / "data" / path.name).read_bytes())
    # A worker, which does not know what was wanted, does not take halves of two for a whole.
    assert load_splits(path.parent) is None
    again = compiled(tmp_path / "a", words(40), tokenizer)
    assert same(again[0], whole[0])
    assert same(again[1], whole[1])


# --- the held-out split


def test_equal_rows_go_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        rows = words(30) * 3
        train, held_out = compiled(
            tmp_path / str(seed), rows, tokenizer, seed=seed, eval_fraction=0.2
        )
        trained, held = set(documents(train)), set(documents(held_out))
        assert not trained & held
        assert len(trained) + len(held) == 30
        assert Counter(documents(train) + documents(held_out)) == Counter(map(by_hand, rows))


def test_the_split_goes_by_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Neither the order of the rows nor a name decides it; the seed does."""
    rows = words(200)
    held = set(documents(compiled(tmp_path / "a", rows, tokenizer, eval_fraction=0.1)[1]))
    assert len(held) == 20
    random.Random(1).shuffle(rows)
    shuffled = compiled(tmp_path / "b", rows, tokenizer, eval_fraction=0.1)[1]
    assert set(documents(shuffled)) == held
    other = set(documents(compiled(tmp_path / "c", rows, tokenizer, 7, eval_fraction=0.1)[1]))
    assert len(other) == 20
    assert len(other & held) < 10  # 2 are to be expected by chance


def test_a_held_out_file_and_its_leaks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = words(30)
    path = toy.write_rows(tmp_path / "eval.jsonl", [*rows[:3], {"text": "new"}])
    train, held_out = compiled(tmp_path / "a", rows, tokenizer, eval=str(path))
    assert documents(train) == list(map(by_hand, rows))
    assert documents(held_out) == [*map(by_hand, rows[:3]), by_hand({"text": "new"})]
    assert "3 of 4 held-out samples stand in the training data too" in train.notes[0]
    apart = compiled(tmp_path / "b", rows[3:], tokenizer, eval=str(path))[0]
    assert apart.notes == ()


# --- length, packing


def test_rows_over_the_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = words(60)
    kept = [d for d in map(by_hand, rows) if len(d[0]) <= 40]
    over = 60 - len(kept)
    assert 0 < over < 60
    options: dict[str, Any] = {"max_length": 40, "eval_fraction": 0}
    cut, _ = compiled(tmp_path / "a", rows, tokenizer, **options)
    assert documents(cut) == [(ids[:40], marks[:40]) for ids, marks in map(by_hand, rows)]
    assert cut.notes == (f"rows.jsonl: {over} of 60 rows are cut at max_length 40",)
    dropped, _ = compiled(tmp_path / "b", rows, tokenizer, overlong="drop", **options)
    assert documents(dropped) == kept
    assert f"{over} of 60 rows are over max_length 40 and left out" in dropped.notes[0]


def test_rows_whose_answer_is_cut_away_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "a" * n, "completion": "b"} for n in range(60)]
    around = len("<user\n>\n<assistant\n")  # one token for < and for >
    train, _ = compiled(tmp_path / "a", rows, tokenizer, max_length=50, eval_fraction=0)
    assert len(train) == 50 - around  # the prompts of 0 to 50 - around - 1 letters
    assert any("have no answer within max_length" in note for note in train.notes)
    assert train.trained_lengths.tolist() == [2] * (len(train) - 1) + [1]


@pytest.mark.parametrize("capacity", [64, 100, 300])
def test_packing_keeps_every_document_once(
    tmp_path: Path, tokenizer: Tokenizer, capacity: int
) -> None:
    rows = words(120) + words(5)  # some of them twice
    options: dict[str, Any] = {"max_length": capacity, "eval_fraction": 0.1}
    packed, packed_eval = compiled(tmp_path / "a", rows, tokenizer, packing=True, **options)
    plain, plain_eval = compiled(tmp_path / "b", rows, tokenizer, **options)
    assert Counter(documents(packed)) == Counter(documents(plain))
    assert Counter(documents(packed_eval)) == Counter(documents(plain_eval))
    assert packed.lengths.max() <= capacity
    assert packed.lengths.sum() == plain.lengths.sum()
    assert packed.trained_lengths.sum() == plain.trained_lengths.sum()
    least = -(-int(plain.lengths.sum()) // capacity)
    assert least <= len(packed) <= least * 11 / 9 + 1
    assert sorted(packed.members.tolist()) == list(range(len(packed.documents) - 1))


def test_digest_is_of_tokens_and_of_what_is_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pair = [{"prompt": "abc", "completion": "def"}, {"prompt": "ab", "completion": "cdef"}]
    digests = set()
    for i, row in enumerate(pair):  # without a template both are "abcdef"
        plain = Tokenizer(toy.toy_model(tmp_path / f"m{i}", template=None))
        train, _ = compiled(tmp_path / str(i), [row] * 2, plain, eval_fraction=0)
        assert {ids for ids, _ in documents(train)} == {by_hand({"text": "abcdef"})[0]}
        digests.add(train.digest)
    assert len(digests) == 2
