"""A pruned model to be swept, and its windows: what the streamed and the resident sweep have in common."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.files.reader import CheckpointReader
from sparsellm.method.sweep.head import divergence_from, through_head
from sparsellm.method.sweep.integers import Integers
from sparsellm.method.sweep.saved import SavedSweep
from sparsellm.method.sweep.training import joined, split
from sparsellm.model import Call, Feed, Stream
from sparsellm.model.streams import Piece


class SweepStep(NamedTuple):
    """A step of a pass: the number of its piece in each process, None in one that has none, and its tokens."""

    pieces: tuple[int | None, ...]
    tokens: int


@dataclass(frozen=True)
class Residence:
    """How a resident sweep holds and runs the blocks."""

    sharded: bool = False  # each process has some rows of every parameter, not all
    narrow: bool = False  # blocks run in bf16, on copies of the fp32 parameters
    recomputes: bool = False  # a block runs again in the backward pass, so its activations are not kept


@dataclass(frozen=True)
class SweepTask:
    """A pruned model to be swept."""

    # the pruned chain and the windows of the first pass, this process's share
    feed: Feed
    # The output of the dense model's last block, ``(batch, seq, hidden)`` in the batches of the feed; None for a chain
    # that holds the dense model's weights, which then runs.
    dense: Sequence[Tensor] | None
    passes: int  # each over a set of windows
    seed: int  # decides the order of the windows
    # called for each final block in order, while it is loaded
    write_block: Callable[[int], None]
    # Adam's rate, relative to a parameter's root mean square; None: whole_model._start chooses one, at most PROBED.
    learning_rate: float | None = None
    # the shard of each; None for a chain that holds pruned weights
    blocks: Sequence[CheckpointReader] | None = None
    # storage of passes, from which an interrupted sweep continues; None to save none
    saved: SavedSweep | None = None
    # This process's windows for later passes, one tensor a pass; after the last, the sets come again in turn. ``dense``
    # must then be None. A sweep soon fits the windows it has seen.
    fresh: Sequence[Tensor] = ()
    # linears with rounded values; blocks and passes hold the trained ones before that
    integers: Integers | None = None
    # how all blocks are in memory at once; None: one block at a time
    resident: Residence | None = None
    # the name of each window's text in the feed, for a mixture
    sources: Sequence[str] = ()

    def pruned(self, index: int) -> CheckpointReader | None:
        """The shard of block ``index``, if there are shards."""
        if self.blocks is None:
            return None
        return self.blocks[index]


class Weights(ABC):
    """The fp32 parameters of all blocks and Adam's moments, wherever they are, and the blocks that run on them.

    The parameters of a block are one tensor, ``(elements,)``, its moments are ``(2, elements)``. A parameter that
    several blocks use belongs to the first of them."""

    def __init__(self, task: SweepTask) -> None:
        self.task = task
        self.chain = task.feed.chain
        self.integers = task.integers
        # The pass after which the kept parameters are; 0 for the blocks as they were pruned, where the store is empty.
        self.best = 0
        self._best_store = task.feed.scratch.store(self.chain.device)
        # Names of the weights of linears, whose zeros must stay.
        self.pruned: set[str] = set()
        # What each block trains, in the order of its tensor.
        self.shapes: list[dict[str, torch.Size]] = []
        # The dtypes of each parameter in the chain and on disk.
        self.dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = {}

    @abstractmethod
    def steps(self, tokens: Sequence[Sequence[int]]) -> list[SweepStep]:
        """The steps of a pass over pieces with these tokens, those of each process."""

    @abstractmethod
    def outputs(
        self, data: TrainingSet, pieces: Sequence[Piece | None]
    ) -> Iterator[tuple[Piece, Tensor]]:
        """This process's pieces, and the output of the last block, with the weights as they would be written now."""

    @abstractmethod
    def step(
        self, data: TrainingSet, step: SweepStep, rate: float, number: int
    ) -> float:
        """Takes step ``number`` of Adam, from 1, on every block; returns the divergence before, summed over tokens."""

    @abstractmethod
    def parameters(self, block: int) -> Tensor:
        """The parameters of a block. Every process takes part."""

    @abstractmethod
    def moments(self, block: int) -> Tensor:
        """Adam's moments of a block. Every process takes part."""

    def keep(self, number: int) -> None:
        """Copies the current parameters, which are those after pass ``number``, as the best."""
        self.best = number
        self._best_store.close()
        for index in range(len(self.chain)):
            self._best_store.append(self.copied(index))

    def restart(self) -> None:
        """Restores the best state, or the blocks as they were pruned if there is none, with moments of zero."""
        for index in range(len(self.chain)):
            if self.best:
                parameters = self._best_store[index].clone()
            else:
                with self.chain.block(index, self.task.pruned(index)):
                    parameters = self.part(index, joined(self.trained(index)))
            self.replace(index, parameters, parameters.new_zeros(2, len(parameters)))

    def write(self) -> None:
        """Calls ``write_block`` for each block, loaded with its best weights, rounded as they are written."""
        chain = self.chain
        for index in range(len(chain)):
            with chain.block(index, self.task.pruned(index)):
                if self.best:
                    flat = self.complete(index, self._best_store[index])
                    trained = self.views(flat, index)
                    if self.integers is not None:
                        trained = self.integers.of(trained, index)
                    del flat
                    for name, value in trained.items():
                        chain.value(name).copy_(value)
                elif self.integers is not None:
                    self.integers.settle(index)
                chain.settle_block(index)
                self.task.write_block(index)

    def close(self) -> None:
        """Frees what the sweep holds."""
        self._best_store.close()

    @abstractmethod
    def copied(self, index: int) -> Tensor:
        """A copy of this process's part of the parameters of a block."""

    @abstractmethod
    def replace(self, index: int, parameters: Tensor, moments: Tensor) -> None:
        """Replaces this process's part of a block; a subclass may go on using the tensors."""

    def part(self, index: int, complete: Tensor) -> Tensor:
        """What this process has of the parameters or moments of a block."""
        return complete

    def complete(self, index: int, part: Tensor) -> Tensor:
        """The parameters or one of the moments of a block, of which every process gives its part."""
        return part

    def trained(self, index: int) -> dict[str, Tensor]:
        """What is trained in the loaded block: the parameters it owns, and factors of groups if values are rounded."""
        trained: dict[str, Tensor] = {
            name: parameter
            for name, parameter in self.chain.block_parameters(index).items()
            if self.chain.owns(name)
        }
        if self.integers is not None:
            trained |= self.integers.factors(index)
        return trained

    def describe(self, index: int) -> dict[str, Tensor]:
        """Notes names, shapes and dtypes of the loaded block, the next one; returns what is trained in it."""
        trained = self.trained(index)
        self.pruned |= {linear.weight_name for linear in self.chain.linears(index)}
        self.shapes.append({name: tensor.shape for name, tensor in trained.items()})
        for name, parameter in self.chain.block_parameters(index).items():
            self.dtypes[name] = (parameter.dtype, self.chain.stored_dtype(name))
        return trained

    def read_saved(self) -> None:
        """Takes this process's part of the state after the last saved pass, if more passes follow, and keeps the best
        parameters of the saved passes, if there are any."""
        saved = self.task.saved
        if saved is None or saved.last is None:
            return
        number = saved.last.history[-1].passes
        self.best = saved.last.best
        for index in range(len(self.chain)):
            if 0 < number < self.task.passes:
                self.replace(
                    index,
                    self.part(index, saved.read("parameters", number, index)),
                    moments=self.part(index, saved.read("moments", number, index)),
                )
            if self.best:
                best = saved.read("parameters", self.best, index)
                self._best_store.append(self.part(index, best))
                del best

    def views(self, parameters: Tensor, index: int) -> dict[str, nn.Parameter]:
        """Views of a block's tensor, by parameter. All require gradients, so that moments have the same layout."""
        return {
            name: nn.Parameter(part)
            for name, part in split(parameters, self.shapes[index]).items()
        }

    def as_written(self, name: str, value: Tensor) -> Tensor:
        """Values of a parameter, rounded as they will be written; fp32."""
        in_chain, on_disk = self.dtypes[name]
        return value.to(in_chain).to(on_disk).float()


