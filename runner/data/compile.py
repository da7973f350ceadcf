"""Rows → token arrays on disk, once, before any worker starts.

Tokenising inside a worker is where other trainers lose a cluster: rank 0 works, the rest wait in
a collective until it times out. Here the driver compiles, workers map the file.

`RUN/data/{train,eval}.safetensors`: tokens int32 [n], trained uint8 [n], documents int64 [d + 1]
(offsets into tokens), members int64 [d] (documents in the order of their samples), samples
int64 [s + 1] (offsets into members; one document each unless packing).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trimpot.kernels.ops.content_hash import hash_documents
from trimpot.kernels.ops.pack import pack
from trimpot.runner.config import DataSection
from trimpot.runner.data.sources import read_rows, source_digest
from trimpot.runner.data.templates import Example, Render, detect_format, make_example
from trimpot.runner.errors import DataError, StorageError
from trimpot.runner.redact import redact

FORMAT = 2
"""Raised when what is compiled from the same rows changes."""
CHUNK = 1024
CHARACTERS_PER_TOKEN = 256
"""More than any text has on average: the longest tokens of vocabularies have 128, all spaces."""
Encoded = tuple[list[int], list[tuple[int, int]]]
"""(token ids, [start, end) characters of each)."""


Shown = tuple[list[int], str, str]
"""(tokens of the prompt as the model gets it, question as a person asked it, reference answer)."""
Asked = tuple[int, str, str]
"""Shown of a document whose tokens are known: how many of them are the prompt."""


@dataclass(frozen=True)
class Compiled:
    """One split, ready to train on."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    documents: NDArray[np.int64]
    members: NDArray[np.int64]
    samples: NDArray[np.int64]
    digest: str
    """SHA-256 over documents and their trained tokens, in order: what was trained on."""
    form: str
    """chat | prompt_completion | text: what the rows were."""
    notes: tuple[str, ...] = ()
    """What a person should know: dropped, truncated, leaked samples."""
    shown: tuple[Shown, ...] = ()
    """The first samples as text, for the report."""

    def __len__(self) -> int:
        return len(self.samples) - 1

    def parts(self, sample: int) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """(tokens, trained) of each document in a sample."""
        found: list[tuple[NDArray[np.int32], NDArray[np.uint8]]] = []
        for document in self.members[self.samples[sample] : self.samples[sample + 1]]:
            rows = slice(self.documents[document], self.documents[document + 1])
            found.append((self.tokens[rows], self.trained[rows]))
        return found

    def _per_sample(self, per_document: NDArray[np.int64]) -> NDArray[np.int64]:
        sums = np.concatenate([[0], np.cumsum(per_document[self.members])])
        return np.diff(sums[self.samples])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample → int64 [s]."""
        return self._per_sample(np.diff(self.documents))

    @property
    def trained_lengths(self) -> NDArray[np.int64]:
        """Trained tokens of each sample → int64 [s]."""
        sums = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return self._per_sample(np.diff(sums[self.documents]))


class TokenizerLike(Protocol):
    """What compiling needs of a tokenizer; `hub.Tokenizer` is one."""

    @property
    def digest(self) -> str: ...

    @property
    def end(self) -> str: ...

    def renderer(self, template: str | None) -> Render | None: ...

    def encode(self, texts: Sequence[str], special: bool) -> Iterator[Encoded]: ...


def compile_splits(
    data: DataSection, seed: int, folder: Path, tokenizer: TokenizerLike
) -> tuple[Compiled, Compiled | None]:
    """(train, eval) of a run, from `folder` where they are compiled already. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    key = _key(data, seed, tokenizer)
    if (found := load_splits(folder, key)) is not None:
        return found
    train, notes, shown = _tokenise(data, Path(data.train), tokenizer)
    if data.eval is not None:
        held_out, more, shown = _tokenise(data, Path(data.eval), tokenizer)
        notes = [*notes, *more, *_leaks(train, held_out)]
    else:
        train, held_out, chosen = _split(train, data, seed)
        shown = [shown[i] for i in chosen[:16]]
    empty = len(held_out.documents) < 2
    splits = (
        _finish(train, data, notes, []),
        None if empty else _finish(held_out, data, [], shown[:16]),
    )
    save_splits(*splits, folder, key)
    return splits


