"""The Python interface: :func:`prune`, :func:`evaluate`, :func:`inspect`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.arguments import CHECKPOINT, as_recipe, checked_arguments
from sparsellm.calibration import (
    TextGiven,
    as_text,
    check_seq_len,
    evaluation_windows,
    settle_calibration,
    windows_of_ids,
)
from sparsellm.chain import open_chain
from sparsellm.chain.open import check_vocabulary, load_tokenizer
from sparsellm.errors import DataError
from sparsellm.evaluation.perplexity import Perplexity
from sparsellm.evaluation.streamed import streamed_perplexity
from sparsellm.machine.heap import peak_rss
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.recipe import Bos, Recipe
from sparsellm.run.counts import MatrixZeros, inspect_block
from sparsellm.run.prepare import Request, default_seq_len, open_model
from sparsellm.run.result import PruneResult, versions
from sparsellm.run.run import Run
from sparsellm.sources.resolve import checkpoint_directory


@checked_arguments()
def prune(  # noqa: PLR0913 - the Python door
    model: str | os.PathLike[str] | PreTrainedModel,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    calibration: TextGiven | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> PruneResult:
    """Prunes a model block by block; after a kill, the same call resumes the run, with the same bits.

    A model given by name is read and written one block at a time; without ``out`` it is loaded whole and returned in
    ``result.model``. A model given as an object is pruned in place, and also saved if ``out`` is given. If several
    processes of torch.distributed call this with the same arguments, they divide the work.

    Args:
        model: a checkpoint directory, a hub id, a ``.gguf`` file, ``demo``, or a transformers model.
        recipe: all settings: a recipe, a mapping of its fields, or the path of a YAML file; ``Recipe()`` if None.
        out: the directory of the pruned checkpoint.
        calibration: replaces the recipe's: a text source, the path of a file, token ids ``(samples, seq)`` as a
            tensor, an array or lists of one length, or a data set with a column ``text`` or ``input_ids``.
        tokenizer: needed only for a model given as an object, unless ``calibration`` is token ids.
        overwrite: replace the checkpoint in ``out``.
        restart: start again instead of resuming an unfinished run into ``out``.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: called with the progress of the run.

    Raises:
        SparseLLMError: a subclass of it that names the cause. All input is checked before the work.
    """
    given = as_text(calibration, "calibration", "calibration") if calibration is not None else None
    recipe = settle_calibration(as_recipe(recipe), given)
    beside = None if isinstance(given, str) else given  # the recipe contains a source
    request = Request(model, recipe, out, beside, tokenizer, overwrite, restart, trust_remote_code)
    return Run(request, progress).execute()


@checked_arguments()
def evaluate(  # noqa: PLR0913 - the Python door
    model: str | os.PathLike[str] | PreTrainedModel,
    text: TextGiven,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    bos: Bos = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> Perplexity:
    """Perplexity of a model, which is read block by block and need not fit into memory.

    Args:
        model: as in :func:`prune`.
        text: as ``calibration`` in :func:`prune`.
        seq_len: tokens in a window, 2 or more; None for 2048, or the limit of the model if that is less.
        max_tokens: the most tokens of the text to use.
        bos: as in :class:`Recipe`: whether every window begins with BOS, which is not scored.
        tokenizer: needed only for a model given as an object, unless ``text`` is token ids.
        device, dtype: as in :class:`Recipe`.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: called with the progress of the run.

    Raises:
        SparseLLMError: the model or the text cannot be read, or the text is too short.
    """
    progress(Progress("open", 0, 1, "opening the model"))
    directory = None if isinstance(model, PreTrainedModel) else checkpoint_directory(str(model))
    chain, _ = open_model(
        model, directory, Recipe(device=device, dtype=dtype, products="float32"), trust_remote_code, whole=False
    )
    text = as_text(text, "text", "evaluation")
    if isinstance(text, Tensor):
        windows = check_vocabulary(windows_of_ids(text, chain.config, seq_len, max_tokens, bos), chain.config)
    else:
        seq_len = seq_len or default_seq_len(chain)
        check_seq_len(chain.config, seq_len)
        if tokenizer is None and directory is not None:
            tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        if tokenizer is None:
            raise DataError("a model given as an object needs tokenizer=..., or token ids in place of a text")
        windows = evaluation_windows(text, tokenizer, seq_len, max_tokens, bos)
        check_vocabulary(windows, chain.config, tokenizer)
    return streamed_perplexity(chain, windows, progress=progress)


@checked_arguments(model=CHECKPOINT)
def inspect(model: str | os.PathLike[str], *, trust_remote_code: bool = False) -> list[MatrixZeros]:
    """The zeros of every matrix in the blocks of a checkpoint, linear or not; it is read one block at a time.

    Raises:
        SparseLLMError: there is no such checkpoint, or it cannot be read.
    """
    directory = checkpoint_directory(str(model))
    chain = open_chain(directory, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=trust_remote_code)
    zeros: list[MatrixZeros] = []
    for index in range(len(chain)):
        with chain.block(index):
            zeros += inspect_block(chain, index)
    return zeros


__all__ = ["MatrixZeros", "PruneResult", "evaluate", "inspect", "peak_rss", "prune", "versions"]
