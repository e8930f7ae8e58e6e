"""The alternating minimisation of one feed-forward unit by auxiliary variables.

Read :func:`prune_feed_forward` first, then ``_Run.iterate``. Iteration 0 is local pruning. Each further iteration
minimises the penalty objective over the auxiliary variables, fits the first half to them, prunes it again, and fits and
prunes ``down``. The published algorithm is a setting of this loop: see :class:`Settings`.

An iteration includes pruning, so the true error may rise. With the safeguard, the error is measured after every
iteration and the best iterate is the result, which is never worse than local pruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sparsellm.decomposition import updates
from sparsellm.decomposition.objective import (
    Chunk,
    Coefficients,
    FeedForward,
    LazyChunks,
    Linear,
    Variables,
    default_coefficients,
    objective,
    squares,
    true_error,
)
from sparsellm.decomposition.updates import Moments, MomentsAccumulator
from sparsellm.errors import DataError, NumericalError
from sparsellm.patterns import Pattern
from sparsellm.solvers import Solver
from sparsellm.solvers.support import refine_on_support
from sparsellm.statistics import Fit, Gram
from sparsellm.storage.scratch import Scratch, TensorStore

REFINE_STEPS = 30  # conjugate gradients where masks come from one problem and weights from another: to the minimum
REFINE_DAMPING = 1e-3  # for directions that the tokens do not excite
ACCUMULATED_DAMPING = 0.01  # what SparseGPT adds to the stored Gram matrix in each epoch of the published code


@dataclass(frozen=True)
class Settings:
    """The settings of the loop; :meth:`of_the_paper` are those of the authors' code.

    Attributes:
        iterations: the number after the local solution, which is iteration 0.
        safeguard: keep the iterate with the least true error, on held-out tokens if there are any. False keeps the
            last, and raises an error for an iterate that is not finite.
        patience: iterations without a lower error before the loop stops, with the safeguard.
        coefficients: α, β, γ; None: :func:`~sparsellm.decomposition.objective.default_coefficients`.
        damping: ridge of the least squares towards the current weight (the dense one for ``down``), relative to the
            mean of the Gram matrix's diagonal. At 2.3 tokens per hidden unit 0.1 in place of 0.01 lowered the error of
            the local solution on held-out tokens by 6 to 9 %; 1 was too much. More tokens need less.
        published: the fit of ``down`` in the authors' code; None for ours. There the pseudo-inverse's weights of the
            first half are pruned, where ours takes masks from the least squares and fits the kept weights to the dense
            products; ``down`` is fitted to A, where ours takes what the pruned first half produces; and biases are
            fixed, where ours fits them.
    """

    iterations: int = 4
    safeguard: bool = True
    patience: int = 2
    coefficients: Coefficients | None = None
    damping: float = 0.1
    published: Literal["pseudo-inverse", "gradient"] | None = None

    @classmethod
    def of_the_paper(
        cls, epochs: int, penalty: float, down_fit: Literal["pseudo-inverse", "gradient"], *, safeguard: bool = False
    ) -> Settings:
        """The loop of the authors' code (2402.17946).

        Args:
            epochs: including local pruning, which is the first.
            penalty: α = β = γ.
            down_fit: the fit of ``down``.
            safeguard: the authors' code has none.
        """
        return cls(epochs - 1, safeguard, epochs, Coefficients(penalty, penalty, penalty), published=down_fit)


@dataclass(frozen=True)
class Record:
    """One iteration. Errors are ‖Y − FFN(X)‖² / ‖Y‖², token-weighted; the safeguard compares ``error``.

    ``objective`` is its value after the update of the variables; None in iteration 0.
    """

    iteration: int
    error: float
    train_error: float
    objective: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """The chosen iterate, fitted to all tokens."""

    unit: FeedForward
    masks: dict[str, Tensor]  # by role; True where kept
    chosen: int
    history: list[Record] = field(repr=False)

    @property
    def error(self) -> float:
        """The error of the chosen iterate, before its fit to the held-out tokens."""
        return self.history[self.chosen].error


@torch.no_grad()
def prune_feed_forward(
    dense: FeedForward,
    train: LazyChunks,
    held_out: LazyChunks,
    solvers: Mapping[str, Solver],
    patterns: Mapping[str, Pattern],
    settings: Settings = Settings(),
    scratch: Scratch | None = None,
) -> Result:
    """Prunes up, gate (if any) and down of one unit so that its output stays near the targets.

    Args:
        dense: the unit before pruning; iteration 0 prunes its weights.
        train: read once or twice per iteration.
        held_out: decides which iterate is kept; the result is then fitted to it as well. If empty, the training error
            decides.
        solvers: ``(weight, gram, pattern) -> Solution`` by role (``up``, ``gate``, ``down``), options bound.
        patterns: by role.
        settings: how it is done.
        scratch: storage for the variables of all tokens; None for memory.

    Raises:
        DataError: there are no training tokens.
        NumericalError: an iterate is not finite; with the safeguard, the local solution is not.
    """
    if not len(train):
        raise DataError("no training tokens for a feed-forward unit; give at least one chunk")
    history: list[Record] = []
    best: tuple[_Iterate, int] | None = None
    with ExitStack() as stack:
        room, device = scratch or Scratch(), dense.up.weight.device
        variables = {role: stack.enter_context(room.store(device)) for role in dense.first_half()}
        run = _Run(dense, train, solvers, patterns, settings, variables)
        unit = dense
        for iteration in range(settings.iterations + 1):
            try:
                iterate = run.iterate(unit, iteration)
                error = true_error(iterate.unit, held_out) if len(held_out) else iterate.train_error
                if not math.isfinite(error):
                    raise NumericalError("look for infinite values in inputs and weights")
            except NumericalError as failure:
                if best is None or not settings.safeguard:
                    raise _diverged(iteration, history, failure) from failure
                history.append(Record(iteration, math.inf, math.inf, None, (str(failure),)))
                break
            history.append(Record(iteration, error, iterate.train_error, iterate.objective, iterate.notes))
            if best is None or not settings.safeguard or error < history[best[1]].error:
                best = iterate, iteration
            if iteration - best[1] >= settings.patience:
                break
            unit = iterate.unit
    assert best is not None
    chosen, number = best
    if len(held_out) and settings.safeguard:  # fit the chosen iterate again, to all tokens
        again = replace(settings, iterations=number, patience=number + 1, coefficients=run.prices)
        refit = prune_feed_forward(dense, train + held_out, LazyChunks([]), solvers, patterns, again, scratch)
        return Result(refit.unit, refit.masks, number, history)
    return Result(chosen.unit, chosen.masks, number, history)


def _diverged(iteration: int, history: list[Record], failure: NumericalError) -> NumericalError:
    if not history:
        return NumericalError(f"the locally pruned unit has an error that is not finite: {failure}")
    before = ", ".join(f"{record.error:.3g}" for record in history)
    return NumericalError(
        f"the alternation diverged in iteration {iteration} (relative errors of the iterations before it: {before}): "
        f"{failure}"
    )


@dataclass(frozen=True)
class _Iterate:
    unit: FeedForward
    masks: dict[str, Tensor]
    train_error: float
    objective: float | None
    notes: tuple[str, ...]


class _Run:
    """One unit, its tokens, and the state that iterations share besides the unit itself."""

    def __init__(
        self,
        dense: FeedForward,
        train: LazyChunks,
        solvers: Mapping[str, Solver],
        patterns: Mapping[str, Pattern],
        settings: Settings,
        variables: dict[str, TensorStore],
    ) -> None:
        self.dense, self.train, self.settings, self.published = dense, train, settings, settings.published
        self.solvers, self.patterns, self.variables = solvers, patterns, variables  # stores with a tensor per chunk
        first = self._chunk(0)
        self.prices = settings.coefficients or default_coefficients(dense, first.inputs, first.targets)
        self.energy = 0.0  # Σ ‖Y‖², token-weighted; known after iteration 0
        self.grams: dict[str, Gram] = {}  # Gram matrices of the inputs X, by role; known after iteration 0

    def iterate(self, unit: FeedForward, iteration: int) -> _Iterate:
        """One iteration: updates the variables, then the first half, then ``down``.

        In iteration 0 the variables are the dense products, so the fit of the first half is its dense weights.
        """
        moments, value = self._move_variables(unit, iteration)
        masks: dict[str, Tensor] = {}
        linears: dict[str, Linear] = {}
        notes: list[str] = []

        def prune(role: str, fit: Fit) -> Tensor:
            solution = self.solvers[role](fit.weight, moments[role].gram, self.patterns[role])
            notes.extend(f"{role}: {note}" for note in (*fit.notes, *solution.notes))
            masks[role] = solution.mask
            return solution.weight

        for role, dense in self.dense.first_half().items():
            sparse = prune(role, self._fit(unit.linears()[role], moments[role], iteration))
            if iteration and not self.published:
                args = (dense.weight, moments[role].gram, masks[role], dense.weight, REFINE_STEPS)
                sparse = refine_on_support(*args, damping=REFINE_DAMPING).weight
            linears[role] = moments[role].linear(sparse)
            if self.published:
                matrix = self.grams[role].matrix.clone()
                matrix.diagonal().add_(ACCUMULATED_DAMPING * float(matrix.diagonal().mean()))
                self.grams[role] = Gram(matrix, self.grams[role].tokens)
        unit = replace(unit, up=linears["up"], gate=linears.get("gate"))
        if not self.published:
            moments["down"] = self._produced(unit)
        sparse = prune("down", self._fit_down(unit.down, moments["down"], iteration))
        unit = replace(unit, down=moments["down"].linear(sparse))
        return _Iterate(unit, masks, self._train_error(unit, moments["down"]), value, tuple(dict.fromkeys(notes)))

    def _move_variables(self, unit: FeedForward, iteration: int) -> tuple[dict[str, Moments], float | None]:
        """Updates A, then Z or U and S, for every token; returns the moments for the fit of the weights, and the
        objective."""
        accumulators = {
            role: self._accumulator(linear, self.grams.get(role), exact=self.published is not None)
            for role, linear in unit.first_half().items()
        }
        if self.published:
            accumulators["down"] = self._accumulator(unit.down, exact=self.published == "pseudo-inverse")
        beta, gamma = self.prices.beta, self.prices.gamma
        factor = updates.activation_factor(unit.down, beta=beta, gamma=gamma) if iteration else None
        value = 0.0
        for index in range(len(self.train)):
            chunk = self._chunk(index)
            variables = self._variables(index, chunk)
            a = variables.made(unit.activation)
            if factor is not None:
                a = updates.update_activation(a, chunk.targets, factor)
                variables = updates.move_variables(unit, unit.products(chunk.inputs), variables, a, self.prices)
                value += objective(unit, chunk, variables, a, self.prices)
                self._keep(index, variables, iteration)
            else:
                self.energy += squares(chunk.targets, chunk.token_weights)
            for role, accumulator in accumulators.items():
                x, target = (a, chunk.targets) if role == "down" else (chunk.inputs, getattr(variables, role))
                accumulator.update(x, target, chunk.token_weights)
        moments = {role: accumulator.finish() for role, accumulator in accumulators.items()}
        self.grams = {role: moments[role].gram for role in unit.first_half()}
        return moments, value if iteration else None

    def _chunk(self, index: int) -> Chunk:
        return self.train[index].to(self.dense.up.weight.device)

    def _variables(self, index: int, chunk: Chunk) -> Variables:
        """The current variables of a chunk; at first, the dense products."""
        if index >= len(self.variables["up"]):
            return self.dense.products(chunk.inputs)
        return Variables(**{role: store[index] for role, store in self.variables.items()})

    def _keep(self, index: int, variables: Variables, iteration: int) -> None:
        if iteration == self.settings.iterations:
            return  # they are not read again
        for role, store in self.variables.items():
            if index < len(store):
                store[index] = getattr(variables, role)
            else:
                store.append(getattr(variables, role))

    def _produced(self, unit: FeedForward) -> Moments:
        """The moments of ``down`` on the outputs of the pruned first half."""
        accumulator = self._accumulator(self.dense.down)
        for index in range(len(self.train)):
            chunk = self._chunk(index)
            accumulator.update(unit.activations(chunk.inputs), chunk.targets, chunk.token_weights)
        return accumulator.finish()

    def _accumulator(self, linear: Linear, gram: Gram | None = None, *, exact: bool = False) -> MomentsAccumulator:
        return MomentsAccumulator(linear, gram, fit_bias=not self.published, exact=exact)

    def _fit(self, now: Linear, moments: Moments, iteration: int) -> Fit:
        """The weight of a linear of the first half before it is pruned."""
        if not iteration:
            return Fit(now.weight)
        if self.published:
            return updates.pseudo_inverse_weight(moments)
        return updates.ridge_weight(moments, now.weight, self.settings.damping)

    def _fit_down(self, now: Linear, moments: Moments, iteration: int) -> Fit:
        """The weight of ``down`` before it is pruned."""
        if not self.published:
            return updates.ridge_weight(moments, self.dense.down.weight, self.settings.damping)
        if self.published == "gradient" and iteration:
            return updates.descend_weight(moments, now.weight)
        return self._fit(now, moments, iteration)

    def _train_error(self, unit: FeedForward, moments: Moments) -> float:
        if self.published:
            return true_error(unit, self.train)
        return moments.error(unit.down.weight) * moments.gram.tokens / self.energy if self.energy else 0.0
