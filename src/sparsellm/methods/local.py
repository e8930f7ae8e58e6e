"""Local solvers as methods: each linear is pruned by itself, on the inputs that the pruned blocks before it produce."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

from sparsellm.chain import LinearView
from sparsellm.methods.routed import prune_experts, without_experts
from sparsellm.methods.task import BlockTask, Method
from sparsellm.registry import Entry
from sparsellm.solvers import Solver
from sparsellm.solvers.divided import divide
from sparsellm.statistics import Fit, Gram


def from_solver(entry: Entry[Solver]) -> Entry[Method]:
    """The method of a solver, with its name, options and paper: it collects the statistics of a block in one pass and
    solves each linear on them."""

    def prune_block(task: BlockTask, **options: Any) -> None:
        solver = partial(divide(entry, task.stream.chain.products), **options)

        def solve(linear: LinearView, gram: Gram, fit: Fit | None = None) -> None:
            task.report(linear.name.rpartition(".")[2])
            task.solve(linear, solver, gram)

        prune_experts(task, solve)  # first: their inputs come from linears that are not pruned yet
        task.report("statistics")
        statistics = task.statistics(without_experts(task.linears))
        while statistics:
            group, gram = statistics.pop(0)  # frees each Gram matrix after use; the widest inputs come last
            for linear in group:
                solve(linear, gram)

    return replace(cast(Entry[Method], entry), function=prune_block, distributed=True)
