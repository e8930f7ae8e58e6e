"""The streamed sweep: one block in memory at a time.

Each step runs the blocks forward and stores their inputs. On the way back each block runs again on its stored input,
Adam updates it, and it is stored. Weights and moments of the other blocks are in memory or on disk, depending on the
room. With several processes, the one that has the windows of a step computes the gradient, and all take the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain.streams import Piece
from sparsellm.sweep.sweep_task import Run, Step, SweepTask, Weights
from sparsellm.sweep.training import adam_step, running_on, share_gradients


class Streamed(Weights):
    """The fp32 parameters of every block and Adam's moments, in a store: those of block i at 2i and 2i + 1.

    A parameter that several blocks use belongs to the first of them; the others borrow it. Another store holds the
    parameters after the best pass, unless that is pass 0, the state before the first pass."""

    def __init__(self, task: SweepTask) -> None:
        self.task, self.chain, self.integers = task, task.feed.chain, task.integers
        self.pruned: set[str] = set()  # names of the weights of linears, whose zeros must stay
        self.factors: set[str] = set()  # names of the factors of groups, where values are rounded
        self.store = task.feed.scratch.store(self.chain.device)
        self.best, self.best_store = 0, task.feed.scratch.store(self.chain.device)
        self.shapes: list[dict[str, torch.Size]] = []
        self._dtypes: list[dict[str, tuple[torch.dtype, torch.dtype]]] = []
        self._aliases: list[dict[str, tuple[int, str]]] = []  # other names of parameters: the block and the name there
        saved, reached = task.saved, task.saved.last if task.saved is not None else None
        number = len(reached.history) - 1 if reached is not None else 0  # passes that an earlier process saved
        for index in range(len(self.chain)):
            with self.chain.block(index, task.pruned(index)):
                parameters, trained = self.chain.block_parameters(index), self._trained(index)
                self.pruned |= {linear.weight_name for linear in self.chain.linears(index)}
                self.factors |= trained.keys() - parameters.keys()
                self.shapes.append({name: p.shape for name, p in trained.items()})
                self._aliases.append({name: self.chain.home(name) for name in parameters if name not in trained})
                self._dtypes.append({n: (p.dtype, self.chain.stored_dtype(n)) for n, p in parameters.items()})
                flat, moments = _flat(trained)
            if saved is not None and 0 < number < task.passes:
                flat, moments = (saved.read(kind, number, index) for kind in ("parameters", "moments"))
            self.store.append(flat)
            self.store.append(moments)
        if saved is not None and reached is not None and reached.best:
            self.best = reached.best
            for index in range(len(self.chain)):
                self.best_store.append(saved.read("parameters", self.best, index))

    def keep(self, number: int) -> None:
        self.best = number
        self.best_store.close()
        for index in range(len(self.chain)):
            self.best_store.append(self.parameters(index).clone())

    def restart(self) -> None:
        for index in range(len(self.chain)):
            if self.best:
                flat = self.best_store[index].clone()
                moments = torch.zeros(2, len(flat), device=flat.device)
            else:
                with self.chain.block(index, self.task.pruned(index)):
                    flat, moments = _flat(self._trained(index))
            self.store[2 * index], self.store[2 * index + 1] = flat, moments

    def parameters(self, block: int) -> Tensor:
        return self.store[2 * block]

    def moments(self, block: int) -> Tensor:
        return self.store[2 * block + 1]

    def _trained(self, index: int) -> dict[str, Tensor]:
        """What is trained in the loaded block: the parameters it owns, and factors of groups if values are rounded."""
        factors = {} if self.integers is None else self.integers.factors(self.chain, index)
        parameters = self.chain.block_parameters(index)
        return {**{name: p for name, p in parameters.items() if self.chain.owns(name)}, **factors}

    def views(self, flat: Tensor, index: int) -> dict[str, nn.Parameter]:
        """Views of a block's flat tensor, by parameter. All require gradients, so that moments have the same layout."""
        shapes = self.shapes[index]
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {name: nn.Parameter(part.view(shapes[name])) for name, part in zip(shapes, parts, strict=True)}

    def all_views(
        self, flat: Tensor, index: int, *, running: bool = False, written: bool = False
    ) -> dict[str, nn.Parameter]:
        """:meth:`views`, and the parameters that the block borrows, which are the same objects under all their names.
        With ``running``, values are on the grids of :class:`Integers`; with ``written``, also rounded as on disk."""
        views: dict[int, dict[str, nn.Parameter]] = {}
        for at in [index, *dict.fromkeys(at for at, _ in self._aliases[index].values())]:
            if at not in views:
                views[at] = self.views(flat if at == index else self.parameters(at), at)
                if running and self.integers is not None:
                    views[at] = self.integers.of(views[at], self.chain, at)
                if written:
                    for name, parameter in views[at].items():
                        memory, disk = self._dtypes[at][name]
                        views[at][name] = nn.Parameter(parameter.detach().to(memory).to(disk).float())
        return {**views[index], **{name: views[at][first] for name, (at, first) in self._aliases[index].items()}}

    def borrowed(self, index: int) -> dict[str, str]:
        """For each parameter that block ``index`` borrows of another, by its name there, its name in the block."""
        return {first: name for name, (at, first) in self._aliases[index].items() if at != index}

    def write(self) -> None:
        chain = self.chain
        self.store.close()
        for index in range(len(chain)):
            with chain.block(index, self.task.pruned(index)):
                if self.best:
                    trained = self.views(self.best_store[index].to(chain.device), index)
                    trained = trained if self.integers is None else self.integers.of(trained, chain, index)
                    for name, value in trained.items():
                        chain.block_parameters(index)[name].copy_(value)
                elif self.integers is not None:
                    self.integers.settle(chain, index)
                chain.settle_block(index)
                self.task.write_block(index)

    def close(self) -> None:
        self.store.close()
        self.best_store.close()

    def steps(self, tokens: Sequence[Sequence[int]]) -> list[Step]:
        return [
            Step(tuple(number if at == process else None for at in range(len(tokens))), count)
            for process, some in enumerate(tokens)
            for number, count in enumerate(some)
        ]

    def outputs(self, run: Run, pieces: Sequence[Piece | None]) -> Iterator[tuple[Piece, Tensor]]:
        for piece in pieces:
            if piece is not None:
                yield piece, self._forward(run, piece, written=True)[-1]

    def step(self, run: Run, step: Step, rate: float, number: int) -> float:
        chain, piece = self.chain, run.piece(step)
        process = next(at for at, place in enumerate(step.pieces) if place is not None)
        loss, inputs, gradient = 0.0, [], None
        waiting: dict[str, Tensor] = {}  # gradients of parameters that later blocks borrow
        if piece is not None:
            inputs = self._forward(run, piece, written=False)
            loss, gradient = run.end(inputs.pop(), piece, step.tokens)
        for index in reversed(range(len(chain))):
            flat, state = self.parameters(index), self.moments(index)
            for following in (2 * index - 2, 2 * index - 1):
                self.store.expect(following)
            parameters = used = self.all_views(flat, index)
            if piece is not None:
                hidden = inputs.pop()
                if self.integers is not None:
                    used = self.all_views(flat, index, running=True)
                with running_on(chain, index, used), torch.enable_grad():
                    hidden.requires_grad_(True)
                    chain.apply(index, hidden, run.call(piece, index)).backward(gradient)
                gradient = hidden.grad
                assert gradient is not None
                for name in used:
                    parameters[name].grad = used[name].grad  # straight through the rounding
            trained = {name: parameters[name] for name in self.shapes[index]}
            for first, name in [*self.borrowed(index).items(), *((n, n) for n in trained.keys() & waiting.keys())]:
                if (part := parameters[name].grad) is not None:
                    waiting[first] = waiting[first] + part if first in waiting else part
            for name in trained.keys() & waiting.keys():
                trained[name].grad = waiting.pop(name)
            if piece is not None and self.integers is not None:
                self.integers.pull_back(trained, used, chain, index)
            share_gradients(trained.values(), process)
            adam_step(trained, state, rate, number, pruned=self.pruned, factors=self.factors)
            self.store[2 * index], self.store[2 * index + 1] = flat, state
        return parallel.broadcast(loss, process)

    def _forward(self, run: Run, piece: Piece, *, written: bool) -> list[Tensor]:
        """The input of every block, and the output of the last."""
        hidden = [run.inputs(piece).float()]
        for index in range(len(self.chain)):
            flat = self.parameters(index)
            self.store.expect(2 * index + 2)
            parameters = self.all_views(flat, index, running=True, written=written)
            with running_on(self.chain, index, parameters):
                hidden.append(self.chain.run(index, hidden[-1], run.call(piece, index)))
        return hidden


def _flat(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tensors as one, fp32, and Adam's moments for it, which are zero."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])
    return flat, torch.zeros(2, len(flat), device=flat.device)
