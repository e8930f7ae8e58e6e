"""The chain's end: the kept weights of all blocks against the loss itself, one block in work at a time.

The published objective ends in the last feed-forward unit; the global problem (arXiv 2402.17946, eq. 1) ends in what
the model predicts. Here the pruned model is swept as a whole: forward through the blocks, the divergence of its
predictions from the dense model's at the end, and its gradient back through the blocks, each of which runs again from
what entered it, is corrected by Adam, and is put away. So memory is that of one block, and of the windows of one step;
weights and moments of the others wait in memory or on disk, as there is room. Where there are several processes, the
one that has the windows of a step computes its gradient, and all take the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain import Chain
from sparsellm.chain.products import bf16_products
from sparsellm.errors import ModelError, NumericalError
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.refine.head import divergence_from, through_head
from sparsellm.refine.sweep_state import SweepState
from sparsellm.refine.training import (
    Adam,
    Float32Calls,
    Shuffled,
    as_written,
    held_out_of,
    of_all,
    running_on,
    schedule,
    share_gradients,
)
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.scratch import Scratch
from sparsellm.streams import Piece, Stream

# For a model at KL = 1 nat from the dense one. In steps of 1024 tokens 0.002 diverges there within one pass, and 0.0007
# takes a model at KL = 0.6 further away. What a step gains falls with the square of the distance, what its noise costs
# does not: so the rate follows that square, up to here.
RATE = 0.0007
CUT = 1 / 3  # of the rate, after a pass that did harm
HARM = 1.01  # times the least divergence so far: less is how it wavers near its minimum
STEP_TOKENS = 1024  # of a step; half as many steps of twice the tokens cost as much and go less far
SWEPT_COPIES = 4  # of every block in fp32: its parameters, two moments, and the best state so far


@dataclass(frozen=True)
class Sweep:
    """How the sweep runs.

    Attributes:
        passes: over the calibration windows; 0 for no sweep.
        learning_rate: of Adam, relative to the root mean square of each parameter; None for :data:`RATE` by the
            square of the divergence at the start.
        held_out: share of the windows that decides which state is kept.
    """

    passes: int
    learning_rate: float | None = None
    held_out: float = 0.125


@dataclass(frozen=True)
class Pass:
    """Mean divergence KL(dense ‖ pruned) of a predicted token in nats, after so many passes."""

    passes: int
    held_out: float
    train: float | None


@dataclass(frozen=True)
class _Place:
    """Some windows of a process: the number of the piece there, and its tokens."""

    number: int
    tokens: int


class _Masters:
    """The fp32 parameters of every block, and Adam's moments, in a store: block i stands at 2i and 2i + 1."""

    def __init__(self, chain: Chain, scratch: Scratch) -> None:
        self.chain = chain
        self.pruned: set[str] = set()
        self.store = scratch.store(chain.device)
        self.shapes: list[dict[str, torch.Size]] = []
        self._dtypes: list[dict[str, tuple[torch.dtype, torch.dtype]]] = []

    def add(self, index: int) -> None:
        own = self.chain.block_parameters(index)
        self.pruned |= {linear.weight_name for linear in self.chain.linears(index)}
        self.shapes.append({name: p.shape for name, p in own.items()})
        self._dtypes.append(self.chain.written_dtypes(index))
        flat = self._flat(index)
        self.store.append(flat)
        self.store.append(torch.zeros(2, len(flat), device=flat.device))

    def restart(self, best: Sequence[Tensor] | None, blocks: Sequence[CheckpointReader] | None) -> None:
        """From the best state again, or from the blocks as they were pruned if there is none; Adam knows nothing."""
        for index in range(len(self.chain)):
            if best is not None:
                flat = best[index].clone()
            else:
                _load(self.chain, index, blocks)
                flat = self._flat(index)
                self.chain.release_block(index)
            self.store[2 * index] = flat
            self.store[2 * index + 1] = torch.zeros(2, len(flat), device=flat.device)

    def _flat(self, index: int) -> Tensor:
        return torch.cat([p.detach().float().flatten() for p in self.chain.block_parameters(index).values()])

    def parameters(self, flat: Tensor, index: int) -> dict[str, nn.Parameter]:
        """Views of a block's flat tensor. All take gradients, so that moments and parameters have the same places."""
        found, position = {}, 0
        for name, shape in self.shapes[index].items():
            found[name] = nn.Parameter(flat[position : position + shape.numel()].view(shape))
            position += shape.numel()
        return found

    def written(self, flat: Tensor, index: int) -> dict[str, nn.Parameter]:
        """The same as they would be read again if they were written now."""
        dtypes = self._dtypes[index]
        return {n: nn.Parameter(as_written(p, dtypes[n])) for n, p in self.parameters(flat, index).items()}


