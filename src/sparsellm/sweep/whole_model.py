"""The sweep: trains the kept weights of all blocks towards the dense model's predictions, one block at a time.

The published objective ends at the last feed-forward unit; the global problem (arXiv 2402.17946, eq. 1) ends at the
model's predictions. A step runs forward through the blocks, computes the divergence of the predictions from the dense
model's, and propagates its gradient back through the blocks. On the way back each block runs again on its stored input,
Adam updates it, and it is stored. So a step needs the memory of one block and of the step's windows; weights and
moments of the other blocks are in memory or on disk, depending on the room. With several processes, the one that has
the windows of a step computes the gradient, and all take the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain import Chain, Feed, Stream
from sparsellm.chain.streams import Piece
from sparsellm.errors import ModelError, NumericalError
from sparsellm.progress import Progress
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.scratch import Scratch, TensorStore
from sparsellm.sweep.head import divergence_from, through_head
from sparsellm.sweep.integers import Integers
from sparsellm.sweep.training import (
    Adam,
    Float32Calls,
    as_written,
    held_out_of,
    of_all,
    running_on,
    schedule,
    share_gradients,
    shuffled,
)

# The learning rate of a model that is far from the dense one: three times as much diverges there within one pass. What
# a step gains falls with the square of the divergence, what its noise costs does not. So the rate does, too.
RATE = 0.0007
FAR = 1.2  # nats on windows that nothing was fitted to; from here on the rate is the highest
CAREFUL = 0.75  # nats; below this divergence the rate is tried out
LOWEST_PROBED, PROBED = RATE / 16, 0.004  # the lowest and the highest rate that are tried
FASTER = 4.0  # factor between the rates that are tried
PROBE_STEPS = 2  # steps at each; a pass of fewer than four times as many is not worth the trials
CUT = 1 / 3  # factor of the rate after a harmful pass
HARM = 1.01  # a pass is harmful above this multiple of the least divergence so far; smaller rises are noise
STEP_TOKENS = 512  # tokens of a step; half as many steps of twice the tokens cost as much and gain less
SWEEP_SHARE = 0.5  # windows of a pass per calibration window; what a pass gains depends more on its steps


@dataclass(frozen=True)
class Pass:
    """The mean divergence KL(dense ‖ pruned) per predicted token, in nats, after a number of passes.

    Attributes:
        passes: their number.
        held_out: the divergence on held-out windows.
        train: on the windows of the last pass, before its steps; None before the first.
        rate: the learning rate of the sweep, with the state before the first pass; else None.
    """

    passes: int
    held_out: float
    train: float | None
    rate: float | None = None


@dataclass(frozen=True)
class _Place:
    """A piece of the windows of one process: its number there, and its tokens."""

    number: int
    tokens: int


@dataclass(frozen=True)
class Reached:
    """The last pass that an earlier process saved.

    Attributes:
        history: every pass so far, including the state before the first.
        best: the number of the best pass so far; 0 for the state before the first.
    """

    history: list[Pass]
    best: int

    @property
    def passes(self) -> int:
        return len(self.history) - 1


class Parameters(Protocol):
    """The state of a sweep, block by block."""

    def parameters(self, block: int) -> Tensor:
        """The parameters of a block, flat, fp32."""

    def moments(self, block: int) -> Tensor:
        """Adam's moments of a block, ``(2, elements)`` fp32."""


class SavedPasses(Protocol):
    """Storage of passes: each is saved, and an interrupted sweep continues from the last one."""

    @property
    def reached(self) -> Reached | None:
        """The last pass that was saved; None if there is none."""

    def parameters(self, number: int, block: int) -> Tensor:
        """The parameters of a block after pass ``number``: flat, fp32, on the CPU."""

    def moments(self, number: int, block: int) -> Tensor:
        """Adam's moments of a block after pass ``number``: ``(2, elements)`` fp32, on the CPU."""

    def save(self, history: list[Pass], best: int, state: Parameters, *, last: bool) -> None:
        """Saves the state after the newest pass of ``history``; after the ``last`` pass, only the best parameters."""


