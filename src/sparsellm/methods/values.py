"""The auxiliary variables of attention's values and output, on one block (``decomposition/values.py``).

Iteration 0 is both linears as they are when pruned in the order they run, with ``output`` refitted. Each further
iteration moves V and A between what the pruned ``value`` gives and what ``output`` should give, fits ``value`` to V and
prunes it again, then fits ``output`` to what attention really makes of that. The iterate with the least error on
held-out windows wins, and is then made again on all windows; if that is iteration 0, the block keeps its bits.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import RunOrder, giving, skipping, watch
from sparsellm.chain.units import ValueOutput
from sparsellm.decomposition import Coefficients, Linear, Terms
from sparsellm.decomposition.updates import activation_factor, update_activation
from sparsellm.decomposition.values import Moved, default_value_coefficients, update_values, value_terms
from sparsellm.decomposition.weights import Moments, MomentsAccumulator, wanted_weight, with_bias
from sparsellm.methods.base import BlockTask
from sparsellm.solvers import Solution, Solver
from sparsellm.storage.scratch import TensorStore

HELD_OUT = 0.125  # of the windows


class CoordinatedValues:
    """One value/output pair. Make it while the block is dense: it remembers the dense weights.

    Args:
        task: the block.
        pair: its values and output.
        order: in which the block's linears run.
        targets: what ``output`` should give, batches ``(batch, seq, hidden)``.
        weights: of tokens, batches ``(batch, seq)``, or None for equal ones.
        solvers: of ``value`` and of ``output``.
        damping: ridge of the fits, relative to the mean of the Gram matrix's diagonal.
    """

    def __init__(
        self,
        task: BlockTask,
        pair: ValueOutput,
        order: RunOrder,
        targets: TensorStore,
        weights: list[Tensor] | None,
        solvers: tuple[Solver, Solver],
        damping: float,
    ) -> None:
        self._task, self._value, self._output, self._targets = task, pair.value, pair.output, targets
        self._value_solver, self._output_solver = solvers
        self._damping = damping
        self._unread = order.unread(task.stream.chain.linears(task.index), inputs=[pair.output], outputs=[])
        self._dense_value, self._dense_output = _plain(pair.value), _plain(pair.output)
        device = task.stream.chain.device
        self._everything = weights or [torch.ones(hidden.shape[:2], device=device) for hidden in task.stream.hidden]
        self._train, self._held_out = _split(self._everything)

    def improve(self, iterations: int) -> None:
        """Alternates, beginning with both linears as they stand, pruned; leaves the best iterate in place and the
        history in the record of ``output``."""
        task = self._task
        local = {linear: _plain(linear) for linear in (self._value, self._output)}
        _, history = self._fit_output(self._train)
        records: list[dict[str, Any]] = [{**history, "objective": None}]
        prices: Coefficients | None = None
        for iteration in range(1, iterations + 1):
            task.report(f"values and output, {iteration}")
            prices, terms, _ = self._move_values(prices, self._train)
            _, history = self._fit_output(self._train)
            records.append({**history, "objective": terms.total})
        best = min(range(len(records)), key=lambda i: records[i]["held_out_error"])
        for linear, plain in local.items():
            _put(linear, plain)
        solutions: dict[LinearView, Solution] = {}
        for _ in range(best):
            prices, _, solutions[self._value] = self._move_values(prices, self._everything)
            solutions[self._output], _ = self._fit_output(self._everything)
        for linear, solution in solutions.items():
            task.accept(linear, solution)
        task.history[self._output.name] = [
            {"iteration": iteration, **record, "chosen": iteration == best} for iteration, record in enumerate(records)
        ]

    def _move_values(self, prices: Coefficients | None, weights: list[Tensor]) -> tuple[Coefficients, Terms, Solution]:
        """V and A to their minimisers, batch by batch, and ``value`` fitted to V and pruned."""
        now, output = _plain(self._value), _plain(self._output)
        moments = MomentsAccumulator(now)
        terms = Terms()
        for position, token_weights in enumerate(weights):
            attention = _Attention(self._task, self._value, self._output, position, self._unread)
            with attention:
                entering, made = attention.entering.float(), attention.given.float()
                y = self._targets[position].float()
                start = self._dense_value(entering)
                mixed = attention.linearised(start)
                if prices is None:
                    prices = default_value_coefficients(output, y, attention.mix, start)
                factor = activation_factor(output, beta=prices.beta, gamma=prices.gamma)
                a = update_activation(mixed.flatten(0, 1), y.flatten(0, 1), factor).view_as(mixed)
                moved = update_values(
                    made, a, Moved(start, mixed), attention.mix, attention.adjoint,
                    alpha=prices.alpha, gamma=prices.gamma, token_weights=token_weights,
                )  # fmt: skip
            terms = terms + value_terms(output, made, y, moved, a, prices, token_weights)
            moments.update(entering.flatten(0, 1), moved.values.flatten(0, 1), token_weights.flatten())
        assert prices is not None
        solution = self._fit(self._value, moments.finish(), now.weight, self._value_solver)
        return prices, terms, solution

    def _fit_output(self, weights: list[Tensor]) -> tuple[Solution, dict[str, float]]:
        """``output`` fitted to its targets on what it is really given, pruned; and its errors."""
        train, held_out = (MomentsAccumulator(self._dense_output) for _ in range(2))
        position = 0

        def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
            x, y = entering.float().flatten(0, 1), self._targets[position].float().flatten(0, 1)
            train.update(x, y, weights[position].flatten())
            held_out.update(x, y, self._held_out[position].flatten())

        with watch([self._output], see), skipping(self._unread):
            for position in range(len(self._task.stream)):
                self._task.stream.run_batch(self._task.index, position)
        fitted, judging = train.finish(), held_out.finish()
        solution = self._fit(self._output, fitted, self._dense_output.weight, self._output_solver)
        return solution, {
            "held_out_error": _relative(judging, solution.weight),
            "train_error": _relative(fitted, solution.weight),
        }

    def _fit(self, linear: LinearView, moments: Moments, reference: Tensor, solver: Solver) -> Solution:
        wanted = wanted_weight(moments, reference, damping=self._damping)
        found = solver(wanted.weight, moments.gram, self._task.patterns[linear.name])
        _put(linear, with_bias(found.weight, moments))
        return Solution(found.weight, found.mask, found.error, (*wanted.notes, *found.notes))


class _Attention:
    """What lies between ``value`` and ``output`` on one batch, as a linear map of the values and its adjoint.

    Attributes:
        entering: what ``value`` is given, (windows, seq, in).
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
        self._seen: dict[LinearView, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _Attention:
        self._held.enter_context(skipping(self._unread))
        with torch.no_grad(), watch([self._value], self._see):
            self._chain.apply(self._index, self._hidden, self._call)
        self.entering, self.given = self._seen.pop(self._value)
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
        (found,) = torch.autograd.grad(mixed, leaf, residual, retain_graph=True)
        return found

    def _run(self, values: Tensor) -> Tensor:
        with giving(self._value, lambda given: values.to(given.dtype)), watch([self._output], self._see):
            self._chain.apply(self._index, self._hidden, self._call)
        return self._seen.pop(self._output)[0].float()

    def _see(self, linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        self._seen[linear] = entering, leaving


def _plain(linear: LinearView) -> Linear:
    return Linear(linear.weight(), linear.bias)


def _put(linear: LinearView, plain: Linear) -> None:
    linear.assign(plain.weight)
    if plain.bias is not None:
        linear.assign_bias(plain.bias)


def _relative(moments: Moments, weight: Tensor) -> float:
    return moments.error(weight) / moments.target_square if moments.target_square > 0 else 0.0


def _split(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Token weights with zeros in the windows held out, spread evenly, and with zeros in all others. With a single
    window both are all of it."""
    windows = sum(len(part) for part in weights)
    count = min(max(1, round(windows * HELD_OUT)), windows - 1)
    chosen = {(2 * i + 1) * windows // (2 * count) for i in range(count)}
    if not chosen:
        return weights, weights
    train, held_out, first = [], [], 0
    for part in weights:
        out = torch.tensor([first + row in chosen for row in range(len(part))], device=part.device)[:, None]
        train.append(part * ~out)
        held_out.append(part * out)
        first += len(part)
    return train, held_out
