"""The errors for users. Each message names the thing, its value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SparseLLMError(Exception):
    """Base of every error that this library raises on purpose; the command line prints it and exits with code 2.

    The message is one printable line: line breaks, control characters and halves of surrogate pairs become escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message)))


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


class KernelError(SparseLLMError):
    """A requested kernel cannot run on this machine, or does not support its arguments."""


class MissingExtraError(SparseLLMError):
    """An optional package is not installed; the message names the extra to install."""


class ProcessError(SparseLLMError):
    """Another process of the same run has died, or cannot be reached."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'wanda'?``, or the list of known names if none is similar."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """The message of another library's error, in one short line."""
    said = " ".join(str(error).split())  # some have the reason in the second line
    named = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in named[:300])


def refusal(name: str, error: ValidationError) -> str:
    """One line on the first value that pydantic refuses in the argument or field ``name``."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    reason = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{name}{place} is {shown(first['input'])}: {reason}"


def shown(value: object, most: int = 160) -> str:
    """A value as text for an error message: one line of at most ``most`` characters, cut in the middle, since the end
    of a path says most. It never raises."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes) and len(value) > 2 * most:  # so that a megabyte of text is not formatted
        value = value[:most] + value[-most:]  # type: ignore[operator]  # both are of one type
    try:
        text = " ".join(repr(value).split())
    except Exception:  # from the repr of a user's class, or of a list with a number that is too long
        return f"a {type(value).__name__}"
    head = most // 2
    return text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}"
