"""Named things a user can choose: one decorated function each, options read from its signature."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from sparsellm.errors import RecipeError, nearest

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a registered function."""

    name: str
    type: Any
    default: Any
    description: str

    @property
    def type_name(self) -> str:
        bare = typing.get_args(self.type)[0] if hasattr(self.type, "__metadata__") else self.type
        if typing.get_origin(bare) in (typing.Literal, typing.Union, types.UnionType):
            return str(bare).replace("typing.", "")
        return getattr(bare, "__name__", str(bare))


@dataclass(frozen=True)
class Workspace:
    """What a registered function holds in memory at its worst, beside the block it works on.

    Attributes:
        weights: fp32 copies of the weight that is solved.
        grams: matrices as large as the Gram matrix of its inputs, that matrix included.
        remembered: factorisations that it keeps for other linears with the same inputs; they are bounded, see
            :meth:`sparsellm.statistics.Gram.remember`.
        blocks: fp32 copies of the whole block, such as gradients and moments of an optimiser.
        streams: batches of hidden states as many as the calibration has, such as targets.
    """

    weights: float = 8.0
    grams: float = 4.0
    remembered: int = 0
    blocks: float = 0.0
    streams: int = 0

    def beside(self, other: Workspace) -> Workspace:
        """What covers either of two that run one after the other."""
        return Workspace(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Needs:
    """What a method or an allocation asks for beside the walk over the blocks.

    Attributes:
        dense_stream: the dense model's own hidden states beside the pruned model's.
        pieces: the stream's batches also in the smaller parts that an optimiser steps on.
        passes: sweeps of the whole pruned model over the calibration windows, when all blocks are done.
        learning_rate: of those sweeps; None for what they choose.
        output_costs: what an error of each linear's outputs costs the dense model's loss, from a sweep of its gradient;
            not asked for in N:M, where outputs do not compete.
        surveyed_tokens: calibration tokens that an allocation looks at, in whole windows; None for all.
        gradient_tokens: of those, the ones that it wants gradients of.
        token_states: hidden states ``(windows, seq, width)``, because it picks windows or tokens out of them.
        one_process: the option, as it was given, that no more than one process can serve; "" if there is none.
        workspace: of what runs inside by these options, such as a solver, beside the method's own.
    """

    dense_stream: bool = False
    pieces: bool = False
    passes: int = 0
    learning_rate: float | None = None
    output_costs: bool = False
    surveyed_tokens: int | None = None
    gradient_tokens: int = 0
    token_states: bool = False
    one_process: str = ""
    workspace: Workspace = Workspace(weights=0, grams=0)


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function with the name users type, its paper, and its options.

    ``distributed`` says that it is written for several processes: of a solver, that rows may be solved apart (it
    compares them through its pattern only); of a method, that every process may run it on its share of the windows.
    ``allocation`` names what a method takes where the recipe names none and no pattern fixes the sparsity.
    """

    name: str
    function: F
    paper: str
    summary: str
    options: dict[str, Option]
    workspace: Workspace = Workspace()
    needs: Callable[[dict[str, Any]], Needs] | None = None
    distributed: bool = False
    allocation: str = "uniform"

    def needs_of(self, options: dict[str, Any]) -> Needs:
        """What a run with these options asks of the walk."""
        return self.needs(options) if self.needs is not None else Needs()

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        """Options as given, each coerced to its declared type.

        Raises:
            RecipeError: an option is unknown (the nearest known name is offered) or of the wrong type.
        """
        checked = {}
        for key, value in values.items():
            if key not in self.options:
                raise RecipeError(f"{self.name} has no option {key!r}; {nearest(key, self.options)}")
            option = self.options[key]
            try:
                checked[key] = TypeAdapter(option.type).validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise RecipeError(f"option {key} of {self.name} is {value!r}: {reason}") from None
        return checked


class Registry(Generic[F]):
    """Maps names to entries. A module registers itself by being imported from its package's ``__init__``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}
        self._listeners: list[Callable[[Entry[F]], None]] = []

    def register(
        self,
        name: str,
        *,
        paper: str,
        workspace: Workspace | None = None,
        needs: Callable[[dict[str, Any]], Needs] | None = None,
        distributed: bool = False,
        allocation: str = "uniform",
    ) -> Callable[[F], F]:
        """Decorator. Options are the keyword-only parameters, ``Annotated[type, Field(ge=0), "description"]``: what
        pydantic knows of the type is checked, and the text is shown to users. ``workspace`` is what the prediction of
        memory goes by; ``needs`` tells from the options what the walk has to provide; ``distributed`` and
        ``allocation``: see :class:`Entry`."""

        def add(function: F) -> F:
            hints = typing.get_type_hints(function, include_extras=True)
            options = {}
            for parameter in inspect.signature(function).parameters.values():
                if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                    continue
                hint = hints[parameter.name]
                description = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, str)), "")
                options[parameter.name] = Option(parameter.name, hint, parameter.default, description)
            summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
            room = workspace or Workspace()
            self.add(Entry(name, function, paper, summary, options, room, needs, distributed, allocation))
            return function

        return add

    def add(self, entry: Entry[F]) -> None:
        """Registers an entry that was made by hand."""
        if entry.name in self._entries:
            raise ValueError(f"{self.kind} {entry.name!r} is registered twice")
        self._entries[entry.name] = entry
        for listener in self._listeners:
            listener(entry)

    def on_add(self, listener: Callable[[Entry[F]], None]) -> None:
        """Calls ``listener`` with every entry there is and every one to come."""
        self._listeners.append(listener)
        for entry in self._entries.values():
            listener(entry)

    def __getitem__(self, name: str) -> Entry[F]:
        if name not in self._entries:
            raise RecipeError(f"unknown {self.kind} {name!r}; {nearest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[F]]:
        return iter(self._entries.values())
