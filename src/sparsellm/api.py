"""The Python door: :func:`prune`, :func:`evaluate`, :func:`inspect`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.calibration import check_seq_len, evaluation_windows
from sparsellm.chain import open_chain
from sparsellm.chain.open import check_vocabulary, load_tokenizer
from sparsellm.errors import DataError
from sparsellm.evaluation.perplexity import Perplexity
from sparsellm.evaluation.streamed import streamed_perplexity
from sparsellm.machine.heap import peak_rss
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.run.counts import MatrixZeros, inspect_block
from sparsellm.run.prepare import Request, check_ids, default_seq_len, open_model
from sparsellm.run.result import PruneResult, versions
from sparsellm.run.run import Run
from sparsellm.sources.resolve import checkpoint_directory


def prune(  # noqa: PLR0913 - the Python door
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    calibration: str | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> PruneResult:
    """Prunes a model block by block; the same call again goes on where a killed one was, with the same bits.

    A model given by name is read and written one block at a time; without ``out`` it is loaded whole and returned in
    ``result.model``. A model given as an object is pruned in place, and also saved if ``out`` is given. Where several
    processes of torch.distributed call this, all with the same arguments, they divide the work.

    Args:
        model: a checkpoint directory, a hub id, a ``.gguf`` file, ``demo``, or a transformers model.
        recipe: all settings; ``Recipe()`` if None.
        out: the directory of the pruned checkpoint.
        calibration: a text source in place of the recipe's, or token ids ``(samples, seq)``.
        tokenizer: needed only for a model given as an object, unless ``calibration`` is token ids.
        overwrite: replace the checkpoint in ``out``.
        restart: begin anew where an unfinished run into ``out`` has left something.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: is told how far the run is.

    Raises:
        SparseLLMError: of the kind that names the trouble; what can be known before the work is checked before it.
    """
    recipe = recipe or Recipe()
    if isinstance(calibration, str):
        recipe, calibration = recipe.updated(calibration=calibration), None
    request = Request(model, recipe, out, calibration, tokenizer, overwrite, restart, trust_remote_code)
    return Run(request, progress).execute()


def evaluate(  # noqa: PLR0913 - the Python door
    model: str | Path | PreTrainedModel,
    text: str | Tensor,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> Perplexity:
    """Perplexity of a model, which is read block by block: it need not fit into memory.

    Args:
        model: as in :func:`prune`.
        text: a text source, or token ids ``(windows, seq)``.
        seq_len: tokens in a window; None for 2048, or what the model can take if less.
        max_tokens: stop after so many tokens of text.
        tokenizer: needed only for a model given as an object, unless ``text`` is token ids.
        device, dtype: as in :class:`Recipe`.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: is told how far the run is.

    Raises:
        SparseLLMError: the model or the text cannot be read, or the text is too short.
    """
    progress(Progress("open", 0, 1, "opening the model"))
    directory = None if isinstance(model, PreTrainedModel) else checkpoint_directory(str(model))
    chain, _ = open_model(model, directory, Recipe(device=device, dtype=dtype), trust_remote_code, whole=False)
    if isinstance(text, Tensor):
        windows = check_ids(text, chain)
    else:
        seq_len = seq_len or default_seq_len(chain)
        check_seq_len(chain.config, seq_len)
        if tokenizer is None and directory is not None:
            tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        if tokenizer is None:
            raise DataError("a model given as an object needs tokenizer=..., or token ids in place of a text")
        windows = check_vocabulary(evaluation_windows(text, tokenizer, seq_len, max_tokens), chain.config, tokenizer)
    return streamed_perplexity(chain, windows, progress=progress)


def inspect(model: str | Path, *, trust_remote_code: bool = False) -> list[MatrixZeros]:
    """The zeros of every matrix in the blocks of a checkpoint, linear or not; it is read one block at a time.

    Raises:
        SparseLLMError: there is no such checkpoint, or it cannot be read.
    """
    directory = checkpoint_directory(str(model))
    chain = open_chain(directory, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=trust_remote_code)
    found: list[MatrixZeros] = []
    for index in range(len(chain)):
        with chain.block(index):
            found += inspect_block(chain, index)
    return found


__all__ = ["MatrixZeros", "PruneResult", "evaluate", "inspect", "peak_rss", "prune", "versions"]