@dataclass(frozen=True)
class SweepTask:
    """A pruned model to be swept.

    Attributes:
        feed: the pruned chain and the windows of the first pass, this process's share.
        dense: the output of the dense model's last block, ``(batch, seq, hidden)`` in the batches of the feed; None for
            a chain that holds the dense model's own weights, which then runs.
        passes: the number of passes over a set of windows.
        seed: of the windows' order.
        write_block: called for each final block in order, while it is loaded.
        learning_rate: of Adam, relative to the root mean square of each parameter; None for one by the divergence at
            the start, at most :data:`RATE`.
        held_out: share of the first set that is held out to decide which state is kept.
        blocks: the shard of each pruned block, or None for a chain that holds its weights.
        saved: storage of the passes, from which an interrupted sweep continues; None to save none.
        fresh: this process's windows for later passes, one tensor a pass; after the last, the sets come again in turn.
            ``dense`` must then be None. A sweep soon fits the windows it has seen.
        integers: the linears whose values are rounded; None for none. The blocks and the passes hold their unrounded
            values, which are trained.
        swept: passes of an earlier stage over the first sets of windows; the next pass takes the set after theirs.
    """

    feed: Feed
    dense: Sequence[Tensor] | None
    passes: int
    seed: int
    write_block: Callable[[int], None]
    learning_rate: float | None = None
    held_out: float = 0.125
    blocks: Sequence[CheckpointReader] | None = None
    saved: SavedPasses | None = None
    fresh: Sequence[Tensor] = ()
    integers: Integers | None = None
    swept: int = 0

    def pruned(self, index: int) -> CheckpointReader | None:
        """The shard of the pruned block ``index``; None if the chain holds its weights."""
        return self.blocks[index] if self.blocks is not None else None