def check_sweepable(chain: Chain) -> None:
    """Refuses a model that no sweep can train; nothing need be loaded.

    Raises:
        ModelError: a weight stands in two blocks, or in a block and outside.
    """
    for index in range(len(chain)):
        shared = next((name for name in chain.block_parameters(index) if chain.is_shared(name)), None)
        if shared is not None:
            raise ModelError(
                f"{shared} stands in several places of the model, which a sweep cannot train; set passes=0"
            )


@torch.no_grad()
def sweep(
    chain: Chain,
    windows: Tensor,
    dense: Sequence[Tensor],
    settings: Sweep,
    *,
    blocks: Sequence[CheckpointReader] | None,
    batch_tokens: int,
    scratch: Scratch,
    seed: int,
    progress: ProgressCallback,
    write_block: Callable[[int], None],
    state: SweepState | None = None,
    facts: Callable[[], dict[str, Any]] = dict,
) -> list[Pass]:
    """Fits the kept weights, biases and norms of all blocks to the dense model's predictions; zeros stay zero.

    The state with the least divergence on held-out windows is kept, which may be the one at the start; states are
    judged as they will be written, rounded. A pass that does harm is undone, and those after it take smaller
    steps. The loss is ``KL(dense ‖ pruned)``, in its mean over tokens.

    Args:
        chain: the pruned model.
        windows: calibration token ids ``(samples, seq)``, this process's share of them.
        dense: what leaves the dense model's last block, batches ``(batch, seq, hidden)``, in batches of
            ``batch_tokens``.
        settings: how long and how fast.
        blocks: where each pruned block stands, or None for a chain that holds its weights.
        batch_tokens: as of the walk.
        scratch: room for the parameters of all blocks.
        seed: of the windows' order.
        progress: is told how far the sweep is.
        write_block: called for each block, loaded and final, in order.
        state: where each pass is saved, and the last saved one is gone on from; None for neither.
        facts: JSON values to save with a pass.

    Raises:
        NumericalError: the divergence is not finite at the start.
        ModelError: blocks share weights.
    """
    check_sweepable(chain)
    reached = state.reached if state is not None else None
    masters = _Masters(chain, scratch)
    for index in range(len(chain)):
        _load(chain, index, blocks)
        masters.add(index)
        if reached is not None and state is not None and reached.passes < settings.passes:
            masters.store[2 * index] = state.parameters(reached.passes, index)
            masters.store[2 * index + 1] = state.moments(reached.passes, index)
        if index:
            chain.release_block(index)
    chain.load_outer()
    stream = Stream(chain, windows, batch_tokens=batch_tokens, scratch=scratch, pieces=STEP_TOKENS)
    chain.release_block(0)
    run = _Run(chain, stream, windows, dense, masters)
    places = [_Place(number, run.tokens(piece)) for number, piece in enumerate(stream.pieces)]
    train, judges = held_out_of(of_all(places), settings.held_out)
    steps = settings.passes * len(train)
    order = Shuffled(len(train), seed)

    def judge() -> float:
        own = [stream.pieces[place.number] for process, place in judges if process == parallel.rank()]
        found = of_all([run.divergence(piece) for piece in own])
        return sum(divergence for _, divergence in found) / sum(place.tokens for _, place in judges)

    history = [Pass(**record) for record in reached.history] if reached is not None else [Pass(0, judge(), None)]
    if not math.isfinite(history[0].held_out):
        raise NumericalError(f"the pruned model diverges from the dense one by {history[0].held_out}; prune less")
    best, best_pass = None, 0
    if reached is not None and state is not None and reached.best:
        best, best_pass = scratch.store(), reached.best
        for index in range(len(chain)):
            best.append(state.parameters(best_pass, index))
    rate = settings.learning_rate
    if rate is None:
        rate = RATE * min(1.0, history[0].held_out ** 2)
    done = (len(history) - 1) * len(train)
    for _ in range(done):
        next(order)
    for number in range(len(history) - 1, settings.passes):
        total = 0.0
        harmful = harmful_passes(history)
        trusted, fresh = rate * CUT ** len(harmful), harmful[-1] * len(train) if harmful else 0
        for _ in range(len(train)):
            progress(
                Progress("sweep", done, steps, f"sweep {number + 1}/{settings.passes} · KL {history[-1].held_out:.3f}")
            )
            process, place = train[next(order)]
            piece = stream.pieces[place.number] if process == parallel.rank() else None
            total += run.step(piece, process, trusted * schedule(done, steps), done - fresh + 1)
            done += 1
        history.append(Pass(number + 1, judge(), total / sum(place.tokens for _, place in train)))
        if history[-1].held_out < min(record.held_out for record in history[:-1]):
            best, best_pass = best or scratch.store(), number + 1
            for index in range(len(chain)):
                flat = masters.store[2 * index].clone()
                if len(best) > index:
                    best[index] = flat
                else:
                    best.append(flat)
        elif number + 1 < settings.passes and number + 1 in harmful_passes(history):
            masters.restart(best, blocks)
        if state is not None:
            state.save(
                [asdict(record) for record in history],
                best_pass,
                lambda index: masters.store[2 * index],
                lambda index: masters.store[2 * index + 1],
                last=number + 1 == settings.passes,
                facts=facts(),
            )
    stream.close()
    masters.store.close()
    chain.release_outer()
    for index in range(len(chain)):
        _load(chain, index, blocks)
        if best is not None:
            for name, value in masters.parameters(best[index].to(chain.device), index).items():
                chain.block_parameters(index)[name].copy_(value)
        chain.settle_block(index)
        write_block(index)
        chain.release_block(index)
    if best is not None:
        best.close()
    progress(Progress("sweep", steps, steps))
    return history


