"""The alternating minimisation of one feed-forward unit by auxiliary variables.

Read ``prune_feed_forward`` first, then ``_Loop.iterate``. Iteration 0 is local pruning. Each further iteration
updates each auxiliary variable once, prunes the first half fitted to them, fits its kept weights to the dense products,
and fits and prunes ``down``. The published algorithm is a setting of this loop and omits that fit, see
``LoopSettings``.

An iteration includes pruning, so the true error, measured after each, may rise. With the safeguard, the iterate with
the least error on held-out tokens is chosen, never one worse than local pruning, and made again from all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from sparsellm.errors import NumericalError
from sparsellm.files.scratch import Scratch, TensorStore
from sparsellm.method.auxiliary import objective, updates
from sparsellm.method.auxiliary.objective import (
    Chunks,
    Coefficients,
    FeedForward,
    Linear,
    Variables,
)
from sparsellm.method.auxiliary.updates import Moments, MomentsAccumulator
from sparsellm.method.gram import Fit, Gram, least_squares
from sparsellm.method.solvers import Solver
from sparsellm.method.solvers.support import refine_on_support
from sparsellm.records import Iteration

REFINE_STEPS = 30  # conjugate gradients where masks come from one problem and weights from another: to the minimum
REFINE_DAMPING = 1e-3  # for directions that the tokens do not excite
ACCUMULATED_DAMPING = 0.01  # what SparseGPT adds to the stored Gram matrix in each epoch of the published code


@dataclass(frozen=True)
class LoopSettings:
    """The settings of the loop; ``of_the_paper`` are those of the authors' code."""

    iterations: int = 4  # after the local solution, which is iteration 0
    safeguard: bool = True  # keep the iterate with the least true error; False keeps the last, which must be finite
    # iterations without a lower error before the loop stops, with the safeguard
    patience: int = 2
    # α, β, γ; None: objective.default_coefficients
    coefficients: Coefficients | None = None
    # Ridge of the least squares towards the current weight (the dense one for ``down``), relative to the mean of the
    # Gram matrix's diagonal; more tokens need less.
    damping: float = 0.1
    # The fit of ``down`` in the authors' code, which differs as docs/method.md says; None for ours.
    published: Literal["pseudo-inverse", "gradient"] | None = None

    @classmethod
    def of_the_paper(cls, epochs: int, *, gated: bool, safeguard: bool = False) -> Self:
        """The loop of the authors' code (2402.17946) for a gated unit, or one of two layers. The first epoch is local
        pruning."""
        settings = cls(epochs - 1, safeguard, patience=epochs)
        if gated:
            return replace(
                settings,
                coefficients=Coefficients(alpha=5.0, beta=5.0, gamma=5.0),
                published="pseudo-inverse",
            )
        return replace(
            settings,
            coefficients=Coefficients(alpha=0.1, beta=0.1, gamma=0.1),
            published="gradient",
        )


@dataclass(frozen=True)
class PrunedUnit:
    """The chosen iterate, fitted to all tokens."""

    unit: FeedForward
    masks: dict[str, Tensor]  # by role; True where kept
    error: float  # ‖Y − FFN(X)‖² / ‖Y‖², token-weighted, before the fit to the held-out tokens
    notes: tuple[str, ...]


@torch.no_grad()
def prune_feed_forward(
    dense: FeedForward,
    train: Chunks,
    held_out: Chunks,
    solvers: Mapping[str, Solver],
    settings: LoopSettings,
    scratch: Scratch,
) -> tuple[PrunedUnit, list[Iteration]]:
    """Prunes up, gate (if any) and down of one unit so that its output stays near the targets; returns the chosen
    iterate, and the records of all iterations.

    ``dense`` is the unit before pruning; iteration 0 prunes its weights. Weights are fitted to the tokens ``train``;
    those ``held_out`` choose the iterate, which is then fitted to them too; if empty, ``train`` chooses. ``solvers``
    are by role (``up``, ``gate``, ``down``), each with its pattern; ``scratch`` stores the variables of all tokens. A
    NumericalError says that an iterate is not finite; with the safeguard, that the local solution is not."""
    history: list[Iteration] = []
    best: PrunedUnit | None = None
    with ExitStack() as stack:
        stores = {
            role: stack.enter_context(scratch.store(dense.up.weight.device))
            for role in dense.first_half()
        }
        first = train[0]()
        coefficients = settings.coefficients or objective.default_coefficients(
            dense, first.inputs, first.targets
        )
        loop = _Loop(dense, train, solvers, settings, coefficients, stores)
        unit = dense
        for iteration in range(settings.iterations + 1):
            try:
                unit, masks, value, notes = loop.iterate(unit, iteration)
                error = objective.true_error(unit, held_out or train)
                if not math.isfinite(error):
                    raise NumericalError(
                        "look for infinite values in inputs and weights"
                    )
            except NumericalError as failure:
                if best is None or not settings.safeguard:
                    before = (
                        ", ".join(f"{step.train_error:.3g}" for step in history)
                        or "none"
                    )
                    when = f"in iteration {len(history)} (relative errors before it: {before})"
                    raise NumericalError(
                        f"the alternation diverged {when}: {failure}"
                    ) from failure
                error = math.inf
                value = None
            done = Iteration(iteration=iteration, objective=value)
            if held_out:
                done.held_out_error = error
            else:
                done.train_error = error
            history.append(done)
            if best is None or not settings.safeguard or error < best.error:
                best = PrunedUnit(unit, masks, error, notes)
                chosen = iteration
            if error == math.inf or iteration - chosen >= settings.patience:
                break
    assert best is not None
    history[chosen] = history[chosen].model_copy(update={"chosen": True})
    if held_out:  # make the chosen iterate again, from all tokens
        again = replace(
            settings,
            iterations=chosen,
            patience=chosen + 1,
            coefficients=coefficients,
            safeguard=False,
        )
        refit, _ = prune_feed_forward(
            dense, [*train, *held_out], [], solvers, again, scratch
        )
        best = replace(best, unit=refit.unit, masks=refit.masks)
    return best, history


