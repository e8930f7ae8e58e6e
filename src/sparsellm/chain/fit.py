"""Checks that ``config.json`` and the weights beside it belong together, before a model is built from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparsellm.chain.names import Names, architecture_keys
from sparsellm.errors import ModelError
from sparsellm.storage.reader import WEIGHT_DTYPES, CheckpointReader

TRIFLING = 0.02  # share of the weights that a config may leave unused, such as the head of another task
_QUICK = 256  # layers that are built in a moment; up to here, the names of the weights decide if they are too many
_MANY = 4096  # the same limit for experts and the like
_SIZES = ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers")
_PROBABILITY = re.compile(r"(^|_)(p?drop|dropout|layerdrop)(_prob|_rate|_p)?$")
_COUNTS = re.compile(r"^(num|n)_(\w*_)?(layers?|blocks?|experts)$")
_IN_THEIR_LISTS = re.compile(r"(?:^|\.)(\d{1,9})(?=\.)")  # the numbers in a name such as model.layers.3.mlp.up_proj
# Buffers of older releases of transformers, which newer ones make themselves.
_OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$|att(n|ention)\.(masked_)?bias$")
_DIFFER = "config and weights are of different models"
_AGAIN = "download the checkpoint again"


def check_sizes(config: PretrainedConfig, reader: CheckpointReader) -> None:
    """Refuses sizes in the config that the weights cannot have, before hours are spent on building such a model.

    Raises:
        ModelError: width, vocabulary, or the number of heads, layers or experts is below 1 or more than the weights
            have; or a probability is not from 0 to 1.
    """
    text = config.get_text_config()
    longest = 1 + max((int(number) for name in reader for number in _IN_THEIR_LISTS.findall(name)), default=-1)
    largest = max((size for name in reader for size in reader.shape(name)), default=0)
    sizes = {name: getattr(text, name, None) for name in _SIZES}  # transformers maps the family's own names to these
    for name, value in {**text.to_dict(), **sizes}.items():
        says = f"{reader.directory / 'config.json'} says {name} {value!s:.40}"
        if _PROBABILITY.search(name) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ModelError(f"{says}; a probability is from 0 to 1: {_AGAIN}")
        if type(value) is not int:
            continue
        if abs(value) >= 1 << 63:
            raise ModelError(f"{says}, which no model has: {_AGAIN}")
        if value < 1 and name in _SIZES:
            raise ModelError(f"{says}; it must be 1 or more: {_AGAIN}")
        if value > largest and name in ("hidden_size", "vocab_size"):
            raise ModelError(f"{says}, and no weight beside it has more than {largest} rows or columns; {_DIFFER}")
        if value > max(_QUICK, longest) and name == "num_hidden_layers":
            raise _other_depth(reader, value, longest)
        if value > max(_MANY, longest, largest) and _COUNTS.match(name):
            raise ModelError(f"{says}, and the weights have no more than {longest} of a kind; {_DIFFER}")


def check_depth(
    model: PreTrainedModel, reader: CheckpointReader, blocks: tuple[str, int], names: Names, *, complete: bool
) -> list[str]:
    """Refuses a checkpoint that has more layers than its config says, or many weights that the model does not use.

    Args:
        model: built from the config.
        reader: of the checkpoint.
        blocks: the name of the list of blocks in the model, and its length.
        names: the weight of the model that each tensor of the checkpoint becomes.
        complete: whether the checkpoint has every weight of the model.

    Returns:
        The names of the tensors that the model does not use, if these are few or belong to the config's architecture.

    Raises:
        ModelError: config and weights differ in the number of layers, or the model does not use more than
            :data:`TRIFLING` of the weights, and these belong to no tower of the config's architecture.
    """
    list_name, depth = blocks
    taken = names.taken()
    ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]

    def is_ignored(name: str) -> bool:
        return any(each.search(name) or each.search(names.name_of[name]) for each in ignored)

    unused = [name for name in reader if name not in taken and not _OLD_BUFFERS.search(name)]
    # The model's class may ignore a tower: its matrices are named in a warning, other tensors are not.
    unused = [name for name in unused if len(reader.shape(name)) > 1 or not is_ignored(name)]
    prefix = f"{model.base_model_prefix}."
    in_list = re.compile(rf"(?:{re.escape(prefix)})?{re.escape(list_name.removeprefix(prefix))}\.(\d{{1,9}})\.")
    number = {key: int(match[1]) for key in (*taken, *unused) if (match := in_list.match(names.name_of[key]))}
    layers = max(number.values(), default=-1) + 1
    ahead = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None)
    most = depth + (ahead if type(ahead) is int and ahead > 0 else 0)  # layers that predict further tokens come last
    if layers > most or (0 < layers < depth and not complete):
        raise _other_depth(reader, depth, layers)
    weights = {name: math.prod(reader.shape(name)) for name in reader if reader.dtype(name) in WEIGHT_DTYPES}
    left = {
        name: weights[name]
        for name in unused
        if name in weights and len(reader.shape(name)) > 1 and number.get(name, 0) < depth and not is_ignored(name)
    }
    total = sum(weights.values())
    if complete and sum(left.values()) > TRIFLING * total:
        known = architecture_keys(model, reader)
        left = {name: size for name, size in left.items() if name not in known}
        if sum(left.values()) > TRIFLING * total:
            raise ModelError(
                f"{reader.directory} has weights that the model of its config does not use: {len(left)} tensors, "
                f"{sum(left.values()) / total:.0%} of all, such as {max(left, key=lambda name: left[name])}; "
                f"{_AGAIN}, or load it with transformers and pass the model to prune()"
            )
    return unused


def check_dtypes(model_values: Mapping[str, Tensor], key_of: Mapping[str, str], reader: CheckpointReader) -> None:
    """Refuses weights that are stored as anything but floating point of 16 bits or more.

    Args:
        model_values: the parameters and buffers of the model, by name.
        key_of: their names in the checkpoint.

    Raises:
        ModelError: a weight has another dtype; the first is named.
    """
    for name, key in key_of.items():
        value = model_values[name]
        floating = isinstance(value, nn.Parameter) or value.is_floating_point()
        if floating and reader.dtype(key) not in WEIGHT_DTYPES:
            dtype = str(reader.dtype(key)).removeprefix("torch.")
            raise ModelError(
                f"weight {key} in {reader.file_of(key)} is stored as {dtype}; weights are read in bfloat16, float16, "
                "float32 and float64: convert the checkpoint to one of these first"
            )


def _other_depth(reader: CheckpointReader, config: int, weights: int) -> ModelError:
    where = reader.directory / "config.json"
    return ModelError(f"{where} says {config} layers, the weights have {weights}; {_DIFFER}: {_AGAIN}")
