"""The errors for users. Each message names the thing, its value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sparsepack.errors import UserError
from sparsepack.errors import shown as shown

if TYPE_CHECKING:
    from pydantic import ValidationError


class SparseLLMError(UserError):
    """Base of every error that this library raises on purpose; the command line prints it and exits with code 2."""


class RecipeError(SparseLLMError):
    """A setting is unknown, of the wrong type, or outside its range."""


class ModelError(SparseLLMError):
    """A model does not exist, cannot be read, or is not a chain of blocks."""


class DataError(SparseLLMError):
    """A text source does not exist, cannot be read, or is too short."""


class StorageError(SparseLLMError):
    """A checkpoint cannot be read or written."""


class MemoryBudgetError(SparseLLMError):
    """A run needs more memory than it may take."""


class NumericalError(SparseLLMError):
    """A statistic or a weight is not finite, or a factorisation failed at every damping tried."""


class MissingExtraError(SparseLLMError):
    """An optional package is not installed; the message names the extra to install."""


class ProcessError(SparseLLMError):
    """Another process of the same run has died, or cannot be reached."""


def refusal(error: ValidationError, name: str = "") -> str:
    """One line on the first value that pydantic refuses: in the argument ``name``, or at its place in a model."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = name + "".join(
        f"[{part}]" for part in first["loc"] if isinstance(part, int)
    )
    place = place if name else shown(".".join(map(str, first["loc"])))[1:-1]
    reason = first["msg"].removeprefix("Value error, ")
    for kind in ("Input", "String", "List"):
        reason = reason.replace(f"{kind} should", "it should")
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {shown(first['input'])}: {reason}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'wanda'?``, or the list of known names if none is similar."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """The first ``most`` names, and the number of the others, as text."""
    more = (
        f"{between.rstrip(', ')} and {len(names) - most} more"
        if len(names) > most
        else ""
    )
    return between.join(names[:most]) + more


def one_line(error: BaseException) -> str:
    """The message of another library's error, in one short line."""
    said = " ".join(str(error).split())  # some have the reason in the second line
    named = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return "".join(
        character if character.isprintable() else "?" for character in named[:300]
    )
