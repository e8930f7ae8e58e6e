"""Checks of arguments and of JSON by types and limits, with pydantic; mistakes become errors of one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from sparsepack.errors import SettingError, shown

P = ParamSpec("P")
R = TypeVar("R")


def first_mistake(error: ValidationError, names: Sequence[str] = ()) -> str:
    """The first mistake in pydantic's list: its place, the value, and the value that is expected.

    Args:
        error: that of a model, or of the arguments of a function.
        names: those of the arguments, for one that was given by position.
    """
    mistake = error.errors(include_url=False, include_context=False)[0]
    first, *rest = mistake["loc"] or ("",)
    place = ".".join(map(str, (names[first] if names and isinstance(first, int) else first, *rest)))
    return f"{place + ' is ' if place else ''}{shown(mistake['input'])} ({mistake['msg']})"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that checks its arguments by their annotations before it runs.

    Raises:
        SettingError: from the function, with the first argument that does not fit.
    """
    names = list(signature(function).parameters)
    validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True, strict=True))(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return validated(*args, **kwargs)
        except ValidationError as error:
            raise SettingError(first_mistake(error, names)) from None

    return call
