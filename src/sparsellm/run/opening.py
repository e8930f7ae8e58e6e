"""Opens the models of a run: the dense one, and the weights to prune."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import parallel, plugins
from sparsellm.errors import ModelError, RecipeError, one_line
from sparsellm.files.files import explained
from sparsellm.files.reader import CheckpointReader, as_storage_error, open_checkpoint
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.inputs import read_object
from sparsellm.machine import bf16_is_native, machine_name, resolve_device
from sparsellm.model import Chain, open_chain
from sparsellm.model.open import (
    load_config,
    load_tokenizer,
    shape_difference,
)
from sparsellm.model.products import Bf16Products
from sparsellm.recipe import Recipe
from sparsellm.run.request import Model, Request
from sparsepack.checkpoint import is_packed
from sparsepack.files import config_difference
from sparsepack.loading import load


@dataclass(frozen=True)
class Models:
    """The models of a run."""

    chain: Chain  # the model to prune, or a teacher of the same shapes
    start: CheckpointReader | None  # the weights to prune, if they are not the chain's
    teacher: Chain | None  # the dense model, if its weights have other shapes
    directory: Path | None  # that of the chain; None for a model given as an object
    dense: Path | None  # that of the dense model
    # the model that is pruned in memory; None if it is read block by block
    in_memory: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None  # None for token ids
    sources: tuple[Path, ...]  # directories that the result must not replace
    trust: bool  # whether modelling code of the checkpoint runs


def open_models(request: Request) -> Models:
    """Opens the model of a request and its teacher: with a tokenizer for a text, in memory if nothing is written.
    Raises a SparseLLMError if one cannot be opened, or they do not fit."""
    model = request.model
    teacher = request.teacher
    recipe = request.recipe
    trust = request.trust_remote_code
    tokenizer = request.tokenizer
    loaded = request.out is None
    text = not isinstance(request.calibration, Tensor)
    if teacher is not None and (loaded or isinstance(model, PreTrainedModel)):
        raise RecipeError(
            "teacher needs models on disk: give model and teacher by name, and out=DIR"
        )
    named: dict[str, Model] = {"model": model}
    if teacher is not None:
        named["teacher"] = teacher
    check = partial(load_config, trust_remote_code=trust)
    sources = [
        parallel.main_first(
            partial(
                checkpoint_directory,
                str(given),
                argument,
                check,
                dtype=recipe.dtype,
            )
        )
        for argument, given in named.items()
        if not isinstance(given, PreTrainedModel)
    ]
    directory = sources[-1] if sources else None
    if (
        loaded
        and directory is not None
        and is_packed(read_object(directory / "config.json"))
    ):
        raise RecipeError(
            f"{directory} is packed, and a packed model is not pruned in memory; give out=DIR"
        )
    if isinstance(model, PreTrainedModel) and any(
        hasattr(module, "base_layer") for module in model.modules()
    ):
        raise ModelError(
            "the model has adapters; merge them first (merge_and_unload), or give the model without them"
        )
    dense = directory
    chain, in_memory = open_model(
        model if teacher is None else teacher, directory, recipe, trust, load=loaded
    )
    if tokenizer is None and directory is not None and text:
        tokenizer = load_tokenizer(directory, trust_remote_code=trust)
    start = None
    taught_by = None
    if teacher is not None:
        start = open_checkpoint(sources[0])
        _check_teacher(chain, start, tokenizer if text else None, trust)
        assert chain.reader is not None
        if shape_difference(start, chain.reader) is not None:
            start = None
            taught_by = chain
            directory = sources[0]
            chain, _ = open_model(model, directory, recipe, trust, load=False)
    # the directory that a model in memory was loaded from
    name = getattr(model, "name_or_path", "")
    if not sources and name and Path(name).is_dir():
        sources = [Path(name)]
    return Models(
        chain,
        start,
        teacher=taught_by,
        directory=directory,
        dense=dense,
        in_memory=in_memory,
        tokenizer=tokenizer,
        sources=tuple(sources),
        trust=trust,
    )


def device_of(model: Model, recipe: Recipe) -> torch.device:
    """The device of a model that is an object (a ModelError if it has none, or several), else that of the recipe."""
    if isinstance(model, PreTrainedModel):
        if (
            len({parameter.device for parameter in model.parameters()}) > 1
            or model.device.type == "meta"
        ):
            raise ModelError(
                "the model's weights are on several devices, or not in memory; load it without device_map, or give it "
                "by name, so that it is read block by block"
            )
        return model.device
    return resolve_device(parallel.own_device(recipe.device))


def open_model(
    model: Model, directory: Path | None, recipe: Recipe, trust: bool, *, load: bool
) -> tuple[Chain, PreTrainedModel | None]:
    """A chain over a model, or over its checkpoint in ``directory``, which is loaded if ``load``; and the model itself
    if it is in memory. Raises RecipeError if the recipe sets device or dtype for a model that is in memory already."""
    device = device_of(model, recipe)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    loaded = None
    named = " and ".join(
        name for name in ("dtype", "products") if getattr(recipe, name) == "bfloat16"
    )
    if named and device.type == "cuda" and not bf16_is_native(device):
        raise RecipeError(
            f"{machine_name(device)} has no units for bfloat16; give {named} float32 or auto"
        )
    if isinstance(model, PreTrainedModel):
        if not model.can_generate():
            raise ModelError(
                f"the model is a {type(model).__name__}, without a head; load it by AutoModelForCausalLM"
            )
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ModelError(
                "the model was made in torch.inference_mode, and cannot be changed; load it outside"
            )
        if recipe.device != "auto" or dtype is not None:
            raise RecipeError(
                "a model given as an object runs where and as it is: leave device and dtype 'auto'"
            )
        chain = open_chain(model, device=device)
        loaded = model
    else:
        assert directory is not None
        chain = open_chain(
            directory, device=device, dtype=dtype, trust_remote_code=trust
        )
        if load:
            loaded = load_whole(directory, chain.dtype, device, trust)
            chain = open_chain(loaded, device=device)
    set_products(chain, recipe)
    return chain, loaded


def set_products(chain: Chain, recipe: Recipe) -> None:
    """Sets the dtype in which blocks multiply fp32 matrices."""
    if recipe.products == "bfloat16" or (
        recipe.products == "auto" and bf16_is_native(chain.device)
    ):
        chain.products = Bf16Products()


def load_whole(
    directory: Path, dtype: str | torch.dtype, device: str | torch.device, trust: bool
) -> PreTrainedModel:
    """The model of a directory, in memory. Raises StorageError if transformers cannot load it."""
    with as_storage_error():
        return load(
            directory,
            device=device,
            dtype=dtype,
            activations="fp32",
            trust_remote_code=trust,
        )


def save_companions(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Writes config, generation config and tokenizer of a model that was given as an object, as transformers does.
    Raises ModelError if one of them has settings that transformers does not write."""
    config = copy.deepcopy(model.config)
    head = model.get_output_embeddings()
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    # which the caller may have tied, or untied, since the config was written
    if head is not None:
        config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings
    for part in (config, getattr(model, "generation_config", None), tokenizer):
        try:
            with explained(folder):
                if part is not None:
                    part.save_pretrained(folder)
        except ValueError as error:
            why = one_line(error)
            raise ModelError(
                f"transformers does not save the model's {type(part).__name__}: {why}"
            ) from None


