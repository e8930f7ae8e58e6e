"""Local solvers as methods: each linear is pruned by itself, on the inputs that the pruned blocks before it produce."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

from sparsellm import parallel
from sparsellm.method.blocks.routed import prune_experts, without_experts
from sparsellm.method.blocks.task import BlockTask, Method
from sparsellm.method.gram import Fit, Gram
from sparsellm.method.solvers import Solver, rounding
from sparsellm.method.solvers.divided import divide
from sparsellm.model import LinearView
from sparsellm.registry import Entry


def from_solver(entry: Entry[Solver]) -> Entry[Method]:
    """The method of a solver, with its name, options and paper: one pass collects all statistics of a block."""

    def prune_block(task: BlockTask, **options: Any) -> None:
        solver = partial(divide(entry, task.stream.chain.products), **options)

        def solve(linear: LinearView, gram: Gram, fit: Fit | None = None) -> None:
            task.report(linear.name.rpartition(".")[2])
            task.solve(linear, solver, gram)

        prune_experts(
            task, solve
        )  # first: their inputs come from linears that are not pruned yet
        task.report("statistics")
        statistics = dict(enumerate(task.statistics(without_experts(task.linears))))
        groups = [group for group, _ in statistics.values()]

        def solve_group(number: int) -> None:
            group, gram = statistics.pop(
                number
            )  # frees each Gram matrix after use; the widest inputs come last
            for linear in group:
                solve(linear, gram)

        # A process for each group, if that takes less time than that one process of each machine factorises and each
        # solves some rows of every weight.
        remembered = entry.factorisations
        count = entry.products
        if task.values != "keep":
            remembered = max(remembered, rounding.FACTORISATIONS)
            count += rounding.PRODUCTS
        factors = [2.0 * remembered * group[0].in_features ** 3 for group in groups]
        products = [
            count * sum(x.out_features * x.in_features**2 for x in group)
            for group in groups
        ]
        owners, longest = parallel.greedy(
            [
                factor + product
                for factor, product in zip(factors, products, strict=True)
            ]
        )
        if longest <= sum(factors) + sum(products) / parallel.size():
            statistics = {
                number: statistics[number]
                for number, owner in enumerate(owners)
                if owner == parallel.rank()
            }
            task.share_out(groups, owners, solve_group)
        else:
            for number in range(len(groups)):
                solve_group(number)

    return replace(cast(Entry[Method], entry), function=prune_block, distributed=True)
