"""A short trial run of an allocation: prune on few windows, measure on others, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsellm.chain import Chain
from sparsellm.methods import METHODS, BlockTask
from sparsellm.patterns import Pattern
from sparsellm.progress import PhaseClock
from sparsellm.refine.head import divergence_from, through_head
from sparsellm.refine.training import running_on
from sparsellm.storage.scratch import Scratch
from sparsellm.streams import Stream

SOLVER = "sparsegpt"


class Trials:
    """Trial runs that share what the dense model gives.

    Args:
        chain: the dense model; left as it was to the bit.
        fit: token ids that linears are pruned on, ``(samples, seq)``.
        held_out: token ids that divergence is measured on.
        batch_tokens: tokens in one forward call.
        scratch: where hidden states are kept; None for memory.
    """

    def __init__(
        self, chain: Chain, fit: Tensor, held_out: Tensor, *, batch_tokens: int, scratch: Scratch | None = None
    ) -> None:
        self.chain = chain
        self._ids = held_out
        chain.load_outer(head=False)
        chain.load_block(0)
        self._fit = Stream(chain, fit, batch_tokens=batch_tokens, scratch=scratch)
        self._held = Stream(chain, held_out, batch_tokens=held_out.shape[1], scratch=scratch)  # one window a batch
        chain.release_outer()
        self._dense = self._held.fork()
        for index in range(len(chain)):
            chain.load_block(index)
            self._dense.advance(index)
            chain.release_block(index)

    def divergence(self, patterns: Mapping[str, Pattern]) -> float:
        """Mean ``KL(dense ‖ pruned)`` of a predicted token of the held-out windows, in nats.

        Args:
            patterns: of each linear to prune, by name.
        """
        chain, clock = self.chain, PhaseClock()
        fit, held = self._fit.fork(), self._held.fork()
        for index in range(len(chain)):
            chain.load_block(index)
            copies = {
                name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
                for name, parameter in chain.block_parameters(index).items()
            }
            with running_on(chain, index, copies):
                linears = [linear for linear in chain.linears(index) if linear.name in patterns]
                if linears:
                    task = BlockTask(index, linears, dict(patterns), fit, lambda _: None, clock)
                    METHODS[SOLVER].function(task)
                if index + 1 < len(chain):
                    fit.advance(index)
                held.advance(index)
            chain.release_block(index)
        fit.close()
        found = self._end(held)
        held.close()
        return found

    def close(self) -> None:
        for stream in (self._fit, self._held, self._dense):
            stream.close()

    @torch.no_grad()
    def _end(self, held: Stream) -> float:
        self.chain.load_outer()
        total = 0.0
        for number, (dense, pruned) in enumerate(zip(self._dense.hidden, held.hidden, strict=True)):
            ids = self._ids[number : number + 1]
            total += through_head(self.chain, pruned, ids, divergence_from(self.chain, dense, ids), gradient=False)[0]
        self.chain.release_outer()
        return total / self._ids.numel()
