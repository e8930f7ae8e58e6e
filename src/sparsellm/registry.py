"""Registries of functions that a user chooses by name; each function's options are read from its signature."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sparsellm.errors import RecipeError, nearest, refusal

F = TypeVar("F", bound=Callable[..., Any])
Options: TypeAlias = dict[str, Any]  # the options of a function by name: JSON values, since a recipe sets them

FINITE = ConfigDict(allow_inf_nan=False)  # for numbers in options: JSON has no NaN or infinity


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a registered function."""

    name: str
    type: Any
    default: Any
    description: str

    @property
    def type_name(self) -> str:
        """The type as users read it, such as ``int`` or ``float | None``."""
        bare = typing.get_args(self.type)[0] if hasattr(self.type, "__metadata__") else self.type
        if typing.get_origin(bare) in (typing.Literal, typing.Union, types.UnionType):
            return str(bare).replace("typing.", "")
        return getattr(bare, "__name__", str(bare))

    def checked(self, owner: str, values: Options) -> Any:
        """The value of this option among ``values``, coerced to its type, or its default.

        Raises:
            RecipeError: the value is of the wrong type or out of range, or is missing and there is no default.
        """
        if self.name not in values:
            if self.default is inspect.Parameter.empty:
                raise RecipeError(f"{owner} needs option {self.name}: {self.description or self.type_name}")
            return self.default
        try:
            return TypeAdapter(self.type, config=FINITE).validate_python(values[self.name])
        except ValidationError as error:
            raise RecipeError(refusal(f"option {self.name} of {owner}", error)) from None


@dataclass(frozen=True)
class Workspace:
    """The most memory that a registered function holds at a time, next to the block it works on, and its main work.

    Attributes:
        weights: fp32 copies of the weight that is pruned.
        grams: matrices as large as the Gram matrix of its inputs, including that matrix.
        remembered: factorisations that it caches for other linears with the same inputs; they are bounded, see
            :meth:`sparsellm.statistics.Gram.remember`.
        blocks: fp32 copies of the block, such as gradients and moments of an optimiser.
        streams: copies of the hidden states of all calibration tokens, such as targets.
        products: number of products of the weight with a matrix as large as the Gram matrix, to predict the time.
        narrow: whether factors of its products may be rounded to bf16 where the running blocks multiply in it.
        writers: output projections of a block whose inputs, for all tokens, are kept as far as memory goes.
    """

    weights: float = 8.0
    grams: float = 4.0
    remembered: int = 0
    blocks: float = 0.0
    streams: int = 0
    products: float = 1.0
    narrow: bool = False
    writers: int = 0

    def then(self, other: Workspace) -> Workspace:
        """The larger memory, and the work of both, for two functions that run one after the other."""
        larger = Workspace(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))
        return replace(larger, products=self.products + other.products)