def harmful_passes(history: Sequence[Pass]) -> list[int]:
    """The numbers of the passes that took the held-out divergence above the least before, and not by a little."""
    found, least = [], history[0].held_out
    for record in history[1:]:
        if not record.held_out <= HARM * least:  # NaN too
            found.append(record.passes)
        least = min(least, record.held_out)  # which NaN is never less than
    return found


def _load(chain: Chain, index: int, blocks: Sequence[CheckpointReader] | None) -> None:
    chain.load_block(index, blocks[index] if blocks is not None else None)


class _Run:
    """Forward and backward of a few windows through all blocks."""

    def __init__(
        self, chain: Chain, stream: Stream, windows: Tensor, dense: Sequence[Tensor], masters: _Masters
    ) -> None:
        self.chain, self.stream, self.dense, self.masters = chain, stream, dense, masters
        self.starts = [0]
        for batch in dense:
            self.starts.append(self.starts[-1] + len(batch))
        self.windows = windows
        self._in_fp32 = Float32Calls()

    def ids(self, piece: Piece) -> Tensor:
        """Token ids ``(windows, seq)``."""
        start = self.starts[piece.batch]
        return self.windows[start : self.starts[piece.batch + 1]][piece.rows]

    def tokens(self, piece: Piece) -> int:
        return self.ids(piece).numel()

    def divergence(self, piece: Piece) -> float:
        """Summed over the tokens, of the weights as they would be written now."""
        return self._end(self._forward(piece, written=True)[-1], piece, gradient=False)[0]

    def step(self, piece: Piece | None, process: int, rate: float, number: int) -> float:
        """One step of Adam on every block; returns the divergence before it, summed over the tokens.

        Args:
            piece: the windows of the step, or None where they are in another process.
            process: the one that has them.
            rate: of the step.
            number: of the step, from 1.
        """
        loss, entering, gradient = 0.0, [], None
        if piece is not None:
            entering = self._forward(piece, written=False)
            loss, gradient = self._end(entering.pop(), piece, gradient=True)
        for index in reversed(range(len(self.chain))):
            flat, state = self.masters.store[2 * index], self.masters.store[2 * index + 1]
            parameters = self.masters.parameters(flat, index)
            if piece is not None:
                hidden = entering.pop()
                with running_on(self.chain, index, parameters), torch.enable_grad():
                    hidden.requires_grad_(True)
                    leaving = self.chain.apply(index, hidden, self._in_fp32(piece.calls[index]))
                    with bf16_products(self.chain.products_in_bf16):
                        leaving.backward(gradient)
                gradient = hidden.grad
                assert gradient is not None
            share_gradients(parameters.values(), process)
            Adam(parameters, self.masters.pruned, state).step(rate, number)
            self.masters.store[2 * index] = flat
            self.masters.store[2 * index + 1] = state
        return parallel.broadcast(loss, process)

    def _forward(self, piece: Piece, *, written: bool) -> list[Tensor]:
        """What enters every block, and what leaves the last."""
        hidden = [self.stream.hidden[piece.batch][piece.rows].float()]
        for index in range(len(self.chain)):
            flat = self.masters.store[2 * index]
            parameters = self.masters.written(flat, index) if written else self.masters.parameters(flat, index)
            with running_on(self.chain, index, parameters):
                hidden.append(self.chain.run(index, hidden[-1], self._in_fp32(piece.calls[index])))
        return hidden

    def _end(self, hidden: Tensor, piece: Piece, *, gradient: bool) -> tuple[float, Tensor]:
        """The divergence summed over the tokens, and the gradient of its mean in what left the last block."""
        ids, wanted = self.ids(piece), self.dense[piece.batch][piece.rows]
        loss = divergence_from(self.chain, wanted, ids)
        total, found = through_head(self.chain, hidden, ids, loss, gradient=gradient)
        return total, found / ids.numel() if gradient else found
