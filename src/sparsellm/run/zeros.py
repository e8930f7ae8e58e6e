"""The linears that a recipe prunes, and their patterns."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sparsellm.allocation import Allocation, LinearSize
from sparsellm.allocation.fixed import divide
from sparsellm.chain import Chain, LinearView
from sparsellm.chain.matrices import is_excluded, matches, refuse_silent_dense
from sparsellm.errors import RecipeError
from sparsellm.patterns import Pattern
from sparsellm.recipe import Recipe


def patterns_of(chain: Chain, recipe: Recipe, allocation: Allocation | None = None) -> dict[str, Pattern]:
    """The pattern of every linear that will be pruned, by name: with the zeros of an allocation, or that of the recipe.

    Raises:
        RecipeError: the pattern does not fit a weight, no linear is left to prune, or ``sparsity_of`` does not go with
            the sparsity.
        ModelError: a large part of a block is not in linears, and the recipe does not accept that it stays dense.
    """
    patterns: dict[str, Pattern] = {}
    sizes = sizes_of(chain, recipe)
    if allocation is None and any(linear.fixed is not None for linear in sizes):
        allocation = divide(sizes, recipe.sparsity).allocation()
    for linear in sizes:
        zeros = allocation.zeros[linear.name] if allocation is not None else None
        patterns[linear.name] = recipe.pattern_of(linear.weights, zeros)
        patterns[linear.name].validate(linear.shape, f"{linear.name}.weight")
    if not patterns:
        named = [f"{field} {value}" for field in ("only", "exclude") if (value := getattr(recipe, field))]
        who = " with ".join(named) or "the model"
        raise RecipeError(f"{who} leaves nothing to prune; `sparsellm inspect` lists the names of linears")
    if recipe.sparsity:  # at 0, no pruning was requested
        refuse_silent_dense(chain, [*recipe.exclude, *recipe.allow_dense], recipe.only)
    return patterns


def sizes_of(chain: Chain, recipe: Recipe) -> list[LinearSize]:
    """The linears to prune, in the order of the chain, with the zeros that ``sparsity_of`` fixes: the last of its
    patterns that match counts."""
    sizes = []
    for index, linear in _pruned(chain, recipe):
        shape = (linear.out_features, linear.in_features)
        given = [value for glob, value in recipe.sparsity_of.items() if matches(linear.weight_name, [glob])]
        fixed = round(given[-1] * math.prod(shape)) if given else None
        sizes.append(LinearSize(linear.name, index, shape, fixed))
    return sizes


def unmatched(chain: Chain, recipe: Recipe) -> list[str]:
    """A warning for each pattern of ``sparsity_of`` that matches no pruned linear."""
    names = [linear.weight_name for _, linear in _pruned(chain, recipe)]
    return [
        f"sparsity_of {glob!r} matches no pruned linear"
        for glob in recipe.sparsity_of
        if not any(matches(name, [glob]) for name in names)
    ]


def _pruned(chain: Chain, recipe: Recipe) -> Iterator[tuple[int, LinearView]]:
    """Each linear that is pruned, with the number of its block."""
    for index in range(len(chain)):
        for linear in chain.linears(index):
            if not is_excluded(linear.weight_name, recipe.exclude, recipe.only):
                yield index, linear
