"""A recipe → a folder that `trimpot train` can run: model, data, run.yaml.

Torch-free to import; the model's conversion alone brings torch in. Nothing is written into the
folder before all of it is made.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from trimpot.runner.errors import StorageError, UserError
from trimpot.runner.reading import JSON_BYTES, parse_json, read_bounded
from trimpot.runner.recipes import legal, medical, smollm2, technical

Row = tuple[str, str, str]
"""Prompt, completion, and the family that must not be divided between train and eval."""

MAKERS: dict[str, Callable[[Path | None, Callable[[str], None]], list[Row]]] = {
    "technical": technical.rows,
    "legal": legal.rows,
    "medical": medical.rows,
}
EVAL_FRACTION = 0.1
NEAR = 0.5
"""Families whose runs of three words overlap by this much (Jaccard) count as one."""
MANIFEST = "manifest.json"
DATA = ("train.jsonl", "eval.jsonl")
MODEL = "SmolLM2-135M-Instruct"


def list_recipes() -> dict[str, str]:
    """Name → what it trains: the first line of the recipe's yaml."""
    first = {name: _yaml(name).read_text(encoding="utf-8").partition("\n")[0] for name in MAKERS}
    return {name: line.removeprefix("#").strip() for name, line in first.items()}


def prepare(
    name: str, out: Path, *, source: Path | None = None, say: Callable[[str], None]
) -> Path:
    """Make the folder `out` for recipe `name`, and return the path of its run.yaml.

    source: where the recipe's raw data lie; each recipe says what it takes. What is there and
    whole by its SHA-256 stays, and so does a run.yaml that was edited. Raises UserError.
    """
    if name not in MAKERS:
        raise UserError(f"{name!r} is no recipe; there are {', '.join(MAKERS)}")
    out = out.resolve()
    known = _known(out, name)
    data_whole = _whole(out, known, list(DATA))
    model_files = [path for path in known if path.startswith(f"{MODEL}/")]
    model_whole = bool(model_files) and _whole(out, known, model_files)
    if data_whole and model_whole and (out / "run.yaml").is_file():
        say(f"{out} is whole; nothing to do")
        return out / "run.yaml"
    if not model_whole:
        smollm2.find_gguf()  # what is not installed is told before any work
    rows = [] if data_whole else MAKERS[name](source, say)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            stage = Path(folder)
            if not data_whole:
                _write_data(stage, rows, say)
            if not model_whole:
                smollm2.make_model(stage / MODEL, say)
            shutil.copyfile(_yaml(name), stage / "run.yaml")
            _place(stage, out, name, known)
    except OSError as error:
        raise StorageError(
            f"{out} can't be written: {error.strerror or error}; give a folder with 1 GB of room"
        ) from None
    return out / "run.yaml"


def split(rows: Iterable[Row], fraction: float = EVAL_FRACTION) -> tuple[list[Row], list[Row]]:
    """(train, eval). Which side a row is on, and its place there, follow from what it says.

    Families that are nearly the same, or share a prompt, are kept together; the order of `rows`
    has no influence.
    """
    unique = sorted(set(rows), key=lambda row: _sha256("\0".join(row).encode()))
    kin = _kin(unique)
    limit = int(fraction * 2**256)
    held_out = {family: int(_sha256(kin[family].encode()), 16) < limit for family in kin}
    return (
        [row for row in unique if not held_out[row[2]]],
        [row for row in unique if held_out[row[2]]],
    )


def _kin(rows: Sequence[Row]) -> dict[str, str]:
    """Family → the first, by the alphabet, of all that must be on one side with it."""
    kin = {family: family for _, _, family in rows}

    def head(family: str) -> str:
        while kin[family] != family:
            family = kin[family]
        return family

    for one, other in _pairs(rows):
        first, second = sorted((head(one), head(other)))
        kin[second] = first
    return {family: head(family) for family in kin}


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Pairs of families that share a prompt, or of which NEAR of the words' runs are the same."""
    by_prompt: dict[str, str] = {}
    for prompt, _, family in rows:
        yield by_prompt.setdefault(prompt, family), family
    shingles = {family: _shingles(family) for _, _, family in rows}
    holders: dict[str, list[str]] = {}
    for family, own in shingles.items():
        shared = Counter(other for shingle in own for other in holders.get(shingle, ()))
        for other, count in shared.items():
            if count >= NEAR * (len(own) + len(shingles[other]) - count):
                yield other, family
        for shingle in own:
            holders.setdefault(shingle, []).append(family)


def _shingles(text: str) -> set[str]:
    """The runs of three words in a text, or the text itself if it has fewer."""
    words = re.findall(r"\w+", text.lower())
    runs = {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}
    return runs or {" ".join(words)}


def _write_data(stage: Path, rows: Sequence[Row], say: Callable[[str], None]) -> None:
    sides = split(rows)
    for file, side in zip(DATA, sides, strict=True):
        with (stage / file).open("w", encoding="utf-8", newline="\n") as lines:
            for prompt, completion, _ in side:
                row = {"prompt": prompt, "completion": completion}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    say(f"{len(sides[0])} rows to train on, {len(sides[1])} held out")


def _place(stage: Path, out: Path, name: str, known: dict[str, str]) -> None:
    """Move what was made into `out`. A run.yaml that is there stays."""
    out.mkdir(exist_ok=True)
    if (out / "run.yaml").exists():
        (stage / "run.yaml").unlink()
    made = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
    files = {**known, **{path: _digest(stage / path) for path in made}}
    # The manifest goes first: cut short after it, the next call finds files that do not match
    # and makes them anew. The other way round it would take them for somebody else's.
    text = json.dumps({"recipe": name, "files": files}, indent=2) + "\n"
    (stage / MANIFEST).write_text(text, encoding="utf-8")
    (stage / MANIFEST).replace(out / MANIFEST)
    if (stage / MODEL).exists() and (out / MODEL).exists():
        (out / MODEL).replace(stage / "replaced")  # a full folder can't be replaced in place
    for part in (*DATA, MODEL, "run.yaml"):
        if (stage / part).exists():
            (stage / part).replace(out / part)


def _known(out: Path, name: str) -> dict[str, str]:
    """{path: SHA-256} of what an earlier call made in `out`.

    Raises UserError when the folder holds something else under the names that would be written.
    """
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file; give a new folder for the recipe")
    if (out / MANIFEST).exists():
        return _read_manifest(out / MANIFEST, name)
    taken = [part for part in (*DATA, MODEL, "run.yaml") if (out / part).exists()]
    if taken:
        raise UserError(f"{out} has a {taken[0]} that no recipe made; give a new folder")
    return {}


def _read_manifest(path: Path, name: str) -> dict[str, str]:
    try:
        manifest = parse_json(read_bounded(path, JSON_BYTES))
        recipe, files = manifest["recipe"], dict(manifest["files"])
        if not all((path.parent / name).resolve().is_relative_to(path.parent) for name in files):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{path} is no manifest of a recipe; give a new folder") from None
    if recipe != name:
        raise UserError(f"{path.parent} was made for {recipe}, not {name}; give another folder")
    return files


def _whole(out: Path, known: dict[str, str], files: list[str]) -> bool:
    return all((out / file).is_file() and known.get(file) == _digest(out / file) for file in files)


def _yaml(name: str) -> Path:
    return Path(__file__).parent / f"{name}.yaml"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
