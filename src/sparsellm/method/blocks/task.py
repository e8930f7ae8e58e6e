"""The block that a method prunes, with its inputs, and the results of its linears."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from sparsellm import machine, parallel
from sparsellm.errors import NumericalError
from sparsellm.method.blocks.statistics import Statistics, naming
from sparsellm.method.gram import Fit, Gram
from sparsellm.method.solvers import Solution, Solver
from sparsellm.method.solvers.rounding import Rounded, rounded
from sparsellm.method.solvers.scaling import safe_factor
from sparsellm.model import LinearView, Stream
from sparsellm.model.capture import Group, RunOrder, skipping, watch
from sparsellm.model.experts import ExpertLinear
from sparsellm.model.weights import require_storable
from sparsellm.patterns import NM, Pattern, count_zeros
from sparsellm.progress import PhaseClock
from sparsellm.records import KEEP, Iteration, LinearResult
from sparsellm.registry import Registry
from sparsepack.codes import text_of_exponents

# glibc maps separate pages for tensors above 32 MiB, which cannot use the holes of smaller ones in the heap (0.1 GB in
# a block of a 7B), so the heap is trimmed after them; after every solve, that took a third of the solver's time.
OWN_PAGES = 32 << 20
LOST = 0.01  # the most kept weights, as a fraction of all, that may be too small for the dtype of the checkpoint
COARSE = 0.1  # a linear whose error grows by more than this in rounding is named; a round number, not measured
ROUNDING = "rounding to"  # how the note of such a linear begins
UNREACHED = "pruned by magnitude: no calibration token reached it, or all its inputs were 0"  # note in such a result

T = TypeVar("T")


@dataclass
class BlockTask:
    """One block, loaded, with the hidden states that enter it. A method prunes its linears in place.

    Keys of the mappings are names of linears. ``output_costs`` are ``E[g_i²]`` of every output of each linear,
    ``(out,)``: the cost of an error there to the loss, to second order. ``unrounded`` are the weights, in the storage
    dtype, from which training goes on if values are rounded and ``trained`` is set; they round to the assigned ones."""

    index: int  # from 0
    linears: list[LinearView]  # to be pruned
    patterns: dict[str, Pattern]
    stream: Stream  # the hidden states of the pruned model that enter the block
    report: Callable[[str], None]  # called with a short text at each step of the method
    clock: PhaseClock  # counts the seconds of the parts of the phase prune, such as statistics, solve and rounding
    # one for each linear done
    results: list[LinearResult] = field(default_factory=list)
    # to the user, next to those of the solver
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # tokens that were routed to the linears of experts
    routed: dict[str, int] = field(default_factory=dict)
    # empty for methods that do not need them
    output_costs: Mapping[str, Tensor] = field(default_factory=dict)
    # what values are rounded to: an integer type or the name of a grid; keep for linears without one
    values_of: Mapping[str, str] = field(default_factory=dict)
    unrounded: dict[str, Tensor] = field(default_factory=dict)
    trained: bool = False  # whether a sweep follows

    def note(self, linear: LinearView, text: str) -> None:
        """Tells the user something about the pruning of a linear, next to what was said before."""
        self.notes[linear.name] = (*self.notes.get(linear.name, ()), text)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done: no zeros and no rounding."""
        return not any(map(self.changes, self.linears))

    def rounds(self, linear: LinearView) -> bool:
        """Whether the values of a linear are rounded."""
        return self.values_of.get(linear.name, KEEP) != KEEP

    def changes(self, linear: LinearView) -> bool:
        """Whether a linear gets zeros or rounded values."""
        return self.rounds(linear) or self.patterns[linear.name].sparsity > 0

    def statistics(
        self, linears: list[LinearView], token_weights: list[Tensor] | None = None
    ) -> list[tuple[Group, Gram]]:
        """Groups of linears that share an input, each with the Gram matrix of that input, from one run of the block.

        The tokens are those of all processes. A linear that no calibration token reaches is left out, see
        ``finish``; experts are in ``sparsellm.method.blocks.routed``. ``token_weights`` are
        ``(batch, seq)`` for each batch; for a linear that does not get every token all weights are 1, since it is
        not known which it gets."""
        everything = self.stream.chain.linears(self.index)
        statistics = Statistics(linears, self.stream.chain.device)
        order = RunOrder()
        position = 0

        def see(linear: LinearView, inputs: Tensor, _: Tensor) -> None:
            weights = token_weights[position] if token_weights is not None else None
            statistics.see(linear, inputs, weights)

        with self.clock.phase("prune/statistics"):
            with (
                watch(everything, lambda linear, *_: order.append(linear.name)),
                watch(linears, see),
            ):
                self.stream.run_batch(self.index, 0)
            statistics.grouping.freeze()
            with (
                watch(linears, see),
                skipping(order.unread(everything, inputs=linears, outputs=[])),
            ):
                for position in range(1, len(self.stream)):
                    self.stream.run_batch(self.index, position)
            groups = statistics.reduce()
        return statistics.finish(groups)

    def solve(
        self, linear: LinearView, solver: Solver, gram: Gram, fit: Fit | None = None
    ) -> None:
        """Prunes the weight of a linear, or its refitted weight if there is one, and assigns the result. One whose
        inputs were all 0 is left to ``finish``."""
        if bool(gram.dead.all()):
            return
        fit = Fit(linear.weight()) if fit is None else fit
        with self.clock.phase("prune/solve"), naming(linear.name):
            solution = solver(fit.weight, gram, self.patterns[linear.name])
        self.accept(
            linear,
            fit.weight,
            replace(solution, notes=(*fit.notes, *solution.notes)),
            gram,
        )

    def prune_each(
        self, statistics: list[tuple[Group, T]], prune: Callable[[LinearView, T], None]
    ) -> None:
        """Calls ``prune`` with every linear and the statistics of its group, in the process that owns the linear: the
        longest work goes first, each to the process with the least to do. See ``share_out``. A caller that keeps no
        statistics frees each with its last use."""
        pairs = [(linear, known) for group, known in statistics for linear in group]
        linears = [linear for linear, _ in pairs]
        owners = parallel.greedy(
            [linear.out_features * linear.in_features**2 for linear in linears]
        )
        needed = {
            number: known
            for number, (_, known) in enumerate(pairs)
            if owners[number] == parallel.rank()
        }
        del statistics, pairs
        self.share_out(
            [[linear] for linear in linears],
            owners,
            lambda number: prune(linears[number], needed.pop(number)),
        )

    def share_out(
        self,
        groups: Sequence[Group],
        owners: Sequence[int],
        prune: Callable[[int], None],
    ) -> None:
        """Calls ``prune`` with the number of each group of linears in the process that owns the group, as if it were
        the only one. Then all have its weights, biases and results, in the order of the groups. An error is raised in
        all."""
        first = len(self.results)
        me = parallel.rank()

        def prune_owned() -> None:
            with parallel.alone():
                for number, (group, owner) in enumerate(
                    zip(groups, owners, strict=True)
                ):
                    if group and owner == me:
                        prune(number)

        parallel.together(prune_owned)
        if parallel.size() == 1:
            return
        everything = parallel.gather((self.results[first:], [*self.unrounded]))
        results = {result.name: result for made, _ in everything for result in made}
        del self.results[first:]
        for group, owner in zip(groups, owners, strict=True):
            for linear in group:
                if isinstance(linear.module.bias, Tensor):
                    _receive(linear.module.bias, owner)
                if linear.name not in results:
                    continue
                self.results.append(results[linear.name])
                _receive(linear.parameter, owner)
                if linear.name in everything[owner][1]:
                    empty = torch.empty(
                        results[linear.name].shape,
                        dtype=linear.storage_dtype,
                        device=linear.parameter.device,
                    )
                    kept = self.unrounded.get(linear.name, empty)
                    self.unrounded[linear.name] = parallel.broadcast_(
                        kept.contiguous(), owner
                    )

    def accept(
        self,
        linear: LinearView,
        dense: Tensor,
        solution: Solution,
        gram: Gram | None,
        history: tuple[Iteration, ...] = (),
    ) -> None:
        """Assigns the solution for a weight ``dense (out, in)`` to a linear, with its values rounded if the recipe asks
        for integers, and adds a result. ``gram`` is that of the linear's inputs. If it is None, the rounding runs the
        block, and the result keeps the solution's error. NumericalError if values cannot be rounded or stored."""
        pattern = self.patterns[linear.name]
        weight = solution.weight
        error = solution.error
        notes = solution.notes
        exponents = ""
        values = self.values_of.get(linear.name, KEEP)
        if values != KEEP:
            if (factor := safe_factor(weight)) != 1:
                raise NumericalError(
                    f"{linear.name}: its weights are near 2^{-math.log2(factor):.0f}, too far from 1 to be rounded; "
                    "give values keep, or leave it out (exclude)"
                )
            grid, before, after = self._rounded(linear, dense, solution, gram)
            error = error if gram is None else after
            weight = grid.weight
            notes = (*notes, *grid.notes)
            exponents = text_of_exponents(grid.exponents)
            if after > before + COARSE:
                more = f"raised its error from {before:.3f} to"
                if gram is None:
                    more = "added an error of"
                notes = (*notes, f"{ROUNDING} {values} {more} {after:.3f}")
        linear.assign(weight)
        # later passes would name the linears that read its outputs
        if linear.storage_dtype is torch.float16:
            require_storable(linear.parameter, linear.weight_name, linear.storage_dtype)
        zeros = count_zeros(linear.parameter)
        if gram is not None and values == KEEP:
            _check_kept(linear, zeros, dense, solution.mask, gram)
        self.results.append(
            LinearResult(
                name=linear.name,
                shape=(linear.out_features, linear.in_features),
                zeros=zeros,
                asked=pattern.sparsity,
                error=error,
                notes=(*notes, *self.notes.get(linear.name, ())),
                history=history,
                tokens=self.routed.get(linear.name),
                pattern=str(pattern) if isinstance(pattern, NM) else None,
                exponents=exponents,
                values=values,
            )
        )
        if weight.nbytes >= OWN_PAGES:
            machine.trim()

    def _rounded(
        self, linear: LinearView, dense: Tensor, solution: Solution, gram: Gram | None
    ) -> tuple[Rounded, float, float]:
        """A pruned weight on its grid, and its errors before and after it is rounded."""
        if gram is None:
            # experts get inputs of their own, which a pass does not tell apart
            expert = isinstance(linear.module, ExpertLinear)
            taken = [] if expert else self.statistics([linear])
            gram = taken[0][1] if taken else _equal_inputs(linear)
        with self.clock.phase("prune/rounding"):
            fixed = isinstance(self.patterns[linear.name], NM)
            weight = solution.weight
            target = weight if solution.fitted else dense
            grid = rounded(
                weight,
                gram,
                self.values_of[linear.name],
                linear.storage_dtype,
                fixed_mask=fixed,
                target=target,
            )
            lost = [
                gram.energy(matrix, minus=dense) for matrix in (weight, grid.weight)
            ]
            energy, *errors = torch.stack((gram.energy(dense), *lost)).tolist()
        # later blocks run on a shared one
        if self.trained and not self.stream.chain.is_shared(linear.weight_name):
            self.unrounded[linear.name] = grid.unrounded.to(linear.storage_dtype)
        before, after = (error / energy if energy > 0 else 0.0 for error in errors)
        return grid, before, after

    def finish(self) -> None:
        """Prunes by magnitude, with a note, linears that no nonzero input reached; their error before rounding is 0."""
        done = {result.name for result in self.results}
        left = [linear for linear in self.linears if linear.name not in done]

        def prune(linear: LinearView, _: None) -> None:
            pattern = self.patterns[linear.name]
            weight = linear.weight()
            notes: tuple[str, ...] = ()
            if pattern.sparsity:
                weight = weight * pattern.mask(weight.abs())
                notes = (UNREACHED,)
            gram = _equal_inputs(linear) if self.rounds(linear) else None
            self.accept(linear, weight, Solution(weight, weight != 0, 0.0, notes), gram)

        self.prune_each([(left, None)], prune)


