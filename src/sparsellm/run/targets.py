"""The survey of the dense model: gradients of its loss for whoever asks, then the allocation of all zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from sparsellm.allocation import Allocation, LinearSize, Survey
from sparsellm.allocation.allocator import in_groups
from sparsellm.allocation.fixed import divide
from sparsellm.chain import Feed
from sparsellm.patterns import Pattern
from sparsellm.progress import PhaseClock
from sparsellm.run.choice import patterns_of, sizes_of
from sparsellm.run.fingerprint import tokens_fingerprint
from sparsellm.run.journal import Journal
from sparsellm.run.plan import Plan
from sparsellm.sweep.gradients import LEAST_WINDOWS, TOKENS, LossGradients, loss_gradients


@dataclass(frozen=True)
class Targets:
    """What the walk aims at: by the name of a linear, its pattern and ``E[g_i²]`` of its outputs (empty if the method
    needs none); and the zeros that an allocation chose (None for uniform ones)."""

    patterns: dict[str, Pattern]
    costs: dict[str, Tensor]
    allocation: Allocation | None


def survey(plan: Plan, feed: Feed, journal: Journal, walked: bool, clock: PhaseClock) -> Targets:
    """The targets of a run. A resumed run takes those of its first start from the journal.

    Args:
        plan: the plan of the run.
        feed: the calibration windows of all processes.
        journal: keeps what the survey finds.
        walked: whether all blocks are pruned already, so that output costs are not needed.
        clock: counts the seconds.
    """
    choice, sizes = plan.choice, sizes_of(plan.chain, plan.recipe)
    feed = replace(feed, blocks=plan.model.start)
    allocation = journal.allocation() if choice.allocates else None
    costs = journal.output_costs() if choice.needs.output_costs and not walked else {}
    allocates = choice.allocates and allocation is None
    saliency = allocates and choice.allocation_needs.gradient_tokens > 0
    gradients: LossGradients | None = None
    if saliency or costs is None:
        with clock.phase("gradients"):
            tokens = choice.allocation_needs.gradient_tokens or TOKENS
            gradients = _gradients(plan, feed.first(tokens, LEAST_WINDOWS), sizes, saliency)
        if choice.needs.output_costs:
            costs = gradients.output_squares
            journal.keep_output_costs(costs)  # first: a saved allocation implies saved costs
    if allocates:
        with clock.phase("allocation"):
            allocation = _allocate(plan, feed, sizes, gradients)
            journal.keep_allocation(allocation)
    return Targets(patterns_of(plan.chain, plan.recipe, allocation), costs or {}, allocation)


def _gradients(plan: Plan, feed: Feed, sizes: list[LinearSize], saliency: bool) -> LossGradients:
    names = frozenset(size.name for size in sizes)
    who = (plan.identity.model, plan.identity.start, plan.identity.computing)
    key = (*who, tokens_fingerprint(feed.windows), names, saliency)
    return plan.request.once(key, partial(loss_gradients, feed, names, saliency=saliency))


def _allocate(plan: Plan, feed: Feed, sizes: list[LinearSize], gradients: LossGradients | None) -> Allocation:
    """The allocation of all zeros: fixed ones by the recipe, the others by the allocation that it names."""
    parts = divide(sizes, plan.recipe.sparsity)
    if not parts.free:
        return parts.allocation()
    allocate = plan.choice.allocator.function
    surveyed = Survey(feed, parts.free, parts.sparsity, parts.zeros, gradients)
    found = parts.allocation(allocate(surveyed, **plan.choice.allocation_options))
    m = plan.recipe.chosen_of
    return found if m is None else in_groups(found, parts.free, m, parts.zeros)
