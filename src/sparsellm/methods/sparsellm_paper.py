"""The published SparseLLM, for comparison: SparseGPT inside, the last iterate kept, whatever became of it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import watch
from sparsellm.decomposition.paper import prune_as_published
from sparsellm.errors import NumericalError
from sparsellm.methods.base import METHODS, BlockTask
from sparsellm.methods.sparsellm import feed_forward_of, find_units
from sparsellm.patterns import Pattern
from sparsellm.registry import Needs
from sparsellm.solvers import SOLVERS, Solution


@METHODS.register("sparsellm-paper", paper="arXiv 2402.17946", needs=lambda options: Needs(token_states=True))
def sparsellm_paper(
    task: BlockTask,
    *,
    epochs: Annotated[int, Field(ge=0), "rounds over the variables; 0 takes the published ones (8 or 10)"] = 0,
) -> None:
    """The published algorithm on the whole model in fp32, so that what it does can be seen; it may diverge.

    As published, the inputs of the feed-forward unit are those before the attention of the same block is pruned, the
    targets are the dense unit's on the pruned stream, and about ten copies of tokens × hidden width are in memory.
    """
    if not any(task.patterns[linear.name].sparsity for linear in task.linears):
        return
    sparsegpt = SOLVERS["sparsegpt"].function
    units = find_units(task)
    inputs: dict[str, list[Tensor]] = {unit.up.name: [] for unit in units}

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        inputs[linear.name].append(entering.detach().flatten(0, -2).float())

    with watch([unit.up for unit in units], see):
        statistics = task.statistics()
    inside = {linear.name for unit in units for linear in unit.linears()}
    with task.clock.phase("prune/solve"):
        for group, gram in statistics:
            for linear in group:
                if linear.name not in inside:
                    task.report(linear.name.rpartition(".")[2])
                    task.accept(linear, sparsegpt(linear.weight(), gram, task.patterns[linear.name]))
        for unit in units:
            task.report("alternating")
            dense, roles = feed_forward_of(unit)
            x = torch.cat(inputs[unit.up.name])  # (tokens, d)
            pattern: Pattern = task.patterns[unit.up.name]
            try:
                published = prune_as_published(dense, x, sparsegpt, pattern, epochs=epochs or None)
            except NumericalError as failure:
                raise NumericalError(f"{unit.down.name}: {failure}; options.epochs stops it earlier") from failure
            history = [{"epoch": epoch, "error": error} for epoch, error in enumerate(published.errors)]
            task.history[unit.down.name] = history
            for role, pruned in published.unit.linears().items():
                mask = pruned.weight != 0
                task.accept(roles[role], Solution(pruned.weight, mask, published.errors[-1]))
                if pruned.bias is not None:
                    roles[role].assign_bias(pruned.bias)
