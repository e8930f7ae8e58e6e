"""Perplexity of a chain, block by block, for models that do not fit into memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsellm.chain import Chain, Feed
from sparsellm.errors import NumericalError
from sparsellm.evaluation.perplexity import Perplexity, nll_from_logits
from sparsellm.progress import Progress, ProgressCallback, ignore

_HIDDEN_BYTES = 1 << 30  # of hidden states held at once; a longer text runs through the blocks in several passes
_BATCH_TOKENS = 4096


def streamed_perplexity(chain: Chain, windows: Tensor, *, progress: ProgressCallback = ignore) -> Perplexity:
    """As :func:`sparsellm.evaluation.perplexity.perplexity`, with one block's weights in memory at a time.

    Args:
        chain: the model.
        windows: token ids, ``(windows, seq)``.
        progress: called with the progress of the passes over the blocks.

    Raises:
        NumericalError: the loss of a window is not finite.
    """
    width = chain.config.get_text_config().hidden_size
    per_window = windows.shape[1] * width * torch.empty(0, dtype=chain.dtype).element_size()
    size = max(1, _HIDDEN_BYTES // per_window)
    nll, tokens = 0.0, 0
    sweeps = math.ceil(len(windows) / size)
    steps = sweeps * (len(chain) + 1)  # the head counts as one more block
    for sweep in range(sweeps):
        part = windows[sweep * size : (sweep + 1) * size]
        before = sweep * (len(chain) + 1)
        stream = Feed(chain, part, _BATCH_TOKENS).stream()
        for index in range(len(chain)):
            progress(Progress("evaluate", before + index, steps, f"block {index + 1}/{len(chain)}"))
            with chain.block(index):
                stream.advance(index)
        rows = (hidden[row : row + 1] for hidden in stream.hidden for row in range(len(hidden)))
        with chain.outer():
            for number, hidden in enumerate(rows):  # one window at a time: logits are (seq, vocabulary)
                progress(Progress("evaluate", before + len(chain) + number / len(part), steps, "head"))
                ids = part[number : number + 1]
                window_nll, count = nll_from_logits(chain.finish(hidden, ids), ids)
                if not math.isfinite(window_nll):
                    raise NumericalError(
                        f"the loss of window {sweep * size + number} is {window_nll}: weights or activations overflow "
                        f"in {chain.dtype}; try --dtype float32"
                    )
                nll, tokens = nll + window_nll, tokens + count
    progress(Progress("evaluate", steps, steps))
    mean = nll / tokens
    return Perplexity(math.exp(mean) if mean < 709 else math.inf, tokens, windows.shape[1], mean)