@dataclass(frozen=True)
class Needs:
    """The needs of a method or an allocation with given options.

    Attributes:
        output_costs: whether it needs the cost of an error of each output to the dense model's loss, from a backward
            sweep. Not needed for N:M, where outputs do not compete.
        surveyed_tokens: calibration tokens that an allocation reads, in complete windows; None for all.
        gradient_tokens: the number of these, from the first, for which it needs gradients; four windows or more.
        token_states: whether it needs hidden states ``(windows, seq, width)``, to select windows or tokens by position.
        one_process: name of an option in use that works in one process only; "" for none.
        workspace: memory and work of functions that the options choose, such as a solver.
    """

    output_costs: bool = False
    surveyed_tokens: int | None = None
    gradient_tokens: int = 0
    token_states: bool = False
    one_process: str = ""
    workspace: Workspace = Workspace(weights=0, grams=0)


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function.

    Attributes:
        name: as users type it.
        function: the function.
        paper: where it is published.
        summary: first paragraph of its docstring.
        options: its keyword-only parameters, by name.
        workspace: its memory and work.
        needs: returns its needs for all options, as :meth:`check` returns them.
        validate: raises RecipeError if options contradict each other.
        distributed: whether it works in several processes. A solver does if rows may be solved apart, because it
            compares them through its pattern only; a method if every process may run it on its share of the windows.
        allocation: a method's default allocation, unless a pattern fixes the sparsity.
        effort: a method's default effort of the sweep that follows; None if none may follow.
    """

    name: str
    function: F
    paper: str
    summary: str
    options: dict[str, Option]
    workspace: Workspace = Workspace()
    needs: Callable[[Options], Needs] | None = None
    validate: Callable[[Options], None] | None = None
    distributed: bool = False
    allocation: str = "uniform"
    effort: int | None = None

    def needs_of(self, options: Options) -> Needs:
        """The needs of a run with these options, as :meth:`check` returns them."""
        return self.needs(options) if self.needs is not None else Needs()

    def check(self, values: Options) -> Options:
        """All options with their values, coerced to the declared types, as JSON values in the order of the signature.

        Raises:
            RecipeError: an option is unknown (the message has the nearest known name), missing, of the wrong type or
                out of range, or the options contradict each other.
        """
        for key in values:
            if key not in self.options:
                hint = nearest(key, self.options) if self.options else "it has no options at all; leave it out"
                raise RecipeError(f"{self.name} has no option {key!r}; {hint}")
        checked = {name: option.checked(self.name, values) for name, option in self.options.items()}
        if self.validate is not None:
            self.validate(checked)
        return checked

    def to_dict(self) -> dict[str, Any]:
        """Summary, paper and options as plain JSON values."""
        options = {
            option.name: {"type": option.type_name, "default": option.default, "description": option.description}
            for option in self.options.values()
        }
        return {"summary": self.summary, "paper": self.paper, "options": options}


class Registry(Generic[F]):
    """Maps names to entries. A package's ``__init__`` imports its modules, which register their functions."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}
        self._listeners: list[Callable[[Entry[F]], None]] = []

    def register(self, name: str, *, paper: str, **declared: Any) -> Callable[[F], F]:
        """A decorator that registers a function; ``declared`` are further attributes of its :class:`Entry`.

        Options are the keyword-only parameters, ``Annotated[type, Field(ge=0), "description"]``. pydantic checks values
        against the type, and users see the description.

        Raises:
            TypeError: the default of an option is not a JSON value.
        """

        def add(function: F) -> F:
            hints = typing.get_type_hints(function, include_extras=True)
            options = {}
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                    continue
                if parameter.default is not inspect.Parameter.empty:
                    json.dumps(parameter.default)  # raises TypeError: options go into reports and identities
                hint = hints[parameter.name]
                description = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, str)), "")
                options[parameter.name] = Option(parameter.name, hint, parameter.default, description)
            summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
            self.add(Entry(name, function, paper, summary, options, **declared))
            return function

        return add

    def add(self, entry: Entry[F]) -> None:
        """Registers an entry."""
        if entry.name in self._entries:
            raise ValueError(f"{self.kind} {entry.name!r} is registered twice")
        self._entries[entry.name] = entry
        for listener in self._listeners:
            listener(entry)

    def on_add(self, listener: Callable[[Entry[F]], None]) -> None:
        """Calls ``listener`` with every registered entry, and with each later one when it is registered."""
        self._listeners.append(listener)
        for entry in self:
            listener(entry)

    def __getitem__(self, name: str) -> Entry[F]:
        if name not in self._entries:
            raise RecipeError(f"unknown {self.kind} {name!r}; {nearest(name, self._entries)}")
        return self._entries[name]

    def forget(self, names: frozenset[str]) -> None:
        """Removes what a plugin registered that failed afterwards."""
        self._entries = {name: entry for name, entry in self._entries.items() if name not in names}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[F]]:
        return iter(self._entries.values())