class _Masters:
    """The fp32 parameters of every block and Adam's moments, in a store: those of block i at 2i and 2i + 1.

    A parameter that several blocks use belongs to the first of them; the others borrow it.
    """

    def __init__(self, chain: Chain, scratch: Scratch, integers: Integers | None) -> None:
        self.chain = chain
        self.integers = integers
        self.pruned: set[str] = set()  # names of the weights of linears, whose zeros must stay
        self.factors: set[str] = set()  # names of the factors of groups, where values are rounded
        self.store = scratch.store(chain.device)
        self.shapes: list[dict[str, torch.Size]] = []
        self._dtypes: list[dict[str, tuple[torch.dtype, torch.dtype]]] = []
        self._aliases: list[dict[str, tuple[int, str]]] = []  # other names of parameters: the block and the name there

    def fill(self, task: SweepTask, reached: Reached | None) -> None:
        """Loads the pruned blocks, or the state after the last saved pass if further passes follow."""
        for index in range(len(self.chain)):
            with self.chain.block(index, task.pruned(index)):
                everything, own = self.chain.block_parameters(index), self._own(index)
                self.pruned |= {linear.weight_name for linear in self.chain.linears(index)}
                self.factors |= own.keys() - everything.keys()
                self.shapes.append({name: p.shape for name, p in own.items()})
                self._aliases.append({name: self.chain.home(name) for name in everything if name not in own})
                self._dtypes.append(self.chain.written_dtypes(index))
                flat = _flat(own)
            if reached is not None and task.saved is not None and reached.passes < task.passes:
                self.store.append(task.saved.parameters(reached.passes, index))
                self.store.append(task.saved.moments(reached.passes, index))
            else:
                self.store.append(flat)
                self.store.append(torch.zeros(2, len(flat), device=flat.device))

    def restart(self, task: SweepTask, best: _Best) -> None:
        """Restores the best state, or the blocks as they were pruned if there is none, with moments of zero."""
        for index in range(len(self.chain)):
            if best.number:
                flat = best[index].clone()
            else:
                with self.chain.block(index, task.pruned(index)):
                    flat = _flat(self._own(index))
            self.store[2 * index] = flat
            self.store[2 * index + 1] = torch.zeros(2, len(flat), device=flat.device)

    def parameters(self, block: int) -> Tensor:
        return self.store[2 * block]

    def moments(self, block: int) -> Tensor:
        return self.store[2 * block + 1]

    def _own(self, index: int) -> dict[str, Tensor]:
        """What is trained in the loaded block: its own parameters, and factors of groups where values are rounded."""
        factors = {} if self.integers is None else self.integers.factors(self.chain, index)
        parameters = self.chain.block_parameters(index)
        return {**{name: p for name, p in parameters.items() if self.chain.owns(name)}, **factors}

    def views(self, flat: Tensor, index: int) -> dict[str, nn.Parameter]:
        """Views of a block's flat tensor, by parameter. All require gradients, so that moments have the same layout."""
        views, position = {}, 0
        for name, shape in self.shapes[index].items():
            views[name] = nn.Parameter(flat[position : position + shape.numel()].view(shape))
            position += shape.numel()
        return views

    def all_views(
        self, flat: Tensor, index: int, *, running: bool = False, written: bool = False
    ) -> dict[str, nn.Parameter]:
        """:meth:`views`, and the parameters that the block borrows, which are the same objects under all their names.

        Args:
            flat: of the block.
            index: of the block.
            running: whether values are on the grids of :class:`Integers`, as the block runs.
            written: whether they are rounded as they would be written now, too.
        """
        views: dict[int, dict[str, nn.Parameter]] = {}
        for at in [index, *dict.fromkeys(at for at, _ in self._aliases[index].values())]:
            if at not in views:
                views[at] = self.views(flat if at == index else self.parameters(at), at)
                if (running or written) and self.integers is not None:
                    views[at] = self.integers.of(views[at], self.chain, at)
                if written:
                    dtypes = self._dtypes[at]
                    views[at] = {n: nn.Parameter(as_written(p, dtypes[n])) for n, p in views[at].items()}
        return {**views[index], **{name: views[at][first] for name, (at, first) in self._aliases[index].items()}}

    def borrowed(self, index: int) -> dict[str, str]:
        """For each parameter that block ``index`` borrows of another, by its name there, its name in the block."""
        return {first: name for name, (at, first) in self._aliases[index].items() if at != index}


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([each.detach().float().flatten() for each in tensors.values()])


class _Best:
    """The parameters after the best pass so far; empty if that is the state before the first."""

    def __init__(self, task: SweepTask, masters: _Masters, reached: Reached | None) -> None:
        self._masters = masters
        self._scratch = task.feed.scratch
        self._store: TensorStore | None = None
        self.number = reached.best if reached is not None else 0
        if self.number:
            assert task.saved is not None
            self._store = self._scratch.store()
            for index in range(len(masters.chain)):
                self._store.append(task.saved.parameters(self.number, index))

    def __getitem__(self, index: int) -> Tensor:
        assert self._store is not None
        return self._store[index]

    def take(self, number: int) -> None:
        """Copies the current parameters, which are those after pass ``number``."""
        self.number = number
        self._store = self._store or self._scratch.store()
        for index in range(len(self._masters.chain)):
            flat = self._masters.parameters(index).clone()
            if len(self._store) > index:
                self._store[index] = flat
            else:
                self._store.append(flat)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def check_sweepable(chain: Chain) -> None:
    """Refuses a model that a sweep cannot train; nothing need be loaded.

    Raises:
        ModelError: a weight is used in a block and outside the blocks.
    """
    for index in range(len(chain)):
        for name in chain.block_parameters(index):
            outside = chain.outside(name)
            if outside is not None:
                raise ModelError(
                    f"{name} is used outside the blocks too, as {outside}, which a sweep cannot train; set passes=0"
                )


