"""Text from a file: ``.txt``, or the ``text`` or ``messages`` of each record of a ``.jsonl`` or ``.parquet``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsellm import machine
from sparsellm.errors import DataError, one_line, shown
from sparsellm.inputs import parse_json, text_file

Split = Literal["calibration", "evaluation"]
_FIELDS = {"text": str, "messages": list}  # the second where a record has no text


@dataclass(frozen=True)
class Text:
    """Documents, and the protocol that turns them into token windows."""

    # strings, or messages for a chat template; may be lazy (a column of a data set on disk)
    documents: Sequence[Any]
    # the string between two documents when all are tokenised as one string
    joiner: str = "\n\n"
    # calibration windows are drawn inside single long documents
    per_document: bool = False
    most_windows: int | None = None  # that the protocol evaluates on
    called: str = "the text"  # in messages


def read_file(argument: str, split: Split) -> Text:
    """Every line of a .txt, record of a .jsonl or row of a .parquet as one document.

    Documents are joined with a blank line, as in GPTQ (2210.17323). A file has no splits: use different files to
    calibrate and to evaluate, or the perplexity will be too low."""
    return Text(read_rows(argument, READERS[Path(argument).suffix.lower()]))


def read_rows(argument: str, reader: Callable[[Path], list[Any]]) -> list[Any]:
    """The documents that ``reader`` returns for a file; a DataError if it is unreadable, not UTF-8, or too large."""
    path = text_file(argument)
    try:
        size = path.stat().st_size
        if size > machine.free_memory() // 4:  # room for bytes, text and token ids
            raise DataError(
                f"{path} has {size / 1e9:.1f} GB, too much for the memory that is free; give a part of it"
            )
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def text_rows(path: Path) -> list[str]:
    """The lines of a text file without line breaks; an empty last line counts, so that joining restores the text."""
    return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")


def documents_of(records: Iterable[tuple[str, Any]]) -> list[Any]:
    """The ``text`` of each record, or else its ``messages``. Records come with their place, for an error; those that
    have null in both fields are left out. Raises DataError for a record without these fields, or with another type."""
    documents = []
    for place, record in records:
        given = [
            name for name in _FIELDS if isinstance(record, Mapping) and name in record
        ]
        name = next((name for name in given if record[name] is not None), None)
        if name is not None and isinstance(record[name], _FIELDS[name]):
            documents.append(record[name])
        elif name is not None or not given:
            raise DataError(
                f"{place}, has no field 'text' that holds a string, and no list 'messages': {shown(record)}"
            )
    return documents


def _jsonl_rows(path: Path) -> list[Any]:
    places = (
        (f"{path}, line {number}", line)
        for number, line in enumerate(text_rows(path), start=1)
        if line.strip()
    )
    return documents_of(
        (place, parse_json(line, f"{place},", error=DataError))
        for place, line in places
    )


def _parquet_rows(path: Path) -> list[Any]:
    import pyarrow.parquet  # here, because the import is slow and few runs need it

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        rows = file.read([name for name in _FIELDS if name in names]).to_pylist()
    except Exception as error:  # a damaged file raises errors of Arrow, of Thrift, of the system, or KeyError
        raise DataError(
            f"{path} is not a readable Parquet file: {one_line(error)}"
        ) from error
    if not _FIELDS.keys() & names:
        raise DataError(
            f"{path} has no column 'text'; its columns: {', '.join(names)[:300]}"
        )
    return documents_of(
        (f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)
    )


READERS = {".txt": text_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
