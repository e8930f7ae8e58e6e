"""Text from a file: ``.txt``, ``.jsonl`` (field ``text``) or ``.parquet`` (column ``text``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sparsellm.calibration.sources import FILE_SUFFIXES, SOURCES, Split, Text
from sparsellm.errors import DataError


@SOURCES.register("file", paper="rows joined as in GPTQ, https://arxiv.org/abs/2210.17323")
def read_file(argument: str, split: Split) -> Text:
    """A file on this machine: every line of a .txt, record of a .jsonl or row of a .parquet is one document.

    Documents are joined with a blank line, as the papers join the rows of WikiText-2. A file has no splits: to
    calibrate and to evaluate, give two files, or the evaluation flatters.

    Raises:
        DataError: the file is absent, of another kind, not UTF-8, or without the field ``text``.
    """
    path = Path(argument).expanduser()
    readers = {".txt": text_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is not a kind of file that can be read; give {', '.join(FILE_SUFFIXES)}")
    return Text(read_rows(path, reader))


def read_rows(path: Path, reader: Callable[[Path], list[str]]) -> list[str]:
    """What ``reader`` finds in a file, with errors that say what is wrong with it.

    Raises:
        DataError: the file is absent, unreadable or not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"text file {path} does not exist; check the path, or name another source")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def text_rows(path: Path) -> list[str]:
    """The lines of a text file, without their ends; a last line that is empty counts, so joining restores the text."""
    return path.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")


def _jsonl_rows(path: Path) -> list[str]:
    rows = []
    for number, line in enumerate(text_rows(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}, is not JSON: {error.msg}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f"{path}, line {number}, has no field 'text' that holds a string")
        rows.append(record["text"])
    return rows


def _parquet_rows(path: Path) -> list[str]:
    import pyarrow  # here, because it takes a noticeable moment and few runs need it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise DataError(f"{path} has no column 'text'; its columns: {', '.join(file.schema_arrow.names)}")
        return [row for row in file.read(["text"]).column("text").to_pylist() if isinstance(row, str)]
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
