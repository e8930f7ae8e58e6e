"""The block that a method prunes, with its inputs, and the results of its linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparsellm import machine
from sparsellm.chain import LinearView, Stream
from sparsellm.chain.capture import InputGroups, RunOrder, skipping, watch
from sparsellm.chain.experts import ExpertLinear
from sparsellm.patterns import NM, Pattern, count_zeros
from sparsellm.progress import PhaseClock
from sparsellm.records import LinearResult, Step
from sparsellm.registry import Registry
from sparsellm.solvers import Solution
from sparsellm.solvers.rounding import rounded
from sparsellm.statistics import Gram, GramAccumulator
from sparsepack.codes import text_of_exponents
from sparsepack.grid import INTEGERS

# glibc maps separate pages for tensors above 32 MiB, which cannot use the holes of smaller ones in the heap (0.1 GB in
# a block of a 7B), so the heap is trimmed after them; after every solve, that took a third of the solver's time.
OWN_PAGES = 32 << 20
UNREACHED = "pruned by magnitude: no calibration token reached it"  # note in the result of such a linear


@dataclass
class BlockTask:
    """One block, loaded, with the hidden states that enter it. A method prunes its linears in place.

    Attributes:
        index: the number of the block, from 0.
        linears: the linears to prune.
        patterns: by name, the pattern of each.
        stream: the hidden states of the pruned model that enter the block.
        report: called with a short text at each step of the method.
        clock: counts the seconds of ``statistics`` and ``solve``, which are parts of the phase ``prune``.
        results: one for each linear done.
        history: by name, one record per iteration for linears that were pruned iteratively.
        notes: by name, messages to the user next to those of the solver.
        routed: by name, the number of tokens that were routed to the linears of experts.
        output_costs: ``E[g_i²]`` of every output of each linear, ``(out,)``: the cost of an error there to the loss, to
            second order. For methods that need them.
        values: the type of the kept values: ``keep``, ``int8``, ``int4`` or ``int3``.
        unrounded: by name, the weights from which training goes on, in the storage dtype; they round to the assigned
            ones. Filled if values are rounded and ``trained`` is set.
        trained: whether a sweep follows.
        exponents: by name, the exponents of the columns of rounded linears, as in their results.
    """

    index: int
    linears: list[LinearView]
    patterns: dict[str, Pattern]
    stream: Stream
    report: Callable[[str], None]
    clock: PhaseClock
    results: list[LinearResult] = field(default_factory=list)
    history: dict[str, list[Step]] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    output_costs: Mapping[str, Tensor] = field(default_factory=dict)
    values: str = "keep"
    unrounded: dict[str, Tensor] = field(default_factory=dict)
    trained: bool = False
    exponents: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Runs the block on every batch, to call the hooks on its linears."""
        for _ in self.stream.run(self.index):
            pass

    def statistics(
        self, linears: list[LinearView] | None = None, token_weights: list[Tensor] | None = None
    ) -> list[tuple[list[LinearView], Gram]]:
        """Groups of linears that share an input, each with the Gram matrix of that input, from one pass of the block.

        The tokens are those of all processes. A linear that no calibration token reaches (an expert without tokens, a
        module that is never called) is left out; see :meth:`finish`.

        Args:
            linears: the linears to include; None for all that are to be pruned.
            token_weights: ``(batch, seq)`` for each batch. Not used for linears that do not get every token, since
                theirs cannot be identified; stacked experts are left to :mod:`sparsellm.methods.routed`.
        """
        linears = self.linears if linears is None else linears
        device, everything = self.stream.chain.device, self.stream.chain.linears(self.index)
        accumulators: dict[str, GramAccumulator] = {}
        grouping = InputGroups()
        order = RunOrder()
        position = 0

        def see(linear: LinearView, inputs: Tensor, _: Tensor) -> None:
            if grouping.add(linear, inputs):
                if linear.name not in accumulators:
                    accumulators[linear.name] = GramAccumulator(linear.in_features, device)
                weights = token_weights[position] if token_weights is not None else None
                whole = weights is not None and weights.numel() == inputs.shape[:-1].numel()
                accumulators[linear.name].update(inputs, weights if whole else None)

        with self.clock.phase("prune/statistics"):
            with watch(everything, lambda linear, *_: order.see(linear)), watch(linears, see):
                self.stream.run_batch(self.index, 0)
            grouping.freeze()
            unread = order.unread(everything, inputs=linears, outputs=[])
            with watch(linears, see), skipping(unread):
                for position in range(1, len(self.stream)):
                    self.stream.run_batch(self.index, position)
            groups = grouping.agreed(linears)
            for head, *_ in groups:
                accumulators.setdefault(head.name, GramAccumulator(head.in_features, device)).reduce()
        return [(group, accumulators.pop(group[0].name).finish()) for group in groups]

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done: no zeros and no rounding."""
        return self.values not in INTEGERS and not any(self.patterns[each.name].sparsity for each in self.linears)

    def accept(
        self, linear: LinearView, solution: Solution, gram: Gram | None = None, wanted: Tensor | None = None
    ) -> LinearResult:
        """Assigns a solution to a linear and returns its result, which replaces an earlier one of the same linear.

        Args:
            linear: the linear.
            solution: its pruned weight; if the recipe asks for integers, its values are rounded here.
            gram: the Gram matrix of its inputs, for the rounding; None to take it in a run of the block.
            wanted: the weight that the solution approximates; None for the current one.
        """
        if self.values in INTEGERS:
            solution = self._rounded(linear, solution, gram, wanted)
        linear.assign(solution.weight)
        self.results[:] = [result for result in self.results if result.name != linear.name]
        result = LinearResult(
            name=linear.name,
            shape=(linear.out_features, linear.in_features),
            zeros=count_zeros(linear.parameter),
            asked=self.patterns[linear.name].sparsity,
            error=solution.error,
            notes=solution.notes,
        )
        self.results.append(result)
        if solution.weight.nbytes >= OWN_PAGES:
            machine.trim()
        return result

    def _rounded(self, linear: LinearView, solution: Solution, gram: Gram | None, wanted: Tensor | None) -> Solution:
        """The solution with its values on the grid of the packed type, and the error that it then has."""
        if gram is None:  # experts get inputs of their own, which a pass does not tell apart
            own = [] if isinstance(linear.module, ExpertLinear) else self.statistics([linear])
            gram = own[0][1] if own else Gram(torch.eye(linear.in_features, device=solution.weight.device), 1)
        wanted = linear.weight() if wanted is None else wanted
        with self.clock.phase("prune/rounding"):
            fixed = isinstance(self.patterns[linear.name], NM)
            found = rounded(solution.weight, gram, self.values, linear.storage_dtype, fixed_mask=fixed)
            energy, lost = gram.energy(wanted), gram.energy(found.weight, minus=wanted)
        self.exponents[linear.name] = text_of_exponents(found.exponents)
        if self.trained and not self.stream.chain.is_shared(linear.weight_name):  # later blocks run on a shared one
            self.unrounded[linear.name] = found.unrounded.to(linear.storage_dtype)
        return replace(
            solution,
            weight=found.weight,
            mask=found.weight != 0,
            error=lost / energy if energy > 0 else 0.0,
            notes=(*solution.notes, *found.notes),
        )

    def finish(self) -> list[LinearResult]:
        """The results of all linears.

        A linear that no calibration token reached is pruned by magnitude to its pattern; its result has a note on it.
        """
        done = {result.name for result in self.results}
        for linear in self.linears:
            if linear.name not in done:
                self._by_magnitude(linear)
        weights = {linear.name: linear.parameter for linear in self.linears}  # zeros by rounding included
        return [
            result.model_copy(
                update={
                    "zeros": count_zeros(weights[result.name]),
                    "notes": (*result.notes, *self.notes.get(result.name, ())),
                    "history": tuple(self.history.get(result.name, ())),
                    "tokens": self.routed.get(result.name),
                    "pattern": str(pattern) if isinstance(pattern := self.patterns[result.name], NM) else None,
                    "exponents": self.exponents.get(result.name, ""),
                }
            )
            for result in self.results
        ]

    def _by_magnitude(self, linear: LinearView) -> None:
        """Prunes a linear that got no input, by its weights alone. Its error is 0, since it has no outputs."""
        pattern, weight = self.patterns[linear.name], linear.weight()
        if pattern.sparsity:
            weight = weight * pattern.mask(weight.abs())
        rounds = self.values in INTEGERS
        gram = Gram(torch.eye(linear.in_features, device=weight.device), 1) if rounds else None
        solution = Solution(weight, weight != 0, 0.0, (UNREACHED,) if pattern.sparsity else ())
        result = self.accept(linear, solution, gram, weight)
        self.results[-1] = result.model_copy(update={"error": 0.0, "notes": solution.notes})


Method = Callable[..., None]
"""``method(task, **options)`` prunes the linears of one block in place and adds to ``task.results``."""

METHODS: Registry[Method] = Registry("method")
