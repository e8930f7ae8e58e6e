"""Opens the models of a run: the dense one as a chain and, where there is a teacher, the weights to prune."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import parallel
from sparsellm.chain import Chain, open_chain
from sparsellm.chain.open import config_difference, load_config, load_tokenizer, shape_difference
from sparsellm.chain.products import Bf16Products, bf16_is_native
from sparsellm.errors import ModelError, RecipeError
from sparsellm.inputs import read_object
from sparsellm.machine import resolve_device
from sparsellm.recipe import Recipe
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.storage.reader import CheckpointReader, open_checkpoint
from sparsepack.checkpoint import is_packed

Model = str | os.PathLike[str] | PreTrainedModel


@dataclass(frozen=True)
class Opened:
    """The models of a run.

    Attributes:
        chain: the dense model.
        start: the weights to prune, if they are not those of the dense model.
        directory: the directory of the dense model; None for a model given as an object.
        in_memory: the model that is pruned in memory; None if it is read and written block by block.
        tokenizer: the tokenizer of the text; None for token ids.
        sources: the directories that the result must not replace.
    """

    chain: Chain
    start: CheckpointReader | None
    directory: Path | None
    in_memory: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    sources: tuple[Path, ...]


def open_models(
    model: Model,
    teacher: str | os.PathLike[str] | None,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text: bool,
    whole: bool,
    trust: bool,
) -> Opened:
    """Opens the model and its teacher, as in :func:`sparsellm.prune`.

    Args:
        text: whether the calibration is a text, which needs a tokenizer.
        whole: whether the model is pruned in memory.
        trust: whether modelling code of the checkpoint may run.

    Raises:
        SparseLLMError: a model cannot be opened, or the teacher is another model.
    """
    dense = model if teacher is None else teacher
    if teacher is not None and (whole or isinstance(model, PreTrainedModel)):
        raise RecipeError("teacher needs models on disk: give model and teacher by name, and out=DIR")
    named = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    sources = [
        parallel.main_first(partial(checkpoint_directory, str(given), argument))
        for argument, given in named.items()
        if not isinstance(given, PreTrainedModel)
    ]
    directory = sources[-1] if sources else None
    if whole and directory is not None and is_packed(read_object(directory / "config.json")):
        raise RecipeError(f"{directory} is packed, and a packed model is not pruned in memory; give out=DIR")
    chain, in_memory = open_model(dense, directory, recipe, trust, whole=whole)
    if tokenizer is None and directory is not None and text:
        tokenizer = load_tokenizer(directory, trust_remote_code=trust)
    start = None if teacher is None else _open_start(chain, sources[0], tokenizer if text else None, trust)
    name = getattr(model, "name_or_path", "")  # the directory that a model in memory was loaded from
    if not sources and name and Path(name).is_dir():
        sources = [Path(name)]
    return Opened(chain, start, directory, in_memory, tokenizer, tuple(sources))


def open_model(
    model: Model, directory: Path | None, recipe: Recipe, trust: bool, *, whole: bool
) -> tuple[Chain, PreTrainedModel | None]:
    """A chain over a model, or over its checkpoint in ``directory``, which is loaded if ``whole``; and the model itself
    if it is in memory.

    Raises:
        RecipeError: the recipe sets device or dtype for a model that is in memory already.
    """
    device = resolve_device(parallel.own_device(recipe.device))
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    loaded = None
    if isinstance(model, PreTrainedModel):
        if recipe.device != "auto" or dtype is not None:
            raise RecipeError("a model given as an object is pruned where and as it is: leave device and dtype 'auto'")
        chain, loaded = open_chain(model, device=device), model
    else:
        assert directory is not None
        chain = open_chain(directory, device=device, dtype=dtype, trust_remote_code=trust)
        if whole:
            loaded = load_whole(directory, chain.dtype, device, trust)
            chain = open_chain(loaded, device=device)
    native = chain.device.type == "cpu" and bf16_is_native()
    if recipe.products == "bfloat16" or (recipe.products == "auto" and native):
        chain.products = Bf16Products()
    return chain, loaded


def load_whole(directory: Path, dtype: torch.dtype, device: torch.device, trust: bool) -> PreTrainedModel:
    """The model of a directory, in memory."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=trust, use_safetensors=True)
    assert isinstance(model, PreTrainedModel)
    torch.nn.Module.to(model, device)
    return model


def _open_start(
    teacher: Chain, directory: Path, tokenizer: PreTrainedTokenizerBase | None, trust: bool
) -> CheckpointReader:
    """The weights of the model to prune.

    Raises:
        ModelError: config, tokenizer, the name or shape of a weight, or a weight outside the blocks, which a run does
            not change, is not the teacher's.
        StorageError: the model cannot be read.
    """
    dense, start = teacher.reader, open_checkpoint(directory)
    assert dense is not None
    why = config_difference(load_config(directory, trust_remote_code=trust), teacher.config)
    if why is None and tokenizer is not None:
        alike = load_tokenizer(directory, trust_remote_code=trust).get_vocab() == tokenizer.get_vocab()
        why = None if alike else "the tokenizers differ"
    why = why or shape_difference(start, dense)
    for name in teacher.outer_tensors() if why is None else ():
        if not torch.equal(dense.get(name), start.get(name, dtype=dense.dtype(name))):
            why = f"weight {name}, outside the blocks, has other values"
    if why is not None:
        advice = "give the dense model that this one was pruned from"
        raise ModelError(f"{dense.directory} cannot be the teacher of {directory}: {why}; {advice}")
    return start