@torch.no_grad()
def sweep(task: SweepTask) -> list[Pass]:
    """Fits the kept weights, biases and norms of all blocks to the dense model's predictions; zeros stay zero.

    The result is the state with the least divergence on held-out windows, which may be the one at the start. States are
    judged with weights rounded as they will be written. A harmful pass is undone, and later passes take smaller steps.
    The loss is ``KL(dense ‖ pruned)``, averaged over tokens.

    Returns:
        The divergence before the first pass and after each.

    Raises:
        NumericalError: the divergence is not finite at the start.
        ModelError: a weight is used in a block and outside the blocks.
    """
    check_sweepable(task.feed.chain)
    assert task.dense is None or not task.fresh, "the dense model's states belong to one set"
    reached = task.saved.reached if task.saved is not None else None
    masters = _Masters(task.feed.chain, task.feed.scratch, task.integers)
    masters.fill(task, reached)
    best = _Best(task, masters, reached)
    if reached is not None and reached.passes >= task.passes:  # all that is left is to write the best
        history = reached.history
    else:
        with _on(task, masters, task.feed.windows) as run:
            history = _passes(task, run, best, reached)
    task.feed.progress(Progress("sweep", 1, 1))
    masters.store.close()
    _write(task, masters, best)
    best.close()
    return history


def _passes(task: SweepTask, run: _Run, best: _Best, reached: Reached | None) -> list[Pass]:
    """Runs the remaining passes: each is judged, kept or undone, and saved. Returns the whole history."""
    chain = task.feed.chain
    train, judges = held_out_of(of_all(run.places()), task.held_out)
    history = list(reached.history) if reached is not None else [_start(task, run, train, judges, best)]
    rate, first = history[0].rate, len(history)
    assert rate is not None, "the state before the first pass has the rate"
    for number in range(first, task.passes + 1):
        harmful = harmful_passes(history)
        place = _Position(number, task.passes, first, harmful[-1] if harmful else 0, history[-1].held_out)
        with contextlib.ExitStack() as held:
            own, among = run, train
            turn = (task.swept + number - 1) % (1 + len(task.fresh))  # 0: the first set, without what is held out
            if turn:
                own = held.enter_context(_on(task, run.masters, task.fresh[turn - 1], place))
                among = of_all(own.places())
            held.enter_context(chain.outer())
            mean = _pass(task, own, among, place, rate * CUT ** len(harmful))
            history.append(Pass(number, run.judge(judges), mean))
        if history[-1].held_out < min(record.held_out for record in history[:-1]):
            best.take(number)
        elif number < task.passes and number in harmful_passes(history):
            run.masters.restart(task, best)
        if task.saved is not None:
            task.saved.save(history, best.number, run.masters, last=number == task.passes)
    return history


def _start(
    task: SweepTask,
    run: _Run,
    train: list[tuple[int, _Place]],
    judges: list[tuple[int, _Place]],
    best: _Best,
) -> Pass:
    """The state before the first pass, with the learning rate for the sweep.

    The rate by rule is proportional to the square of the divergence. Where that is small, it may be far too small for
    a model whose gradients have little noise. So a few steps are tried at rates that rise, each from the start, as long
    as they lower the held-out divergence further.
    """
    with task.feed.chain.outer():
        start = run.judge(judges)
        if not math.isfinite(start):
            raise NumericalError(f"the pruned model diverges from the dense one by {start}; prune less")
        if task.learning_rate is not None:
            return Pass(0, start, None, task.learning_rate)
        chosen, least = RATE * min(1.0, (start / FAR) ** 2), start
        rate = max(chosen, LOWEST_PROBED)
        while start < CAREFUL and rate <= PROBED and len(train) >= 4 * PROBE_STEPS:
            task.feed.progress(Progress("sweep", 0, task.passes, f"trying rate {rate:.1e} · KL {least:.3f}"))
            for number, (process, place) in enumerate(train[:PROBE_STEPS], 1):
                run.step(run.piece(process, place), process, rate, number)
            found = run.judge(judges)
            run.masters.restart(task, best)
            if not found < least:
                break
            least, chosen, rate = found, rate, rate * FASTER
        return Pass(0, start, None, chosen)


