"""What a recipe chooses: method, allocation and sweep, with all options and needs; linears and their patterns."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

from pydantic import JsonValue

from sparsellm import parallel
from sparsellm.errors import RecipeError
from sparsellm.method.allocation import ALLOCATIONS, Allocation, Allocator, LinearSize
from sparsellm.method.allocation.allocator import divide_zeros
from sparsellm.method.blocks import METHODS
from sparsellm.method.blocks.task import Method
from sparsellm.method.sweep.whole_model import check_sweepable
from sparsellm.model import Chain
from sparsellm.model.matrices import is_excluded, matches, refuse_silent_dense
from sparsellm.patterns import Pattern, Unstructured
from sparsellm.recipe import SWEEP, Recipe
from sparsellm.registry import Entry, Needs, Options
from sparsepack.grids import GRIDS, grid_for

PASSES_BY_EFFORT = (0, 1, 3, 8)  # docs/results.md has what each gains and takes
# by `sweep_tokens`; every pass is judged and saved
PASS_TOKENS = 16_000
MOST_PASSES = 16
SWEEP_SHARE = 0.5  # windows of a pass per calibration window; what a pass gains depends more on its steps


@dataclass(frozen=True)
class Choice:
    """The method, the allocation and the sweep of a run; options include defaults."""

    method: Entry[Method]
    options: dict[str, JsonValue]
    needs: Needs
    passes: int  # passes of the sweep over the whole model; 0 for no sweep
    # tokens of all passes; None for a share of the calibration's in each
    sweep_tokens: int | None
    sets: int  # sets of calibration windows, which the blocks take in turn
    allocator: Entry[Allocator]
    allocation_options: dict[str, JsonValue]
    allocation_needs: Needs
    allocates: bool  # whether the allocation is called: it is not uniform, and something is pruned or sized
    zeros: float = 0.0  # the share of zeros in the linears of every block; 0 where the recipe chooses linears by name

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The choice of a recipe. Raises RecipeError for a wrong name or option, or a sweep that a method has not."""
        method = METHODS[recipe.method]
        options = method.check(recipe.options)
        given = next((name for name in SWEEP if getattr(recipe, name)), None)
        if method.effort is None and given is not None:
            raise RecipeError(
                f"method {recipe.method} has no sweep, so no {given}; leave it out"
            )
        scored = (
            recipe.expert_score != Recipe.model_fields["expert_score"].default
            or recipe.expert_options
        )
        if recipe.experts is None and scored:
            raise RecipeError(
                "expert_score and expert_options choose the experts to keep; give experts, or leave them out"
            )
        passes = recipe.passes
        tokens = recipe.sweep_tokens
        if tokens is not None and recipe.effort is not None:
            raise RecipeError(
                "effort and sweep_tokens both say how long the sweep is; give one of them"
            )
        if tokens is not None and passes == 0:
            raise RecipeError(
                "passes 0 leaves out the sweep, and sweep_tokens says how long it is; give one of them"
            )
        if passes is None:
            effort = recipe.effort
            if effort is None:
                effort = method.effort or 0
            passes = PASSES_BY_EFFORT[effort]
            if tokens is not None:
                passes = min(MOST_PASSES, max(1, round(tokens / PASS_TOKENS)))
        # More sets cost a forward pass each and gain most where a sweep follows.
        sets = recipe.sets
        if sets is None:
            sets = 1
            if passes:
                sets = 2
            if passes >= PASSES_BY_EFFORT[2]:
                sets = 4
        allocator = ALLOCATIONS[recipe.allocation_by(method.allocation)]
        chosen = allocator.check(recipe.allocation_options)
        prunes = recipe.sparsity != 0 or recipe.program is not None
        allocates = allocator.name != "uniform" and prunes
        allocation = (
            allocator,
            chosen,
            allocator.needs(chosen) if allocates else Needs(),
            allocates,
        )
        zeros = 0.0 if recipe.only or recipe.exclude else recipe.sparsity
        return cls(
            method,
            options,
            method.needs(options),
            passes,
            tokens,
            sets,
            *allocation,
            zeros,
        )

    @property
    def copies(self) -> int:
        """How often blocks are written: a sweep writes them again, and the walk's are kept until the end."""
        return 2 if self.passes else 1

    def windows_of_pass(self, samples: int, seq_len: int) -> int:
        """The windows of one pass of the sweep, in a run with ``samples`` calibration windows."""
        if self.sweep_tokens is None or not self.passes:
            return math.ceil(SWEEP_SHARE * samples)
        return math.ceil(self.sweep_tokens / self.passes / seq_len)

    @property
    def token_states(self) -> bool:
        """Whether hidden states must be ``(windows, seq, width)``, as for gradients and the sweep."""
        needs = (self.needs, self.allocation_needs)
        return self.passes > 0 or any(
            need.token_states or need.output_costs or need.gradient_tokens
            for need in needs
        )

    def on(
        self, patterns: Collection[Pattern], values: str, *, taught: bool = False
    ) -> Self:
        """The choice for these patterns and ``values``: output costs only where outputs compete. If no weight changes:
        no needs, and no sweep unless another model's predictions are ``taught`` in it."""
        needs = self.needs
        pruned = any(pattern.sparsity for pattern in patterns)
        if values == "keep" and not pruned:
            # No weight changes: nothing has to be compensated.
            return replace(
                self, needs=Needs(), passes=self.passes if taught else 0, sets=1
            )
        # In N:M, weights of different outputs do not compete.
        costs = (
            needs.output_costs
            and pruned
            and any(isinstance(pattern, Unstructured) for pattern in patterns)
        )
        return replace(self, needs=replace(needs, output_costs=costs))

    def trains_integers(self, recipe: Recipe) -> bool:
        """Whether a sweep trains values that are rounded when a block runs."""
        return recipe.values != "keep" and self.passes > 0

    def settings(self, recipe: Recipe) -> Options:
        """Every setting of a recipe that the bits of the result depend on, with all defaults."""
        without = {
            "memory",
            "device_memory",
            "min_tokens_per_expert",
            "products",
            "effort",
        }
        return {
            **recipe.named.model_dump(exclude=without),
            "options": self.options,
            "passes": self.passes,
            "sets": self.sets,
            "allocation": self.allocator.name,
            "allocation_options": self.allocation_options,
            "sparsity_of": [
                list(item) for item in recipe.sparsity_of.items()
            ],  # a list, because the order counts
        }

    def check_processes(self, samples: int) -> None:
        """Refuses a run that cannot be divided among the processes that were started. Raises RecipeError if the method
        or an option runs in one process only, or there are fewer windows than processes."""
        size = parallel.size()
        name = self.method.name
        option = self.needs.one_process
        if size == 1:
            return
        alone = f"runs in one process, not in {size};"
        if not self.method.distributed:
            raise RecipeError(f"method {name} {alone} start it without torchrun")
        if option:
            raise RecipeError(
                f"option {option} of {name} {alone} leave it out, or start without torchrun"
            )
        if samples < size:
            why = f"{samples} calibration windows cannot be divided among {size} processes"
            raise RecipeError(
                f"{why}; ask for {size} samples or more, or start fewer processes"
            )


