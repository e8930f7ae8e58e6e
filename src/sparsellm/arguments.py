"""Checks the arguments of the public functions by types and limits, in one place, before any work.

An argument has the same meaning in every function, so there is one check for each name. A check may convert: a path
becomes a :class:`~pathlib.Path`, a mapping a :class:`~sparsellm.recipe.Recipe`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import torch
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from sparsellm.calibration.given import as_text
from sparsellm.errors import DataError, ModelError, RecipeError, SparseLLMError, StorageError, shown
from sparsellm.progress import ignore
from sparsellm.recipe import MOST_SEED, MOST_TOKENS, Bos, Recipe, Whole

P = ParamSpec("P")
R = TypeVar("R")

MOST_NAME, MOST_PATH = 255, 4096  # in bytes: limits of one name, and of a path, on Linux and macOS
MOST_THREADS = 1024
_ROOM_IN_NAME = 24  # for suffixes of an output that is being written, such as '.partial'


@dataclass(frozen=True)
class Check:
    """The check of one argument.

    Attributes:
        convert: returns the checked value; raises a :class:`SparseLLMError` or pydantic's ``ValidationError``.
        wanted: what to give instead; follows the value in the error message.
    """

    convert: Callable[[Any], Any]
    wanted: str = ""

    def __call__(self, name: str, value: Any) -> Any:
        try:
            return self.convert(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
            reason = self.wanted or first["msg"][0].lower() + first["msg"][1:]
            raise RecipeError(f"{name}{place} is {shown(first['input'])}: {reason}") from None


def checked_arguments(**special: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that checks each argument of a public function by its name before the function runs.

    Args:
        special: checks that replace those in :data:`CHECKS` for this function.

    Raises:
        SparseLLMError: from the decorated function, with the argument, its value and what to give.
        TypeError: from the decorated function, as in Python, if an argument is missing or unknown.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        checks = {**CHECKS, **special}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name, value in given.arguments.items():
                if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:  # passed on to another function
                    given.arguments[name] = {
                        key: entry if entry is None else _checked(CHECKS, key, entry) for key, entry in value.items()
                    }
                elif not (value is None and signature.parameters[name].default is None):
                    given.arguments[name] = _checked(checks, name, value)
            return function(*given.args, **given.kwargs)

        return call

    return decorate


def _checked(checks: Mapping[str, Check], name: str, value: Any) -> Any:
    return checks[name](name, value) if name in checks else value


def check_arguments(**values: Any) -> None:
    """Checks values that will become arguments later, by name, before earlier work starts.

    Raises:
        SparseLLMError: with the argument, its value and what to give.
    """
    for name, value in values.items():
        _checked(CHECKS, name, value)


def as_recipe(value: Any) -> Recipe:
    """A recipe from a recipe, a mapping of its fields, the path of a YAML file, or None for the defaults.

    Raises:
        RecipeError: it is none of these, the file cannot be read, or a field does not fit.
    """
    if value is None:
        return Recipe()
    if isinstance(value, Recipe):
        return value
    if isinstance(value, Mapping):
        return Recipe.of(value)
    if isinstance(value, str | os.PathLike):
        return Recipe.from_yaml(as_path(value, "recipe", RecipeError))
    raise RecipeError(f"recipe is {shown(value)}; give a Recipe, a mapping of its fields, or the path of a YAML file")


def as_path(value: Any, name: str, error: type[SparseLLMError] = StorageError, most_name: int = MOST_NAME) -> Path:
    """A path that the system accepts: not empty, without null bytes, and not too long.

    Args:
        value: a string or a path.
        name: the name of the argument, for the error message.
        error: the kind of error to raise.
        most_name: bytes of the last name.

    Raises:
        SparseLLMError: of the kind ``error``.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise error(f"{name} is {shown(value)}; give a path")
    text = os.fspath(value)
    if not text.strip():
        raise error(f"{name} is empty; give a path, '.' for the current directory")
    if "\0" in text:
        raise error(f"{name} is {shown(text)}; a path holds no null byte")
    path = Path(text)
    encoded = [os.fsencode(part) for part in path.parts]
    if any(len(part) > MOST_NAME for part in encoded) or (encoded and len(encoded[-1]) > most_name):
        raise error(f"{name} is {shown(text)}, a name of {max(map(len, encoded))} bytes; give a shorter one")
    if len(os.fsencode(text)) >= MOST_PATH:
        raise error(f"{name} is {shown(text)}, a path of {len(os.fsencode(text))} bytes; give a shorter one")
    return path


def _checkpoint(value: Any, name: str = "model") -> str | Path:
    """A model by name; a string stays a string, because it may be a hub id."""
    if not isinstance(value, str | os.PathLike):
        raise ModelError(f"{name} is {shown(value)}; give a checkpoint directory, a hub id, a .gguf file, or 'demo'")
    path = as_path(value, name, ModelError)
    try:
        path.expanduser()
    except RuntimeError:
        raise ModelError(f"{name} is {shown(str(path))}: there is no such user; write the whole path") from None
    return value if isinstance(value, str) else path


