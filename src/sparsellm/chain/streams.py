"""Hidden states of the calibration windows on their way through the chain."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain.chain import SHOWN_TOKENS, Call, Chain
from sparsellm.errors import ModelError
from sparsellm.progress import ProgressCallback, ignore
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.scratch import Scratch, TensorStore

PIECE_TOKENS = 2048  # in one forward call of a pass that takes gradients, which keep every activation


@dataclass(frozen=True)
class Piece:
    """Some whole windows of one batch, about as many tokens as were asked for: what a step of an optimiser runs on.

    Attributes:
        batch: the number of the batch.
        rows: which windows of it.
        calls: the arguments of every block for these windows alone; a mask may have a row for each.
    """

    batch: int
    rows: slice
    calls: list[Call]


@dataclass(frozen=True)
class Feed:
    """Calibration windows and how they are fed through a chain: what every traversal of the chain takes.

    Attributes:
        chain: the model.
        windows: token ids, ``(samples, seq)``.
        batch_tokens: tokens in one forward call, at least one window.
        scratch: where hidden states are kept: in memory, or in files beyond its limit.
        progress: is told how far each traversal is.
    """

    chain: Chain
    windows: Tensor
    batch_tokens: int
    scratch: Scratch = field(default_factory=Scratch)
    progress: ProgressCallback = ignore

    @property
    def seq_len(self) -> int:
        """Tokens in a window."""
        return self.windows.shape[1]

    def first(self, tokens: int) -> Feed:
        """The first whole windows that make up so many tokens, at least one."""
        return replace(self, windows=self.windows[: windows_of(tokens, self.seq_len)])

    def in_pieces(self) -> Feed:
        """The same windows in calls small enough for gradients."""
        return replace(self, batch_tokens=min(self.batch_tokens, PIECE_TOKENS))

    def stream(self, weights: CheckpointReader | None = None, *, pieces: int = 0) -> Stream:
        """The hidden states that enter block 0. Embedding and block 0 are read for it and released again.

        Args:
            weights: where a pruned block 0 stands, which a chain read from disk must show; None for the model's own.
            pieces: as of :class:`Stream`.
        """
        with self.chain.outer(head=False), self.chain.block(0, weights):
            return Stream(self.chain, self.windows, batch_tokens=self.batch_tokens, scratch=self.scratch, pieces=pieces)


def windows_of(tokens: int, seq_len: int) -> int:
    """How many whole windows make up so many tokens; at least one."""
    return max(1, tokens // seq_len)


class Stream:
    """What enters the current block, batch by batch, with the arguments each block is called with.

    Args:
        chain: the chain, with its outer weights and block 0 loaded.
        windows: token ids, ``(samples, seq)``.
        batch_tokens: tokens in one forward call, at least one window.
        scratch: where hidden states are kept; None for memory without a limit.
        pieces: tokens in a piece, at least one window: cut the batches into pieces as well, which captures the
            arguments of each anew; 0 for none.

    Attributes:
        hidden: batches ``(batch, seq, hidden)``, in memory or on disk: reading one may read a file, so read it once.
        pieces: the batches in smaller parts, in order, where they were asked for.
        scratch: where they, and all that grows with the tokens, are kept.
    """

    def __init__(
        self,
        chain: Chain,
        windows: Tensor,
        *,
        batch_tokens: int,
        scratch: Scratch | None = None,
        pieces: int = 0,
    ) -> None:
        self.chain = chain
        size = windows_in_batch(batch_tokens, windows.shape[1])
        self.scratch = scratch or Scratch()
        self.hidden = self.store()
        self._calls: list[list[Call]] = []
        self._first_window: list[Call] = []
        self._first_ids = windows[:size]
        self.pieces: list[Piece] = []
        rows = max(1, round(pieces / windows.shape[1]))
        share = _Interning()
        for start in range(0, len(windows), size):
            batch = windows[start : start + size]
            hidden, calls = chain.start(batch)
            if pieces:
                require_token_states(chain, hidden, batch)
            self.hidden.append(hidden)
            self._calls.append(share.call_all(calls))
            for first in range(0, len(batch) if pieces else 0, rows):
                part = slice(first, first + rows)
                # Captured again, not cut: which dimension of an argument counts windows is the model's own affair.
                own = self._calls[-1] if rows >= len(batch) else share.call_all(chain.start(batch[part])[1])
                self.pieces.append(Piece(len(self._calls) - 1, part, own))
            if not start:  # captured, not cut, like the pieces
                self._first_window = share.call_all(chain.start(batch[:1])[1]) if len(batch) > 1 else self._calls[0]

    def fork(self) -> Stream:
        """A second stream that starts from the same hidden states, with the same calls."""
        twin = copy.copy(self)
        twin.hidden = self.store()
        for hidden in self.hidden:
            twin.hidden.append(hidden)
        return twin

    def __len__(self) -> int:
        return len(self.hidden)

    def store(self) -> TensorStore:
        """An empty list for as many batches, such as the targets of a block, in the room that all of them share.

        Close it when it is not needed any more, or use it in a ``with`` block.
        """
        return self.scratch.store(self.chain.device)

    def close(self) -> None:
        """Forgets the hidden states."""
        self.hidden.close()

    def calls(self, index: int) -> list[Call]:
        """The arguments of block ``index``, batch by batch."""
        return [calls[index] for calls in self._calls]

    def run(self, index: int) -> Iterator[Tensor]:
        """Runs the loaded block ``index`` on every batch; the stream itself stays where it is."""
        for position in range(len(self)):
            yield self.run_batch(index, position)

    def run_batch(self, index: int, position: int) -> Tensor:
        """What leaves the loaded block ``index`` for one batch."""
        return self.chain.run(index, self.hidden[position], self._calls[position][index])

    def run_window(self, index: int) -> Tensor:
        """Runs the loaded block ``index`` on the first window alone, for what is to be seen of how a block runs."""
        self.require_token_states()
        return self.chain.run(index, self.hidden[0][:1], self._first_window[index])

    def require_token_states(self) -> None:
        """As :func:`require_token_states`, of the first batch."""
        require_token_states(self.chain, self.hidden[0], self._first_ids)

    def advance(self, index: int) -> None:
        """Replaces what enters block ``index`` by what leaves it."""
        for position, leaving in enumerate(self.run(index)):
            self.hidden[position] = leaving


def require_token_states(chain: Chain, hidden: Tensor, ids: Tensor) -> None:
    """Refuses hidden states that are not ``(windows, seq, width)``: whoever picks windows or tokens out of them, or
    pairs them with token ids, would take others.

    Raises:
        ModelError: Gemma 3n and models with hyper-connections carry several states for each token; CPM-Ant carries
            more tokens than the window has.
    """
    if hidden.dim() == 3 and hidden.shape[:2] == ids.shape:
        return
    raise ModelError(
        f"the blocks of {type(chain.model).__name__} take hidden states of shape {tuple(hidden.shape)} for "
        f"{ids.shape[0]} windows of {ids.shape[1]} tokens, not (windows, tokens, width), which gradients and sweeps "
        "need; take method sparsegpt, wanda or magnitude, and an allocation other than threshold"
    )


def check_forward(chain: Chain, windows: Tensor, *, token_states: bool) -> None:
    """Runs the model's own forward as far as block 0 on a few tokens, before the work; nothing need be loaded.

    Args:
        chain: the model.
        windows: token ids of the calibration, ``(samples, seq)``.
        token_states: whether the run needs what :func:`require_token_states` asks for.

    Raises:
        ModelError: the forward fails, is not a plain chain of the blocks, or has other hidden states.
    """
    few = windows[:2, : SHOWN_TOKENS + 1]
    with chain.outer(head=False), chain.block(0):
        hidden, _ = chain.start(few)
    if token_states:
        require_token_states(chain, hidden, few)


def windows_in_batch(batch_tokens: int, seq_len: int) -> int:
    """Windows in one forward call: at least one, whatever its length."""
    return max(1, batch_tokens // seq_len)


class _Interning:
    """Keeps one copy of equal calls: every batch of equal windows has the same masks and rotary angles, and a mask of
    2048 × 2048 for each of 256 windows would outweigh the model."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], list[Tensor]] = {}
        self._calls: dict[Any, Call] = {}

    def call_all(self, calls: list[Call]) -> list[Call]:
        return [self.call(call) for call in calls]

    def call(self, call: Call) -> Call:
        shared = Call(self._visit(call.args), self._visit(call.kwargs), call.hidden_keyword)
        return self._calls.setdefault((_key(shared.args), _key(shared.kwargs), shared.hidden_keyword), shared)

    def _visit(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._tensors.setdefault((value.shape, value.dtype, value.device), [])
            for tensor in known:
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            known.append(value)
            return value
        if type(value) in (tuple, list):
            return type(value)(self._visit(item) for item in value)
        if type(value) is dict:
            return {key: self._visit(item) for key, item in value.items()}
        return value


def _key(value: Any) -> Any:
    """Equal for two arguments that hold the very same things. What it names lives as long as the first call with it."""
    if type(value) in (tuple, list):
        return (type(value), *map(_key, value))
    if type(value) is dict:
        return (dict, *((key, _key(item)) for key, item in value.items()))
    return id(value)
