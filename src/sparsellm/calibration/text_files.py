"""Text from a file: ``.txt``, ``.jsonl`` (field ``text``) or ``.parquet`` (column ``text``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath

import psutil

from sparsellm.calibration.sources import SOURCES, Split, Text, reads_file, text_file
from sparsellm.errors import DataError, one_line
from sparsellm.inputs import parse_json


@reads_file("file")
@SOURCES.register("file", paper="rows joined as in GPTQ, https://arxiv.org/abs/2210.17323")
def read_file(argument: str, split: Split) -> Text:
    """A file on this machine: every line of a .txt, record of a .jsonl or row of a .parquet is one document.

    Documents are joined with a blank line, as the papers join the rows of WikiText-2. A file has no splits: use
    different files to calibrate and to evaluate, or the perplexity will be too low.

    Raises:
        DataError: the file is absent, of another kind, not UTF-8, or without the field ``text``.
    """
    readers = {".txt": text_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}  # check_source refuses others
    return Text(read_rows(argument, readers[PurePath(argument).suffix.lower()]))


def read_rows(argument: str, reader: Callable[[Path], list[str]]) -> list[str]:
    """The documents that ``reader`` returns for a file, with clear errors.

    Raises:
        DataError: the file is absent, unreadable, not UTF-8, or too large for the free memory.
    """
    path = text_file(argument)
    try:
        size = path.stat().st_size
        if size > psutil.virtual_memory().available // 4:  # room for bytes, text and token ids
            raise DataError(f"{path} has {size / 1e9:.1f} GB, too much for the memory that is free; give a part of it")
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def text_rows(path: Path) -> list[str]:
    """The lines of a text file without line breaks; an empty last line counts, so that joining restores the text."""
    return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")


def _jsonl_rows(path: Path) -> list[str]:
    rows = []
    for number, line in enumerate(text_rows(path), start=1):
        if not line.strip():
            continue
        record = parse_json(line, f"{path}, line {number},", DataError)
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f"{path}, line {number}, has no field 'text' that holds a string")
        rows.append(record["text"])
    return rows


def _parquet_rows(path: Path) -> list[str]:
    """The strings of the column ``text``; rows without a string are left out."""
    import pyarrow  # here, because the import is slow and few runs need it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        if "text" not in schema.names:
            raise DataError(f"{path} has no column 'text'; its columns: {', '.join(schema.names)[:300]}")
        kind = schema.field("text").type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path} has a column 'text' of {kind}; it must hold strings")
        return [row for row in file.read(["text"]).column("text").to_pylist() if row is not None]
    except DataError:
        raise
    except UnicodeDecodeError:
        raise DataError(f"{path} holds text that is not UTF-8; write the file again") from None
    except Exception as error:  # a damaged file raises errors of Arrow, of Thrift, of the system, or KeyError
        raise DataError(f"{path} is not a readable Parquet file: {one_line(error)}") from error
