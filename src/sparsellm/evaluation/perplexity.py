"""Perplexity by the protocol of the pruning papers (GPTQ 2210.17323, SparseGPT 2301.00774).

Every window is evaluated by itself, and the tokens 1 … T-1 of the window are scored; the first token has no context and
is not scored. So ``windows · (T - 1)`` tokens are scored, and all windows have the same weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsellm.errors import DataError, NumericalError

# Positions whose fp32 log-probabilities are in memory at once: 256 × 128k vocabulary entries take 128 MB.
CHUNK = 256


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and the conditions under which it holds.

    Attributes:
        value: ``exp(nll)``.
        tokens: tokens scored, ``windows · (window - 1)``.
        window: tokens in a window; perplexities of different windows do not compare.
        nll: mean negative log-likelihood of a scored token, in nats.
    """

    value: float
    tokens: int
    window: int
    nll: float


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model, in evaluation mode, on windows of token ids.

    Args:
        model: a transformers causal language model; called as ``model(input_ids=…, use_cache=False).logits``. It may
            hold any floating type: log-probabilities are taken in fp32 and summed in fp64.
        windows: ``(windows, T)`` token ids, as :func:`sparsellm.calibration.evaluation_windows` makes them.
        batch_size: windows read at once.
        progress: called with (windows done, windows in all) after each batch.

    Raises:
        DataError: there is no window, or a window has less than two tokens.
        NumericalError: a window's loss is infinite or not a number.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise DataError(f"perplexity needs windows of shape (1 or more, 2 or more); got {tuple(windows.shape)}")
    device = next(model.parameters()).device
    was_training = model.training
    model.train(False)
    nll, tokens = 0.0, 0
    try:
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size].to(device)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits  # (batch, T, vocabulary)
            batch_nll, batch_tokens = nll_from_logits(logits, ids)
            if not math.isfinite(batch_nll):
                raise NumericalError(
                    f"the loss of window {start} to {start + len(ids) - 1} is {batch_nll}: the weights or activations "
                    f"hold infinite or undefined values ({logits.dtype} logits); "
                    "try float32, or look for the first block whose weights are not finite"
                )
            nll += batch_nll
            tokens += batch_tokens
            if progress is not None:
                progress(start + len(ids), len(windows))
    finally:
        model.train(was_training)
    mean = nll / tokens
    # exp overflows a double above 709 nats; such a perplexity is reported as infinite.
    return Perplexity(math.exp(mean) if mean < 709 else math.inf, tokens, windows.shape[1], mean)


def nll_from_logits(logits: Tensor, ids: Tensor) -> tuple[float, int]:
    """The summed negative log-likelihood of the tokens, in nats, and the number of tokens scored.

    Position ``t`` of the logits predicts token ``t + 1``. The fp32 log-probabilities of 256 positions are in memory at
    a time; the sum is kept in fp64.

    Args:
        logits: ``(..., T, vocabulary)``, any floating type.
        ids: ``(..., T)`` token ids.
    """
    vocabulary = logits.shape[-1]
    total, count = 0.0, 0
    sequences = zip(logits.reshape(-1, *logits.shape[-2:]), ids.reshape(-1, ids.shape[-1]), strict=True)
    for sequence_logits, sequence_ids in sequences:  # (T, vocabulary), (T,)
        targets = sequence_ids[1:].to(logits.device)
        for chunk, chunk_targets in zip(
            torch.split(sequence_logits[:-1], CHUNK), torch.split(targets, CHUNK), strict=True
        ):
            losses = nn.functional.cross_entropy(chunk.float().view(-1, vocabulary), chunk_targets, reduction="none")
            total += losses.cpu().double().sum().item()  # on the CPU, because some devices have no fp64
            count += len(chunk_targets)
    return total, count


def kl_divergence(dense_logits: Tensor, logits: Tensor) -> float:
    """Mean over positions of ``KL(dense ‖ other) = Σ p_dense (log p_dense - log p_other)``, in nats, computed in fp32.

    Unlike perplexity, it does not depend on the tokens of the text: it is zero only if every prediction is unchanged.

    Args:
        dense_logits: ``(..., vocabulary)``, of the reference model.
        logits: the same shape, of the other model.

    Raises:
        DataError: the shapes differ, or there is no position.
        NumericalError: the divergence is not finite.
    """
    if dense_logits.shape != logits.shape or dense_logits.numel() == 0:
        raise DataError(f"logits of shape {tuple(dense_logits.shape)} and {tuple(logits.shape)} cannot be compared")
    vocabulary = logits.shape[-1]
    total, count = 0.0, 0
    dense_chunks = torch.split(dense_logits.reshape(-1, vocabulary), CHUNK)
    for dense_chunk, chunk in zip(dense_chunks, torch.split(logits.reshape(-1, vocabulary), CHUNK), strict=True):
        log_dense = dense_chunk.float().log_softmax(-1)
        log_other = chunk.float().to(log_dense.device).log_softmax(-1)
        per_position = nn.functional.kl_div(log_other, log_dense, reduction="none", log_target=True).sum(-1)
        total += per_position.cpu().double().sum().item()
        count += len(chunk)
    if not math.isfinite(total):
        raise NumericalError(f"the divergence between two sets of logits is {total}: one of them is not finite")
    return total / count
