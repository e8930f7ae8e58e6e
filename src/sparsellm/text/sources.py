"""The text that a user names or passes, checked before a model is opened: a source, a file, token ids, or a data set.

A source string is ``name`` or ``name:argument`` (``wikitext2``, ``hub:owner/name``), or the path of a file. A text
mixture is several of them, each with its share of the windows: ``wiki.txt:0.5,hub:owner/name:0.3,self:0.2``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

from sparsellm.errors import DataError, nearest, one_line, shown
from sparsellm.inputs import mixture_of, text_file, without_folders
from sparsellm.recipe import Recipe
from sparsellm.text import corpora
from sparsellm.text.texts import (
    READERS,
    Split,
    Text,
    documents_of,
    read_file,
)

TextGiven: TypeAlias = (
    str
    | os.PathLike[str]
    | Tensor
    | numpy.ndarray
    | Sequence[Any]
    | Mapping[str, Any]
    | Text
)
"""The types accepted as text: a source, a file, token ids, or a data set; see ``as_text``."""

SELF = "self"  # the only source that reads no text: the dense model writes its own, see self_generated.py
# The recipe records these as ``calibration``.
IDS = "token ids given in Python"
DOCUMENTS = "documents given in Python"

_PLAIN: dict[str, Callable[[Split], Text]] = {
    "pydoc": corpora.read_pydoc,
    "pycode": corpora.read_pycode,
    "ptb": corpora.read_ptb,
    "c4": corpora.read_c4,
    "c4-sample": corpora.read_c4_sample,
}
_WITH_ARGUMENT: dict[str, Callable[[str, Split], Text]] = {
    "file": read_file, "wikitext2": corpora.read_wikitext2, "hub": corpora.read_hub
}  # fmt: skip
_SUFFIXES = ", ".join(READERS)
_HINT = (
    "give a source such as 'pydoc', the path of a file, token ids of windows of one length [[id, id, ...], ...], or a "
    "data set with a column 'text', 'messages' or 'input_ids', such as [{'text': ...}, ...]"
)


def shares_of(source: str) -> dict[str, float]:
    """The share of the windows that each source of a mixture gets, after division by their sum; 1 for a source alone.
    Raises DataError for a share of 0, and a source that occurs twice."""
    parts = mixture_of(source)
    total = sum(float(share) for _, share in parts)
    shares: dict[str, float] = {}
    for name, share in parts:
        why = ""
        if name in shares:
            why = "occurs twice; add its shares"
        elif not float(share):
            why = f"has share {share}; leave it out"
        if why:
            raise DataError(
                f"source {shown(name)} in text mixture {shown(source)} {why}"
            )
        shares[name] = float(share) / total
    return shares or {source: 1.0}


def check_sources(source: str, split: Split) -> list[tuple[str, str]]:
    """``check_source`` for each source of a mixture, or for a source alone. Raises DataError also if the shares are
    wrong (``shares_of``), or for a mixture to evaluate on."""
    shares = shares_of(source)
    if len(shares) > 1 and split == "evaluation":
        raise DataError(
            f"{shown(source)} mixes texts for calibration; to evaluate, name one of them after the other"
        )
    sources = [check_source(part, split) for part in shares]
    texts = {
        (name, os.path.realpath(os.path.expanduser(file))) for name, file in sources
    }
    if len(texts) < len(sources):
        raise DataError(
            f"text mixture {shown(source)} names one text twice; add its shares"
        )
    if len(set(map(without_folders, shares))) < len(shares):
        raise DataError(
            f"text mixture {shown(source)} has files of one name, which reports cannot tell apart; rename one"
        )
    return sources


def check_source(source: str, split: Split) -> tuple[str, str]:
    """The name and the argument of a source. Nothing is read, so that a mistake is reported before any work. Raises
    DataError if it is neither the name of a source nor a path of a known kind; the file does not exist; the source
    takes no argument; or it is ``self``, for evaluation."""
    name, colon, argument = source.partition(":")
    if not source.strip():
        raise DataError(
            f"the text source is empty; name a file ({_SUFFIXES}), or 'pydoc'"
        )
    if name in (*_PLAIN, SELF):
        if colon:
            if "," in source:
                _refuse_mixture(source)
            raise DataError(
                f"source {shown(source)}: {name} takes nothing after its name; write {name!r}"
            )
        if name == SELF and split == "evaluation":
            raise DataError(
                "source 'self' is text for calibration only; to evaluate, name a file or 'wikitext2'"
            )
    elif name not in _WITH_ARGUMENT:
        _refuse_mixture(source)
        is_path = Path(source).suffix.lower() in READERS or any(
            part in source for part in "/\\~"
        )
        if not is_path:
            _refuse_kind(source)
            known = [*_PLAIN, *_WITH_ARGUMENT, SELF]
            known.remove("file")
            raise DataError(
                f"unknown text source {shown(source)}; {nearest(name[:100], known)} (a path ends in {_SUFFIXES})"
            )
        name = "file"
        argument = source
    if name == "file" or (name == "wikitext2" and argument):
        file = text_file(argument)
        if name == "file" and file.suffix.lower() not in READERS:
            raise DataError(
                f"{shown(argument)} is not a kind of file that can be read; give {_SUFFIXES}"
            )
    return name, argument


def _refuse_mixture(source: str) -> None:
    """Raises DataError for what was meant as a mixture: sources with commas, one of them without a share above 0."""
    if os.path.isfile(os.path.expanduser(source)):
        return
    single, _, share = source.rpartition(":")
    if "," not in source:
        if re.fullmatch(r"[\d.]+", share) and single:
            raise DataError(
                f"{shown(source)} gives a share to its only text; write {single}"
            )
        return
    parts = [part.strip() for part in source.split(",")]
    names = [part.rpartition(":")[0] or part for part in parts]
    such = ",".join(f"{name}:{1 / len(names):.2g}" for name in names)
    for part in parts:
        name, _, share = part.rpartition(":")
        if not name or not share or share in (*_PLAIN, SELF):
            raise DataError(
                f"{shown(part)} in {shown(source)} has no share of the windows; write {such}"
            )
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise DataError(
                f"share {shown(share)} of {shown(name)} in {shown(source)} is not a number above 0; write {such}"
            )


def _refuse_kind(source: str) -> None:
    """Refuses a path that exists and is not a text file. Raises DataError."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        raise DataError(
            f"text source {shown(source)} is a directory; name a file in it ({_SUFFIXES})"
        )
    if os.path.isfile(path):
        raise DataError(
            f"text source {shown(source)} is not a kind of file that can be read; give {_SUFFIXES}"
        )


