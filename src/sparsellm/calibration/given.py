"""Checks the text that a Python user passes: a source, a file, token ids, or a data set, before any model is opened.

Token ids are windows of equal length, one per row. Rows of different lengths are refused rather than cut or joined,
because only the user can decide where a text may be cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

from sparsellm.calibration.sources import FILE_SUFFIXES, SOURCES, Split, Text, check_source
from sparsellm.errors import DataError, shown
from sparsellm.recipe import Recipe

TextGiven: TypeAlias = str | os.PathLike[str] | Tensor | numpy.ndarray | Sequence[Any] | Mapping[str, Any] | Text
"""The types accepted as text: a source, a file, token ids, or a data set; see :func:`as_text`."""

IDS, DOCUMENTS = "token ids given in Python", "documents given in Python"  # recorded in the recipe as ``calibration``

_HINT = (
    "give a source such as 'pydoc', the path of a file, token ids (windows, tokens), or a data set with a column "
    "'text' or 'input_ids'"
)
_WHOLE = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def as_text(value: Any, name: str, split: Split) -> str | Tensor | Text:
    """Checks a text argument and returns the name of a source, token ids, or the documents of a data set.

    Token ids are returned as ``(windows, tokens)`` int64 on the CPU.

    Args:
        value: a source, a path, a tensor or numpy array of ids, a sequence of id sequences of one length, or a data
            set: a sequence of mappings with ``text`` or ``input_ids``, such as ``datasets.Dataset``.
        name: the name of the argument, for error messages.
        split: whether the text is for calibration or evaluation.

    Raises:
        DataError: the value is none of these, the source or file does not exist, or the ids are not integers in rows
            of one length of 2 or more.
    """
    if isinstance(value, Text):
        return value
    if isinstance(value, str):
        check_source(value, split)
        return value
    if isinstance(value, os.PathLike):
        path = os.fsdecode(value)  # also if it looks like a name or ``name:argument``
        plain = os.path.splitext(path)[1].lower() in FILE_SUFFIXES and path.partition(":")[0] not in SOURCES
        source = path if plain else f"file:{path}"
        check_source(source, split)
        return source
    if isinstance(value, Mapping) and "input_ids" in value:  # the return value of a tokenizer
        return _ids(value["input_ids"], name)
    if isinstance(value, Mapping | bytes | bytearray) or not isinstance(value, Iterable):
        detail = f" with the keys {shown(list(value))}" if isinstance(value, Mapping) else ""
        raise DataError(f"{name} is a {type(value).__name__}{detail}; {_HINT}")
    if isinstance(value, Tensor | numpy.ndarray):
        return _ids(value, name)
    if not hasattr(value, "__len__"):
        raise DataError(f"{name} is a {type(value).__name__} without a length; give a list of its first rows")
    rows = list(value)
    if rows and isinstance(rows[0], Mapping):
        return _of_mappings(rows, name)
    if rows and isinstance(rows[0], str | bytes):
        raise DataError(
            f"{name} holds {type(rows[0]).__name__}; give documents as [{{'text': ...}}, ...], or the path of a file"
        )
    return _ids(rows, name)


def settle_calibration(recipe: Recipe, calibration: str | Tensor | Text | None) -> Recipe:
    """The recipe with ``calibration`` set to the name of the text that is used; checks that a source exists.

    Raises:
        DataError: see :func:`as_text`.
    """
    if calibration is None:
        check_source(recipe.calibration, "calibration")
        return recipe
    if isinstance(calibration, str):
        return recipe.updated(calibration=calibration)
    return recipe.updated(calibration=IDS if isinstance(calibration, Tensor) else DOCUMENTS)


def _of_mappings(rows: list[Any], name: str) -> Tensor | Text:
    """The documents or token ids of the rows of a data set."""
    field = "input_ids" if "input_ids" in rows[0] else "text"
    for at, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{name} has rows that are mappings and rows that are not")
        if field not in row:
            raise DataError(f"{name}, row {at}, has no 'text' and no 'input_ids'; its columns: {shown(list(row), 200)}")
        if field == "text" and not isinstance(row["text"], str):
            raise DataError(f"{name}, row {at}: 'text' is {shown(row['text'])}, not a string")
    values = [row[field] for row in rows]
    return Text(values) if field == "text" else _ids(values, name)


def _ids(value: Any, name: str) -> Tensor:
    """Token ids ``(windows, tokens)`` from an array, or from rows of one length."""
    if not isinstance(value, Tensor | numpy.ndarray):
        value = _stacked(value, name)
    described = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    integers = value.dtype.kind in "iu" if isinstance(value, numpy.ndarray) else value.dtype in _WHOLE
    if not integers or value.ndim != 2 or value.shape[0] < 1 or value.shape[1] < 2:
        raise DataError(f"{name}: token ids must be integers of shape (windows, 2 or more); got {described}")
    if isinstance(value, numpy.ndarray):
        if value.dtype == numpy.uint64 and int(value.max()) >= 1 << 63:
            raise DataError(f"{name}: token id {int(value.max())} is beyond every vocabulary")
        return torch.from_numpy(value.astype(numpy.int64))
    if value.is_meta or value.layout != torch.strided:
        raise DataError(
            f"{name}: token ids must be an ordinary tensor; got {described} on {value.device}, {value.layout}"
        )
    ids: Tensor = value.detach().to("cpu", torch.int64)
    return ids


def _stacked(rows: Any, name: str) -> numpy.ndarray:
    if not isinstance(rows, Sequence):
        raise DataError(f"{name} holds ids as a {type(rows).__name__}; {_HINT}")
    if not rows:
        raise DataError(f"{name} is empty; {_HINT}")
    arrays: list[numpy.ndarray] = []
    for at, row in enumerate(rows):
        if isinstance(row, int) or not hasattr(row, "__len__") or isinstance(row, str | bytes | Mapping):
            raise DataError(f"{name}, row {at}, is {shown(row)}, not a window of ids; give [[id, id, ...], ...]")
        try:
            array = row.detach().cpu().numpy() if isinstance(row, Tensor) else numpy.asarray(row)
        except (ValueError, TypeError, OverflowError, RuntimeError):  # different lengths, or another dtype
            array = numpy.empty((0, 0))
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(f"{name}, row {at}, is {shown(row)}; a window of ids is a list of integers")
        arrays.append(array)
        if len(array) != len(arrays[0]):
            raise DataError(
                f"{name} has windows of {len(arrays[0])} and {len(array)} ids (row {at}); cut them to one length"
            )
    return numpy.stack(arrays)
