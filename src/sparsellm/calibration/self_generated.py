"""Calibration text sampled from the dense model, so that pruning needs no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparsellm.chain.structure import cache_keyword
from sparsellm.errors import NumericalError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Windows sampled in one batch: enough for efficient matrix products, few enough for the memory of the key-value cache.
BATCH = 16


class Author(NamedTuple):
    """The dense model, which writes the text of the source ``self``.

    Attributes:
        model: the whole model.
        progress: called with (tokens written, tokens of all windows).
    """

    model: PreTrainedModel
    progress: Callable[[int, int], None] | None = None


@torch.no_grad()
def self_generated_windows(
    author: Author,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    bos: int | None = None,
    *,
    fresh: int = 0,
    greedy_tokens: int = 4,
) -> Tensor:
    """Samples windows of text from a model as in LLM-QAT (2305.17888, section 2.1).

    Each window starts with a random token of the vocabulary, after the beginning-of-text token if there is one. The
    next few tokens are the most likely ones, so that the text has a subject from the training data; the rest are
    sampled. After an end-of-text token a new text starts in the same way, so no window holds padding.

    The random numbers are drawn on the CPU from ``seed``. On one machine the same arguments return the same windows.
    The first ``samples`` windows do not depend on ``fresh``.

    Args:
        author: the dense model.
        tokenizer: its tokenizer.
        samples: the number of windows.
        seq_len: tokens in each.
        seed: of the sampling.
        bos: the token with which every window begins, see :func:`sparsellm.calibration.leading_token`; or None.
        fresh: further windows, written after the others in batches of their own.
        greedy_tokens: tokens after the random one that are chosen greedily; LLM-QAT uses 3 to 5.

    Returns:
        ``(samples + fresh, seq_len)`` int64 token ids, on the CPU.

    Raises:
        NumericalError: the model's logits are not finite.
    """
    model, progress = author
    device = next(model.parameters()).device
    was_training = model.training
    model.train(False)
    generator = torch.Generator().manual_seed(seed)
    starts = _start_tokens(tokenizer)
    known = len(tokenizer)  # many models pad the vocabulary with rows that no token uses
    end = tokenizer.eos_token_id

    cache_name = cache_keyword(model)
    batches = []
    written, total = 0, (samples + fresh) * seq_len
    try:
        for rows in (min(BATCH, count - first) for count in (samples, fresh) for first in range(0, count, BATCH)):
            columns = [] if bos is None else [torch.full((rows,), bos)]
            age = torch.zeros(rows, dtype=torch.int64)  # tokens since each row's text began
            columns.append(_pick(starts, rows, generator))
            new, cache = torch.stack(columns, dim=1), None  # (rows, 1 or 2)
            while len(columns) < seq_len:
                output: Any = model(input_ids=new.to(device), use_cache=True, **{cache_name: cache})
                cache = getattr(output, cache_name)
                logits = output.logits[:, -1, :known].float().cpu()  # (rows, known)
                if not torch.isfinite(logits).all():
                    raise NumericalError(f"the model's logits are not finite after {len(columns)} tokens; try float32")
                sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
                token = torch.where(age < greedy_tokens, logits.argmax(-1), sampled)
                start = _pick(starts, rows, generator)  # at every step, so that rows do not affect each other
                ended = columns[-1] == end if end is not None else torch.zeros(rows, dtype=torch.bool)
                token, age = torch.where(ended, start, token), torch.where(ended, 0, age + 1)
                columns.append(token)
                new = token.unsqueeze(1)
                written += rows
                if progress is not None:
                    progress(written, total)
            batches.append(torch.stack(columns, dim=1)[:, :seq_len])
    finally:
        model.train(was_training)
    if progress is not None:
        progress(total, total)
    return torch.cat(batches)


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token ids that may begin a text: all except the special ones."""
    special = set(tokenizer.all_special_ids)
    return torch.tensor([token for token in range(len(tokenizer)) if token not in special])


def _pick(choices: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return choices[torch.randint(len(choices), (count,), generator=generator)]
