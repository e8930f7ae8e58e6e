"""The auxiliary variables of attention's values and output, on one block (``decomposition/values.py``).

Iteration 0 is both linears pruned in the order they run, with ``output`` refitted. Each further iteration moves V and A
between what the pruned ``value`` gives and what ``output`` should give, fits ``value`` to V and prunes it again, then
fits ``output`` to what attention really makes of that. Biases stay as they are. The iterate with the least error on
held-out windows wins, and is then made again on all windows; if that is iteration 0, the block keeps its bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import RunOrder, giving, skipping, watch
from sparsellm.chain.products import bf16_products
from sparsellm.chain.units import ValueOutput
from sparsellm.decomposition import Coefficients, Linear, Terms
from sparsellm.decomposition.updates import ActivationFactor, activation_factor, update_activation
from sparsellm.decomposition.values import Moved, default_value_coefficients, update_values, value_terms
from sparsellm.decomposition.weights import Moments, MomentsAccumulator, wanted_weight
from sparsellm.errors import NumericalError
from sparsellm.held_out import spread_evenly
from sparsellm.methods.base import BlockTask
from sparsellm.solvers import Solution, Solver
from sparsellm.statistics import GramAccumulator

HELD_OUT = 0.125  # of the windows


class CoordinatedValues:
    """One value/output pair. Make it while the block is dense: it remembers the dense weights.

    Args:
        task: the block.
        pair: its values and output.
        order: in which the block's linears run.
        targets: what ``output`` should give, ``(batch, seq, hidden)``, by the number of the batch.
        weights: of tokens, batches ``(batch, seq)``, or None for equal ones.
        solvers: of ``value`` and of ``output``.
        damping: ridge of the fits, relative to the mean of the Gram matrix's diagonal.
    """

    def __init__(
        self,
        task: BlockTask,
        pair: ValueOutput,
        order: RunOrder,
        targets: Callable[[int], Tensor],
        weights: list[Tensor] | None,
        solvers: tuple[Solver, Solver],
        damping: float,
    ) -> None:
        self._task, self._value, self._output, self._targets = task, pair.value, pair.output, targets
        self._value_solver, self._output_solver = solvers
        self._damping = damping
        self._order = order
        self._dense_value, self._dense_output = _plain(pair.value), _plain(pair.output)
        device = task.stream.chain.device
        self._weights = weights or [torch.ones(hidden.shape[:2], device=device) for hidden in task.stream.hidden]
        self._held_out = [rows.to(device) for rows in _chosen([len(part) for part in self._weights])]

    def improve(self, iterations: int) -> None:
        """Alternates, beginning with both linears as they stand, pruned; leaves the best iterate in place and the
        history in the record of ``output``."""
        task, linears = self._task, (self._value, self._output)
        local = [linear.weight() for linear in linears]
        records: list[dict[str, Any]] = []
        prices: Coefficients | None = None
        for iteration in range(iterations + 1):
            task.report(f"values and output, {iteration}")
            terms: Terms | None = None
            try:
                if iteration:
                    prices, terms, _ = self._move_values(prices, everything=False)
                else:
                    self._prune_values()
                errors = self._fit_output(everything=False)[1]
            except NumericalError as failure:  # a diverged iterate; everything before it stands
                if not iteration:
                    raise
                records.append({"held_out_error": math.inf, "train_error": math.inf, "notes": [str(failure)]})
                break
            records.append({**errors, "objective": terms.total if terms is not None else None})
        best = min(range(len(records)), key=lambda i: records[i]["held_out_error"])
        for linear, weight in zip(linears, local, strict=True):
            linear.assign(weight)
        solutions: dict[str, Solution] = {}
        for _ in range(best):
            prices, _, solutions[self._value.name] = self._move_values(prices, everything=True)
            solutions[self._output.name], _ = self._fit_output(everything=True)
        for linear in linears if best else ():
            task.accept(linear, solutions[linear.name])
        task.history[self._output.name] = [
            {"iteration": iteration, **record, "chosen": iteration == best} for iteration, record in enumerate(records)
        ]

    def _prune_values(self) -> None:
        """Iteration 0 without the windows held out: it is to be judged on what nothing was fitted to."""
        gram = GramAccumulator(self._value.in_features, self._task.stream.chain.device)

        def see(position: int, entering: Tensor) -> None:
            rows = ~self._held_out[position]
            gram.update(entering[rows], self._weights[position][rows])

        self._pass(self._value, see)
        pattern = self._task.patterns[self._value.name]
        self._value.assign(self._value_solver(self._dense_value.weight, gram.finish(), pattern).weight)

    def _move_values(self, prices: Coefficients | None, *, everything: bool) -> tuple[Coefficients, Terms, Solution]:
        """V and A to their minimisers, batch by batch, and ``value`` fitted to V and pruned."""
        now, output = _plain(self._value), _plain(self._output)
        moments = MomentsAccumulator(Linear(now.weight))
        terms = Terms()
        unread = self._unread(self._output)
        factor: ActivationFactor | None = None  # of the weights as they are: one for all batches
        for position, token_weights in enumerate(self._weights):
            rows = self._rows(position, everything)
            if not bool(rows.any()):
                continue
            counted = token_weights * rows[:, None]
            y = self._targets(position).float()
            with _Attention(self._task, self._value, self._output, position, unread) as attention:
                entering, made = attention.entering, attention.given
                start = self._dense_value(entering)
                mixed = attention.linearised(start)
                if prices is None:
                    prices = default_value_coefficients(output, y, attention.mix, start)
                if factor is None:
                    factor = activation_factor(output, beta=prices.beta, gamma=prices.gamma)
                a = update_activation(mixed.flatten(0, 1), y.flatten(0, 1), factor).view_as(mixed)
                moved = update_values(
                    made, a, Moved(start, mixed), attention.mix, attention.adjoint,
                    alpha=prices.alpha, gamma=prices.gamma, token_weights=counted,
                )  # fmt: skip
            terms = terms + value_terms(output, made, y, moved, a, prices, counted)
            wanted = moved.values if now.bias is None else moved.values - now.bias
            moments.update(entering[rows].flatten(0, 1), wanted[rows].flatten(0, 1), token_weights[rows].flatten())
        assert prices is not None
        solution = self._fit(self._value, moments.finish(), now.weight, self._value_solver)
        return prices, terms, solution

    def _fit_output(self, *, everything: bool) -> tuple[Solution, dict[str, float]]:
        """``output`` fitted to its targets on what it is really given, pruned; and its errors ‖Y − Ŷ‖² / ‖Y − b‖²."""
        fitted, judging = (MomentsAccumulator(Linear(self._dense_output.weight)) for _ in range(2))
        bias = self._output.bias

        def see(position: int, entering: Tensor) -> None:
            y = self._targets(position).float()
            y = y if bias is None else y - bias
            for moments, rows in (
                (fitted, self._rows(position, everything)),
                (judging, self._held_out[position] & (not everything)),
            ):
                if bool(rows.any()):
                    weights = self._weights[position][rows].flatten()
                    moments.update(entering[rows].float().flatten(0, 1), y[rows].flatten(0, 1), weights)

        self._pass(self._output, see)
        found = fitted.finish()
        solution = self._fit(self._output, found, self._dense_output.weight, self._output_solver)
        train = _relative(found, solution.weight)
        alone = everything or not any(bool(rows.any()) for rows in self._held_out)
        held_out = train if alone else _relative(judging.finish(), solution.weight)
        return solution, {"held_out_error": held_out, "train_error": train}

    def _fit(self, linear: LinearView, moments: Moments, reference: Tensor, solver: Solver) -> Solution:
        wanted = wanted_weight(moments, reference, damping=self._damping)
        found = solver(wanted.weight, moments.gram, self._task.patterns[linear.name])
        linear.assign(found.weight)
        return Solution(found.weight, found.mask, found.error, (*wanted.notes, *found.notes))

    def _rows(self, position: int, everything: bool) -> Tensor:
        """Windows of one batch to fit to, bool (batch,)."""
        held_out = self._held_out[position]
        return torch.ones_like(held_out) if everything else ~held_out

    def _pass(self, linear: LinearView, see: Callable[[int, Tensor], None]) -> None:
        """Shows what the linear is given, batch by batch, each with its number."""
        position = 0
        with watch([linear], lambda _, entering, leaving: see(position, entering)), skipping(self._unread(linear)):
            for position in range(len(self._task.stream)):  # the hook reads where the pass is
                self._task.stream.run_batch(self._task.index, position)

    def _unread(self, last: LinearView) -> list[LinearView]:
        linears = self._task.stream.chain.linears(self._task.index)
        return self._order.unread(linears, inputs=[last], outputs=[])


class _Attention:
    """What lies between ``value`` and ``output`` on one batch, as a linear map of the values and its adjoint.

    Attributes:
        entering: what ``value`` is given, (windows, seq, in), fp32.
        given: what it gives.
    """

    def __init__(
        self, task: BlockTask, value: LinearView, output: LinearView, position: int, unread: list[LinearView]
    ) -> None:
        self._chain, self._index = task.stream.chain, task.index
        self._hidden, self._call = task.stream.hidden[position], task.stream.calls(task.index)[position]
        self._value, self._output, self._unread = value, output, unread
        self._held = contextlib.ExitStack()
        self._graph: tuple[Tensor, Tensor] | None = None
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _Attention:
        with contextlib.ExitStack() as held:
            held.enter_context(skipping(self._unread))
            for parameter in self._chain.block_parameters(self._index).values():
                if parameter.requires_grad:  # only the way of the values is to be remembered
                    held.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            with torch.no_grad(), watch([self._value], self._see):
                self._chain.apply(self._index, self._hidden, self._call)
            self.entering, self.given = self._seen.pop(self._value.name)
            self._held = held.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._graph = None
        self._held.close()

    def linearised(self, values: Tensor) -> Tensor:
        """𝒫V, fp32, kept with what its adjoint needs: the map is linear, so any V will do."""
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            mixed = self._run(leaf)
        self._graph = leaf, mixed
        return mixed.detach()

    def mix(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            return self._run(values)

    def adjoint(self, residual: Tensor) -> Tensor:
        assert self._graph is not None, "linearised() comes before adjoint()"
        leaf, mixed = self._graph
        with bf16_products(self._chain.products_in_bf16):
            (found,) = torch.autograd.grad(mixed, leaf, residual, retain_graph=True)
        return found

    def _run(self, values: Tensor) -> Tensor:
        with giving(self._value, lambda given: values.to(given.dtype)), watch([self._output], self._see):
            self._chain.apply(self._index, self._hidden, self._call)
        return self._seen.pop(self._output.name)[0]

    def _see(self, linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        # Copies: what runs later may work in place.
        self._seen[linear.name] = entering.to(torch.float32, copy=True), leaving.to(torch.float32, copy=True)


def _plain(linear: LinearView) -> Linear:
    return Linear(linear.weight(), linear.bias)


def _relative(moments: Moments, weight: Tensor) -> float:
    return moments.error(weight) / moments.target_square if moments.target_square > 0 else 0.0


def _chosen(sizes: list[int]) -> list[Tensor]:
    """Which windows of each batch are held out, bool (batch,), spread evenly; of a single window none is, and it is
    judged by what it was fitted to."""
    windows = sum(sizes)
    count = min(max(1, round(windows * HELD_OUT)), windows - 1)
    chosen = torch.zeros(windows, dtype=torch.bool)
    chosen[list(spread_evenly(count, windows))] = True
    return list(chosen.split(sizes))
