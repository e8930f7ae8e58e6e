"""Text of other kinds than a user's: Python's documentation, and the source code of its standard library.

It is read from the Python that runs, under the licence of Python (PSF-2.0), and nothing is fetched. It changes with the
version of Python; its digest is a part of what a resumed run must have in common with the one that was stopped.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sparsellm.errors import DataError, one_line
from sparsellm.text.corpora import read_pydoc

DOCUMENTATION = "python-docs"
SOURCE_CODE = "python-code"
KINDS = (DOCUMENTATION, SOURCE_CODE)

# Distributions of Python leave some of these out; the others are tables, and the text of the documentation.
_LEFT_OUT = {
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "tkinter",
    "turtle",
    "turtledemo",
    "venv",
}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_TESTS = {"test", "tests", "__pycache__"}
# characters of a document at most, so that windows come from many modules
_PIECE = 8000
_LEAST = (
    1_000_000  # characters of source code, below which Python's sources are not there
)
_PROBED = 4  # documents of each kind that show how a tokenizer reads it
_MOST_UNKNOWN = 0.1  # of their tokens
_LONGEST_TOKEN = 20  # characters of a token on average, beyond which tokens are missing


@cache
def modules() -> dict[str, str]:
    """The source code of the standard library by path, without tests. It may be empty: some Pythons have none."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        package = root / name
        if name.startswith("_sysconfigdata"):  # it is written for one machine
            continue
        if package.is_dir():
            found = sorted(package.rglob("*.py"))
            files += [
                file for file in found if not _TESTS & {*file.relative_to(root).parts}
            ]
        elif package.with_suffix(".py").is_file():
            files.append(package.with_suffix(".py"))
    sources = {}
    for file in files:
        text = file.read_text("utf-8", errors="replace")
        sources[file.relative_to(root).as_posix()] = text
    return sources


def documents(kind: str) -> Sequence[str]:
    """The documents of a kind, each of at most 8,000 characters. Raises DataError if Python's sources are missing."""
    _check_sources()
    if kind == SOURCE_CODE:
        return _code_pieces()
    return _Documentation()


def python_digest() -> str:
    """A digest of the whole text."""
    digest = hashlib.sha256()
    for part in (*_topic_pieces(), *_code_pieces()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def unsuited(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why Python's text is of no use to a tokenizer: sources are missing, or it does not know such text; else ""."""
    try:
        probed = [
            documents(kind)[number] for kind in KINDS for number in range(_PROBED)
        ]
    except DataError as error:
        return str(error)
    text = "\n\n".join(probed)
    try:
        ids = tokenizer(text, verbose=False)["input_ids"]
    except (
        Exception
    ) as error:  # tokenizers raises it for a word that a vocabulary has no token for
        return f"the tokenizer cannot read Python's text ({one_line(error)})"
    if len(ids) * _LONGEST_TOKEN < len(text):
        return f"the tokenizer makes only {len(ids)} tokens of {len(text)} characters of Python's text"
    unknown = tokenizer.unk_token_id
    share = 0.0
    if unknown is not None:
        share = ids.count(unknown) / len(ids)
    if share > _MOST_UNKNOWN:
        return f"the tokenizer does not know {share:.0%} of Python's text"
    return ""


def _check_sources() -> None:
    """Raises DataError if the standard library is there without its source code."""
    if sum(map(len, modules().values())) < _LEAST:
        raise DataError(
            f"the source code of Python's standard library is not in {sysconfig.get_path('stdlib')}"
        )


@cache
def _code_pieces() -> list[str]:
    return [piece for text in modules().values() for piece in _pieces(text)]


@cache
def _topic_pieces() -> list[str]:
    """The part of Python's documentation that is not held out for evaluation."""
    topics = read_pydoc("calibration").documents
    return [piece for topic in topics for piece in _pieces(topic)]


def _pieces(text: str) -> list[str]:
    """A text cut between lines into pieces of at most 8,000 characters; a longer line is a piece by itself."""
    pieces: list[str] = []
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if lines and size + len(line) > _PIECE:
            pieces.append("".join(lines))
            lines = []
            size = 0
        lines.append(line)
        size += len(line)
    if lines:
        pieces.append("".join(lines))
    return pieces


class _Documentation(Sequence[str]):
    """The topics of Python's documentation, then the docstrings of each module, which are looked for when asked for:
    parsing all modules takes seconds."""

    def __init__(self) -> None:
        self._topics = _topic_pieces()
        self._modules = list(modules())

    def __len__(self) -> int:
        return len(self._topics) + len(self._modules)

    def __getitem__(self, number: int) -> str:  # type: ignore[override]
        if number < len(self._topics):
            return self._topics[number]
        name = self._modules[number - len(self._topics)]
        return _docstrings(name)


@cache
def _docstrings(name: str) -> str:
    """The first 8,000 characters of a module's docstrings, without paragraphs of the held-out documentation; empty for
    a module that this Python cannot parse."""
    try:
        tree = ast.parse(modules()[name])
    except SyntaxError:
        return ""
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, _WITH_DOCSTRING):
            docstrings.append(ast.get_docstring(node) or "")
    held_out = _held_out_paragraphs()
    paragraphs = [
        paragraph
        for docstring in docstrings
        for paragraph in docstring.split("\n\n")
        if paragraph.strip() and paragraph.strip() not in held_out
    ]
    return _pieces("\n\n".join(paragraphs) or "\n")[0]


@cache
def _held_out_paragraphs() -> frozenset[str]:
    held_out = read_pydoc("evaluation").documents
    return frozenset(
        paragraph.strip() for topic in held_out for paragraph in topic.split("\n\n")
    )
