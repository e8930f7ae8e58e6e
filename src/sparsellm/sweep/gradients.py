"""The gradient of the dense model's loss at every linear, one block in memory at a time.

The forward pass stores the input of each block. The next-token loss is differentiated through the head. Then each
block, from the last to the first, runs again on its stored input and propagates the gradient to it. Hidden states and
gradients are in memory, or in files where the scratch has no room.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from sparsellm.chain import Feed, LinearView, Stream
from sparsellm.chain.capture import watch
from sparsellm.errors import DataError, ModelError, NumericalError
from sparsellm.progress import Progress as Event
from sparsellm.storage.scratch import TensorStore
from sparsellm.sweep.head import next_token_loss, through_head
from sparsellm.sweep.training import running_on

TOKENS = 4096  # calibration tokens for gradients; the time is proportional to them
LEAST_WINDOWS = 4  # with half as many the model is worse, with twice as many it is not better
SHARE = 0.25  # positions of a window whose loss is differentiated; fewer make the squares noisy
LEAST_SCORED = 128  # fewest such positions: fewer save little, because the blocks run on all positions
WITHOUT = "take allocation uniform and, in sparsellm, effort 0 and options.output_metric 0"


class Visitor:
    """Receives the gradients of a backward sweep. A subclass overrides the methods that it needs.

    Every gradient is that of the *sum* over all scored tokens of the negative log-likelihood, in nats. So it does not
    depend on the number of windows, and its squares make up the empirical Fisher of a token. If only a share of the
    positions is scored, it is scaled so that its squares keep their expectation.

    Attributes:
        reads_inputs: whether :meth:`linear` reads the inputs of linears, which the model must then not change in place.
    """

    reads_inputs = True

    def linear(self, index: int, linear: LinearView, x: Tensor, gradient: Tensor) -> None:
        """Called for a linear of block ``index``: its input ``(..., in)``, and the gradient at its output."""

    def boundary(self, index: int, hidden: Tensor, gradient: Tensor) -> None:
        """Called with the input of block ``index`` and the gradient there, both fp32 ``(batch, seq, hidden)``.

        An ``index`` equal to the number of blocks stands for the output of the last block.
        """

    def block(self, index: int, linears: list[LinearView]) -> None:
        """Called after all tokens of block ``index``, which is still loaded, in fp32. Do not change its weights."""


@torch.no_grad()
def backward_sweep(feed: Feed, visitor: Visitor, names: Collection[str] | None = None, *, share: float = 1.0) -> float:
    """Calls a visitor with the gradients of the next-token loss at the outputs of linears and between the blocks.

    Blocks run in fp32, whatever dtype they are stored in. The model stays the same to the bit, without gradients in its
    parameters. The scratch holds ``blocks + 2`` times the hidden states of the windows.

    Args:
        feed: the chain, of which nothing need be loaded, and the windows; the first token of each is not scored.
        visitor: called block by block, from the last to the first.
        names: the linears to call it for; None for all.
        share: the share of a window's positions that is scored, drawn at random, at least :data:`LEAST_SCORED`. The
            head, whose vocabulary may cost more than all blocks, runs for these alone. See :func:`_positions`.

    Returns:
        The mean loss of a scored token, in nats.

    Raises:
        DataError: windows have a single token, which is not scored.
        NumericalError: the loss is not finite.
        ModelError: a block changes the input of a linear in place, so that gradient and input cannot be paired; or a
            block has no gradient; or hidden states are not ``(windows, seq, width)``.
    """
    if feed.seq_len < 2:
        raise DataError(f"windows of shape {tuple(feed.windows.shape)} have no next token; give windows of two or more")
    chain, blocks = feed.chain, len(feed.chain)
    stream = feed.stream()
    with contextlib.ExitStack() as stack:
        stack.callback(stream.close)
        stream.require_token_states()
        inputs: list[TensorStore] = []
        for index in range(blocks):
            feed.progress(Event("gradients", index, 2 * blocks, f"block {index + 1}/{blocks} forward"))
            inputs.append(stack.enter_context(stream.store()))
            with chain.block(index, feed.blocks):
                for position, output in enumerate(stream.run(index)):
                    inputs[index].append(stream.hidden[position])
                    stream.hidden[position] = output
        gradients = stack.enter_context(stream.store())
        with chain.outer():
            loss = _through_the_end(feed, stream, gradients, visitor, share)
        for index in reversed(range(blocks)):
            done = 2 * blocks - 1 - index
            feed.progress(Event("gradients", done, 2 * blocks, f"block {index + 1}/{blocks} backward"))
            with chain.block(index, feed.blocks):
                _back_through(stream, index, inputs[index], gradients, visitor, names)
            inputs[index].close()
    feed.progress(Event("gradients", 2 * blocks, 2 * blocks, ""))
    return loss


def _through_the_end(feed: Feed, stream: Stream, gradients: TensorStore, visitor: Visitor, share: float) -> float:
    """The mean loss; appends the gradient of its sum at the output of the last block to ``gradients``."""
    chain, total, start, predicted = feed.chain, 0.0, 0, feed.seq_len - 1
    for hidden in stream.hidden:
        hidden, ids = hidden.float(), feed.windows[start : start + len(hidden)].to(chain.device)
        scored = _positions(predicted, share, seed=start).to(chain.device)
        start += len(hidden)
        following = next_token_loss(ids[:, scored + 1])
        loss, slope = through_head(chain, hidden[:, scored], ids[:, scored], following, gradient=True)
        total += loss * predicted / len(scored)
        slope *= (predicted / len(scored)) ** 0.5
        gradient = torch.zeros_like(hidden).index_copy_(1, scored, slope)
        gradients.append(gradient)
        visitor.boundary(len(chain), hidden, gradient)
    if not math.isfinite(total):
        raise NumericalError(f"the loss of the dense model is {total} in {chain.dtype}; try dtype float32")
    return total / (len(feed.windows) * predicted)


def _positions(predicted: int, share: float, seed: int) -> Tensor:
    """The positions of a window that are scored, int64, in order, of the ``predicted`` ones with a next token.

    The gradient ``g`` at a token sums those of later positions, ``Σ_s a_s``. Of a share p of the positions it is
    ``ĝ = Σ_s m_s a_s``, scaled by ``1/√p`` so that ``E ĝ² = p g² + (1 − p) Σ_s a_s²``. Errors of predictions at
    different positions are uncorrelated in a calibrated model, so ``E g² = E Σ_s a_s²``: squares keep their expectation
    for any share, while gradients themselves are ``√p`` of theirs.
    """
    count = min(predicted, max(LEAST_SCORED, round(share * predicted)))
    if count == predicted:
        return torch.arange(predicted)
    return torch.randperm(predicted, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _back_through(
    stream: Stream,
    index: int,
    inputs: TensorStore,
    gradients: TensorStore,
    visitor: Visitor,
    names: Collection[str] | None,
) -> None:
    """Runs the loaded block on its stored input, and replaces ``gradients`` at its output by those at its input."""
    chain = stream.chain
    weights = {
        name: nn.Parameter(parameter.detach().float(), requires_grad=False)
        for name, parameter in chain.block_parameters(index).items()
    }
    with running_on(chain, index, weights):
        linears = [linear for linear in chain.linears(index) if names is None or linear.name in names]
        calls = [call.to(torch.float32) for call in stream.calls(index)]
        for position, call in enumerate(calls):
            hidden = inputs[position].float().detach().requires_grad_(True)
            with torch.enable_grad(), watch(linears, _show(visitor, index)):
                output = chain.apply(index, hidden, call)
            try:
                (gradient,) = torch.autograd.grad(output, hidden, gradients[position])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # the model's own code may not be differentiable
                why = str(error).splitlines()[0]
                block = chain.block_names[index]
                raise ModelError(f"{block} has no gradient ({why}); do without: {WITHOUT}") from error
            gradients[position] = gradient
            visitor.boundary(index, hidden.detach(), gradient)
        visitor.block(index, linears)


def _show(visitor: Visitor, index: int) -> Callable[[LinearView, Tensor, Tensor], None]:
    """A hook on a linear's output in the graph; later changes of the output in place do not affect it."""

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        given, version = x.detach(), x._version

        def arrived(gradient: Tensor) -> None:
            if visitor.reads_inputs and given._version != version:
                raise ModelError(
                    f"the model changes the input of {linear.name} in place, so it has no gradient; do without: "
                    f"{WITHOUT}"
                )
            visitor.linear(index, linear, given, gradient.detach())

        if y.requires_grad:  # else the loss does not depend on this linear
            y.register_hook(arrived)

    return see


def not_finite(name: str) -> str:
    """The error message for gradients at a linear that are not finite."""
    return f"gradients at {name} are not finite; try dtype float32, or do without: {WITHOUT}"


class OutputSquares(Visitor):
    """Sums the squared gradients at every output of each linear.

    Args:
        tokens: all tokens of the sweep, including those that a linear does not get.
    """

    reads_inputs = False

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._sums: dict[str, Tensor] = {}

    def linear(self, index: int, linear: LinearView, x: Tensor, gradient: Tensor) -> None:
        if not gradient.numel():  # an expert that no token was routed to
            return
        squares = gradient.flatten(0, -2).float().square().sum(0)
        self._sums[linear.name] = self._sums[linear.name] + squares if linear.name in self._sums else squares

    def means(self) -> dict[str, Tensor]:
        """``E[g_i²]`` over all tokens, ``(out,)`` fp32 on the CPU, of each linear that a token reached.

        Raises:
            NumericalError: a gradient was NaN or infinite.
        """
        means = {name: (total / self._tokens).cpu() for name, total in self._sums.items()}
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                raise NumericalError(not_finite(name))
        return means
