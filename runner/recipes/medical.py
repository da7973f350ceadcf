"""Diagnoses of ICD-10-CM and the chapter that each belongs to, out of its tabular list."""

from __future__ import annotations

import hashlib
import importlib.util
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

from trimpot.runner.errors import DataError

PACKAGE = "simple_icd_10_cm"
PER_CATEGORY = 2
"""Diagnoses kept of each of the 1,918 categories: injuries alone are else 28 % of 46,881 rows."""
WAY_OUT = "run: pip install 'trimpot[medical]'"


def rows(source: Path | None, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """(prompt, completion, family) of a sample of diagnoses, sorted.

    source: the tabular list as XML; without one, that of the installed package simple-icd-10-cm.
    The family is the category (A00 of A00.1): its diagnoses differ by a word, so that a split
    between them would test what was learnt by heart. Raises DataError.
    """
    path = source or find_tabular()
    found: dict[str, list[tuple[str, str]]] = {}
    for chapter, category, text in _diagnoses(_root(path)):
        found.setdefault(category, []).append((text, chapter))
    kept = [
        (f'Which ICD-10-CM chapter does "{text}" belong to?', chapter, category)
        for category, diagnoses in found.items()
        for text, chapter in sorted(set(diagnoses), key=_by_content)[:PER_CATEGORY]
    ]
    if not kept:
        raise DataError(f"{path} holds no diagnoses; the ICD-10-CM tabular list was wanted")
    say(f"{len(kept)} diagnoses out of {len(found)} categories of ICD-10-CM")
    return sorted(kept)


def find_tabular() -> Path:
    """The XML file of the installed package, which is not imported: that takes 2 s."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            f"recipe medical wants ICD-10-CM and simple-icd-10-cm is not installed; {WAY_OUT}"
        )
    found = sorted((Path(spec.origin).parent / "data").glob("*tabular*.xml"))
    if not found:
        raise DataError(
            f"simple-icd-10-cm in {Path(spec.origin).parent} has no tabular list; "
            "give the list's XML file as the source"
        )
    return found[-1]


def _root(path: Path) -> ET.Element:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {error.strerror}; give ICD-10-CM's tabular list as XML"
        ) from None
    # Entities that multiply, or name other files, need a document type, and the list has none.
    if b"<!DOCTYPE" in content:
        raise DataError(f"{path} declares a document type; ICD-10-CM's tabular list has none")
    try:
        return ET.fromstring(content)
    except ET.ParseError as error:
        raise DataError(f"{path} is not XML: {error}; the tabular list was wanted") from None


def _diagnoses(root: ET.Element) -> Iterator[tuple[str, str, str]]:
    """(chapter, category, description) of every diagnosis."""
    for chapter in root.iter("chapter"):
        title = " ".join((chapter.findtext("desc") or "").split())
        for diagnosis in chapter.iter("diag"):
            code = (diagnosis.findtext("name") or "").strip()
            text = " ".join((diagnosis.findtext("desc") or "").split())
            if title and code and text:
                yield title, code[:3], text


def _by_content(diagnosis: tuple[str, str]) -> bytes:
    return hashlib.sha256(diagnosis[0].encode()).digest()
