"""Perplexity of a chain, and its divergence from another, block by block, for models that do not fit into memory.

Perplexity is by the protocol of the pruning papers (GPTQ 2210.17323, SparseGPT 2301.00774): each window of T tokens is
evaluated by itself, and its tokens 1 … T-1 are scored, so all windows have the same weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional

from sparsellm import parallel
from sparsellm.errors import NumericalError
from sparsellm.files.reader import CheckpointReader
from sparsellm.model import Chain, Feed
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.records import Against, Interval

# Positions whose fp32 log-probabilities are in memory at once: 256 × 128k vocabulary entries take 128 MB.
CHUNK = 256
# hidden states held at once; a longer text runs through the blocks in several parts
_HIDDEN_BYTES = 1 << 30
_BATCH_TOKENS = 4096
# standard errors from the mean to the end of a 95 % interval
_Z = NormalDist().inv_cdf(0.975)


class Kept:
    """A dense model whose outputs on some windows stay in memory, for several evaluations on the same windows."""

    def __init__(self, chain: Chain, name: str) -> None:
        self.chain = chain
        self.name = name
        # windows, and the outputs of the last block
        self._kept: tuple[Tensor, list[Tensor]] | None = None

    def outputs(self, windows: Tensor, tell: Callable[[str], None]) -> Iterator[Tensor]:
        """Same as ``_outputs``; the outputs on the first windows that it is called with are kept."""
        # a chain whose blocks a run has pruned may share weights between blocks
        with self.chain.unpruned():
            if self._kept is None:
                self._kept = windows, list(_outputs(self.chain, windows, tell))
            known, rows = self._kept
            if torch.equal(known, windows):
                return iter(rows)
            return _outputs(self.chain, windows, tell)


def measured(
    chain: Chain,
    windows: Tensor,
    dense: Kept | None,
    progress: ProgressCallback,
    *,
    blocks: Sequence[CheckpointReader] | None = None,
) -> tuple[Interval, Against | None]:
    """The perplexity of a model on token ids ``(windows, seq)``, and its comparison with a dense one of the same
    tokenizer. One block of one model is in memory at a time; then embedding, norm and head of both, and the logits of
    256 positions. ``blocks`` are the weights of each block, if they are not the chain's own; the dense model may then
    be that of the same chain. Each process takes some windows. A loss that is not finite is a NumericalError."""
    feed, places = Feed(chain, windows, _BATCH_TOKENS).own()
    # so that all load the same blocks as often
    fewer = max(parallel.gather(len(feed.windows))) - len(feed.windows)
    windows = torch.cat([feed.windows, feed.windows[:1].expand(fewer, -1)])
    chains = [chain] if dense is None else [chain, dense.chain]
    width = sum(model.config.get_text_config().hidden_size for model in chains)
    parts = windows.split(
        max(1, _HIDDEN_BYTES // (windows.shape[1] * width * chain.dtype.itemsize))
    )
    # the heads count as one more block
    steps = len(parts) * (sum(map(len, chains)) + 1)
    done = itertools.count()

    def tell(detail: str) -> None:
        progress(Progress("evaluate", next(done), steps, detail))

    rows: list[list[float]] = []  # for the windows that this process has
    for part in parts:
        hidden = [_outputs(chain, part, tell, blocks)]
        if dense is not None:
            hidden.append(dense.outputs(part, tell))
        begun = next(done)
        with ExitStack() as held:
            for model in dict.fromkeys(chains):
                held.enter_context(model.outer())
            of_windows = zip(part.split(1), *hidden, strict=True)
            for at, (ids, *states) in enumerate(of_windows):
                progress(Progress("evaluate", begun + at / len(part), steps, "head"))
                rows.append(_window(chains, states, ids))
                if not math.isfinite(sum(rows[-1])):
                    raise NumericalError(
                        f"the loss or divergence of window {places.start + len(rows) - 1} is not finite: {chain.dtype} "
                        "overflows; try --dtype float32"
                    )
    progress(Progress("evaluate", steps, steps))
    of_all = parallel.gather(rows[: places.stop - places.start])
    rows = [row for some in of_all for row in some]
    loss, *more = torch.tensor(rows, dtype=torch.float64).T
    if dense is None:
        return _perplexity(loss), None
    dense_loss, divergence, agreement = more
    kl = _mean_of(divergence)
    return _perplexity(loss), Against(
        model=dense.name,
        perplexity=_perplexity(dense_loss),
        kl=max(0.0, kl.value),
        kl_low=None if kl.low is None else max(0.0, kl.low),
        kl_high=kl.high,
        agreement=float(agreement.mean()),
        recovery=_exp(float(dense_loss.mean() - loss.mean())),
    )


def _mean_of(windows: Tensor) -> Interval:
    """The mean of the windows' values ``(windows,)``, plus and minus 1.96 standard errors."""
    mean = float(windows.mean())
    if len(windows) < 2:
        return Interval(value=mean)
    half = _Z * float(windows.std()) / math.sqrt(len(windows))
    return Interval(value=mean, low=mean - half, high=mean + half)


