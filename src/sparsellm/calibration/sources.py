"""What a text source is, and how the string that a user types finds its function.

A source string is ``name`` or ``name:argument`` (``wikitext2``, ``hub:owner/name``), or the path of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from sparsellm.errors import DataError, nearest
from sparsellm.registry import Registry

Split = Literal["calibration", "evaluation"]

# The one source that is no text: the dense model writes its own. See self_generated.py.
SELF = "self"

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Text:
    """Documents, and how a paper's protocol makes token windows of them.

    Attributes:
        documents: may be lazy (a column of a data set on disk).
        joiner: what stands between two documents when all are tokenised as one string.
        per_document: calibration windows are drawn inside single long documents, not from the joined string.
        most_windows: the protocol evaluates on no more windows than this.
    """

    documents: Sequence[str]
    joiner: str = "\n\n"
    per_document: bool = False
    most_windows: int | None = None

    def joined(self) -> str:
        return self.joiner.join(self.documents)


# (argument after the colon, or "", and the split) -> text
TextSource = Callable[[str, Split], Text]
SOURCES: Registry[TextSource] = Registry("text source")


def read_source(source: str, split: Split) -> Text:
    """The text that a source string names.

    Raises:
        DataError: no source has this name and it is no path of a known kind, or the source itself cannot be read.
    """
    name, _, argument = source.partition(":")
    if name == SELF:
        raise DataError(
            f"source {source!r} is text that the dense model writes itself, for calibration only; "
            "to evaluate, name a text: a file, 'pydoc' or 'wikitext2'"
        )
    if name in SOURCES:
        return SOURCES[name].function(argument, split)
    if PurePath(source).suffix.lower() in FILE_SUFFIXES:
        return SOURCES["file"].function(source, split)
    hint = nearest(name, [*(entry.name for entry in SOURCES), SELF])
    raise DataError(f"unknown text source {source!r}; {hint}, or a path ending in {', '.join(FILE_SUFFIXES)}")
