"""Checks of the arguments of public functions by their annotations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sparsepack.errors import SettingError, UserError, refusal

# names of torch's dtypes, by short ones
SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}

P = ParamSpec("P")
R = TypeVar("R")
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def checking(kind: type[UserError]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for functions that check and convert their arguments before they run.

    Raises:
        UserError: as ``kind``, from the function, with the argument, its value and what to give.
        TypeError: from the function, as in Python, if an argument is missing or unknown.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = signature(function)

        @cache  # at the first call: annotations may name what is defined later
        def adapters() -> dict[str, TypeAdapter[Any]]:
            hints = get_type_hints(function, include_extras=True)
            return {
                name: TypeAdapter(hints[name], config=_STRICT)
                for name in parameters.parameters
                if name in hints
            }

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = parameters.bind(*args, **kwargs)
            for name, adapter in adapters().items():
                try:
                    if name in given.arguments:
                        given.arguments[name] = adapter.validate_python(
                            given.arguments[name]
                        )
                except ValidationError as error:
                    raise kind(refusal(error, name)) from None
            return function(*given.args, **given.kwargs)

        return call

    return decorate


checked = checking(SettingError)