def read_source(source: str, split: Split) -> Text:
    """The text that a source string names. Raises DataError as ``check_source``, or if the text cannot be read."""
    name, argument = check_source(source, split)
    if name in _PLAIN:
        text = _PLAIN[name](split)
    else:
        text = _WITH_ARGUMENT[name](argument, split)
    return replace(text, called=f"source {shown(source)}")


def as_text(value: Any, name: str, split: Split) -> str | Tensor | Text:
    """The text argument ``name`` as a source's name, token ids ``(windows, tokens)`` in int64 on the CPU, or documents.

    The value is a source, a path, a tensor or array of ids, a sequence of id sequences of one length, or a data set: a
    sequence of mappings with ``text`` or ``input_ids``, such as ``datasets.Dataset``. Raises DataError if it is none of
    these, the source or file does not exist, or the ids are not integers in rows of one length of 2 or more."""
    if isinstance(value, Text):
        return value
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
        if Path(value).suffix.lower() not in READERS:
            value = f"file:{value}"  # a path, although it may look like a name
    if isinstance(value, str):
        check_sources(value, split)
        return value
    # A tokenizer returns such a mapping.
    if isinstance(value, Mapping) and "input_ids" in value:
        ids = _ids(value["input_ids"], name)
        _refuse_padding([value], name)
        return ids
    if isinstance(value, Tensor | numpy.ndarray):
        return _ids(value, name)
    if (
        isinstance(value, Mapping | bytes | bytearray)
        or not hasattr(value, "__len__")
        or not len(value)
    ):
        raise DataError(f"{name} is {shown(value)}; {_HINT}")
    rows = list(value)
    if not isinstance(rows[0], Mapping):
        return _ids(rows, name)
    if "input_ids" not in rows[0]:
        return Text(
            documents_of(
                (f"{name}, row {number}", row) for number, row in enumerate(rows)
            )
        )
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        raise DataError(
            f"not every row of {name} has 'input_ids', as the first has; {_HINT}"
        )
    _refuse_padding(rows, name)
    return _ids([row["input_ids"] for row in rows], name)


def _refuse_padding(rows: Iterable[Mapping[str, Any]], name: str) -> None:
    masks = (
        row["attention_mask"] for row in rows if row.get("attention_mask") is not None
    )
    if not all(torch.as_tensor(mask).all() for mask in masks):
        raise DataError(
            f"{name} has padding (attention_mask is 0 there); give windows of one length without padding"
        )


def default_source(*, demo: bool) -> tuple[str, list[str]]:
    """The source to calibrate on where the user named none, fetched if it comes from the hub; and a warning if it is
    one that suits no model well, because the hub cannot be reached."""
    if demo:
        return "pydoc", []
    try:
        corpora.fetch_c4_sample()
    except DataError as error:
        return "pydoc", [
            f"calibrated on Python's documentation (pydoc), since no text was named and {error}; --calibration with a "
            "text of the kind that the model reads loses less"
        ]
    return "c4-sample", []


def settle_calibration(
    recipe: Recipe, calibration: str | Tensor | Text | None
) -> Recipe:
    """The recipe with the name of ``calibration``, which ``as_text`` checked; if None, its own, checked here."""
    if calibration is None:
        if recipe.calibration is not None:
            check_sources(recipe.calibration, "calibration")
        return recipe
    if isinstance(calibration, Tensor):
        calibration = IDS
    elif isinstance(calibration, Text):
        calibration = DOCUMENTS
    return recipe.updated(calibration=calibration)


def _ids(value: Any, name: str) -> Tensor:
    """Token ids ``(windows, tokens)`` from an array, or from rows of one length."""
    try:
        if isinstance(value, numpy.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            ids = value
        else:
            ids = torch.stack([torch.as_tensor(row, device="cpu") for row in value])
    # Rows have other lengths, or are not numbers.
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"{name} is {shown(value)}, not windows of ids ({one_line(error)}); {_HINT}"
        ) from None
    if ids.is_meta or ids.layout != torch.strided:
        raise DataError(
            f"{name}: token ids must be an ordinary tensor, not on {ids.device} as {ids.layout}"
        )
    if (
        ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
        or ids.dim() != 2
        or ids.shape[1] < 2
    ):
        raise DataError(
            f"{name}: token ids must be integers of shape (windows, 2 or more); got "
            f"{str(ids.dtype).removeprefix('torch.')} {tuple(ids.shape)}"
        )
    if not len(ids):
        raise DataError(f"{name} is empty; {_HINT}")
    return ids.detach().to("cpu", torch.int64)
