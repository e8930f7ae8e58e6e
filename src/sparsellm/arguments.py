"""Types of arguments of the public functions, which pydantic checks and converts before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeAlias, TypeVar, get_type_hints

import torch
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SkipValidation,
    TypeAdapter,
    ValidationError,
)
from transformers import PreTrainedModel

from sparsellm.errors import RecipeError, refusal
from sparsellm.recipe import MOST_TOKENS, Dtype, Integer, Recipe
from sparsellm.text.sources import TextGiven

P = ParamSpec("P")
R = TypeVar("R")
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

MOST_NAME = 255  # bytes of one name, on Linux and macOS
MOST_PATH = 4096  # bytes of a path
ROOM_IN_NAME = 24  # for suffixes of an output that is being written, such as '.partial'


def _path(value: Any, *, most_name: int = MOST_NAME, hint: str = "give a path") -> Path:
    """A path that the system accepts: not empty, without null bytes, and not too long."""
    text = None
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
    if not isinstance(text, str):
        raise ValueError(hint)
    if not text.strip():
        raise ValueError("it is empty; give a path, '.' for the current directory")
    if "\0" in text:
        raise ValueError("a path holds no null byte")
    sizes = [len(os.fsencode(part)) for part in Path(text).parts]
    if (
        len(os.fsencode(text)) >= MOST_PATH
        or max(sizes, default=0) > MOST_NAME
        or (sizes and sizes[-1] > most_name)
    ):
        raise ValueError(
            f"a name of {max(sizes)} bytes in a path of {len(os.fsencode(text))}; give a shorter one"
        )
    return Path(text)


def _checkpoint(value: Any, hint: str = "") -> str | Path:
    """A name of a model; a string stays a string, because it may be a hub id."""
    path = _path(
        value,
        hint="give a checkpoint directory, a hub id, a .gguf file, or 'demo'" + hint,
    )
    try:
        path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such user; write the path in full") from None
    return value if isinstance(value, str) else path


def _model(value: Any) -> Any:
    if isinstance(value, PreTrainedModel):
        return value
    return _checkpoint(value, "; or a transformers model")


def _name_of(value: Any) -> Any:
    """The name of a torch dtype or device, such as ``torch.float32`` or ``torch.device('cuda')``."""
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return value


PathGiven = Annotated[str | os.PathLike[str], PlainValidator(_path)]
Out = Annotated[
    str | os.PathLike[str],
    PlainValidator(partial(_path, most_name=MOST_NAME - ROOM_IN_NAME)),
]
Checkpoint = Annotated[str | os.PathLike[str], PlainValidator(_checkpoint)]
Model: TypeAlias = Annotated[
    str | os.PathLike[str] | PreTrainedModel, PlainValidator(_model)
]
# ``as_text`` and ``Recipe.of`` check and convert these
AnyText: TypeAlias = Annotated[TextGiven, SkipValidation]
RecipeGiven: TypeAlias = Annotated[
    Recipe | Mapping[str, Any] | str | os.PathLike[str] | None, SkipValidation
]
SeqLen = Annotated[Integer, Field(ge=2, le=MOST_TOKENS)]
Count = Annotated[Integer, Field(ge=1, le=1 << 62)]
DeviceName = Annotated[
    str, Field(min_length=1, max_length=200), BeforeValidator(_name_of)
]
DtypeName = Annotated[Dtype, BeforeValidator(_name_of)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that checks and converts its arguments by their annotations before it runs.

    Raises:
        RecipeError: from the function, with the argument, its value and what to give.
        TypeError: from the function, as in Python, if an argument is missing or unknown.
    """
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
                raise RecipeError(refusal(error, name)) from None
        return function(*given.args, **given.kwargs)

    return call
