"""Hidden states of the calibration windows on their way through the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain import Call, Chain


class Stream:
    """What enters the current block, batch by batch, with the arguments each block is called with.

    Args:
        chain: the chain, with its outer weights and block 0 loaded.
        windows: token ids, ``(samples, seq)``.
        batch_tokens: tokens in one forward call, at least one window.
    """

    def __init__(
        self,
        chain: Chain,
        windows: Tensor,
        *,
        batch_tokens: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.chain = chain
        size = windows_in_batch(batch_tokens, windows.shape[1])
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = []
        share = _Interning()
        for start in range(0, len(windows), size):
            hidden, calls = chain.start(windows[start : start + size])
            self.hidden.append(hidden)
            self._calls.append([share.call(call) for call in calls])
            if progress is not None:
                progress(min(start + size, len(windows)), len(windows))

    def __len__(self) -> int:
        return len(self.hidden)

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

    def advance(self, index: int) -> None:
        """Replaces what enters block ``index`` by what leaves it."""
        for position, leaving in enumerate(self.run(index)):
            self.hidden[position] = leaving


def windows_in_batch(batch_tokens: int, seq_len: int) -> int:
    """Windows in one forward call: at least one, whatever its length."""
    return max(1, batch_tokens // seq_len)


class _Interning:
    """Keeps one copy of equal tensors: every batch of equal windows has the same masks and rotary angles, and a mask
    of 2048 × 2048 for each of 256 windows would outweigh the model."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[Tensor]] = {}

    def call(self, call: Call) -> Call:
        return Call(self._visit(call.args), self._visit(call.kwargs), call.hidden_keyword)

    def _visit(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._known.setdefault((value.shape, value.dtype, value.device), [])
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