def _loaded(value: Any) -> Any:
    from transformers import PreTrainedModel

    if not isinstance(value, PreTrainedModel):
        raise ModelError(f"model is a {type(value).__name__}; give a transformers model")
    return value


def _dense(value: Any) -> Any:
    """A model, or an opened one to evaluate several others against."""
    return value if hasattr(value, "outputs") else _model(value)


def _model(value: Any) -> Any:
    """A model by name, or a transformers model."""
    from transformers import PreTrainedModel

    if isinstance(value, PreTrainedModel):
        return value
    if not isinstance(value, str | os.PathLike):
        raise ModelError(f"model is a {type(value).__name__}; give a transformers model, or the name of a checkpoint")
    return _checkpoint(value)


def _tokenizer(value: Any) -> Any:
    from transformers import PreTrainedTokenizerBase

    if not isinstance(value, PreTrainedTokenizerBase):
        raise DataError(f"tokenizer is a {type(value).__name__}; give a transformers tokenizer")
    return value


def _prompt(value: Any) -> Any:
    if not isinstance(value, str):
        raise RecipeError(f"prompt is {shown(value)}; give a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"prompt is {shown(value)}; it holds bytes that are not UTF-8") from None
    return value


def _progress(value: Any) -> Any:
    if value is None:
        return ignore
    if not callable(value):
        raise RecipeError(f"progress is {shown(value)}; give a function that takes a sparsellm Progress")
    return value


def _name_of(value: Any) -> Any:
    """The name of a torch dtype or device, such as ``torch.float32`` or ``torch.device('cuda')``."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype | torch.device) else value


def _typed(kind: Any, wanted: str = "") -> Check:
    return Check(TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python, wanted)


def _count(least: int, most: int, wanted: str = "") -> Check:
    return _typed(Annotated[Whole, Field(ge=least, le=most)], wanted or f"give a whole number from {least} to {most}")


def _counts(least: int, most: int) -> Check:
    kind = Annotated[list[Annotated[Whole, Field(ge=least, le=most)]], Field(min_length=1, strict=False)]
    return _typed(kind, f"give whole numbers from {least} to {most}")


CHECKPOINT = Check(_checkpoint)
"""The check of an argument ``model`` that must be a name, because the files are needed."""

LOADED = Check(_loaded)
"""The check of an argument ``model`` that must be a model in memory."""

COUNT_OF_THREADS = _count(1, MOST_THREADS)

_FLAG = _typed(bool, "give True or False")
_DTYPES = Literal["auto", "float32", "bfloat16", "float16"]

CHECKS: dict[str, Check] = {
    "model": Check(_model),
    "teacher": Check(partial(_checkpoint, name="teacher")),
    "directory": Check(partial(_checkpoint, name="directory")),
    "packed": Check(partial(_checkpoint, name="packed")),
    "dense": Check(partial(_checkpoint, name="dense")),
    "recipe": Check(as_recipe),
    "out": Check(lambda value: as_path(value, "out", most_name=MOST_NAME - _ROOM_IN_NAME)),
    "calibration": Check(lambda value: as_text(value, "calibration", "calibration")),
    "text": Check(lambda value: as_text(value, "text", "evaluation")),
    "tokenizer": Check(_tokenizer),
    "repo": _typed(Annotated[str, Field(max_length=200)], "give owner/name"),
    "revision": _typed(Annotated[str, Field(min_length=1, max_length=200)], "give the name of a branch"),
    "private": _FLAG,
    "force": _FLAG,
    "overwrite": _FLAG,
    "restart": _FLAG,
    "trust_remote_code": _FLAG,
    "progress": Check(_progress),
    "seq_len": _count(2, MOST_TOKENS, f"give a whole number from 2 to {MOST_TOKENS}, or leave it out for the default"),
    "max_tokens": _count(2, 1 << 62),
    "bos": _typed(Bos, "give auto, yes or no"),
    "against": Check(_dense),
    "tasks": _typed(
        Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(min_length=1, strict=False)],
        "give a list of names of lm-eval tasks",
    ),
    "tasks_dir": Check(lambda value: as_path(value, "tasks_dir", RecipeError)),
    "device": _typed(
        Annotated[str, Field(min_length=1, max_length=200), BeforeValidator(_name_of)],
        "give a name such as 'cpu', 'cuda' or 'auto'",
    ),
    "dtype": _typed(Annotated[_DTYPES, BeforeValidator(_name_of)], "give auto, float32, bfloat16 or float16"),
    "values": _typed(str, "give keep, bf16, fp16, fp32, int8, int4 or int3"),
    "prompt": Check(_prompt),
    "max_new_tokens": _count(1, MOST_TOKENS),
    "temperature": _typed(Annotated[float, Field(ge=0, le=1e6)], "give 0 (greedy) or a number above, up to 1e6"),
    "seed": _count(0, MOST_SEED),
    "batches": _counts(1, 1 << 20),
    "threads": _counts(1, MOST_THREADS),
    "prompt_tokens": _count(1, MOST_TOKENS),
    "new_tokens": _count(1, MOST_TOKENS),
    "repeats": _count(1, 1_000_000),
}
"""The checks of all arguments of public functions, by name."""