def choice_for(chain: Chain, recipe: Recipe, *, taught: bool = False) -> Choice:
    """The choice of a recipe without needs that are useless for its patterns on this chain, which is ``taught`` by
    another model or not. A RecipeError or ModelError says that the two do not fit."""
    patterns = patterns_of(chain, recipe).values()
    choice = Choice.of(recipe).on(patterns, recipe.values, taught=taught)
    if choice.passes:
        check_sweepable(chain)
    return choice


def patterns_of(
    chain: Chain, recipe: Recipe, allocation: Allocation | None = None
) -> dict[str, Pattern]:
    """The pattern of every linear that will be pruned, by name: with the zeros of an allocation, or that of the recipe.

    Raises RecipeError if the pattern does not fit a weight, no linear is left to prune, or ``sparsity_of`` does not go
    with the sparsity; ModelError if a large part of a block is not in linears, which the recipe does not accept."""
    patterns: dict[str, Pattern] = {}
    sizes = sizes_of(chain, recipe)
    if allocation is None and any(linear.fixed is not None for linear in sizes):
        allocation = divide_zeros(sizes, recipe.sparsity).allocation()
    for linear in sizes:
        zeros = None
        if allocation is not None:
            zeros = allocation.zeros[linear.name]
        patterns[linear.name] = recipe.pattern_of(linear.weights, zeros)
        patterns[linear.name].validate(linear.shape, f"{linear.name}.weight")
    if not patterns:
        named = [
            f"{field} {value}"
            for field in ("only", "exclude")
            if (value := getattr(recipe, field))
        ]
        who = " with ".join(named) or "the model"
        raise RecipeError(
            f"{who} leaves nothing to prune; `sparsellm inspect` lists the names of linears"
        )
    if all(pattern.sparsity == 1 for pattern in patterns.values()):
        raise RecipeError(
            f"sparsity {recipe.sparsity} would make every weight 0; choose a lower one"
        )
    _check_groups(sizes, recipe.grid)
    if recipe.sparsity:  # at 0, no pruning was requested
        refuse_silent_dense(chain, [*recipe.exclude, *recipe.allow_dense], recipe.only)
    return patterns


def _check_groups(sizes: list[LinearSize], name: str) -> None:
    """Raises RecipeError for another program's grid whose groups do not divide a linear's inputs, and names another."""
    if name not in GRIDS:
        return
    odd = next((linear for linear in sizes if not _has_groups(linear, name)), None)
    if odd is None:
        return
    grid = grid_for(name, odd.shape[1])
    fits = [
        other.name
        for other in GRIDS.values()
        if (other.form, other.bits) == (grid.form, grid.bits)
        and other.group
        and all(_has_groups(linear, other.name) for linear in sizes)
    ]
    advice = "leave it out (exclude), or take grid own"
    if fits:
        advice = f"take grid {fits[0]}"
    raise RecipeError(
        f"grid {grid.name} has groups of {grid.group}, which do not divide the {odd.shape[1]} inputs of {odd.name}; "
        f"{advice}"
    )


def _has_groups(linear: LinearSize, name: str) -> bool:
    """Whether the groups of a grid divide a linear's inputs."""
    columns = linear.shape[1]
    group = grid_for(name, columns).group
    return not group or columns % group == 0


def sizes_of(chain: Chain, recipe: Recipe) -> list[LinearSize]:
    """The linears to prune, in the order of the chain, with the zeros that the last match of ``sparsity_of`` fixes."""
    sizes = []
    for index in range(len(chain)):
        for linear in chain.linears(index):
            if is_excluded(linear.weight_name, recipe.exclude, recipe.only):
                continue
            shape = (linear.out_features, linear.in_features)
            given = [
                value
                for glob, value in recipe.sparsity_of.items()
                if matches(linear.weight_name, [glob])
            ]
            fixed = None
            if given:
                fixed = round(given[-1] * math.prod(shape))
            sizes.append(LinearSize(linear.name, index, shape, fixed))
    return sizes
