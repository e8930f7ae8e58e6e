"""Text sources: their registry, and the look-up of the source string that a user types.

A source string is ``name`` or ``name:argument`` (``wikitext2``, ``hub:owner/name``), or the path of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, NoReturn, TypeVar

from sparsellm.errors import DataError, nearest, shown
from sparsellm.registry import Registry

Split = Literal["calibration", "evaluation"]

SELF = "self"  # the only source that reads no text: the dense model writes its own, see self_generated.py
FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Text:
    """Documents, and the protocol that turns them into token windows."""

    documents: Sequence[str]  # may be lazy (a column of a data set on disk)
    joiner: str = "\n\n"  # the string between two documents when all are tokenised as one string
    per_document: bool = False  # calibration windows are drawn inside single long documents
    most_windows: int | None = None  # that the protocol evaluates on

    def joined(self) -> str:
        return self.joiner.join(self.documents)


TextSource = Callable[[str, Split], Text]  # (argument after the colon, or "", and the split) -> text
SOURCES: Registry[TextSource] = Registry("text source")

_WITHOUT_ARGUMENT: set[str] = {SELF}
_FILE_READERS: set[str] = set()  # sources whose argument is the path of a file

F = TypeVar("F", bound=TextSource)


def takes_no_argument(name: str) -> Callable[[F], F]:
    """Decorator next to ``SOURCES.register``: ``name:anything`` is refused."""
    _WITHOUT_ARGUMENT.add(name)
    return lambda function: function


def reads_file(name: str) -> Callable[[F], F]:
    """Decorator next to ``SOURCES.register``: the text after the colon, if any, is the path of a file."""
    _FILE_READERS.add(name)
    return lambda function: function


def check_source(source: str, split: Split) -> tuple[str, str]:
    """The name and the argument of a source. Nothing is read, so that a mistake is reported before any work.

    Raises:
        DataError: no source has this name and it is no path of a known kind; the file does not exist; the source takes
            no argument; or it is ``self``, for evaluation.
    """
    name, colon, argument = source.partition(":")
    if not source.strip():
        raise DataError(f"the text source is empty; name a file ({', '.join(FILE_SUFFIXES)}), or 'pydoc'")
    if name not in SOURCES and name != SELF:
        name, argument = "file", source
        if PurePath(source).suffix.lower() not in FILE_SUFFIXES:
            _refuse_unknown(source)
    elif colon and name in _WITHOUT_ARGUMENT:
        raise DataError(f"source {shown(source)}: {name} takes nothing after its name; write {name!r}")
    if name == SELF and split == "evaluation":
        raise DataError(
            f"source {source!r} is text that the dense model writes itself, for calibration only; "
            "to evaluate, name a text: a file, 'pydoc' or 'wikitext2'"
        )
    if name == "file" and PurePath(argument).suffix.lower() not in FILE_SUFFIXES:
        raise _unreadable(argument)
    if name in _FILE_READERS and (argument or name == "file"):
        text_file(argument)
    return name, argument


def read_source(source: str, split: Split) -> Text:
    """The text that a source string names.

    Raises:
        DataError: see :func:`check_source`; or the source itself cannot be read.
    """
    name, argument = check_source(source, split)
    return SOURCES[name].function(argument, split)


def text_file(path: str) -> Path:
    """The path of a file that exists.

    Raises:
        DataError: there is no such file.
    """
    try:
        file = Path(path).expanduser()
        if file.is_file():
            return file
        reason = "is a directory" if file.is_dir() else "is not a file" if file.exists() else "does not exist"
    except (OSError, RuntimeError, ValueError) as error:  # too long; no such user after '~'; a null byte
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise DataError(f"text file {shown(path)} {reason}; check the path, or name another source")


def _unreadable(path: str) -> DataError:
    return DataError(f"{shown(path)} is not a kind of file that can be read; give {', '.join(FILE_SUFFIXES)}")


def _refuse_unknown(source: str) -> NoReturn:
    if any(separator in source for separator in ("/", "\\")) or source.startswith(("~", ".")):
        raise _unreadable(str(text_file(source)))  # or that it does not exist
    hint = nearest(source.partition(":")[0][:100], [*(entry.name for entry in SOURCES), SELF])
    raise DataError(f"unknown text source {shown(source)}; {hint}, or a path ending in {', '.join(FILE_SUFFIXES)}")
