"""Errors a user can meet. Each names the thing, the value it had, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseLLMError(Exception):
    """Base of every error this library raises on purpose; the command line prints it as one line, exit code 2.

    The message is one printable line whatever names and paths stand in it: line ends, control characters and halves of
    surrogate pairs are written as escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message)))


class RecipeError(SparseLLMError):
    """A setting is unknown, of the wrong type, or outside its range."""


class ModelError(SparseLLMError):
    """A model cannot be found, read, or seen as a chain of blocks."""


class DataError(SparseLLMError):
    """A text source cannot be found, or is too short for what was asked of it."""


class StorageError(SparseLLMError):
    """A checkpoint cannot be read or written."""


class MemoryBudgetError(SparseLLMError):
    """A run needs more memory than it may take."""


class NumericalError(SparseLLMError):
    """A statistic or a weight is not finite, or a factorisation failed at every damping tried."""


class KernelError(SparseLLMError):
    """A kernel that was asked for cannot run here, or cannot take what it was given."""


class ProcessError(SparseLLMError):
    """Another process of the same run has died, or cannot be reached."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'wanda'?``, or the list of known names when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line that is not long."""
    said = " ".join(str(error).split())  # some put the reason into the second line
    named = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in named[:300])


def shown(value: object, most: int = 80) -> str:
    """A value as an error message writes it: in one line, cut at ``most`` characters, and never an error of its own."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # no need to write a megabyte that is cut off
    try:
        text = repr(value)
    except Exception:  # the repr of anybody's class, or of a list with a number that is too long
        return f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
