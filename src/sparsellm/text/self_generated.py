"""Calibration text sampled from the dense model, so that pruning needs no data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.errors import NumericalError
from sparsellm.text.windows import check_memory
from sparsepack.decode import cache_keyword

# Windows sampled in one batch: enough for efficient matrix products, few enough for the memory of the key-value cache.
BATCH = 16
GREEDY_TOKENS = 4  # after the random one; LLM-QAT uses 3 to 5


@torch.no_grad()
def self_generated_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    bos: int
    | None,  # the token with which every window begins, see windows.leading_token
    fresh: int,
    progress: Callable[
        [int, int], None
    ],  # gets the tokens that are written, and those of all windows
) -> Tensor:
    """Samples windows of text from a model as in LLM-QAT (2305.17888, section 2.1).

    Each window starts with a random token of the vocabulary, after the beginning-of-text token if there is one. The
    next few tokens are the most likely ones, so that the text has a subject from the training data; the rest are
    sampled. After an end-of-text token a new text starts in the same way, so no window holds padding. The random
    numbers are drawn on the CPU from ``seed``: on one machine the same arguments return the same windows.

    Returns ``(samples + fresh, seq_len)`` int64 token ids, on the CPU; fresh ones are written after the others, which
    do not depend on them. Raises DataError if windows do not fit in memory, NumericalError if logits are not finite."""
    check_memory(samples + fresh, seq_len)
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    # some tokenizers have more than the model
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    starts = torch.tensor([token for token in range(known) if token not in special])
    device = next(model.parameters()).device
    keyword = cache_keyword(model)
    end = tokenizer.eos_token_id
    if end is None:
        end = -1
    windows: list[Tensor] = []

    def pick(rows: int) -> Tensor:
        return starts[torch.randint(len(starts), (rows,), generator=generator)]

    def batch(rows: int) -> Tensor:
        columns = [pick(rows)]
        if bos is not None:
            columns.insert(0, torch.full((rows,), bos))
        age = torch.zeros(rows, dtype=torch.int64)  # tokens since each row's text began
        new = torch.stack(columns, dim=1)  # (rows, 1 or 2)
        cache = None
        while len(columns) < seq_len:
            output = model(input_ids=new.to(device), use_cache=True, **{keyword: cache})
            # Many models pad the vocabulary with rows that no token uses.
            logits = output.logits[:, -1, :known].float().cpu()
            cache = getattr(output, keyword)
            if not torch.isfinite(logits).all():
                raise NumericalError(
                    f"the model's logits are not finite after {len(columns)} tokens; try float32"
                )
            sampled = torch.multinomial(
                logits.softmax(-1), 1, generator=generator
            ).squeeze(1)
            token = torch.where(age < GREEDY_TOKENS, logits.argmax(-1), sampled)
            start = pick(rows)  # at every step, so that rows do not affect each other
            ended = columns[-1] == end
            token = torch.where(ended, start, token)
            age = torch.where(ended, 0, age + 1)
            columns.append(token)
            new = token.unsqueeze(1)
            progress(
                len(windows) * seq_len + rows * len(columns),
                (samples + fresh) * seq_len,
            )
        return torch.stack(columns, dim=1)[:, :seq_len]

    for count in (samples, fresh):
        for first in range(0, count, BATCH):
            windows += batch(min(BATCH, count - first))
    return torch.stack(windows)
