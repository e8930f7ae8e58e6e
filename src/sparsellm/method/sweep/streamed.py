"""The streamed sweep: one block in memory at a time.

Each step runs the blocks forward and stores their inputs. On the way back each block runs again on its stored input,
Adam updates it, and it is stored. Weights and moments of the other blocks are in memory or on disk, depending on the
room; in a block with 30 % of zeros or more, those of pruned weights, which stay zero, are not stored. With several
processes, the one that has the windows of a step computes the gradient, and all take the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.method.sweep.sweep_task import SweepStep, SweepTask, TrainingSet, Weights
from sparsellm.method.sweep.training import (
    adam_step,
    add_to,
    joined,
    running_on,
    send_gradients,
)
from sparsellm.model.streams import Piece

# elements that are put in their places at once, since that takes places in int64
COPIED = 1 << 20
MOST_KEPT = 0.7  # share of a block's elements; with more, the places of what is kept take as much as is saved


class Streamed(Weights):
    """The fp32 parameters of every block and Adam's moments. One store has the parameters of block i at 2i, and its
    moments at 2i + 1. Only elements that are not pruned are stored, and a second store has their places. It has none
    for a block of which nearly all is kept, which is stored whole."""

    def __init__(self, task: SweepTask) -> None:
        super().__init__(task)
        # names of the factors of groups, where values are rounded
        self.factors: set[str] = set()
        self.store = task.feed.scratch.store(self.chain.device)
        self._places = task.feed.scratch.store(self.chain.device)
        # the block whose places were read last, and these
        self._read: tuple[int, Tensor] | None = None
        # other names of parameters: the block and the name there
        self._aliases: list[dict[str, tuple[int, str]]] = []
        for index in range(len(self.chain)):
            with self.chain.block(index, task.pruned(index)):
                trained = self.describe(index)
                parameters = self.chain.block_parameters(index)
                self.factors |= trained.keys() - parameters.keys()
                others = [name for name in parameters if name not in trained]
                self._aliases.append({name: self.chain.home(name) for name in others})
                self._places.append(self._places_in(trained))
                flat = self.part(index, joined(trained))
            self.store.append(flat)
            self.store.append(flat.new_zeros(2, len(flat)))
        self.read_saved()

    def _places_in(self, trained: Mapping[str, Tensor]) -> Tensor:
        """The places of a block's elements that are not pruned, ``(kept,)``; empty for a block that is stored whole."""
        flags = []
        for name, value in trained.items():
            # As integers: a zero with a sign is kept with it.
            flag = joined({name: value}).view(torch.int32) != 0
            if name not in self.pruned:
                flag.fill_(True)
            flags.append(flag)
        kept = torch.cat(flags)
        dtype = torch.int32 if len(kept) < 1 << 31 else torch.int64
        if int(kept.count_nonzero()) > MOST_KEPT * len(kept):
            return torch.empty(0, dtype=dtype, device=kept.device)
        return kept.nonzero().flatten().to(dtype)

    def _places_of(self, index: int) -> Tensor:
        """The places of a block, read once for all of its tensors in a step."""
        if self._read is None or self._read[0] != index:
            self._read = index, self._places[index]
        return self._read[1]

    def part(self, index: int, complete: Tensor) -> Tensor:
        places = self._places_of(index)
        if not len(places):
            return complete
        return complete.to(places.device).index_select(-1, places)

    def complete(self, index: int, part: Tensor) -> Tensor:
        places = self._places_of(index)
        if not len(places):
            return part
        elements = sum(shape.numel() for shape in self.shapes[index].values())
        filled = part.new_zeros(*part.shape[:-1], elements)
        pieces = zip(places.split(COPIED), part.split(COPIED, -1), strict=True)
        for some, values in pieces:
            filled.index_copy_(-1, some.long(), values)
        return filled

    def parameters(self, block: int) -> Tensor:
        return self.complete(block, self.store[2 * block])

    def moments(self, block: int) -> Tensor:
        return self.complete(block, self.store[2 * block + 1])

    def copied(self, index: int) -> Tensor:
        return self.store[2 * index].clone()

    def replace(self, index: int, parameters: Tensor, moments: Tensor) -> None:
        self.store.overwrite(2 * index, parameters)
        self.store.overwrite(2 * index + 1, moments)

    def expect(self, index: int, *, moments: bool) -> None:
        """Says which block is read next, with its moments or without."""
        self._places.expect(index)
        for place in range(2 * index, 2 * index + 1 + moments):
            self.store.expect(place)

    def write(self) -> None:
        self.store.close()
        super().write()

    def close(self) -> None:
        self.store.close()
        self._places.close()
        super().close()

    def all_views(
        self, flat: Tensor, index: int, *, running: bool, written: bool = False
    ) -> dict[str, nn.Parameter]:
        """``views``, and the parameters that the block borrows, which are the same objects under all their names.
        With ``running``, values are on the grids of ``Integers``; with ``written``, also rounded as on disk."""
        views: dict[int, dict[str, nn.Parameter]] = {}
        owners = [index, *(at for at, _ in self._aliases[index].values())]
        for at in dict.fromkeys(owners):
            views[at] = self.views(flat if at == index else self.parameters(at), at)
            if running and self.integers is not None:
                views[at] = self.integers.of(views[at], at)
            if written:
                for name, parameter in views[at].items():
                    value = self.as_written(name, parameter.detach())
                    views[at][name] = nn.Parameter(value)
        result = dict(views[index])
        for name, (at, first) in self._aliases[index].items():
            result[name] = views[at][first]
        return result

    def steps(self, tokens: Sequence[Sequence[int]]) -> list[SweepStep]:
        steps = []
        for process, some in enumerate(tokens):
            for number, count in enumerate(some):
                pieces: list[int | None] = [None] * len(tokens)
                pieces[process] = number
                steps.append(SweepStep(tuple(pieces), count))
        return steps

    def outputs(
        self, data: TrainingSet, pieces: Sequence[Piece | None]
    ) -> Iterator[tuple[Piece, Tensor]]:
        for piece in pieces:
            if piece is not None:
                yield piece, self._forward(data, piece, written=True)[-1]

    def step(
        self, data: TrainingSet, step: SweepStep, rate: float, number: int
    ) -> float:
        chain = self.chain
        piece = data.piece(step)
        process = next(at for at, place in enumerate(step.pieces) if place is not None)
        loss = 0.0
        inputs = []
        gradient = None
        # gradients of parameters that later blocks borrow
        waiting: dict[str, Tensor] = {}
        if piece is not None:
            inputs = self._forward(data, piece, written=False)
            loss, gradient = data.end(inputs.pop(), piece, step.tokens)
        for index in reversed(range(len(chain))):
            flat = self.parameters(index)
            state = self.moments(index)
            self.expect(index - 1, moments=True)
            parameters = used = self.all_views(flat, index, running=False)
            if piece is not None:
                hidden = inputs.pop()
                if self.integers is not None:
                    used = self.all_views(flat, index, running=True)
                with running_on(chain, index, used), torch.enable_grad():
                    hidden.requires_grad_(True)
                    output = chain.apply(index, hidden, data.call(piece, index))
                    output.backward(gradient)
                    del output
                gradient = hidden.grad
                assert gradient is not None
                for name in used:  # straight through the rounding
                    parameters[name].grad = used[name].grad
            trained = {name: parameters[name] for name in self.shapes[index]}
            returned = trained.keys() & waiting.keys()
            # the parameters by their first names
            shared = {name: trained[name] for name in returned}
            for name, (at, first) in self._aliases[index].items():
                if at != index:
                    shared[first] = parameters[name]
            for first, parameter in shared.items():
                if parameter.grad is not None:
                    add_to(waiting, first, parameter.grad)
            for name in returned:
                trained[name].grad = waiting.pop(name)
            if piece is not None and self.integers is not None:
                self.integers.pull_back(trained, used, index)
            send_gradients(trained.values(), process)
            adam_step(
                trained, state, rate, number, pruned=self.pruned, factors=self.factors
            )
            kept = self.part(index, flat)
            del flat, parameters, used, trained  # before as much is taken again
            self.replace(index, kept, self.part(index, state))
            del state
        return parallel.broadcast(loss, process)

    def _forward(
        self, data: TrainingSet, piece: Piece, *, written: bool
    ) -> list[Tensor]:
        """The input of every block, and the output of the last."""
        hidden = [data.inputs(piece).float()]
        for index in range(len(self.chain)):
            flat = self.parameters(index)
            self.expect(index + 1, moments=False)
            used = self.all_views(flat, index, running=True, written=written)
            with running_on(self.chain, index, used):
                hidden.append(
                    self.chain.run(index, hidden[-1], data.call(piece, index))
                )
            del used  # before the next block's are made
        return hidden