def _check_kept(
    linear: LinearView, zeros: int, dense: Tensor, mask: Tensor, gram: Gram
) -> None:
    """Refuses a weight with more ``zeros`` than its mask, if kept weights became 0 because they are too small for the
    dtype of the checkpoint. Those that were 0 before, and those of inputs that were 0 in every token, may be 0."""
    if zeros <= count_zeros(mask) + LOST * mask.numel():
        return
    lost = int((mask & (dense != 0) & ~gram.dead & (linear.weight() == 0)).sum())
    if lost > LOST * mask.numel():
        dtype = str(linear.storage_dtype).removeprefix("torch.")
        raise NumericalError(
            f"{linear.name}: {lost} of its {mask.numel()} weights would be kept and are too small for {dtype}; store "
            "the model in float32, or leave it out (exclude)"
        )


def _receive(parameter: Tensor, owner: int) -> None:
    """Overwrites a parameter with that of the process ``owner``."""
    values = parallel.broadcast_(parameter.detach().contiguous(), owner)
    parameter.detach().copy_(values)


def _equal_inputs(linear: LinearView) -> Gram:
    """The Gram matrix of inputs that are not known: all count alike."""
    return Gram(torch.eye(linear.in_features, device=linear.parameter.device), 1)


Method = Callable[..., None]
"""``method(task, **options)`` prunes the linears of one block in place and adds to ``task.results``."""

METHODS: Registry[Method] = Registry("method")
