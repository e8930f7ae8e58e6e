"""A form for each linear: the type of its values and its share of zeros, at a size of all linears together.

The allocation ``threshold`` says how many bytes a linear gets. Each linear then takes the form in which it loses least
at those bytes, measured on some of its rows. Only forms on the convex hull of size and error count: between two of
them, others lose more for each byte that they save. What is left of the size is spent where it helps the model most.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm.errors import RecipeError
from sparsellm.method.gram import Gram
from sparsellm.method.solvers.rounding import to_nearest, uncompensated
from sparsellm.patterns import Unstructured
from sparsellm.records import KEEP
from sparsepack.grids import GRIDS
from sparsepack.layout import predicted_bytes

# rows of a weight on which its forms are measured
ROWS = 64
# bytes of a weight's bit in the mask of a notional format, which turns the sparsities of `threshold` into bytes
MASK = 1 / 8
# between sparsities of forms; errors between those measured are interpolated
STEP = 0.025


@dataclass(frozen=True)
class Form:
    """What values of a linear are rounded to (a type of the packed format or a grid), and its share of zeros."""

    values: str
    sparsity: float = 0.0

    def __str__(self) -> str:
        return f"{self.values} {self.sparsity:.1%}" if self.sparsity else self.values


def form_bytes(form: Form, shape: tuple[int, int]) -> int:
    """Bytes of a linear ``(out, in)`` in a form: on another program's grid, where zeros save nothing; or packed, with
    masks, scales and exponents of columns, in the layout that is smallest."""
    weights = math.prod(shape)
    if (grid := GRIDS.get(form.values)) is not None:
        return math.ceil(grid.bits_per_weight(shape[1]) * weights / 8)
    zeros = round(form.sparsity * weights)
    return predicted_bytes(shape, zeros, form.values, exponents=form.values != KEEP)


def bytes_of_threshold(
    weights: Mapping[str, int], sparsities: Mapping[str, float], total: float
) -> dict[str, float]:
    """The bytes of each linear, ``total`` together: those of a mask and of its kept values, of one width for all.

    ``weights`` and ``sparsities`` are by the name of a linear. In a format without zeros the sparsities are notional:
    they only say which linear needs more."""
    masks = MASK * sum(weights.values())
    kept = math.fsum((1 - sparsities[name]) * count for name, count in weights.items())
    mask = MASK if masks < total else 0.0
    width = (total - mask * sum(weights.values())) / kept
    return {
        name: (mask + (1 - sparsities[name]) * width) * count
        for name, count in weights.items()
    }


def some_rows(weight: Tensor, rows: int = ROWS) -> Tensor:
    """At most ``rows`` evenly spaced rows of a weight ``(out, in)``."""
    count = min(rows, len(weight))
    places = torch.arange(count, device=weight.device) * len(weight) // count
    return weight[places]


def errors_of(
    weight: Tensor,
    gram: Gram,
    forms: Sequence[Form],
    dtype: torch.dtype,
    rows: int = ROWS,
) -> list[float]:
    """The relative error that a linear will have in each form, as in ``sparsellm.method.solvers.Solution``, from
    at most ``rows`` evenly spaced rows of its weight ``(out, in)`` fp32. ``dtype`` is that of the checkpoint.

    Nothing is solved: errors of values at their nearest are weighed by what they cost once others made up for them."""
    part = some_rows(weight, rows)
    energy = float(gram.energy(part))
    if energy == 0:
        return [0.0] * len(forms)
    costs_of = {
        dense: uncompensated(gram, dense=dense)
        for dense in {form.sparsity == 0 for form in forms}
    }
    errors = []
    for form in forms:
        costs = costs_of[form.sparsity == 0]
        saliency = part.square() * costs
        zeros = round(form.sparsity * part.numel())
        pruned = part * Unstructured(zeros, part.numel()).mask(saliency)
        stored = to_nearest(pruned, costs, form.values, dtype)
        errors.append(float(((stored - part).square() @ costs).double().sum()) / energy)
    return errors


def between(
    forms: Sequence[Form], errors: Sequence[float], step: float = STEP
) -> tuple[list[Form], list[float]]:
    """The forms, and those between two neighbouring sparsities of one type at every ``step``; with their errors, whose
    logarithms are interpolated."""
    known = dict(zip(forms, errors, strict=True))
    every = dict(known)
    for values, of_type in itertools.groupby(
        sorted(forms, key=lambda form: (form.values, form.sparsity)),
        key=lambda form: form.values,
    ):
        for low, high in itertools.pairwise(of_type):
            if not 0 < known[low] <= known[high]:
                continue
            span = high.sparsity - low.sparsity
            parts = math.ceil(span / step - 1e-9)
            growth = math.log(known[high] / known[low])
            for part in range(1, parts):
                form = Form(values, round(low.sparsity + span * part / parts, 6))
                every[form] = known[low] * math.exp(growth * part / parts)
    return list(every), list(every.values())


def hull(sizes: Sequence[float], errors: Sequence[float]) -> list[int]:
    """The places of the points on the lower convex hull of size and error, by size: from the smallest to the one with
    the least error. Errors fall along it, by less and less for each byte."""
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place], errors[place]))
    corners: list[int] = []
    for place in order:
        # each later point must be better than all smaller ones
        if corners and errors[place] >= errors[corners[-1]]:
            continue
        while len(corners) > 1:
            before = corners[-2]
            last = corners[-1]
            slope = (errors[before] - errors[last]) * (sizes[place] - sizes[last])
            next_slope = (errors[last] - errors[place]) * (sizes[last] - sizes[before])
            if slope > next_slope:
                break
            corners.pop()
        corners.append(place)
    return corners


@dataclass(frozen=True)
class Table:
    """The forms of a linear, or of several that must have one form, with their bytes and what each loses: the error
    times the cost of an error, in one unit for all tables."""

    forms: Sequence[Form]
    bytes: Sequence[int]
    losses: Sequence[float]

    @property
    def corners(self) -> list[int]:
        """The places of the forms on the hull, by size."""
        return hull(self.bytes, self.losses)


def joined(tables: Sequence[Table]) -> Table:
    """The table of linears that must have one form, with the forms that all have: bytes and losses add up."""
    places = [
        {form: place for place, form in enumerate(table.forms)} for table in tables
    ]
    forms = [form for form in tables[0].forms if all(form in at for at in places)]
    pairs = list(zip(tables, places, strict=True))
    return Table(
        forms,
        [sum(table.bytes[at[form]] for table, at in pairs) for form in forms],
        [math.fsum(table.losses[at[form]] for table, at in pairs) for form in forms],
    )


def best_forms(
    budgets: Mapping[str, float], tables: Mapping[str, Table], total: float
) -> dict[str, int]:
    """The place of the form of each unit in its table, with at most ``total`` bytes together.

    Each takes the form on its hull that loses least at no more than its budget. Where that is too much together, units
    go back a corner where it costs least a byte; then what is left is spent where it gains most a byte, at last on
    forms inside the hull. Raises RecipeError, with the least possible size, if the total is below that."""
    choice = _Choice(budgets, tables)
    if choice.least > total:
        raise RecipeError(
            f"{total:,.0f} bytes are too few for the linears; at least {choice.least:,} are possible"
        )
    choice.shrink(total)
    choice.spend(total, choice.next_corner)
    choice.spend(total, choice.next_of_all)
    return choice.places


class _Choice:
    """A form on the hull for each unit, by place in its table, and the bytes of all; see ``best_forms``."""

    def __init__(
        self, budgets: Mapping[str, float], tables: Mapping[str, Table]
    ) -> None:
        self.tables = tables
        self.corners = {name: table.corners for name, table in tables.items()}
        self.places: dict[str, int] = {}
        for name, table in tables.items():
            fitting = [
                place
                for place in self.corners[name]
                if table.bytes[place] <= budgets[name]
            ]
            self.places[name] = fitting[-1] if fitting else self.corners[name][0]
        self.spent = sum(
            table.bytes[self.places[name]] for name, table in tables.items()
        )

    @property
    def least(self) -> int:
        """The bytes of all in their smallest forms."""
        return sum(
            table.bytes[self.corners[name][0]] for name, table in self.tables.items()
        )

    def move(self, name: str, place: int) -> None:
        """Gives a unit another form."""
        table = self.tables[name]
        self.spent += table.bytes[place] - table.bytes[self.places[name]]
        self.places[name] = place

    def shrink(self, total: float) -> None:
        """Moves units to their next smaller corners, where that costs least for each byte, until all fit."""
        steps: list[tuple[float, str, int]] = []

        def offer(name: str) -> None:
            number = self.corners[name].index(self.places[name])
            if number:
                smaller = self.corners[name][number - 1]
                cost = _gain(self.tables[name], smaller, self.places[name])
                heapq.heappush(steps, (cost, name, smaller))

        for name in self.tables:
            offer(name)
        while self.spent > total:
            _, name, place = heapq.heappop(steps)
            self.move(name, place)
            offer(name)

    def spend(self, total: float, larger: Callable[[str, float], int | None]) -> None:
        """Moves units to larger forms, where that gains most for each byte, until none fits. ``larger`` gives the next
        place of a unit by its name and the bytes that there is room for."""
        steps: list[tuple[float, str, int]] = []

        def offer(name: str) -> None:
            place = larger(name, total - self.spent)
            if place is not None:
                gain = _gain(self.tables[name], self.places[name], place)
                heapq.heappush(steps, (-gain, name, place))

        for name in self.tables:
            offer(name)
        while steps:
            _, name, place = heapq.heappop(steps)
            # what was left when it was offered may have been spent
            if self._more(name, place) <= total - self.spent:
                self.move(name, place)
            offer(name)

    def next_corner(self, name: str, room: float) -> int | None:
        """The next larger corner of a unit if there is room: no later one gains as much for a byte."""
        number = self.corners[name].index(self.places[name]) + 1
        if number == len(self.corners[name]):
            return None
        place = self.corners[name][number]
        return place if self._more(name, place) <= room else None

    def next_of_all(self, name: str, room: float) -> int | None:
        """The form of a unit that gains most for each byte, of all that there is room for."""
        table = self.tables[name]
        now = self.places[name]
        gains = [
            (_gain(table, now, place), place)
            for place in range(len(table.forms))
            if 0 < self._more(name, place) <= room
            and table.losses[place] < table.losses[now]
        ]
        return max(gains)[1] if gains else None

    def _more(self, name: str, place: int) -> int:
        """The bytes that a form of a unit takes beyond its present one."""
        table = self.tables[name]
        return table.bytes[place] - table.bytes[self.places[name]]


def _gain(table: Table, smaller: int, larger: int) -> float:
    """What a larger form gains over a smaller one, for each byte."""
    bytes_more = table.bytes[larger] - table.bytes[smaller]
    return (table.losses[smaller] - table.losses[larger]) / bytes_more
