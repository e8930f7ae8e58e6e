"""The published SparseLLM, for comparison: with SparseGPT as solver, and the last iterate as the result.

As in the authors' code, the statistics of a block come from one pass before any of its linears is pruned. SparseGPT
prunes attention and the experts of a mixture. The loop with ``LoopSettings.of_the_paper`` prunes
the feed-forward unit: its inputs are those from before attention was pruned, and its targets are the dense unit's
outputs on them. Differences from the authors' code: the loop computes in fp32, sums of moments and the pseudo-inverse
in fp64; every block of the model is pruned; variables are kept in chunks that may be on disk.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

from pydantic import Field
from torch import Tensor

from sparsellm.errors import ModelError, NumericalError
from sparsellm.method.auxiliary.loop import LoopSettings
from sparsellm.method.auxiliary.objective import stored
from sparsellm.method.blocks.feed_forward import alternate, current
from sparsellm.method.blocks.routed import prune_experts
from sparsellm.method.blocks.task import METHODS, BlockTask
from sparsellm.method.gram import Fit, Gram
from sparsellm.method.solvers import SOLVERS
from sparsellm.model import LinearView
from sparsellm.model.capture import watch
from sparsellm.model.experts import without_experts
from sparsellm.model.units import find_feed_forward
from sparsellm.registry import Needs


@METHODS.register(
    "sparsellm-paper",
    paper="arXiv 2402.17946",
    needs=lambda options: Needs(token_states=True),
)
def prune_as_published(
    task: BlockTask,
    *,
    epochs: Annotated[
        int, Field(ge=1), "rounds over the weights; the first is plain SparseGPT"
    ] = 4,
    safeguard: Annotated[
        bool, "keep the best epoch of each unit instead of the last"
    ] = False,
) -> None:
    """The published algorithm on the whole model, in fp32, for comparison; it may diverge."""
    if task.idle:
        return
    solver = SOLVERS["sparsegpt"].function

    def solve(linear: LinearView, gram: Gram, fit: Fit | None = None) -> None:
        task.report(linear.name.rpartition(".")[2])
        task.solve(linear, solver, gram)

    linears = without_experts(task.linears)
    units = find_feed_forward(linears, task.stream, task.index)
    for unit in units:
        if unit.gate is None and unit.activation.name != "relu":
            raise ModelError(
                f"{unit.down.name}: the published algorithm updates only ReLU in a two-layer unit, "
                f"not {unit.activation.name!r}"
            )
    inside = {
        linear.name: solver for unit in units for linear in unit.linears().values()
    }
    with ExitStack() as held:
        inputs = {
            unit.up.name: held.enter_context(task.stream.store()) for unit in units
        }

        def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
            inputs[linear.name].append(x.detach().flatten(0, -2).clone())

        with watch([unit.up for unit in units], see):
            statistics = task.statistics(linears)
        prune_experts(task, solve)
        for group, gram in statistics:
            for linear in group:
                if linear.name not in inside:
                    solve(linear, gram)
        del statistics
        for unit in units:
            settings = LoopSettings.of_the_paper(
                epochs, gated=unit.gate is not None, safeguard=safeguard
            )
            task.report("alternating")
            dense = current(unit)
            entered = inputs[unit.up.name]
            with task.clock.phase("prune/variables"), task.stream.store() as targets:
                for x in entered:
                    targets.append(dense(x.float()))
                try:
                    alternate(
                        task,
                        unit,
                        train=stored(entered, targets),
                        held_out=[],
                        solvers=inside,
                        settings=settings,
                    )
                except NumericalError as failure:
                    raise NumericalError(
                        f"{unit.down.name}: {failure}; options.epochs stops it earlier, options.safeguard=true keeps "
                        "the best epoch"
                    ) from failure
