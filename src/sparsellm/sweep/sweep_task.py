"""A pruned model to be swept, and its windows: what the streamed and the resident sweep have in common."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.chain import Call, Chain, Feed, Stream
from sparsellm.chain.streams import Piece
from sparsellm.storage.reader import CheckpointReader
from sparsellm.sweep.head import divergence_from, through_head
from sparsellm.sweep.integers import Integers
from sparsellm.sweep.saved import SavedSweep


class Step(NamedTuple):
    """A step of a pass: the number of its piece in each process, None in one that has none, and its tokens."""

    pieces: tuple[int | None, ...]
    tokens: int


@dataclass(frozen=True)
class Residence:
    """How a resident sweep holds and runs the blocks."""

    sharded: bool = False  # each process has some rows of every parameter, not all
    narrow: bool = False  # blocks run in bf16, on copies of the fp32 parameters
    recomputes: bool = False  # a block runs again in the backward pass, so its activations are not kept
    offloads: bool = False  # parameters are in the memory of the machine while their block does not run


@dataclass(frozen=True)
class SweepTask:
    """A pruned model to be swept.

    Attributes:
        feed: the pruned chain and the windows of the first pass, this process's share.
        dense: the output of the dense model's last block, ``(batch, seq, hidden)`` in the batches of the feed; None for
            a chain that holds the dense model's weights, which then runs.
        passes, seed: the number of passes, each over a set of windows, and the seed of the windows' order.
        write_block: called for each final block in order, while it is loaded.
        learning_rate: Adam's rate, relative to the root mean square of each parameter; None: by the divergence at
            the start, at most :data:`~sparsellm.sweep.whole_model.RATE`.
        blocks: the shard of each pruned block, or None for a chain that holds its weights.
        saved: storage of the passes, from which an interrupted sweep continues; None to save none.
        fresh: this process's windows for later passes, one tensor a pass; after the last, the sets come again in turn.
            ``dense`` must then be None. A sweep soon fits the windows it has seen.
        resident: how all blocks are in memory at once; None: one block at a time.
        integers: the linears whose values are rounded; blocks and passes hold the trained values before that.
        sources: the name of each window's text in the feed, for a mixture.
    """

    feed: Feed
    dense: Sequence[Tensor] | None
    passes: int
    seed: int
    write_block: Callable[[int], None]
    learning_rate: float | None = None
    blocks: Sequence[CheckpointReader] | None = None
    saved: SavedSweep | None = None
    fresh: Sequence[Tensor] = ()
    integers: Integers | None = None
    resident: Residence | None = None
    sources: Sequence[str] = ()

    def pruned(self, index: int) -> CheckpointReader | None:
        return self.blocks[index] if self.blocks is not None else None


class Weights(Protocol):
    """The fp32 parameters of all blocks and Adam's moments, wherever they are, and the blocks that run on them."""

    best: int  # the pass after which the kept parameters are; 0 for the state before the first

    def steps(self, tokens: Sequence[Sequence[int]]) -> list[Step]:
        """The steps of a pass over pieces with these tokens, those of each process."""

    def outputs(self, run: Run, pieces: Sequence[Piece | None]) -> Iterator[tuple[Piece, Tensor]]:
        """This process's pieces, and the output of the last block, with the weights as they would be written now."""

    def step(self, run: Run, step: Step, rate: float, number: int) -> float:
        """Takes step ``number`` of Adam, from 1, on every block; returns the divergence before it, summed over the
        tokens."""

    def keep(self, number: int) -> None:
        """Copies the current parameters, which are those after pass ``number``, as the best."""

    def restart(self) -> None:
        """Restores the best state, or the blocks as they were pruned if there is none, with moments of zero."""

    def parameters(self, block: int) -> Tensor:
        """The parameters of a block as one, fp32. Every process takes part."""

    def moments(self, block: int) -> Tensor:
        """Adam's moments of a block, ``(2, elements)``. Every process takes part."""

    def write(self) -> None:
        """Calls ``write_block`` for each block, loaded with its best weights, rounded as they are written."""

    def close(self) -> None:
        """Frees what the sweep holds."""


