"""A run with a teacher: the weights to prune come from one checkpoint, the predictions to follow from another."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparsellm.chain import Chain
from sparsellm.chain.likeness import config_difference, shape_difference
from sparsellm.chain.open import load_config, load_tokenizer
from sparsellm.errors import ModelError, RecipeError
from sparsellm.storage.packed_reader import open_checkpoint
from sparsellm.storage.reader import CheckpointReader

_SAME = "give the dense model that this one was pruned from"


def check_teacher(model: object, teacher: object, out: str | os.PathLike[str] | None) -> None:
    """Refuses a teacher for a model in memory, or in memory itself: its blocks are read beside those of the model.

    Raises:
        RecipeError: model or teacher is an object, or there is no output directory.
    """
    if teacher is not None and (out is None or any(isinstance(each, PreTrainedModel) for each in (model, teacher))):
        raise RecipeError("teacher needs models on disk: give model and teacher by name, and out=DIR")


def open_start(chain: Chain, directory: Path, teacher: Path, *, trust: bool, tokenizers: bool) -> CheckpointReader:
    """The weights of the model to prune, checked to be of the same architecture as the teacher.

    Args:
        chain: the teacher.
        directory: of the model to prune.
        teacher: its directory.
        trust: whether modelling code of the checkpoint may run.
        tokenizers: whether both have a tokenizer, which must be the same.

    Raises:
        ModelError: config, tokenizer, or the name or shape of a weight differs.
        StorageError: the model cannot be read.
    """
    assert chain.reader is not None
    if why := config_difference(load_config(directory, trust_remote_code=trust), chain.config):
        raise _unlike(directory, teacher, why)
    if tokenizers:
        one, two = (load_tokenizer(each, trust_remote_code=trust).get_vocab() for each in (directory, teacher))
        if one != two:
            raise _unlike(directory, teacher, "the tokenizers differ")
    start = open_checkpoint(directory)
    if why := shape_difference(start, chain.reader):
        raise _unlike(directory, teacher, why)
    return start


def check_outside(chain: Chain, start: CheckpointReader) -> None:
    """Refuses a model whose embedding, norm or head is not the teacher's: a run changes blocks alone.

    Raises:
        ModelError: a weight outside the blocks differs.
    """
    assert chain.reader is not None
    reader = chain.reader
    for name in chain.outer_tensors():
        if not torch.equal(reader.get(name), start.get(name, dtype=reader.dtype(name))):
            raise _unlike(start.directory, reader.directory, f"weight {name}, outside the blocks, has other values")


def _unlike(directory: Path, teacher: Path, why: str) -> ModelError:
    return ModelError(f"{teacher} cannot be the teacher of {directory}: {why}; {_SAME}")
