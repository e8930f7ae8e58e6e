"""The block that a method prunes, with its inputs, and the results of its linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from sparsellm.chain import LinearView, Stream
from sparsellm.chain.capture import InputGroups, RunOrder, skipping, watch
from sparsellm.machine import heap
from sparsellm.patterns import Pattern
from sparsellm.progress import PhaseClock
from sparsellm.registry import Registry
from sparsellm.solvers import Solution
from sparsellm.statistics import Gram, GramAccumulator
from sparsellm.storage.writer import count_zeros

# glibc maps separate pages for tensors above 32 MiB. Weights that large cannot use the holes that smaller tensors leave
# in the heap (0.1 GB in a block of a 7B), so the heap is trimmed after each of them. Smaller weights do use the holes,
# and trimming after every solve took a third of the solver's time on the demo model.
OWN_PAGES = 32 << 20
UNREACHED = "pruned by magnitude: no calibration token reached it"  # note in the result of such a linear


@dataclass(frozen=True)
class LinearResult:
    """The result of one linear.

    Attributes:
        name: the module's name in the model.
        shape: ``(out, in)``.
        zeros: zeros in the stored weight.
        asked: the requested fraction of zeros.
        error: ‖X Wᵀ − X W_denseᵀ‖² / ‖X W_denseᵀ‖² on the calibration inputs that the method fitted to.
        notes: messages to the user, such as a damping that had to be raised.
        history: one record for each iteration, for methods that iterate.
        tokens: the number of calibration tokens that were routed to it, if it belongs to an expert; else None.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    asked: float
    error: float
    notes: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    tokens: int | None = None

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.shape[0] * self.shape[1])

    def to_dict(self) -> dict[str, Any]:
        lists = {"shape": list(self.shape), "notes": list(self.notes), "history": list(self.history)}
        return {**asdict(self), **lists, "sparsity": self.sparsity}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LinearResult:
        """The inverse of :meth:`to_dict`, also after JSON."""
        known = {each.name: values.get(each.name, each.default) for each in fields(cls)}
        return cls(
            **{
                **known,
                "shape": tuple(known["shape"]),
                "notes": tuple(known["notes"]),
                "history": tuple(known["history"]),
            }
        )


@dataclass
class BlockTask:
    """One block, loaded, with the hidden states that enter it. A method prunes its linears in place.

    Attributes:
        index: the number of the block, from 0.
        linears: the linears to prune.
        patterns: the pattern of each, by name.
        stream: the hidden states of the pruned model that enter the block.
        report: called with a short text at each step of the method.
        clock: counts the seconds of ``statistics`` and ``solve``, which are parts of the phase ``prune``.
        results: one for each linear done.
        history: by name, one record per iteration for linears that were pruned iteratively.
        notes: by name, messages to the user beside those of the solver.
        routed: by name, the number of tokens that were routed to the linears of experts.
        output_costs: ``E[g_i²]`` of every output of each linear, ``(out,)``: the cost of an error there to the loss, to
            second order. For methods that need them.
    """

    index: int
    linears: list[LinearView]
    patterns: dict[str, Pattern]
    stream: Stream
    report: Callable[[str], None]
    clock: PhaseClock
    results: list[LinearResult] = field(default_factory=list)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    output_costs: Mapping[str, Tensor] = field(default_factory=dict)

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

        def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
            if grouping.add(linear, entering):
                if linear.name not in accumulators:
                    accumulators[linear.name] = GramAccumulator(linear.in_features, device)
                weights = token_weights[position] if token_weights is not None else None
                whole = weights is not None and weights.numel() == entering.shape[:-1].numel()
                accumulators[linear.name].update(entering, weights if whole else None)

        with self.clock.phase("prune/statistics"):
            with watch(everything, lambda linear, entering, leaving: order.see(linear)), watch(linears, see):
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

    def accept(self, linear: LinearView, solution: Solution) -> LinearResult:
        """Assigns a solution to a linear and returns its result, which replaces an earlier one of the same linear."""
        linear.assign(solution.weight)
        self.results = [result for result in self.results if result.name != linear.name]
        result = LinearResult(
            linear.name,
            (linear.out_features, linear.in_features),
            count_zeros(linear.parameter),
            self.patterns[linear.name].sparsity,
            solution.error,
            solution.notes,
        )
        self.results.append(result)
        if solution.weight.nbytes >= OWN_PAGES:
            heap.trim()
        return result

    def finish(self) -> list[LinearResult]:
        """The results of all linears.

        A linear that no calibration token reached is pruned by magnitude to its pattern; its result has a note on it.
        """
        done = {result.name for result in self.results}
        for linear in self.linears:
            if linear.name not in done:
                self.results.append(self._by_magnitude(linear))
        weights = {linear.name: linear.parameter for linear in self.linears}  # zeros by rounding included
        return [
            replace(
                result,
                zeros=count_zeros(weights[result.name]),
                notes=(*result.notes, *self.notes.get(result.name, ())),
                history=tuple(self.history.get(result.name, ())),
                tokens=self.routed.get(result.name),
            )
            for result in self.results
        ]

    def _by_magnitude(self, linear: LinearView) -> LinearResult:
        """Prunes a linear that got no input, by its weights alone. Its error is 0, since it has no outputs."""
        pattern, weight = self.patterns[linear.name], linear.weight()
        notes: tuple[str, ...] = ()
        if pattern.sparsity:
            linear.assign(weight * pattern.mask(weight.abs()))
            notes = (UNREACHED,)
        shape = (linear.out_features, linear.in_features)
        return LinearResult(linear.name, shape, count_zeros(linear.parameter), pattern.sparsity, 0.0, notes)


Method = Callable[..., None]
"""``method(task, **options)`` prunes the linears of one block in place and adds to ``task.results``."""

METHODS: Registry[Method] = Registry("method")