@dataclass(frozen=True)
class _Position:
    """Where a pass stands in its sweep: its number, of how many, the first of this process, the last that was undone,
    and the divergence before it."""

    number: int
    passes: int
    first: int
    undone: int
    divergence: float

    @property
    def done(self) -> int:
        """Passes that this process has finished."""
        return self.number - self.first

    @property
    def left(self) -> int:
        """Passes of this process."""
        return self.passes - self.first + 1


def _pass(task: SweepTask, run: _Run, train: list[tuple[int, _Place]], at: _Position, rate: float) -> float:
    """Runs one pass over the pieces of all processes; returns the mean divergence per token before its steps."""
    order, count, total = shuffled(len(train), task.seed + (at.number - 1) * 1_000_003), len(train), 0.0
    for step in range(count):
        said = f"pass {at.number}/{at.passes} · KL {at.divergence:.3f}"
        task.feed.progress(Progress("sweep", at.done + step / count, at.left, said))
        process, place = train[order[step]]
        factor = schedule((at.number - 1) * count + step, at.passes * count)
        since = (at.number - 1 - at.undone) * count + step + 1  # steps since Adam's moments began
        total += run.step(run.piece(process, place), process, rate * factor, since)
    return total / sum(place.tokens for _, place in train)


@contextlib.contextmanager
def _on(task: SweepTask, masters: _Masters, windows: Tensor, at: _Position | None = None) -> Iterator[_Run]:
    """A run over a set of windows, with the dense model's hidden states for them, before the pass ``at``."""
    feed, chain = replace(task.feed, windows=windows), task.feed.chain
    with contextlib.ExitStack() as held:
        stream = feed.stream(task.pruned(0), pieces=STEP_TOKENS)
        held.callback(stream.close)
        wanted = task.dense
        if wanted is None:
            dense = stream.fork()
            held.callback(dense.close)
            done, passes = (at.done, at.left) if at is not None else (0, task.passes)
            with chain.unpruned():
                for index in range(len(chain)):
                    task.feed.progress(Progress("sweep", done, passes, f"dense block {index + 1}/{len(chain)}"))
                    with chain.block(index):
                        dense.advance(index)
            wanted = dense.hidden
        yield _Run(chain, windows, stream, wanted, masters)


def _write(task: SweepTask, masters: _Masters, best: _Best) -> None:
    """Calls the task's ``write_block`` for every block, loaded with its final weights, rounded as they are written."""
    chain = task.feed.chain
    for index in range(len(chain)):
        with chain.block(index, task.pruned(index)):
            if best.number:
                trained = masters.views(best[index].to(chain.device), index)
                trained = trained if task.integers is None else task.integers.of(trained, chain, index)
                for name, value in trained.items():
                    chain.block_parameters(index)[name].copy_(value)
            elif task.integers is not None:
                task.integers.settle(chain, index)
            chain.settle_block(index)
            task.write_block(index)


def harmful_passes(history: Sequence[Pass]) -> list[int]:
    """The numbers of the passes that raised the held-out divergence above :data:`HARM` times the least before."""
    harmful, least = [], history[0].held_out
    for record in history[1:]:
        if not record.held_out <= HARM * least:  # NaN too
            harmful.append(record.passes)
        least = min(least, record.held_out)  # NaN is never less
    return harmful


