"""Local solvers as methods: each linear is pruned by itself, on the inputs that the pruned blocks before it produce."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

from sparsellm.method.blocks.routed import prune_experts
from sparsellm.method.blocks.task import BlockTask, Method
from sparsellm.method.gram import Fit, Gram
from sparsellm.method.solvers import Solver
from sparsellm.method.solvers.prepared import prepared
from sparsellm.model import LinearView
from sparsellm.model.experts import without_experts
from sparsellm.registry import Entry


def from_solver(entry: Entry[Solver]) -> Entry[Method]:
    """The method of a solver, with its name, options and paper: one pass collects all statistics of a block."""

    def prune_block(task: BlockTask, **options: Any) -> None:
        solver = partial(prepared(entry, task.stream.chain.products), **options)

        def solve(linear: LinearView, gram: Gram, fit: Fit | None = None) -> None:
            task.report(linear.name.rpartition(".")[2])
            task.solve(linear, solver, gram)

        # Experts come first: their inputs come from linears that are not pruned yet.
        prune_experts(task, solve)
        task.report("statistics")
        task.prune_each(task.statistics(without_experts(task.linears)), solve)

    return replace(cast(Entry[Method], entry), function=prune_block, distributed=True)
