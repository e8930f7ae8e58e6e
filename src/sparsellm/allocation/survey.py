"""What an allocation may know of the dense model: sizes at once, statistics when they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sparsellm.chain import Chain, LinearView
from sparsellm.chain.capture import watch
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.refine.gradients import Visitor, backward_sweep
from sparsellm.storage.scratch import Scratch
from sparsellm.streams import PIECE_TOKENS, Stream


def windows_of(tokens: int, seq_len: int) -> int:
    """How many whole windows so many tokens are; one at least."""
    return max(1, tokens // seq_len)


@dataclass(frozen=True)
class LinearSize:
    """A linear to prune: its name, its block's number, and its shape ``(out, in)``."""

    name: str
    block: int
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


class Survey:
    """The dense model in numbers. It is read block by block, and left as it was to the bit.

    Args:
        chain: the dense model.
        windows: calibration token ids, ``(samples, seq)``.
        linears: those that will be pruned, in the order of the chain.
        sparsity: fraction of zeros over all of them.
        batch_tokens: tokens in one forward call.
        scratch: where hidden states are kept; None for memory.
        progress: is told how far each sweep is.
    """

    def __init__(
        self,
        chain: Chain,
        windows: Tensor,
        linears: Sequence[LinearSize],
        sparsity: float,
        *,
        batch_tokens: int,
        scratch: Scratch | None = None,
        progress: ProgressCallback = ignore,
    ) -> None:
        self.chain = chain
        self.windows = windows
        self.linears = tuple(linears)
        self.sparsity = sparsity
        self.batch_tokens = batch_tokens
        self.scratch = scratch or Scratch()
        self.progress = progress

    @property
    def weights(self) -> int:
        """In all linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def zeros(self) -> int:
        """In all linears together: ``round(sparsity · weights)``."""
        return round(self.sparsity * self.weights)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(linear.name for linear in self.linears)

    @cached_property
    def shared(self) -> frozenset[str]:
        """Those of which the weight stands in several places of the model."""
        views = (linear for index in self.blocks for linear in self._views(index))
        return frozenset(linear.name for linear in views if self.chain.is_shared(linear.weight_name))

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that have a linear to prune, in order."""
        return tuple(dict.fromkeys(linear.block for linear in self.linears))

    def over(self, windows: Tensor) -> Survey:
        """The same model, seen on other windows."""
        other = copy.copy(self)
        other.windows = windows
        other.__dict__.pop("mean_squares", None)
        return other

    @cached_property
    def mean_squares(self) -> dict[str, Tensor]:
        """Mean square of every input over the tokens that reach a linear, ``(in,)`` fp32; absent where none did."""
        sums: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}

        def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
            rows = entering.detach().flatten(0, -2).float()
            squares = rows.square().sum(0)
            sums[linear.name] = sums[linear.name] + squares if linear.name in sums else squares
            tokens[linear.name] = tokens.get(linear.name, 0) + len(rows)

        chain = self.chain
        chain.load_outer(head=False)
        chain.load_block(0)
        stream = Stream(chain, self.windows, batch_tokens=self.batch_tokens, scratch=self.scratch)
        chain.release_outer()
        for index in range(len(chain)):
            self.progress(Progress("survey", index, len(chain), f"block {index + 1}/{len(chain)} inputs"))
            chain.load_block(index)
            with watch(self._views(index), see):
                stream.advance(index)
            chain.release_block(index)
        stream.close()
        self.progress(Progress("survey", len(chain), len(chain)))
        return {name: total / tokens[name] for name, total in sums.items() if tokens[name]}

    def wanda_metrics(self) -> Iterator[tuple[int, list[Tensor]]]:
        """For each block, ``|w_ij| · √E[x_j²]`` (2306.11695) of its linears, ``(out, in)`` fp32.

        The papers take the norm over the tokens in place of the root of the mean: a factor that all share. A linear
        that no token reached is left out.
        """
        mean_squares = self.mean_squares
        for index in self.blocks:
            self.chain.load_block(index)
            metrics = []
            for linear in self._views(index):
                if linear.name in mean_squares:
                    metrics.append(linear.weight().abs_().mul_(mean_squares[linear.name].sqrt()))
            self.chain.release_block(index)
            yield index, metrics

    def sweep(self, visitor: Visitor) -> float:
        """The gradients of the loss; see :func:`sparsellm.refine.gradients.backward_sweep`."""
        return backward_sweep(
            self.chain,
            self.windows,
            visitor,
            names=self.names,
            batch_tokens=min(self.batch_tokens, PIECE_TOKENS),
            scratch=self.scratch,
            progress=self.progress,
        )

    def _views(self, index: int) -> list[LinearView]:
        return [linear for linear in self.chain.linears(index) if linear.name in self.names]