@dataclass
class _Loop:
    """One unit, its tokens, and the state that iterations share besides the unit itself."""

    dense: FeedForward
    train: Chunks
    solvers: Mapping[str, Solver]
    settings: LoopSettings
    coefficients: Coefficients
    variables: dict[str, TensorStore]  # by role, a tensor for each chunk
    # for the inputs X, by role; known after iteration 0
    grams: dict[str, Gram] = field(default_factory=dict)

    def iterate(
        self, unit: FeedForward, iteration: int
    ) -> tuple[FeedForward, dict[str, Tensor], float | None, tuple[str, ...]]:
        """Updates the variables, then the first half, then ``down``; returns the unit, masks, objective and notes.

        In iteration 0 the variables are the dense products, so the fit of the first half is its dense weights."""
        moments, value = self._move_variables(unit, iteration)
        published = self.settings.published
        masks: dict[str, Tensor] = {}
        linears: dict[str, Linear] = {}
        notes: list[str] = []

        def prune(role: str) -> Tensor:
            fit = self._fit(role, unit.linears()[role].weight, moments[role], iteration)
            solution = self.solvers[role](fit.weight, moments[role].gram)
            notes.extend(f"{role}: {note}" for note in (*fit.notes, *solution.notes))
            masks[role] = solution.mask
            return solution.weight

        for role, dense in self.dense.first_half().items():
            sparse = prune(role)
            if iteration and not published:
                refined = refine_on_support(
                    dense.weight,
                    moments[role].gram,
                    mask=masks[role],
                    start=dense.weight,
                    iterations=REFINE_STEPS,
                    damping=REFINE_DAMPING,
                )
                sparse = refined.weight
            linears[role] = moments[role].linear(sparse)
            means = moments[role].means
            if means is not None and dense.bias is not None:
                # The bias is fitted to the dense products, as the weights are.
                bias = dense.bias + (dense.weight - sparse) @ means[0]
                linears[role] = Linear(sparse, bias)
            if published:
                matrix = self.grams[role].matrix.clone()
                matrix.diagonal().add_(
                    ACCUMULATED_DAMPING * float(matrix.diagonal().mean())
                )
                self.grams[role] = Gram(matrix, self.grams[role].tokens)
        unit = replace(unit, up=linears["up"], gate=linears.get("gate"))
        if not published:
            # on the outputs of the pruned first half
            accumulator = MomentsAccumulator(self.dense.down)
            for read in self.train:
                chunk = read()
                accumulator.update(
                    unit.activations(chunk.inputs), chunk.targets, chunk.token_weights
                )
            moments["down"] = accumulator.finish()
        unit = replace(unit, down=moments["down"].linear(prune("down")))
        return unit, masks, value, tuple(dict.fromkeys(notes))

    def _move_variables(
        self, unit: FeedForward, iteration: int
    ) -> tuple[dict[str, Moments], float | None]:
        """Updates A, then Z or U and S, for every token; returns the moments for the weights, and the objective."""
        published = self.settings.published
        coefficients = self.coefficients
        empty = partial(MomentsAccumulator, fit_bias=not published)
        accumulators = {
            role: empty(linear, self.grams.get(role), exact=published is not None)
            for role, linear in unit.first_half().items()
        }
        if published:
            accumulators["down"] = empty(unit.down, exact=published == "pseudo-inverse")
        gain = None
        value = None
        if iteration:
            gain = updates.activation_gain(unit.down.weight, coefficients)
            value = 0.0
        for index, read in enumerate(self.train):
            chunk = read()
            known = {
                role: store[index]
                for role, store in self.variables.items()
                if index < len(store)
            }
            if known:
                variables = Variables(**known)
            else:  # at first, the dense ones
                variables = self.dense.products(chunk.inputs)
            a = variables.activated(unit.activation)
            if gain is not None and value is not None:
                a = updates.update_activation(a, chunk.targets, unit.down, gain)
                variables = updates.move_variables(
                    unit, unit.products(chunk.inputs), variables, a, coefficients
                )
                value += objective.objective(unit, chunk, variables, a, coefficients)
                if iteration < self.settings.iterations:  # else they are not read again
                    self._keep(index, variables)
            for role, accumulator in accumulators.items():
                if role == "down":
                    x = a
                    target = chunk.targets
                else:
                    x = chunk.inputs
                    target = getattr(variables, role)
                accumulator.update(x, target, chunk.token_weights)
        moments = {
            role: accumulator.finish() for role, accumulator in accumulators.items()
        }
        self.grams = {role: moments[role].gram for role in unit.first_half()}
        return moments, value

    def _keep(self, index: int, variables: Variables) -> None:
        for role, store in self.variables.items():
            if index < len(store):
                store[index] = getattr(variables, role)
            else:
                store.append(getattr(variables, role))

    def _fit(self, role: str, now: Tensor, moments: Moments, iteration: int) -> Fit:
        """The weight of a linear before it is pruned, from its weight ``now``."""
        published = self.settings.published
        if not iteration and (published or role != "down"):
            return Fit(now)
        if published == "gradient" and role == "down":
            return updates.descend_weight(moments, now)
        if published:
            return updates.pseudo_inverse_weight(moments)
        prior = now
        if role == "down":
            prior = self.dense.down.weight
        return least_squares(
            moments.gram, moments.cross, self.settings.damping, prior=prior
        )
