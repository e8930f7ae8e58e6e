"""The hidden states of the calibration windows, between the blocks of the chain."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from sparsellm import parallel
from sparsellm.errors import ModelError
from sparsellm.files.reader import CheckpointReader
from sparsellm.files.scratch import Scratch, TensorStore
from sparsellm.model.capture import choosing
from sparsellm.model.chain import Call, Chain
from sparsellm.progress import ProgressCallback, ignore

LOCAL = (
    "take method sparsegpt, wanda or magnitude, and an allocation other than threshold"
)
PIECE_TOKENS = 2048  # in one forward call of a pass with gradients, which keeps every activation in memory


@dataclass(frozen=True)
class Piece:
    """Some windows of one batch, with about the requested number of tokens: one optimiser step runs on them."""

    batch: int  # its number
    rows: slice  # the windows of that batch
    # one a block, for these windows alone, since a mask may have a row for each window
    calls: list[Call]


@dataclass(frozen=True)
class Feed:
    """Calibration windows and the settings for running them through a chain. Every pass over the chain takes one."""

    chain: Chain
    windows: Tensor  # token ids, (samples, seq)
    batch_tokens: int  # in one forward call, at least one window
    # keeps hidden states, in memory or in files beyond its limit
    scratch: Scratch = field(default_factory=Scratch)
    progress: ProgressCallback = ignore
    # the weights of the blocks for gradients, if not the chain's own
    blocks: CheckpointReader | None = None

    @property
    def seq_len(self) -> int:
        """Tokens in a window."""
        return self.windows.shape[1]

    def first(self, tokens: int, least: int = 1) -> Feed:
        """A feed of the first windows that fit in ``tokens``, at least ``least`` where the feed has as many."""
        return replace(
            self, windows=self.windows[: max(least, windows_of(tokens, self.seq_len))]
        )

    def own(self) -> tuple[Feed, slice]:
        """A feed of this process's share of the windows, and the slice of that share. If there are fewer windows than
        processes, some get an empty slice, and a feed of the first window, since no feed is empty."""
        places = parallel.own_slice(
            len(self.windows), windows_of(self.batch_tokens, self.seq_len)
        )
        windows = self.windows[places]
        if not len(windows):
            windows = self.windows[:1]
        return replace(self, windows=windows), places

    def stream(
        self, weights: CheckpointReader | None = None, *, pieces: int = 0
    ) -> Stream:
        """The inputs of block 0, for which embedding and block 0 (with ``weights``) are loaded and released again."""
        with self.chain.outer(head=False), self.chain.block(0, weights):
            return Stream(self, pieces)


def windows_of(tokens: int, seq_len: int) -> int:
    """The number of whole windows in ``tokens`` tokens, such as those of one forward call; at least one."""
    return max(1, tokens // seq_len)


class Stream:
    """The inputs of the current block, batch by batch, and the other arguments of every block.

    Args:
        feed: the windows and their chain, with its outer weights and block 0 loaded.
        pieces: tokens in a piece, at least one window, into which the batches are also cut; 0 for no pieces.

    Attributes:
        hidden: batches ``(batch, seq, hidden)``, in memory or on disk. Each access may read a file, so access it once.
        pieces: the batches in smaller parts, in order; empty without pieces.
        first_window: the arguments of every block for the first window, with the changes by blocks that ran.
    """

    def __init__(self, feed: Feed, pieces: int) -> None:
        chain = feed.chain
        windows = feed.windows
        self.chain = chain
        self.scratch = feed.scratch
        size = windows_of(feed.batch_tokens, feed.seq_len)
        self.hidden = self.store()
        self.pieces: list[Piece] = []
        self._calls: list[list[Call]] = []
        rows = max(1, round(pieces / feed.seq_len))
        unique = _Unique()
        for start in range(0, len(windows), size):
            batch = windows[start : start + size]
            hidden, calls = chain.start(batch)
            self.hidden.append(hidden)
            self._calls.append(unique.calls(calls))
            if not pieces:
                continue
            for first in range(0, len(batch), rows):
                part = slice(first, first + rows)
                # Captured again rather than cut: only the model defines which dimension of an argument is windows.
                if rows >= len(batch):
                    calls = self._calls[-1]
                else:
                    calls = unique.calls(chain.start(batch[part])[1])
                self.pieces.append(Piece(len(self._calls) - 1, part, calls))
        self.first_window = unique.calls(chain.start(windows[:1])[1])

    def __len__(self) -> int:
        return len(self.hidden)

    def fork(self) -> Stream:
        """A second stream that starts from the same hidden states, with the same calls."""
        twin = copy.copy(self)
        twin.hidden = self.store()
        for hidden in self.hidden:
            twin.hidden.append(hidden)
        return twin

    def store(self) -> TensorStore:
        """An empty store for one tensor of each batch, such as the targets of a block. Close it after use."""
        return self.scratch.store(self.chain.device)

    def close(self) -> None:
        """Drops the hidden states."""
        self.hidden.close()

    def calls(self, index: int) -> list[Call]:
        """The arguments of block ``index``, batch by batch."""
        return [calls[index] for calls in self._calls]

    def run(self, index: int) -> Iterator[Tensor]:
        """Runs the loaded block ``index`` on every batch and yields the outputs; the stream does not advance."""
        for position in range(len(self)):
            yield self.run_batch(index, position)

    def run_batch(self, index: int, position: int) -> Tensor:
        """The output of the loaded block ``index`` for one batch."""
        hidden = self.hidden[position]
        self.hidden.expect(position + 1)
        return self.chain.run(index, hidden, self._calls[position][index])

    def run_window(self, index: int) -> Tensor:
        """The output of the loaded block ``index`` for the first window; enough to observe how a block runs."""
        return self.chain.run(index, self.hidden[0][:1], self.first_window[index])

    def advance(self, index: int) -> None:
        """Replaces the input of block ``index`` by its output."""
        if _keeps_state(self.first_window[index]) and self.hidden[0].dim() == 3:
            self.run_window(index)  # later blocks read what it leaves
        for position, output in enumerate(self.run(index)):
            self.hidden[position] = output


def check_forward(chain: Chain, windows: Tensor, *, token_states: bool) -> None:
    """Runs the model's own forward up to block 0 on a few tokens of the windows, so that it fails early.

    Linears in a module that returns whole numbers, such as an indexer of sparse attention, become gates in every block.
    A ModelError says that the forward fails, or is not a plain chain of the blocks; or, with ``token_states``, that
    blocks read keys of earlier ones, or that a position of the hidden states is not that of a window and token: Gemma
    3n carries several states for each token, CPM-Ant more tokens than the window has."""
    few = windows[:2, :8]  # enough to see what a block takes and returns
    chosen: set[str] = set()
    with chain.outer(head=False), chain.block(0) as block, choosing(block, chosen):
        hidden, calls = chain.start(few)
    chain.gates |= {f"{name}.{inner}" for inner in chosen for name in chain.block_names}
    if token_states and (hidden.dim() != 3 or hidden.shape[:2] != few.shape):
        raise ModelError(
            f"the blocks of {type(chain.model).__name__} take hidden states of shape {tuple(hidden.shape)} for "
            f"{len(few)} windows of {few.shape[1]} tokens, not (windows, tokens, width), which gradients and sweeps "
            f"need; {LOCAL}"
        )
    readers: int = getattr(chain.config.get_text_config(), "num_kv_shared_layers", 0)
    if token_states and _keeps_state(calls[0]) and readers:
        raise ModelError(
            f"blocks of {type(chain.model).__name__} read keys and values of earlier ones, to which gradients and "
            f"sweeps do not go back; {LOCAL}"
        )
    chain.check_handed(windows[:1])


def _keeps_state(call: Call) -> bool:
    """Whether a block may leave something for later ones in a mapping that all of them get; Gemma 4 shares keys so."""
    return any(
        isinstance(leaf, MutableMapping)
        for leaf in tree_leaves((call.args, call.kwargs))
    )


class _Unique:
    """Keeps one copy of equal calls: masks of 2048 × 2048 for 256 windows would take more memory than the model."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[object, ...], list[Tensor]] = {}
        self._calls: dict[tuple[object, ...], Call] = {}

    def calls(self, calls: list[Call]) -> list[Call]:
        return [self._call(call.map(self._known)) for call in calls]

    def _call(self, call: Call) -> Call:
        leaves, form = tree_flatten((call.args, call.kwargs))
        # No id is used twice: the kept call keeps the leaves alive.
        key = (str(form), call.hidden_keyword, *map(id, leaves))
        return self._calls.setdefault(key, call)

    def _known(self, value: Tensor) -> Tensor:
        known = self._tensors.setdefault((value.shape, value.dtype, value.device), [])
        for tensor in known:
            if tensor is value or torch.equal(tensor, value):
                return tensor
        known.append(value)
        return value