class TrainingSet:
    """A set of windows, with the dense model's hidden states for them, that weights are trained on."""

    def __init__(
        self,
        windows: Tensor,
        stream: Stream,
        dense: Sequence[Tensor],
        weights: Weights,
        sources: Sequence[str],
    ) -> None:
        self.windows = windows
        self.stream = stream
        self.dense = dense
        self.weights = weights
        self.sources = sources  # the text of each window, in a mixture
        self.starts = [0, *itertools.accumulate(map(len, dense))]
        # A call that several batches or blocks share is converted once.
        self._to: Callable[[Call, torch.dtype], Call] = functools.cache(Call.to)

    def steps(self) -> list[SweepStep]:
        """The steps of a pass over the windows of all processes, in order."""
        tokens = [self.ids(piece).numel() for piece in self.stream.pieces]
        return self.weights.steps(parallel.gather(tokens))

    def texts(self, steps: Sequence[SweepStep]) -> list[str]:
        """The text of a mixture that the first window of each step is from."""
        texts = parallel.gather([self.text(piece) for piece in self.stream.pieces])
        first = []
        for step in steps:
            places = zip(texts, step.pieces, strict=True)
            first.append(next(part[at] for part, at in places if at is not None))
        return first

    def text(self, piece: Piece) -> str:
        """The text of a mixture that the first of these windows is from; empty without a mixture."""
        if not self.sources:
            return ""
        first: int = self.starts[piece.batch] + piece.rows.start
        return self.sources[first]

    def piece(self, step: SweepStep) -> Piece | None:
        """The windows of a step that this process has."""
        number = step.pieces[parallel.rank()]
        if number is None:
            return None
        return self.stream.pieces[number]

    def ids(self, piece: Piece) -> Tensor:
        """Token ids ``(windows, seq)``."""
        start = self.starts[piece.batch]
        stop = self.starts[piece.batch + 1]
        return self.windows[start:stop][piece.rows]

    def inputs(self, piece: Piece) -> Tensor:
        """The inputs of block 0."""
        return self.stream.hidden[piece.batch][piece.rows]

    def call(
        self, piece: Piece, index: int, dtype: torch.dtype = torch.float32
    ) -> Call:
        """The other arguments of block ``index``."""
        return self._to(piece.calls[index], dtype)

    def judge(self, judges: Sequence[SweepStep]) -> tuple[float, dict[str, float]]:
        """The mean divergence per token over the held-out steps of all processes, with the weights as they would be
        written now; and that over the windows of each text of a mixture."""
        sums: list[tuple[str, float, int]] = []  # the text, the divergence, the tokens
        pieces = [self.piece(step) for step in judges]
        for piece, hidden in self.weights.outputs(self, pieces):
            parts = [piece]
            if self.sources:  # window by window
                rows = range(piece.rows.start, piece.rows.start + len(hidden))
                parts = [replace(piece, rows=slice(row, row + 1)) for row in rows]
            for part, some in zip(parts, hidden.chunk(len(parts)), strict=True):
                divergence, _ = self.end(some, part)
                sums.append((self.text(part), divergence, self.ids(part).numel()))
        gathered = [record for some in parallel.gather(sums) for record in some]

        def mean(*names: str) -> float:
            chosen = [record for record in gathered if record[0] in names]
            total = sum(divergence for _, divergence, _ in chosen)
            return total / sum(tokens for _, _, tokens in chosen)

        names = sorted({name for name, _, _ in gathered})
        return mean(*names), {name: mean(name) for name in names if name}

    def step(self, step: SweepStep, rate: float, number: int) -> float:
        return self.weights.step(self, step, rate, number)

    def end(
        self, hidden: Tensor, piece: Piece, tokens: int = 0
    ) -> tuple[float, Tensor]:
        """The divergence summed over the tokens of a piece; and, if its step has ``tokens``, the gradient of the step's
        mean at the output of the last block."""
        ids = self.ids(piece)
        chain = self.stream.chain
        loss = divergence_from(chain, self.dense[piece.batch][piece.rows], ids)
        total, slope = through_head(chain, hidden, ids, loss, gradient=tokens > 0)
        if tokens:
            slope = slope / tokens
        return total, slope