def _perplexity(losses: Tensor) -> Interval:
    """The perplexity for mean losses ``(windows,)`` in nats; its interval is that of the loss, exponentiated."""
    mean = _mean_of(losses)
    return mean.model_copy(
        update={name: _exp(end) for name, end in mean if end is not None}
    )


def _exp(loss: float) -> float:
    # nearly the largest float in place of an overflow
    return math.exp(min(loss, 709.0))


def _outputs(
    chain: Chain,
    windows: Tensor,
    tell: Callable[[str], None],
    blocks: Sequence[CheckpointReader] | None = None,
) -> Iterator[Tensor]:
    """The output of the last block for each window, ``(1, seq, hidden)``; the blocks run when this is called."""
    weights: Sequence[CheckpointReader | None] = blocks or [None] * len(chain)
    # Some models carry several states for each token; a batch of one window is not divided.
    one = Feed(chain, windows[:1], 1).stream(weights[0])
    by_window = one.hidden[0].shape[1:2] == windows.shape[1:]
    feed = Feed(chain, windows, _BATCH_TOKENS if by_window else 1)
    stream = feed.stream(weights[0])
    chain.check_handed(windows[:1])
    for index in range(len(chain)):
        tell(f"block {index + 1}/{len(chain)}")
        with chain.block(index, weights[index]):
            stream.advance(index)
    return (
        row
        for hidden in stream.hidden
        for row in (hidden.split(1) if by_window else [hidden])
    )


def _window(chains: list[Chain], states: list[Tensor], ids: Tensor) -> list[float]:
    """The means over the scored tokens of one window ``(1, seq)``: the loss in nats; with a dense model also its loss,
    ``KL(dense ‖ model)`` in nats, and the fraction of tokens for which both have the same first choice."""
    sums = torch.zeros(4 if len(chains) > 1 else 1, dtype=torch.float64)
    scored = ids.shape[1] - 1
    for first in range(0, scored, CHUNK):
        span = slice(first, min(first + CHUNK, scored))
        logs = [
            _logits(chain, state, ids, span)
            for chain, state in zip(chains, states, strict=True)
        ]
        targets = ids[0, span.start + 1 : span.stop + 1].to(logs[0].device)
        values = [functional.nll_loss(log, targets, reduction="none") for log in logs]
        if len(logs) > 1:
            values.append(
                functional.kl_div(
                    logs[0], logs[1], reduction="none", log_target=True
                ).sum(-1)
            )
            values.append((logs[0].argmax(-1) == logs[1].argmax(-1)).float())
        # on the CPU, because some devices have no fp64
        sums += torch.stack([value.cpu().double().sum() for value in values])
    return (sums / scored).tolist()  # type: ignore[no-any-return]


def _logits(chain: Chain, hidden: Tensor, ids: Tensor, span: slice) -> Tensor:
    """The log-probabilities at some positions of one window, ``(span, vocabulary)`` fp32."""
    if hidden.shape[:2] == ids.shape:
        logits = chain.finish(hidden[:, span], ids[:, span])[0]
    else:
        logits = chain.finish(hidden, ids)[0, span]
    return logits.float().log_softmax(-1)
