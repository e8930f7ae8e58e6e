"""The forms of all linears for a program and a size: measured, chosen, and compared with one form for all.

The dense model runs over a few windows, block by block, and each linear is measured in every form that the program has.
Then it runs over a few others, next to candidates, and the one that diverges least from it is taken. A candidate's
weights are rounded to nearest there, and moved so near to the dense ones that a linear has the error that was measured,
since a run compensates errors as the measurement did.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sparsellm.errors import RecipeError
from sparsellm.method.allocation import Allocation, HeadForm, LinearSize, Survey
from sparsellm.method.allocation.forms import (
    Form,
    Table,
    best_forms,
    between,
    bytes_of_threshold,
    errors_of,
    form_bytes,
    joined,
    some_rows,
)
from sparsellm.method.blocks.statistics import Statistics
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.method.gram import Gram
from sparsellm.method.sweep.gradients import LossGradients
from sparsellm.method.sweep.head import divergence_from, through_head
from sparsellm.model import Chain, Feed, LinearView, Stream
from sparsellm.model.capture import Group, watch
from sparsellm.model.experts import ExpertLinear
from sparsellm.patterns import Unstructured
from sparsellm.progress import PhaseClock, Progress
from sparsellm.recipe import NOTIONAL, Recipe
from sparsellm.records import Settings
from sparsellm.run.choice import Choice, sizes_of
from sparsellm.run.head_forms import (
    Heads,
    HeadTable,
    best_heads,
    between_sizes,
    least_bytes,
    measure_heads,
    most_bytes,
    smallest_heads,
    some_sizes,
    with_rest,
)
from sparsellm.run.smallest_size import Q4_K_M, q4_k_m, smallest
from sparsepack.grid import on_grid
from sparsepack.grids import GRIDS, grid_for

OWN = "sparsellm"
LLAMA_CPP = "llama.cpp"
VLLM = "vllm"
SPARSITIES = (0.0, 0.3, 0.5, 0.7)  # at which forms of the packed format are measured
# Grids that are not measured: int8 activations lose more at the same bytes, no kernel of vLLM reads int3, and iq4_nl
# loses less than q4_0 at its bytes.
NEVER = frozenset({"w8a8", "w3a16", "q4_0"})
# grids that the packed format stores dense, with scales of more than 32 columns
WIDER = ("w4a16-64", "w4a16", "w3a16")
# zeros of one form for all: with more of them another type is better
MOST_ZEROS = 0.6
WITH_ZEROS = 2  # types with zeros that are compared
# A run gains more on one form with zeros than the quick pass says, since it places zeros by what outputs cost: on the
# demo the mixture lost at 2.8 bits, with a quick divergence of 0.78 of that of one form, and won at 4.2, with 0.72.
RUN_GAINS = 0.75
GRAM_TOKENS = 4096
CURVE_SIZES = 8  # sizes of all linears at which their divergence is measured, for a size with a divergence
JUDGES = 1  # windows on which candidates are compared
BY_LINEAR = "by linear"
# A quotient that was rounded down stands for a size that is less than this part of a byte larger.
ROUNDING = 1e-3

Zeros = Callable[[float], Mapping[str, float]]
"""The sparsity of each linear by its name, from that of all."""


def forms_for(program: str, columns: int) -> list[Form]:
    """The forms that are measured for a program, of linears with this many inputs."""
    if program == OWN:
        grouped = [Form(t, s) for t in ("int4", "int3") for s in SPARSITIES]
        wider = [Form(name) for name in WIDER if columns % GRIDS[name].group == 0]
        return [Form("int8"), Form("int6"), Form("int5"), *grouped, *wider]
    formats = {LLAMA_CPP: "gguf", VLLM: "compressed-tensors"}
    names = [
        grid.name
        for grid in GRIDS.values()
        if grid.form == formats[program]
        and grid.name not in NEVER
        # llama.cpp takes another type where one does not divide a row
        and columns % (grid_for(grid.name, columns).columns or columns) == 0
    ]
    return [Form(name) for name in names]


def byte_range(program: str, sizes: Sequence[LinearSize]) -> tuple[int, int]:
    """The bytes of linears in the smallest and in the largest forms of a program, where those of one unit are alike."""
    shapes = {size.name: size.shape for size in sizes}
    # linears that read one input have one number of columns, and so the same forms
    alone = [[name] for name in shapes]
    least = 0
    most = 0
    for names in units_of(sizes, alone, program):
        counts = Counter(shapes[name] for name in names)
        forms_of = [forms_for(program, columns) for _, columns in counts]
        bytes_of = [
            sum(count * form_bytes(form, shape) for shape, count in counts.items())
            for form in forms_of[0]
            if all(form in forms for forms in forms_of)
        ]
        least += min(bytes_of, default=0)
        most += max(bytes_of, default=0)
    return least, most


def size_range(
    program: str, chain: Chain, recipe: Recipe, *, heads: bool
) -> tuple[int, int]:
    """The bytes of the linears to prune in the smallest and in the largest forms of a program. If ``heads``, those of
    embedding and head count too."""
    least, most = byte_range(program, sizes_of(chain, recipe))
    if heads:
        least += least_bytes(chain)
        most += most_bytes(chain)
    return least, most


def for_whole(recipe: Recipe, chain: Chain) -> Recipe:
    """The recipe of a run that removes experts, for the whole mixture ``chain``: with the size that lies between those
    of its smallest and largest forms where the size of the recipe lies for the experts that stay."""
    assert recipe.program is not None
    assert recipe.experts is not None
    if recipe.size is None and recipe.bits is None:
        return recipe
    smaller = FewerExperts(chain, recipe.experts).chain
    size = recipe.size
    if size is None:
        weights = sum(x.weights for x in sizes_of(smaller, recipe))
        size = _bytes_at(recipe.bits or 0.0, weights)
    heads = recipe.size is not None
    least, most = size_range(recipe.program, smaller, recipe, heads=heads)
    low, high = size_range(recipe.program, chain, recipe, heads=heads)
    place = (size - least) / max(1, most - least)
    # a run may be asked for a little more than its largest forms use
    scaled = low + math.floor(min(1.0, place) * (high - low))
    if heads:
        return recipe.updated(size=scaled)
    weights = sum(x.weights for x in sizes_of(chain, recipe))
    return recipe.updated(bits=bits_in(scaled, weights))


def most_asked(most: int) -> int:
    """The largest size that may be asked for where the largest forms take ``most`` bytes: what is written has to be
    within a hundredth of it."""
    return most + most // 100


def too_large(asked: str, program: str, most: str) -> RecipeError:
    """The error for a size beyond the largest forms of a program. A run would end far below it."""
    return RecipeError(
        f"{asked} too large for {program}: at most {most} are possible; give at most that, or keep the model as it is, "
        "without rounding"
    )


def _check_bits(program: str, bits: float, sizes: Sequence[LinearSize]) -> None:
    """Refuses bits of a weight that no forms of a program have. Raises RecipeError."""
    least, most = byte_range(program, sizes)
    weights = sum(size.weights for size in sizes)
    if least > _bytes_at(bits, weights):
        raise RecipeError(
            f"bits {bits:g} are too few for {program}; at least {_rounded_up(8 * least / weights)} are possible"
        )
    if bits > bits_in(most_asked(most), weights):
        raise too_large(
            f"bits {bits:g} are", program, f"{_rounded_up(bits_in(most, weights))}"
        )


def _check_bytes(program: str, size: int, chain: Chain, recipe: Recipe) -> None:
    """Refuses bytes of linears, embedding and head together that no forms of a program have. Raises RecipeError."""
    if chain.reader is None:
        raise RecipeError(
            f"size {size} counts embedding and head, which are rounded in a checkpoint; give the model by its directory"
        )
    least, most = size_range(program, chain, recipe, heads=True)
    if least > size:
        raise RecipeError(
            f"size {size} is too few bytes for {program}; at least {least} are possible"
        )
    if size > most_asked(most):
        raise too_large(f"size {size} is", program, f"{most} bytes")


def check_forms(program: str, chain: Chain, recipe: Recipe) -> None:
    """Refuses a linear without a form of a program, and experts in the packed format, where they stay dense. Raises
    RecipeError."""
    sizes = sizes_of(chain, recipe)
    names = {size.name for size in sizes}
    for index in range(len(chain)):
        for linear in chain.linears(index):
            if (
                program == OWN
                and linear.name in names
                and isinstance(linear.module, ExpertLinear)
            ):
                raise RecipeError(
                    f"{linear.name} is an expert, which the packed format keeps dense; take another program, or leave "
                    "experts out (exclude)"
                )
    for size in sizes:
        if not forms_for(program, size.shape[1]):
            raise RecipeError(
                f"{size.name} has {size.shape[1]} inputs, for which {program} has no form; leave it out (exclude)"
            )


def check_size(chain: Chain, recipe: Recipe) -> None:
    """Refuses a size that no forms of its program have, where ``check_forms`` refused nothing. Raises RecipeError."""
    if recipe.program is None:
        return
    if recipe.size is not None:
        _check_bytes(recipe.program, recipe.size, chain, recipe)
    if recipe.bits is not None:
        _check_bits(recipe.program, recipe.bits, sizes_of(chain, recipe))


def bits_in(size: int, weights: int) -> float:
    """Bits of a weight where all take ``size`` bytes."""
    return 8 * size / weights


def _bytes_at(bits: float, weights: int) -> int:
    """The inverse of ``bits_in``, whose quotient may be rounded down."""
    return math.floor(bits * weights / 8 + ROUNDING)


def _rounded_up(bits: float) -> float:
    """Bits with three digits after the point, not below what they are."""
    return math.ceil(bits * 1000) / 1000


@dataclass
class Measured:
    """What the first pass found, by the name of a linear."""

    # error of each form, with those between the measured ones
    errors: dict[str, dict[Form, float]] = field(default_factory=dict)
    # the same, rounded to nearest
    nearest: dict[str, dict[Form, float]] = field(default_factory=dict)
    # mean squares of inputs, (in,)
    squares: dict[str, Tensor] = field(default_factory=dict)
    # what the loss of the whole output would cost
    costs: dict[str, float] = field(default_factory=dict)
    # linears that read the same input, block by block
    groups: list[list[str]] = field(default_factory=list)


def _margin(candidate: Candidate) -> float:
    """What the divergence of a candidate is multiplied by before candidates are compared."""
    sparse = any(form.sparsity for form in candidate.forms.values())
    if sparse and candidate.name != BY_LINEAR:
        return RUN_GAINS
    return 1.0


@dataclass(frozen=True)
class Candidate:
    """A form for each linear, by name."""

    name: str
    forms: Mapping[str, Form]
    compensated: bool = True  # whether a run makes up for its errors

    def bytes(self, sizes: Sequence[LinearSize]) -> int:
        return sum(form_bytes(self.forms[x.name], x.shape) for x in sizes)


def choose_forms(
    feed: Feed,
    sizes: Sequence[LinearSize],
    gradients: LossGradients | None,
    choice: Choice,
    recipe: Recipe,
) -> Allocation:
    """The allocation of zeros and types for the program and the size of a recipe, from the ``gradients`` of the dense
    model. The model of the feed is not changed by a bit. Raises RecipeError if the size is impossible, or no size has
    the divergence that is asked for."""
    assert gradients is not None
    assert recipe.program is not None
    program = recipe.program
    weights = sum(size.weights for size in sizes)

    def zeros(sparsity: float) -> dict[str, float]:
        count = round(sparsity * weights)
        survey = Survey(feed, sizes, sparsity, count, gradients)
        allocation = choice.allocator.function(survey, **choice.allocation_options)
        return {size.name: allocation.zeros[size.name] / size.weights for size in sizes}

    judges = feed.windows[-min(JUDGES, len(feed.windows)) :]
    rest = feed.windows[: max(1, len(feed.windows) - len(judges))]
    observed = replace(feed, windows=rest).first(GRAM_TOKENS)
    clock = PhaseClock()
    with clock.phase("measure"):
        measured = measure(observed, sizes, gradients.output_squares, program)
    tables = tables_of(sizes, measured)
    mixtures = Mixtures(
        tables,
        units_of(sizes, measured.groups, program),
        sparsities=zeros(NOTIONAL),
        weights={size.name: size.weights for size in sizes},
    )
    judging = replace(feed, windows=judges)
    compared: list[Settings] = []
    heads: dict[str, HeadForm] = {}
    tables_of_heads: list[HeadTable] = []
    bits = recipe.bits
    # only a checkpoint on disk has its embedding and head rounded
    if bits is None and program == LLAMA_CPP and feed.chain.reader is not None:
        with clock.phase("heads"):
            tables_of_heads = measure_heads(judging)
    if recipe.size is not None:
        with clock.phase("heads"):
            chosen = _heads(
                tables_of_heads,
                judging,
                sizes,
                measured,
                mixtures.by_linear,
                recipe.size,
            )
        heads = chosen.forms
        bits = bits_in(chosen.room, weights)
    elif bits is None:
        with clock.phase("size"):
            smallest_one = _smallest_size(
                judging, sizes, measured, mixtures.by_linear, recipe, tables_of_heads
            )
        bits = smallest_one.bits
        heads = smallest_one.heads
        compared += smallest_one.compared
    total = _bytes_at(bits, weights)
    candidates = [
        mixtures.by_linear(bits),
        *uniform_forms(sizes, tables, zeros, total),
    ]
    with clock.phase("compare"):
        divergence_of = divergences(judging, measured, candidates)
    best = min(
        range(len(candidates)),
        key=lambda number: divergence_of[number] * _margin(candidates[number]),
    )
    compared += [
        _compared(candidate, sizes, divergence)
        for candidate, divergence in zip(candidates, divergence_of, strict=True)
    ]
    report: Settings = {
        "program": program,
        "bits": bits,
        "chosen": candidates[best].name,
        "candidates": [*compared],
        "seconds": {name: round(took, 1) for name, took in clock.seconds.items()},
    }
    if heads:
        unused = total - candidates[best].bytes(sizes)
        heads = with_rest(heads, tables_of_heads, unused)
        report["heads"] = {key: form.values for key, form in heads.items()}
    forms = candidates[best].forms
    return Allocation(
        {size.name: round(forms[size.name].sparsity * size.weights) for size in sizes},
        report,
        {size.name: forms[size.name].values for size in sizes},
        heads,
    )


@dataclass(frozen=True)
class Mixtures:
    """Mixtures of forms by linear, at any size. All mappings are by the name of a linear."""

    tables: Mapping[str, Table]
    units: Sequence[Sequence[str]]  # linears that must have one form
    sparsities: Mapping[str, float]  # by `threshold`, at a notional sparsity of all
    weights: Mapping[str, int]

    def by_linear(self, bits: float) -> Candidate:
        """Each linear gets the bytes that `threshold` gives it."""
        total = _bytes_at(bits, sum(self.weights.values()))
        budgets = bytes_of_threshold(self.weights, self.sparsities, total)
        return Candidate(BY_LINEAR, _by_unit(self.units, self.tables, budgets, total))


def _heads(
    tables: Sequence[HeadTable],
    judging: Feed,
    sizes: Sequence[LinearSize],
    measured: Measured,
    by_linear: Callable[[float], Candidate],
    room: int,
) -> Heads:
    """The types of embedding and head in ``room`` bytes for them and the linears."""
    weights = sum(size.weights for size in sizes)
    least, most = byte_range(LLAMA_CPP, sizes)
    tried = some_sizes(tables, room, least)
    candidates = [by_linear(8 * min(size, most) / weights) for size in tried]
    divergence_of = divergences(judging, measured, candidates)
    return best_heads(tables, room, between_sizes(tried, divergence_of, least))


def _compared(
    candidate: Candidate, sizes: Sequence[LinearSize], divergence: float
) -> Settings:
    """What the report says of a candidate."""
    weights = sum(size.weights for size in sizes)
    return {
        "name": candidate.name,
        "bits": round(8 * candidate.bytes(sizes) / weights, 4),
        "divergence": divergence,
    }


@dataclass(frozen=True)
class SmallestSize:
    """The smallest size that has the divergence which a recipe asks for."""

    bits: float
    heads: dict[str, HeadForm]  # by tensor of embedding and head; empty if they stay
    compared: list[Settings]  # what it was compared with


def _smallest_size(
    judging: Feed,
    sizes: Sequence[LinearSize],
    measured: Measured,
    by_linear: Callable[[float], Candidate],
    recipe: Recipe,
    tables: Sequence[HeadTable],
) -> SmallestSize:
    """The fewest bits at which the mixture by linear, with types of embedding and head from ``tables``, diverges by at
    most what the recipe asks for. Raises RecipeError if the largest forms diverge more."""
    assert recipe.program is not None
    goal = recipe.divergence
    weights = sum(size.weights for size in sizes)
    least, most = byte_range(recipe.program, sizes)
    some = [float(most)]
    if tables:
        some = [*np.geomspace(least, most, CURVE_SIZES)]
    candidates = [by_linear(8 * size / weights) for size in some]
    if goal == Q4_K_M:
        candidates.append(Candidate(Q4_K_M, q4_k_m(sizes), compensated=False))
    measured_at = divergences(judging, measured, candidates)
    compared: list[Settings] = []
    if goal == Q4_K_M:
        goal = measured_at.pop()
        compared.append(_compared(candidates[-1], sizes, goal))
        goal += math.fsum(table.in_q4_k_m for table in tables)
    assert isinstance(goal, float)
    lowest = measured_at[-1] + math.fsum(min(table.divergences) for table in tables)
    if lowest > goal:
        raise RecipeError(
            f"no form of {recipe.program} has a divergence of at most {goal:.3g}; the largest ones have {lowest:.3g}"
        )
    heads: dict[str, HeadForm] = {}
    if tables:
        divergence_of = between_sizes(some, measured_at, least)
        chosen = smallest_heads(tables, goal, least, most, divergence_of)
        heads = chosen.forms
        goal -= chosen.divergence

    def divergences_at(tried: Sequence[float]) -> list[float]:
        return divergences(judging, measured, [by_linear(bits) for bits in tried])

    bits = smallest(8 * least / weights, 8 * most / weights, goal, divergences_at)
    return SmallestSize(bits, heads, compared)


def measure(
    feed: Feed,
    sizes: Sequence[LinearSize],
    output_squares: Mapping[str, Tensor],
    program: str,
) -> Measured:
    """The errors of all forms of each linear, on the inputs that it has in the dense model."""
    names = {size.name for size in sizes}
    measured = Measured()
    for groups in _through_blocks(feed, names):
        for group, gram in groups:
            measured.groups.append([linear.name for linear in group])
            for linear in group:
                forms = forms_for(program, linear.in_features)
                weight = linear.weight()
                dtype = linear.storage_dtype
                errors = errors_of(weight, gram, forms, dtype)
                every = between(forms, errors)
                measured.errors[linear.name] = dict(zip(*every, strict=True))
                part = some_rows(weight)
                energy = float(gram.energy(part)) or 1.0
                lost = []
                for form in forms:
                    stored = nearest(part, gram.diagonal, form, dtype)
                    lost.append(float(gram.energy(stored, minus=part)) / energy)
                every = between(forms, lost)
                measured.nearest[linear.name] = dict(zip(*every, strict=True))
                measured.squares[linear.name] = gram.diagonal
                squares = output_squares.get(linear.name)
                outputs = (weight @ gram.matrix).mul_(weight).sum(1)
                if squares is None:
                    squares = torch.zeros_like(outputs)
                cost = outputs.double() @ squares.to(outputs.device).double()
                measured.costs[linear.name] = float(cost)
    return measured


def tables_of(sizes: Sequence[LinearSize], measured: Measured) -> dict[str, Table]:
    """The table of each linear by its name."""
    tables = {}
    for size in sizes:
        errors = measured.errors[size.name]
        cost = measured.costs[size.name]
        tables[size.name] = Table(
            list(errors),
            [form_bytes(form, size.shape) for form in errors],
            [cost * error for error in errors.values()],
        )
    return tables


def units_of(
    sizes: Sequence[LinearSize], groups: Sequence[Sequence[str]], program: str
) -> list[list[str]]:
    """The linears that must have one form: where vLLM runs them as one matrix, those that read one input; in a mixture
    all experts of a block for vLLM, and those of one kind for llama.cpp, which stores them as one tensor."""
    first = {name: group[0] for group in groups for name in group}
    units: dict[tuple[object, ...], list[str]] = {}
    for size in sizes:
        before, experts, after = size.name.partition(".experts.")
        key: tuple[object, ...] = (size.name,)
        if experts and program == VLLM:
            key = (size.block, before)
        elif experts and program == LLAMA_CPP:
            key = (size.block, before, after.rpartition(".")[2])
        elif program == VLLM:
            key = (first[size.name],)
        units.setdefault(key, []).append(size.name)
    return list(units.values())


def _by_unit(
    units: Sequence[Sequence[str]],
    tables: Mapping[str, Table],
    budgets: Mapping[str, float],
    total: float,
) -> dict[str, Form]:
    """The form of each linear by ``best_forms``, with linears of one unit alike."""
    of_units = {names[0]: joined([tables[name] for name in names]) for names in units}
    for names in units:
        if not of_units[names[0]].forms:
            raise RecipeError(
                f"{names[0]} and {names[-1]} must have one type, and none fits the inputs of both; leave them out "
                "(exclude)"
            )
    bytes_of = {names[0]: math.fsum(budgets[name] for name in names) for names in units}
    places = best_forms(bytes_of, of_units, total)
    return {
        name: of_units[names[0]].forms[places[names[0]]]
        for names in units
        for name in names
    }


def uniform_forms(
    sizes: Sequence[LinearSize],
    tables: Mapping[str, Table],
    zeros: Zeros,
    total: float,
) -> list[Candidate]:
    """One type for all linears at this size: the one that loses least among those that fit without zeros; and in the
    packed format the next larger ones that have zeros, with as many of these as that takes."""
    dense: list[tuple[float, Candidate]] = []
    larger: list[tuple[int, str]] = []
    first = next(iter(tables.values()))
    sparse = {form.values for form in first.forms if form.sparsity}
    for form in first.forms:
        if form.sparsity or any(form not in x.forms for x in tables.values()):
            continue
        alike = Candidate(form.values, dict.fromkeys(tables, form))
        size = alike.bytes(sizes)
        if size <= total:
            lost = math.fsum(x.losses[x.forms.index(form)] for x in tables.values())
            dense.append((lost, alike))
        elif form.values in sparse:
            larger.append((size, form.values))
    candidates: list[Candidate] = []
    for _, values in sorted(larger)[:WITH_ZEROS]:
        candidates += _with_zeros(values, sizes, zeros, total)
    if dense:
        candidates.append(min(dense, key=lambda pair: pair[0])[1])
    return candidates


def _with_zeros(
    values: str, sizes: Sequence[LinearSize], zeros: Zeros, total: float
) -> list[Candidate]:
    """One type with the fewest zeros at which it fits; none if that is too many."""

    def at(sparsity: float) -> Candidate:
        shares = zeros(sparsity)
        forms = {size.name: Form(values, shares[size.name]) for size in sizes}
        return Candidate(f"{values}, {sparsity:.1%} zeros", forms)

    low = 0.0
    high = MOST_ZEROS
    if at(high).bytes(sizes) > total:
        return []
    while high - low > 1e-3:
        middle = (low + high) / 2
        if at(middle).bytes(sizes) > total:
            low = middle
        else:
            high = middle
    return [at(high)]


@torch.no_grad()
def divergences(
    judges: Feed, measured: Measured, candidates: Sequence[Candidate]
) -> list[float]:
    """The divergence from the dense model of each candidate on the windows of ``judges``, in nats a token."""
    chain = judges.chain
    with contextlib.ExitStack() as held:
        dense = judges.stream()
        held.callback(dense.close)
        streams = []
        for _ in candidates:
            streams.append(dense.fork())
            held.callback(streams[-1].close)
        for index in range(len(chain)):
            said = f"block {index + 1}/{len(chain)} comparing forms"
            judges.progress(Progress("allocation", index, len(chain), said))
            with chain.block(index, judges.blocks):
                dense.advance(index)
                for candidate, stream in zip(candidates, streams, strict=True):
                    with _in_form(chain.linears(index), candidate, measured):
                        stream.advance(index)
        return _behind(judges, dense, streams)


def _behind(judges: Feed, dense: Stream, streams: Sequence[Stream]) -> list[float]:
    """The divergence of each stream behind the last block from the dense one, in nats a token."""
    chain = judges.chain
    totals = [0.0] * len(streams)
    with chain.outer():
        start = 0
        for position, goal in enumerate(dense.hidden):
            ids = judges.windows[start : start + len(goal)].to(chain.device)
            start += len(goal)
            loss = divergence_from(chain, goal, ids)
            for number, stream in enumerate(streams):
                hidden = stream.hidden[position]
                lost, _ = through_head(chain, hidden, ids, loss, gradient=False)
                totals[number] += lost
    return [total / judges.windows.numel() for total in totals]


def _through_blocks(
    feed: Feed, names: Collection[str]
) -> Iterator[list[tuple[Group, Gram]]]:
    """Runs the dense model over the windows; yields for each block, while it is loaded, the linears of these names by
    their input, with its Gram matrix: equal inputs for a linear that no token reached, or whose input is not seen."""
    chain = feed.chain
    with contextlib.closing(feed.stream()) as stream:
        for index in range(len(chain)):
            said = f"block {index + 1}/{len(chain)} measuring forms"
            feed.progress(Progress("allocation", index, len(chain), said))
            with chain.block(index, feed.blocks):
                linears = [x for x in chain.linears(index) if x.name in names]
                groups = _statistics(stream, index, linears)
                known = {x.name for group, _ in groups for x in group}
                for linear in linears:
                    if linear.name not in known:
                        identity = torch.eye(linear.in_features, device=chain.device)
                        groups.append(([linear], Gram(identity, 1)))
                yield groups


def _statistics(
    stream: Stream, index: int, linears: Sequence[LinearView]
) -> list[tuple[Group, Gram]]:
    """The groups of linears that share an input, with its Gram matrix, while the stream advances through the loaded
    block; without experts."""
    seen = [x for x in linears if not isinstance(x.module, ExpertLinear)]
    statistics = Statistics(seen, stream.chain.device)
    with watch(seen, lambda linear, inputs, _: statistics.see(linear, inputs)):
        stream.advance(index)
    return statistics.finish(statistics.reduce())


@contextlib.contextmanager
def _in_form(
    linears: Sequence[LinearView], candidate: Candidate, measured: Measured
) -> Iterator[None]:
    """In the context the loaded linears have errors of their forms."""
    before: list[tuple[LinearView, Tensor]] = []
    try:
        for linear in linears:
            if linear.name not in candidate.forms:
                continue
            weight = linear.weight()
            before.append((linear, weight.clone()))
            form = candidate.forms[linear.name]
            stored = nearest(
                weight, measured.squares[linear.name], form, linear.storage_dtype
            )
            share = 1.0
            if candidate.compensated:
                error = _error_at(measured.errors[linear.name], form)
                lost = _error_at(measured.nearest[linear.name], form)
                share = math.sqrt(error / lost) if lost else 1.0
            linear.assign(weight + share * (stored - weight))
        yield
    finally:
        for linear, weight in before:
            linear.assign(weight)


def _error_at(errors: Mapping[Form, float], form: Form) -> float:
    """The error of a form: that of the known one of its type with the nearest sparsity."""
    of_type = [known for known in errors if known.values == form.values]
    known = min(of_type, key=lambda known: abs(known.sparsity - form.sparsity))
    return errors[known]


def nearest(weight: Tensor, squares: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """A weight ``(out, in)`` fp32 in a form, without any compensation: zeros where magnitude times the root of the
    input's mean ``squares (in,)`` is least in a row, and others rounded to nearest."""
    zeros = round(form.sparsity * weight.numel())
    if zeros:
        scores = weight.abs() * squares.clamp(min=0).sqrt()
        pattern = Unstructured(zeros, weight.numel())
        weight = weight * pattern.mask(scores, scope="row")
    return on_grid(weight, form.values, dtype)