class Run:
    """A set of windows, with the dense model's hidden states for them, that weights are trained on."""

    def __init__(
        self,
        chain: Chain,
        windows: Tensor,
        stream: Stream,
        dense: Sequence[Tensor],
        weights: Weights,
        sources: Sequence[str],
    ) -> None:
        self.chain, self.windows, self.stream, self.dense, self.weights = chain, windows, stream, dense, weights
        self.sources = sources  # the text of each window, in a mixture
        self.starts = [0, *itertools.accumulate(map(len, dense))]
        # A call that several batches or blocks share is converted once.
        self._to: Callable[[Call, torch.dtype], Call] = functools.cache(Call.to)

    def steps(self) -> list[Step]:
        """The steps of a pass over the windows of all processes, in order."""
        return self.weights.steps(parallel.gather([self.ids(piece).numel() for piece in self.stream.pieces]))

    def texts(self, steps: Sequence[Step]) -> list[str]:
        """The text of a mixture that the first window of each step is from."""
        texts = parallel.gather([self.text(piece) for piece in self.stream.pieces])
        return [next(own[at] for own, at in zip(texts, each.pieces, strict=True) if at is not None) for each in steps]

    def text(self, piece: Piece) -> str:
        return self.sources[self.starts[piece.batch] + piece.rows.start] if self.sources else ""

    def piece(self, step: Step) -> Piece | None:
        """The windows of a step that this process has."""
        number = step.pieces[parallel.rank()]
        return None if number is None else self.stream.pieces[number]

    def ids(self, piece: Piece) -> Tensor:
        """Token ids ``(windows, seq)``."""
        start = self.starts[piece.batch]
        return self.windows[start : self.starts[piece.batch + 1]][piece.rows]

    def inputs(self, piece: Piece) -> Tensor:
        """The inputs of block 0."""
        return self.stream.hidden[piece.batch][piece.rows]

    def call(self, piece: Piece, index: int, dtype: torch.dtype = torch.float32) -> Call:
        """The other arguments of block ``index``."""
        return self._to(piece.calls[index], dtype)

    def judge(self, judges: Sequence[Step]) -> tuple[float, dict[str, float]]:
        """The mean divergence per token over the held-out steps of all processes, with the weights as they would be
        written now; and that over the windows of each text of a mixture."""
        sums: list[tuple[str, float, int]] = []  # the text, the divergence, the tokens
        for piece, hidden in self.weights.outputs(self, [self.piece(step) for step in judges]):
            rows = range(piece.rows.start, piece.rows.start + len(hidden))
            parts = [replace(piece, rows=slice(row, row + 1)) for row in rows] if self.sources else [piece]
            for part, some in zip(parts, hidden.chunk(len(parts)), strict=True):
                sums.append((self.text(part), self.end(some, part)[0], self.ids(part).numel()))
        gathered = [each for some in parallel.gather(sums) for each in some]

        def mean(*names: str) -> float:
            chosen = [each for each in gathered if each[0] in names]
            return sum(divergence for _, divergence, _ in chosen) / sum(tokens for _, _, tokens in chosen)

        names = sorted({name for name, _, _ in gathered})
        return mean(*names), {name: mean(name) for name in names if name}

    def step(self, step: Step, rate: float, number: int) -> float:
        return self.weights.step(self, step, rate, number)

    def end(self, hidden: Tensor, piece: Piece, tokens: int = 0) -> tuple[float, Tensor]:
        """The divergence summed over the tokens of a piece; and, if its step has ``tokens``, the gradient of the step's
        mean at the output of the last block."""
        ids = self.ids(piece)
        loss = divergence_from(self.chain, self.dense[piece.batch][piece.rows], ids)
        total, slope = through_head(self.chain, hidden, ids, loss, gradient=tokens > 0)
        return total, slope / tokens if tokens else slope