class _Run:
    """Forward and backward of a few windows through all blocks."""

    def __init__(
        self, chain: Chain, windows: Tensor, stream: Stream, dense: Sequence[Tensor], masters: _Masters
    ) -> None:
        self.chain, self.windows, self.stream, self.dense, self.masters = chain, windows, stream, dense, masters
        self.starts = [0]
        for batch in dense:
            self.starts.append(self.starts[-1] + len(batch))
        self._in_fp32 = Float32Calls()

    def places(self) -> list[_Place]:
        return [_Place(number, self.tokens(piece)) for number, piece in enumerate(self.stream.pieces)]

    def piece(self, process: int, place: _Place) -> Piece | None:
        """The windows of a step, or None if another process has them."""
        return self.stream.pieces[place.number] if process == parallel.rank() else None

    def ids(self, piece: Piece) -> Tensor:
        """Token ids ``(windows, seq)``."""
        start = self.starts[piece.batch]
        return self.windows[start : self.starts[piece.batch + 1]][piece.rows]

    def tokens(self, piece: Piece) -> int:
        return self.ids(piece).numel()

    def judge(self, judges: Sequence[tuple[int, _Place]]) -> float:
        """The mean divergence per token over the held-out pieces of all processes."""
        own = [self.piece(process, place) for process, place in judges]
        sums = of_all([self.divergence(piece) for piece in own if piece is not None])
        return sum(divergence for _, divergence in sums) / sum(place.tokens for _, place in judges)

    def divergence(self, piece: Piece) -> float:
        """The divergence summed over the tokens, with the weights as they would be written now."""
        return self._end(self._forward(piece, written=True)[-1], piece, gradient=False)[0]

    def step(self, piece: Piece | None, process: int, rate: float, number: int) -> float:
        """Takes one step of Adam on every block; returns the divergence before it, summed over the tokens.

        Args:
            piece: the windows of the step, or None if another process has them.
            process: the process that has them.
            rate: the learning rate.
            number: of the step, from 1.
        """
        loss, entering, gradient = 0.0, [], None
        waiting: dict[str, Tensor] = {}  # gradients of parameters that later blocks borrow
        if piece is not None:
            entering = self._forward(piece, written=False)
            loss, gradient = self._end(entering.pop(), piece, gradient=True)
        for index in reversed(range(len(self.chain))):
            flat, state = self.masters.parameters(index), self.masters.moments(index)
            parameters = used = self.masters.all_views(flat, index)
            if piece is not None:
                hidden = entering.pop()
                if self.masters.integers is not None:
                    used = self.masters.all_views(flat, index, running=True)
                with running_on(self.chain, index, used), torch.enable_grad():
                    hidden.requires_grad_(True)
                    leaving = self.chain.apply(index, hidden, self._in_fp32(piece.calls[index]))
                    leaving.backward(gradient)
                gradient = hidden.grad
                assert gradient is not None
                for name in used:
                    parameters[name].grad = used[name].grad  # of a rounded value: straight through
            for first, name in self.masters.borrowed(index).items():
                _add_gradient(waiting, first, parameters[name].grad)
            own = {name: parameters[name] for name in self.masters.shapes[index]}
            for name in own.keys() & waiting.keys():
                _add_gradient(waiting, name, own[name].grad)
                own[name].grad = waiting.pop(name)
            if piece is not None and self.masters.integers is not None:
                self.masters.integers.pull_back(own, used, self.chain, index)
            share_gradients(own.values(), process)
            Adam(own, self.masters.pruned, state, self.masters.factors).step(rate, number)
            self.masters.store[2 * index] = flat
            self.masters.store[2 * index + 1] = state
        return parallel.broadcast(loss, process)

    def _forward(self, piece: Piece, *, written: bool) -> list[Tensor]:
        """The input of every block, and the output of the last."""
        hidden = [self.stream.hidden[piece.batch][piece.rows].float()]
        for index in range(len(self.chain)):
            flat = self.masters.parameters(index)
            parameters = self.masters.all_views(flat, index, running=True, written=written)
            with running_on(self.chain, index, parameters):
                hidden.append(self.chain.run(index, hidden[-1], self._in_fp32(piece.calls[index])))
        return hidden

    def _end(self, hidden: Tensor, piece: Piece, *, gradient: bool) -> tuple[float, Tensor]:
        """The divergence summed over the tokens, and the gradient of its mean at the output of the last block."""
        ids, wanted = self.ids(piece), self.dense[piece.batch][piece.rows]
        loss = divergence_from(self.chain, wanted, ids)
        total, slope = through_head(self.chain, hidden, ids, loss, gradient=gradient)
        return total, slope / ids.numel() if gradient else slope


def _add_gradient(sums: dict[str, Tensor], name: str, gradient: Tensor | None) -> None:
    """Adds a gradient to the sum of this name, if there is one."""
    if gradient is not None:
        sums[name] = sums[name] + gradient if name in sums else gradient
