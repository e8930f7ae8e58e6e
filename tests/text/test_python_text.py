"""The text of Python's documentation and source code: its text, its windows, and its share of a mixture."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sparsellm.errors import DataError
from sparsellm.recipe import Recipe
from sparsellm.text import python_text
from sparsellm.text.corpora import read_pydoc
from sparsellm.text.mixing import check_mix, is_mixed, with_python_text
from sparsellm.text.python_text import DOCUMENTATION, KINDS, SOURCE_CODE
from sparsellm.text.windows import python_windows
from tests.models import tiny_tokenizer
from tests.text.tokenizers import words_tokenizer


@pytest.fixture
def forgetting() -> Iterator[None]:
    """What was read of it is forgotten before and after a test that changes it."""
    kept = (
        python_text.modules,
        python_text._code_pieces,
        python_text._topic_pieces,
        python_text._docstrings,
        python_text._held_out_paragraphs,
    )
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def test_the_code_is_that_of_the_installed_library_without_tests_and_tables() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    modules = python_text.modules()
    assert modules["json/decoder.py"] == (root / "json/decoder.py").read_text("utf-8")
    tops = {name.partition("/")[0].removesuffix(".py") for name in modules}
    assert tops <= sys.stdlib_module_names
    assert not tops & {"test", "idlelib", "encodings", "pydoc_data", "tkinter"}
    assert not any("/tests/" in name or "/test/" in name for name in modules)
    pieces = python_text.documents(SOURCE_CODE)
    assert "".join(pieces) == "".join(modules.values())
    assert max(map(len, pieces)) <= 8000


def test_no_paragraph_of_the_held_out_documentation_is_in_it() -> None:
    held_out = {
        paragraph.strip()
        for topic in read_pydoc("evaluation").documents
        for paragraph in topic.split("\n\n")
    }
    documents = python_text.documents(DOCUMENTATION)
    sampled = {
        paragraph.strip() for text in documents for paragraph in text.split("\n\n")
    }
    assert not sampled & held_out
    decoder = ast.parse(python_text.modules()["json/decoder.py"])
    docstring = next(
        ast.get_docstring(node)
        for node in decoder.body
        if isinstance(node, ast.ClassDef) and node.name == "JSONDecoder"
    )
    assert docstring is not None
    assert any(docstring.split("\n\n")[0] in text for text in documents)


def test_a_docstring_with_a_held_out_paragraph_loses_it(
    forgetting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = read_pydoc("evaluation").documents[0].split("\n\n")[0].strip()
    docstring = f"Kept before.\n\n{held_out}\n\nKept after.".replace("\\", "")
    monkeypatch.setattr(python_text, "modules", lambda: {"a.py": f"{docstring!r}\n"})
    assert python_text._docstrings("a.py") == "Kept before.\n\nKept after."


def test_windows_are_consecutive_and_the_first_do_not_depend_on_their_number() -> None:
    tokenizer = tiny_tokenizer()
    for kind in KINDS:
        few = python_windows(kind, tokenizer, 3, 64, seed=1)
        many = python_windows(kind, tokenizer, 9, 64, seed=1)
        assert few.shape == (3, 64)
        assert torch.equal(many[:3], few)
        assert not torch.equal(python_windows(kind, tokenizer, 3, 64, seed=2), few)
        document = next(
            text
            for text in python_text.documents(kind)
            if tokenizer.decode(few[0])[:40] == text[:40]
        )
        ids = tokenizer(document + "\n\n")["input_ids"]
        length = min(len(ids), few.numel())
        assert few.flatten()[:length].tolist() == ids[:length]


def test_windows_begin_with_bos_where_others_do() -> None:
    windows = python_windows(SOURCE_CODE, tiny_tokenizer(add_bos=True), 3, 64, seed=1)
    assert (windows == 0).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]


def test_a_sample_that_is_used_up_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["first " * 20, "second " * 20]
    monkeypatch.setattr(python_text, "documents", lambda kind: documents)
    tokenizer = words_tokenizer("first", "second")
    windows = python_windows(SOURCE_CODE, tokenizer, 7, 20, seed=0)
    for number in (0, 2, 4):  # each time both documents
        assert sorted(windows[number : number + 2, 0].tolist()) == [1, 2]
    with pytest.raises(
        DataError, match="python-code has 40 tokens, and 41 are needed for one window"
    ):
        python_windows(SOURCE_CODE, tokenizer, 1, 41, seed=0)


def test_a_tokenizer_that_cannot_read_the_sample_is_found() -> None:
    assert python_text.unsuited(tiny_tokenizer()) == ""
    proteins = words_tokenizer("A", "C", "G", "T")
    assert "does not know" in python_text.unsuited(proteins)
    silent = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"~": 0}, []))
    )
    assert "tokens of" in python_text.unsuited(silent)
    raising = Tokenizer(models.WordLevel({"~": 0}, unk_token="<unk>"))
    refused = PreTrainedTokenizerFast(tokenizer_object=raising)
    assert "WordLevel error" in python_text.unsuited(refused)


def test_a_python_without_sources_is_named(
    forgetting: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("'a docstring'\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=f"is not in {tmp_path}"):
        python_text.documents(SOURCE_CODE)
    assert str(tmp_path) in python_text.unsuited(tiny_tokenizer())


def test_the_digest_is_of_the_text(
    forgetting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = python_text.python_digest()
    assert digest == python_text.python_digest()
    changed = {**python_text.modules(), "abc.py": "pass\n"}
    python_text._code_pieces.cache_clear()
    monkeypatch.setattr(python_text, "modules", lambda: changed)
    assert python_text.python_digest() != digest


@pytest.mark.parametrize(
    ("source", "mixed"),
    [
        ("a.txt", True),
        ("file:a.txt", True),
        ("hub:owner/name", True),
        ("documents given in Python", True),
        ("token ids given in Python", False),
        ("pydoc", False),
        ("self", False),
        ("c4-sample", False),
        ("a.txt:1,pydoc:1", False),
    ],
)
def test_only_a_text_of_the_user_is_mixed_unless_asked(
    source: str, mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    assert is_mixed(Recipe(calibration=source)) is mixed
    assert not is_mixed(Recipe(calibration=source, mix=0))
    asked = Recipe(calibration=source, mix=0.5)
    if source.startswith("token") or ":1," in source:
        with pytest.raises(DataError, match=r"mix 0\.5"):
            check_mix(asked)
    else:
        check_mix(asked)
        assert is_mixed(asked)


def test_shares_of_both_texts() -> None:
    shares = with_python_text({"a.txt": 1.0}, 0.25, 16)
    assert shares == {"a.txt": 0.75, DOCUMENTATION: 0.125, SOURCE_CODE: 0.125}
    # a window for one kind alone, and for none
    assert with_python_text({"a.txt": 1.0}, 0.25, 4) == {
        "a.txt": 0.75,
        DOCUMENTATION: 0.25,
    }
    assert with_python_text({"a.txt": 1.0}, 0.25, 2) == {"a.txt": 1.0}
    assert with_python_text({"a.txt": 1.0}, 0.0, 99) == {"a.txt": 1.0}
    assert with_python_text({"pydoc": 1.0}, 0.5, 8) == {"pydoc": 0.5, SOURCE_CODE: 0.5}