def _check_teacher(
    teacher: Chain,
    start: CheckpointReader,
    tokenizer: PreTrainedTokenizerBase | None,
    trust: bool,
) -> None:
    """Refuses a teacher whose tokenizer differs from that of the model to prune, or a weight outside the blocks, or, if
    all weights have the same shapes, the config. Raises ModelError; StorageError if a weight is unreadable."""
    dense = teacher.reader
    directory = start.directory
    why = None
    assert dense is not None
    if shape_difference(start, dense) is None:
        why = config_difference(
            load_config(directory, trust_remote_code=trust).to_dict(),
            teacher.config.to_dict(),
        )
    if why is None and tokenizer is not None:
        alike = (
            load_tokenizer(directory, trust_remote_code=trust).get_vocab()
            == tokenizer.get_vocab()
        )
        why = None if alike else "the tokenizers differ"
    for name in teacher.outer_tensors() if why is None else ():
        if name not in start:
            why = f"weight {name} is missing"
            break
        if not torch.equal(dense.get(name), start.get(name, dtype=dense.dtype(name))):
            why = f"weight {name}, outside the blocks, has other values"
    if why is not None:
        advice = "give the dense model that this one was pruned from"
        raise ModelError(
            f"{dense.directory} cannot be the teacher of {directory}: {why}; {advice}"
        )


def computing_of(chain: Chain) -> str:
    """Dtype and device of the blocks, by which a run is known. Refuses processes that differ in it, or in a plugin."""
    products = ", products in bf16" if chain.products is not None else ""
    ways = {*parallel.gather(f"{chain.dtype} on {chain.device.type}{products}")}
    if len(ways) > 1:
        differ = (
            f"processes would compute in different ways ({'; '.join(sorted(ways))})"
        )
        raise RecipeError(
            f"{differ}; set device, dtype and products, or leave out the machines that differ"
        )
    if len({*map(str, parallel.gather(sorted(plugins.loaded().items())))}) > 1:
        raise RecipeError(
            "a plugin differs between processes; give all machines the same file"
        )
    return ways.pop()