def _key(data: DataSection, seed: int, tokenizer: TokenizerLike) -> str:
    """Digest of all that decides the compiled arrays."""
    options = data.model_dump(mode="json", exclude={"train", "eval"})
    sources = [source_digest(Path(p)) for p in (data.train, data.eval) if p is not None]
    parts = [FORMAT, options, sources, tokenizer.digest, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Tokens:
    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    documents: NDArray[np.int64]
    form: str


def _tokenise(
    data: DataSection, path: Path, tokenizer: TokenizerLike
) -> tuple[_Tokens, list[str], list[Asked]]:
    rows = read_rows(path)
    form = detect_format(data, rows[0], f"{path} row 1")
    render = tokenizer.renderer(data.chat_template) if form != "text" else None
    ids: list[NDArray[np.int32]] = []
    marks: list[NDArray[np.uint8]] = []
    shown: list[Asked] = []
    truncated, dropped, silent = 0, 0, 0
    for start in range(0, len(rows), CHUNK):
        examples = [
            make_example(data, form, row, f"{path} row {start + i}", render, tokenizer.end)
            for i, row in enumerate(rows[start : start + CHUNK], 1)
        ]
        # What is certainly too long is not tokenised whole: a token takes 300 bytes on the way.
        most = CHARACTERS_PER_TOKEN * data.max_length
        texts = [e.text[:most] for e in examples]
        encoded = tokenizer.encode(texts, special=render is None)
        for number, (example, (tokens, offsets)) in enumerate(
            zip(examples, encoded, strict=True), start + 1
        ):
            if len(tokens) > data.max_length or len(example.text) > most:
                if data.overlong == "error":
                    at_least = "at least " if len(example.text) > most else ""
                    raise DataError(
                        f"{path} row {number} has {at_least}{len(tokens)} tokens, over "
                        f"data.max_length {data.max_length}; raise it, or set data.overlong to "
                        "truncate or drop"
                    )
                dropped += data.overlong == "drop"
                truncated += data.overlong == "truncate"
                if data.overlong == "drop":
                    continue
            mark = _trained(example, offsets)[: data.max_length]
            if not mark.any():
                silent += 1
                continue
            ids.append(np.asarray(tokens[: data.max_length], np.int32))
            marks.append(mark)
            asked = sum(end <= len(example.prompt) for _, end in offsets)
            shown.append((asked, example.question, example.answer))
    if not ids:
        raise DataError(
            f"{path}: none of {len(rows)} rows has a token to train on "
            f"({dropped} over max_length, {silent} with no answer within it); "
            "check the columns, or raise data.max_length"
        )
    notes = [
        f"{path.name}: {count} of {len(rows)} rows {what}"
        for count, what in (
            (truncated, f"are cut at max_length {data.max_length}"),
            (dropped, f"are over max_length {data.max_length} and left out"),
            (silent, "have no answer within max_length and are left out"),
        )
        if count
    ]
    offsets_d = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    return _Tokens(np.concatenate(ids), np.concatenate(marks), offsets_d, form), notes, shown


def _trained(example: Example, offsets: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """Which tokens are trained: those whose text begins inside an answer → uint8 [tokens]."""
    starts = np.array([start for start, _ in offsets], np.int64)
    ends = np.array([end for _, end in offsets], np.int64)
    mark = np.zeros(len(offsets), np.uint8)
    for start, end in example.spans:
        mark[(starts >= start) & (starts < end) & (ends > starts)] = 1
    mark[:1] = 0  # nothing comes before the first token that it could be predicted from
    return mark


def _split(part: _Tokens, data: DataSection, seed: int) -> tuple[_Tokens, _Tokens, list[int]]:
    """Hold out about `eval_fraction` of the documents, by content: equal ones go together.

    Returns (train, held out, which documents are held out). Raises DataError.
    """
    count, fraction = len(part.documents) - 1, data.eval_fraction
    hashes = hash_documents(part.tokens, part.documents, seed=seed)
    wanted = max(1, round(count * fraction)) if fraction else 0
    threshold = np.sort(hashes)[wanted - 1] if wanted else None
    held_out = hashes <= threshold if threshold is not None else np.zeros(count, bool)
    if held_out.all():
        raise DataError(
            f"{data.train} has {len(np.unique(hashes))} distinct rows to train on, too few to "
            "hold any out; add rows, set data.eval, or set data.eval_fraction=0"
        )
    chosen = np.flatnonzero(held_out)
    return _select(part, np.flatnonzero(~held_out)), _select(part, chosen), chosen.tolist()


def _select(part: _Tokens, documents: NDArray[np.int64]) -> _Tokens:
    lengths = np.diff(part.documents)
    rows = [slice(part.documents[d], part.documents[d + 1]) for d in documents]
    empty = part.tokens[:0], part.trained[:0]
    return _Tokens(
        np.concatenate([part.tokens[r] for r in rows] or [empty[0]]),
        np.concatenate([part.trained[r] for r in rows] or [empty[1]]),
        np.concatenate([[0], np.cumsum(lengths[documents])]).astype(np.int64),
        part.form,
    )


def _leaks(train: _Tokens, held_out: _Tokens) -> list[str]:
    known = hash_documents(train.tokens, train.documents)
    asked = hash_documents(held_out.tokens, held_out.documents)
    leaked = int(np.isin(asked, known).sum())
    if not leaked:
        return []
    return [
        f"{leaked} of {len(asked)} held-out samples stand in the training data too: "
        "the held-out loss will look better than it is"
    ]


def _finish(part: _Tokens, data: DataSection, notes: list[str], shown: list[Asked]) -> Compiled:
    lengths = np.diff(part.documents)
    if data.packing:
        bins = pack(lengths, data.max_length)
        members = np.argsort(bins, kind="stable").astype(np.int64)
        samples = np.concatenate([[0], np.cumsum(np.bincount(bins))]).astype(np.int64)
    else:
        members = np.arange(len(lengths), dtype=np.int64)
        samples = np.arange(len(lengths) + 1, dtype=np.int64)
    hashes = hash_documents(part.tokens, part.documents)
    marks = hashlib.sha256(part.trained.tobytes() + hashes.tobytes()).hexdigest()
    return Compiled(
        part.tokens,
        part.trained,
        part.documents,
        members,
        samples,
        marks[:32],
        part.form,
        tuple(notes),
        tuple(
            (part.tokens[part.documents[i] :][:asked].tolist(), redact(question), redact(answer))
            for i, (asked, question, answer) in enumerate(shown)
        ),
    )


ARRAYS = ("tokens", "trained", "documents", "members", "samples")
TRAIN, EVAL = "train.safetensors", "eval.safetensors"


def save_splits(train: Compiled, held_out: Compiled | None, folder: Path, key: str) -> None:
    """Write both splits. Raises StorageError; then no half of a file is left."""
    # eval first: train says which eval belongs to it, so its presence says that both are whole.
    if held_out is not None:
        _save(held_out, folder / EVAL, key, "")
    else:
        (folder / EVAL).unlink(missing_ok=True)
    try:
        _save(train, folder / TRAIN, key, held_out.digest if held_out else "")
    except StorageError:
        (folder / EVAL).unlink(missing_ok=True)
        raise


def _save(compiled: Compiled, path: Path, key: str, held_out: str) -> None:
    arrays = {name: getattr(compiled, name) for name in ARRAYS}
    meta = {
        "key": key,
        "digest": compiled.digest,
        "form": compiled.form,
        "held_out": held_out,
        "notes": json.dumps(compiled.notes),
        "shown": json.dumps(compiled.shown),
    }
    partial = path.with_suffix(".partial")
    try:
        save_file(arrays, partial, metadata=meta)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path} can't be written: {error}") from None


def load_splits(folder: Path, key: str | None = None) -> tuple[Compiled, Compiled | None] | None:
    """The compiled splits of a run, or None where there are none of this key, or damaged ones."""
    if (found := _load(folder / TRAIN, key)) is None:
        return None
    train, wanted = found
    if not wanted:
        return train, None
    held_out = _load(folder / EVAL, key)
    return (train, held_out[0]) if held_out and held_out[0].digest == wanted else None


def _load(path: Path, key: str | None) -> tuple[Compiled, str] | None:
    """(a split, digest of the held-out split that belongs to it)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            meta: dict[str, str] = file.metadata() or {}
            if key is not None and meta.get("key") != key:
                return None
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
        notes, shown = json.loads(meta["notes"]), json.loads(meta["shown"])
        digest, form, held_out = meta["digest"], meta["form"], meta["held_out"]
    except (SafetensorError, KeyError, ValueError):
        return None
    shown = tuple((prompt, question, answer) for prompt, question, answer in shown)
    compiled = Compiled(**arrays, digest=digest, form=form, notes=tuple(notes), shown=shown)
    return compiled, held_out
