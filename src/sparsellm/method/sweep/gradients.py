"""The gradient of the dense model's loss at every linear, one block in memory at a time, and what follows from it: the
cost of errors of outputs, and the saliency of weights.

The forward pass stores the input of each block. The next-token loss is differentiated through the head. Then each
block, from the last to the first, runs again on its stored input and propagates the gradient to it. Hidden states and
gradients are in memory, or in files where the scratch has no room. Each process takes some of the windows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsellm import machine, parallel
from sparsellm.errors import DataError, ModelError, NumericalError
from sparsellm.files.scratch import TensorStore
from sparsellm.method.sweep.head import next_token_loss, through_head
from sparsellm.method.sweep.training import add_to, running_on
from sparsellm.model import Chain, Feed, LinearView, Stream
from sparsellm.model.capture import watch
from sparsellm.model.streams import PIECE_TOKENS
from sparsellm.progress import Progress as Event

TOKENS = 4096  # calibration tokens for gradients; the time is proportional to them
LEAST_WINDOWS = 4  # half as many make the model worse, twice as many no better
SCORED = 0.25  # positions of a window whose loss is differentiated; fewer make the squares noisy
LEAST_SCORED = 128  # fewest such positions: fewer save little, because the blocks run on all positions
BINS = 1 << 14
# log₂ of a saliency in nats: the range of fp32 factors; a bin is 1 % wide
LOWEST = -160.0
HIGHEST = 60.0
WITHOUT = (
    "take allocation uniform and, in sparsellm, effort 0 and options.output_metric 0"
)

See = Callable[[LinearView, Tensor, Tensor], None]
"""Called for a linear with its input ``(..., in)`` and the gradient at its output, which is that of the *sum* over all
scored tokens of the negative log-likelihood, in nats: its squares make up the empirical Fisher of a token."""


@dataclass(frozen=True)
class LossGradients:
    """The results of one backward sweep of the dense model. Linears that no token reached are in neither mapping."""

    tokens: int
    # E[g_i²] of each output i of a linear, (out,) fp32: what an error of that output costs the loss, to second order
    output_squares: dict[str, Tensor]
    # a histogram() of each linear; empty if it was not requested
    saliency: dict[str, Tensor]


def loss_gradients(
    feed: Feed, names: Collection[str], *, saliency: bool = False
) -> LossGradients:
    """The squared gradients at outputs of the linears ``names``, and optionally the saliency of every weight.

    Saliency takes one product ``F = (g∘g)ᵀ(x∘x)`` a batch, with factors in bf16 where blocks multiply in it (their
    rounding is less than a bin), summed in fp32. One block's ``F`` is in memory at a time. A NumericalError says that a
    gradient is NaN or infinite; others are as in ``backward_sweep``."""
    tokens = feed.windows.numel()
    dtype = torch.float32
    if feed.chain.products is not None:
        dtype = torch.bfloat16
    squares: dict[str, Tensor] = {}  # (out,) fp32, sums over tokens
    fisher: dict[str, Tensor] = {}  # (out, in) fp32, those of one block
    histograms: dict[str, Tensor] = {}

    def see(linear: LinearView, x: Tensor, gradient: Tensor) -> None:
        if not gradient.numel():  # an expert that no token was routed to
            return
        costs = gradient.flatten(0, -2).float().square()  # (tokens, out)
        add_to(squares, linear.name, costs.sum(0))
        if saliency:
            rows = x.flatten(0, -2).float().square()  # (tokens, in)
            add_to(fisher, linear.name, (costs.to(dtype).T @ rows.to(dtype)).float())

    def done(linears: list[LinearView]) -> None:
        sizes = {
            linear.name: (linear.out_features, linear.in_features) for linear in linears
        }
        parallel.all_sums_(
            squares, {name: size[:1] for name, size in sizes.items()}, feed.chain.device
        )
        parallel.all_sums_(fisher, sizes, feed.chain.device)
        for linear in linears:
            if linear.name in fisher:
                histograms[linear.name] = histogram(
                    linear, fisher.pop(linear.name).div_(tokens)
                )

    pieces = replace(feed, batch_tokens=min(feed.batch_tokens, PIECE_TOKENS))
    backward_sweep(
        pieces, names, see=see, done=done, fraction=SCORED, reads_inputs=saliency
    )
    means = {name: (total / tokens).cpu() for name, total in squares.items()}
    for name, mean in means.items():
        _check_finite(name, mean)
    return LossGradients(tokens, means, histograms)


def histogram(linear: LinearView, fisher: Tensor) -> Tensor:
    """Counts of ``log₂ s_ij``, int64 ``(BINS,)`` on the CPU; bin 0 includes weights of zero saliency.

    ``s_ij = ½ w_ij² F_ij`` is the loss, in nats a token, that removing the weight adds, to second order (the optimal
    brain damage of LeCun et al. 1990). ``fisher``, which is overwritten, is ``F_ij = Σ_t g_ti² x_tj² / N``, ``(out,
    in)``, the diagonal of the empirical Fisher; a NumericalError says that it is not finite."""
    _check_finite(linear.name, fisher)
    logarithm = fisher.log2_().add_(linear.weight().abs_().log2_(), alpha=2).sub_(1)
    bins = logarithm.sub_(LOWEST).mul_(BINS / (HIGHEST - LOWEST)).clamp_(0, BINS - 1)
    total = torch.zeros(BINS, dtype=torch.int64)
    for rows in bins.split(max(1, (1 << 22) // bins.shape[1])):
        total += torch.bincount(rows.flatten().to(torch.int64), minlength=BINS).cpu()
    return total


def _check_finite(name: str, squares: Tensor) -> None:
    if not bool(torch.isfinite(squares).all()):
        raise NumericalError(
            f"gradients at {name} are not finite; try dtype float32, or do without: {WITHOUT}"
        )


@torch.no_grad()
def backward_sweep(
    feed: Feed,
    names: Collection[str],
    *,
    see: See,
    done: Callable[[list[LinearView]], None],
    fraction: float,
    reads_inputs: bool,
) -> float:
    """Differentiates the next-token loss at the outputs of the linears ``names``, last block first. Returns the mean
    loss, in nats a token.

    The forward pass runs blocks in the chain's dtype, the backward pass copies in fp32. The model stays the same to the
    bit. The scratch holds ``blocks + 2`` times the hidden states of this process's windows.

    Args:
        see: called for each of these linears and each batch of this process's windows.
        done: called with those of each block after all its tokens, while it is loaded, in every process.
        fraction: the fraction of a window's positions that is scored, see ``_positions``. The head, whose
            vocabulary may cost more than all blocks, runs for these alone.
        reads_inputs: whether ``see`` reads inputs, which the model must then not change in place.

    A NumericalError says that the loss is not finite; a ModelError that a block has no gradient, or changes the input
    of a linear in place, where inputs are read; a DataError that windows have one token, which is not scored."""
    if feed.seq_len < 2:
        raise DataError(
            f"windows of shape {tuple(feed.windows.shape)} have no next token; give windows of two or more"
        )
    windows = len(feed.windows)  # in all processes
    feed, places = feed.own()
    has_windows = places.start < places.stop
    chain = feed.chain
    blocks = len(chain)
    stream = feed.stream()
    with contextlib.ExitStack() as stack:
        stack.callback(stream.close)
        inputs = [stack.enter_context(stream.store()) for _ in range(blocks)]
        _forward(feed, stream, inputs)
        gradients = stack.enter_context(stream.store())
        with chain.outer():
            loss = _through_the_end(feed, stream, gradients, fraction, places)
        loss = parallel.total(loss) / (windows * (feed.seq_len - 1))
        if not math.isfinite(loss):
            raise NumericalError(
                f"the loss of the dense model is {loss} in {chain.dtype}; try dtype float32"
            )
        for index in reversed(range(blocks)):
            done_so_far = 2 * blocks - 1 - index
            text = f"block {index + 1}/{blocks} backward"
            feed.progress(Event("gradients", done_so_far, 2 * blocks, text))
            with (
                chain.block(index, feed.blocks),
                _running_in_fp32(chain, index),
            ):
                linears = [
                    linear for linear in chain.linears(index) if linear.name in names
                ]
                _back_through(
                    stream,
                    index,
                    inputs=inputs[index],
                    gradients=gradients,
                    linears=linears if has_windows else [],
                    hook=_hook(see, reads_inputs),
                )
                done(linears)
            inputs[index].close()
            machine.trim()  # the copies in fp32 leave holes
    feed.progress(Event("gradients", 2 * blocks, 2 * blocks, ""))
    return loss


def _forward(feed: Feed, stream: Stream, inputs: list[TensorStore]) -> None:
    """Runs the stream through all blocks, and keeps the batches that each block gets in its store of ``inputs``."""
    blocks = len(inputs)
    for index, store in enumerate(inputs):
        text = f"block {index + 1}/{blocks} forward"
        feed.progress(Event("gradients", index, 2 * blocks, text))
        with feed.chain.block(index, feed.blocks):
            for position, output in enumerate(stream.run(index)):
                store.append(stream.hidden[position])
                stream.hidden[position] = output


def _through_the_end(
    feed: Feed, stream: Stream, gradients: TensorStore, fraction: float, places: slice
) -> float:
    """The sum of the losses of the windows at ``places`` among those of all processes; appends its gradient at the
    output of the last block to ``gradients``."""
    chain = feed.chain
    predicted = feed.seq_len - 1
    total = 0.0
    start = 0
    for states in stream.hidden:
        hidden = states.float()
        stop = start + len(hidden)
        ids = feed.windows[start:stop].to(chain.device)
        seeds = range(places.start + start, places.start + stop)
        chosen = [_positions(predicted, fraction, seed) for seed in seeds]
        scored = torch.stack(chosen).to(chain.device)
        spots = scored[..., None].expand(-1, -1, hidden.shape[-1])
        following = next_token_loss(ids.gather(1, scored + 1))
        loss, slope = through_head(
            chain,
            hidden.gather(1, spots),
            ids=ids.gather(1, scored),
            loss=following,
            gradient=True,
        )
        total += loss * predicted / scored.shape[1]
        slope *= (predicted / scored.shape[1]) ** 0.5
        gradients.append(torch.zeros_like(hidden).scatter_(1, spots, slope))
        start = stop
    if places.start == places.stop:
        return 0.0
    return total


def _positions(predicted: int, fraction: float, seed: int) -> Tensor:
    """The positions of a window that are scored, int64, in order: a random ``fraction`` of the ``predicted`` ones with
    a next token, at least ``LEAST_SCORED``.

    The gradient ``g`` at a token sums those of later positions, ``Σ_s a_s``. Of a fraction p of the positions it is
    ``ĝ = Σ_s m_s a_s``, scaled by ``1/√p`` so that ``E ĝ² = p g² + (1 − p) Σ_s a_s²``. Errors of predictions at
    different positions are uncorrelated in a calibrated model, so ``E g² = E Σ_s a_s²``: squares keep their expectation
    for any fraction, while gradients themselves are ``√p`` of theirs."""
    count = min(predicted, max(LEAST_SCORED, round(fraction * predicted)))
    if count == predicted:
        return torch.arange(predicted)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(predicted, generator=generator)
    return order[:count].sort().values


def _back_through(
    stream: Stream,
    index: int,
    inputs: TensorStore,
    gradients: TensorStore,
    linears: list[LinearView],
    hook: See,
) -> None:
    """Runs the loaded block on its stored input, and replaces ``gradients`` at its output by those at its input."""
    chain = stream.chain
    calls = [call.to(torch.float32) for call in stream.calls(index)]
    for position, call in enumerate(calls):
        hidden = inputs[position].float().detach().requires_grad_(True)
        with torch.enable_grad(), watch(linears, hook):
            output = chain.apply(index, hidden, call)
        try:
            (gradients[position],) = torch.autograd.grad(
                output, hidden, gradients[position]
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the model's own code may not be differentiable
            why = str(error).splitlines()[0]
            raise ModelError(
                f"{chain.block_names[index]} has no gradient ({why}); do without: {WITHOUT}"
            ) from error


def _running_in_fp32(
    chain: Chain, index: int
) -> contextlib.AbstractContextManager[None]:
    """Replaces the parameters of the loaded block ``index`` by copies in fp32 until the context ends."""
    copies = {
        name: nn.Parameter(p.detach().float(), requires_grad=False)
        for name, p in chain.block_parameters(index).items()
    }
    return running_on(chain, index, copies)


def _hook(see: See, reads_inputs: bool) -> See:
    """A hook on a linear's output in the graph; later changes of the output in place do not affect it."""

    def watched(linear: LinearView, x: Tensor, y: Tensor) -> None:
        given = x.detach()
        version = x._version

        def arrived(gradient: Tensor) -> None:
            if reads_inputs and given._version != version:
                raise ModelError(
                    f"the model changes the input of {linear.name} in place, so it has no gradient; do without: "
                    f"{WITHOUT}"
                )
            see(linear, given, gradient.detach())

        if y.requires_grad:  # else the loss does not depend on this linear
            y.register_hook(arrived)

    return watched
