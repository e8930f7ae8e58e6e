"""Registries of functions that a user chooses by name; each function's options are read from its signature."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from sparsellm.errors import RecipeError, nearest, refusal, shown

F = TypeVar("F", bound=Callable[..., Any])
# the options of a function by name: JSON values, since a recipe sets them
Options: TypeAlias = dict[str, Any]
# JSON has no NaN or infinity
_OPTIONS = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True)
class Needs:
    """The needs of a method or an allocation with given options."""

    output_costs: bool = False  # costs of outputs, from a backward sweep; not for N:M, where outputs do not compete
    gradient_tokens: int = 0  # the first calibration tokens, for which it needs gradients; four windows or more
    token_states: bool = False  # hidden states (windows, seq, width), to select windows or tokens by position
    one_process: str = ""  # an option in use that works in one process only


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function; ``needs`` takes all options, and raises RecipeError if they contradict each other.

    ``distributed`` says, for a method, that every process may run it on its share of the windows."""

    name: str
    function: F
    paper: str
    options: type[BaseModel]  # a model of its keyword-only parameters
    summary: str
    narrow: bool = False  # whether factors of a solver's products may be rounded to bf16 where blocks multiply in it
    needs: Callable[[Options], Needs] = lambda options: Needs()
    distributed: bool = False
    # a method's default, unless a pattern fixes the sparsity
    allocation: str = "uniform"
    # a method's default effort of the sweep that follows; None if none may follow
    effort: int | None = None

    def check(self, values: Options) -> Options:
        """All options with their values, coerced to the declared types, as JSON values in the order of the signature.
        One that is unknown, missing, of the wrong type or out of range is a RecipeError."""
        try:
            return self.options.model_validate(values).model_dump()
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            option = str(first["loc"][0])
            known = self.options.model_fields
            if option in known:
                raise RecipeError(
                    refusal(error, f"option {option} of {self.name}")
                ) from None
            hint = "it has no options at all; leave it out"
            if known:
                hint = nearest(option, known)
            raise RecipeError(f"{self.name} has no option {option!r}; {hint}") from None

    def to_dict(self) -> Options:
        """Summary, paper and options as plain JSON values."""
        options: dict[str, Options] = {}
        for name, info in self.options.model_fields.items():
            kind = info.annotation
            type_name = str(kind).replace("typing.", "")
            if isinstance(kind, type):
                type_name = kind.__name__
            default = None if info.is_required() else info.get_default()
            options[name] = {
                "type": type_name,
                "default": default,
                "description": info.description,
            }
        return {"summary": self.summary, "paper": self.paper, "options": options}


class Registry(dict[str, Entry[F]]):
    """Entries by name. A package's ``__init__`` imports its modules, which register their functions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        # called with every entry that is added
        self.listeners: list[Callable[[Entry[F]], None]] = []

    def register(self, name: str, *, paper: str, **declared: Any) -> Callable[[F], F]:
        """A decorator that registers a function; ``declared`` are further attributes of its ``Entry``.

        Options are the keyword-only parameters, ``Annotated[type, Field(ge=0), "description"]``. pydantic checks values
        against the type, and users see the description. A default that is not a JSON value is a TypeError."""

        def add(function: F) -> F:
            hints = typing.get_type_hints(function, include_extras=True)
            spec = inspect.getfullargspec(inspect.unwrap(function))
            defaults = spec.kwonlydefaults or {}
            # raises TypeError: options go into reports and identities
            json.dumps(defaults)
            fields: dict[str, Any] = {
                name: (hints[name], defaults.get(name, ...)) for name in spec.kwonlyargs
            }
            summary = (
                (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
            )
            options = create_model(name, __config__=_OPTIONS, **fields)
            for field in options.model_fields.values():
                field.description = next(
                    (part for part in field.metadata if isinstance(part, str)), ""
                )
            self.add(Entry(name, function, paper, options, summary, **declared))
            return function

        return add

    def add(self, entry: Entry[F]) -> None:
        if entry.name in self:
            raise ValueError(
                f"{self.kind} {entry.name!r} is registered twice; give it another name"
            )
        self[entry.name] = entry
        for listener in self.listeners:
            listener(entry)

    def __missing__(self, name: str) -> Entry[F]:
        raise RecipeError(f"unknown {self.kind} {shown(name)}; {nearest(name, self)}")
