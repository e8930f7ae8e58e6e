"""The calibration windows of a run: one or more sets for the statistics, and further ones for the sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsellm import parallel
from sparsellm.calibration.self_generated import self_generated_windows
from sparsellm.calibration.sources import SELF
from sparsellm.calibration.texts import Text
from sparsellm.calibration.windows import calibration_windows, check_seq_len, leading_token, windows_of_ids
from sparsellm.chain import Chain
from sparsellm.chain.open import check_vocabulary
from sparsellm.chain.streams import windows_of
from sparsellm.errors import DataError
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.run.opening import load_whole
from sparsellm.sweep.whole_model import STEP_TOKENS, SWEEP_SHARE

DEFAULT_SEQ_LEN = 2048  # the window of the pruning papers


@dataclass(frozen=True)
class Windows:
    """Token ids.

    Attributes:
        sets: ``(sets, samples, seq)``: the sets of windows that blocks take in turn for their statistics.
        fresh: ``(windows, seq)``: further windows, for the sweep; there may be none.
        bos: whether every window begins with BOS: ``yes`` or ``no``, or ``given`` for token ids that the user passed.
        batch_tokens: tokens in one forward call, by which windows are divided among processes.
        passes: passes of the sweep that ``fresh`` is for, as far as the text has room.
    """

    sets: Tensor
    fresh: Tensor
    bos: str
    batch_tokens: int
    passes: int = 0

    @property
    def first(self) -> Tensor:
        """The first set of all processes."""
        return self.sets[0]

    @property
    def own(self) -> list[Tensor]:
        """This process's share of each set."""
        return [self._share(windows) for windows in self.sets]

    @property
    def everything(self) -> Tensor:
        """All windows ``(windows, seq)``."""
        return torch.cat([*self.sets, self.fresh])

    @property
    def swept(self) -> list[Tensor]:
        """This process's share of the windows of each pass: new ones as far as there are any, then those of the
        statistics, which the pruned weights fit already."""
        size = windows_of_pass(len(self.first))
        fresh = [part for part in self.fresh.split(size) if 2 * len(part) >= size]
        known = [] if fresh and len(fresh) == self.passes else [self.first]
        lead = int(self.first[0, 0]) if self.bos == "yes" else None
        return [self._share(_cut(part, lead) if self.bos != "given" else part) for part in (*fresh, *known)]

    def _share(self, windows: Tensor) -> Tensor:
        return windows[parallel.share(len(windows), windows_of(self.batch_tokens, windows.shape[1]))]


def given_windows(ids: Tensor, chain: Chain, recipe: Recipe) -> Windows:
    """The token ids ``(samples, seq)`` that the user passed, as one set.

    Raises:
        DataError: they do not fit the model.
    """
    windows = check_vocabulary(windows_of_ids(ids, chain.config, bos=recipe.bos), chain.config)
    return Windows(windows[None], windows[:0], "given", recipe.batch_tokens)


def read_windows(
    text: Text | str,
    chain: Chain,
    recipe: Recipe,
    directory: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sets: int,
    passes: int,
    progress: ProgressCallback,
) -> Windows:
    """Windows of a text, or of the one that the dense model writes if the recipe says so: ``sets`` sets for the
    statistics and further ones for ``passes`` passes, as far as the text has room.

    Raises:
        DataError: the model has no tokenizer, or the text is too short for one set.
    """
    if tokenizer is None:
        raise DataError("a model given as an object needs tokenizer=..., or token ids as calibration")
    seq_len = recipe.seq_len or default_seq_len(chain)
    check_seq_len(chain.config, seq_len)
    lead, drawn = leading_token(tokenizer, recipe.bos), (recipe.samples, seq_len, recipe.seed)
    further = (sets - 1) * recipe.samples + passes * windows_of_pass(recipe.samples)
    if recipe.calibration == SELF:
        dense = chain.model if directory is None else load_whole(directory, chain.dtype, chain.device, trust=False)
        windows = self_generated_windows(dense, tokenizer, *drawn, lead, further, partial(_tell, progress))
    else:
        windows = calibration_windows(text, tokenizer, *drawn, recipe.bos, further)
    windows = check_vocabulary(windows, chain.config, tokenizer)
    samples = min(recipe.samples, len(windows))
    sets = min(sets, len(windows) // max(1, samples))
    taken, further = sets * samples, passes * windows_of_pass(samples)
    read, fresh = windows[:taken], windows[taken : taken + further]
    bos = "no" if lead is None else "yes"
    return Windows(read.view(sets, samples, -1), fresh, bos, recipe.batch_tokens, passes)


def _tell(progress: ProgressCallback, done: int, total: int) -> None:
    progress(Progress("calibration", done, total, "the model writes its text"))


def default_seq_len(chain: Chain) -> int:
    """2048 tokens, or the number of the model's positions if that is less."""
    limit = getattr(chain.config.get_text_config(), "max_position_embeddings", None)
    return min(DEFAULT_SEQ_LEN, limit) if isinstance(limit, int) and limit > 0 else DEFAULT_SEQ_LEN


def windows_of_pass(samples: int) -> int:
    """The windows of one pass of the sweep, in a run with ``samples`` calibration windows."""
    return math.ceil(SWEEP_SHARE * samples)


def _cut(windows: Tensor, lead: int | None) -> Tensor:
    """Windows ``(windows, seq)`` cut to ``(more windows, STEP_TOKENS)``, unless they are less than two steps long; the
    rest at their ends is dropped. Each part begins with the id ``lead``, if there is one, in place of its first token.
    """
    parts = windows.shape[1] // STEP_TOKENS
    if parts < 2:
        return windows
    shorter = windows[:, : parts * STEP_TOKENS].reshape(-1, STEP_TOKENS).clone()
    if lead is not None:
        shorter[:, 0] = lead
    return shorter
