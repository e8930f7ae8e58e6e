"""Checks that ``config.json`` and the weights next to it belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparsellm.chain.names import Names
from sparsellm.errors import ModelError
from sparsellm.storage.reader import WEIGHT_DTYPES, CheckpointReader

_QUICK = 256  # layers that are built in a moment; up to here, the names of the weights decide if they are too many
_MANY = 4096  # the same limit for experts and other sizes
_SIZES = ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers")
_COUNTS = re.compile(r"^(num|n)_(\w*_)?(layers?|blocks?|experts)$")
_IN_THEIR_LISTS = re.compile(r"(?:^|\.)(\d{1,9})(?=\.)")  # the numbers in a name such as model.layers.3.mlp.up_proj
# Buffers of older releases of transformers, which newer ones make themselves.
_OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$|att(n|ention)\.(masked_)?bias$")
_DIFFER = "config and weights are of different models: download the checkpoint again"


def check_sizes(config: PretrainedConfig, reader: CheckpointReader) -> None:
    """Refuses sizes in the config with which transformers would take hours to build a model, or fail.

    Raises:
        ModelError: width, vocabulary, or the number of heads, layers or experts is below 1 or far beyond the weights.
    """
    text = config.get_text_config()
    longest = 1 + max((int(number) for name in reader for number in _IN_THEIR_LISTS.findall(name)), default=-1)
    largest = max((size for name in reader for size in reader.shape(name)), default=0)
    sizes = {name: getattr(text, name, None) for name in _SIZES}  # transformers maps the family's own names to these
    for name, value in {**text.to_dict(), **sizes}.items():
        if type(value) is int and (name in _SIZES or _COUNTS.match(name)):
            most = max(_QUICK, longest) if name == "num_hidden_layers" else max(_MANY, longest, largest)
            if value > most or (value < 1 and name in _SIZES):
                raise ModelError(
                    f"{reader.directory / 'config.json'} says {name} {value!s:.40}, and the weights have no list of "
                    f"modules longer than {longest} and no more than {largest} rows or columns; {_DIFFER}"
                )


def unused_tensors(
    model: PreTrainedModel, reader: CheckpointReader, blocks: tuple[str, int], names: Names
) -> list[str]:
    """The tensors of a checkpoint that the model does not use, without those that its class tells to ignore.

    Args:
        model: built from the config.
        reader: reads the checkpoint.
        blocks: the name of the list of blocks in the model, and its length.
        names: the weight of the model that each tensor of the checkpoint becomes.

    Raises:
        ModelError: some belong to layers that the model does not have.
    """
    list_name, depth = blocks
    ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    taken = names.taken()
    unused = [
        name
        for name in reader
        if name not in taken
        and not _OLD_BUFFERS.search(name)
        # The class may ignore a tower: its matrices are named in a warning, other tensors are not.
        and (len(reader.shape(name)) > 1 or not any(p.search(name) or p.search(names.name_of[name]) for p in ignored))
    ]
    prefix = f"{model.base_model_prefix}."
    in_list = re.compile(rf"(?:{re.escape(prefix)})?{re.escape(list_name.removeprefix(prefix))}\.(\d{{1,9}})\.")
    layers = max((int(match[1]) for key in unused if (match := in_list.match(names.name_of[key]))), default=-1) + 1
    ahead = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None)
    if layers > depth + (ahead if type(ahead) is int else 0):  # layers that predict further tokens come last
        raise ModelError(
            f"{reader.directory / 'config.json'} says {depth} layers, the weights have {layers}; {_DIFFER}"
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
