"""The names of a model's weights in its checkpoint, by transformers' own rules.

transformers renames weights while it loads them: GPT-NeoX is published with ``embed_out.weight`` for
``lm_head.weight``, and the names in a multimodal directory have prefixes that the text model alone does not have.
Transformers is asked for the rules of each family, and only names are read. What is written goes back under the names
of the checkpoint, so that every other tool still reads it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from sparsellm.chain.experts import Index, Part
from sparsellm.errors import ModelError
from sparsellm.storage.reader import CheckpointReader

_SENSES = re.compile("vision|audio")  # in the name of a config inside one that is the text's own


@dataclass(frozen=True)
class Names:
    """What the tensors of a checkpoint are to a model.

    Attributes:
        key_of: for each weight of the model that is one tensor of the checkpoint, the name of that tensor.
        converted: for each weight that transformers makes of other tensors, or by an operation, their names.
        name_of: for every tensor of the checkpoint, the name that transformers looks for in the model.
        conversions: for each of ``converted``, how it is made.
    """

    key_of: dict[str, str]
    converted: dict[str, list[str]]
    name_of: dict[str, str]
    conversions: dict[str, Conversion] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """How transformers makes a weight of tensors of a checkpoint.

    Attributes:
        sources: the names of the tensors of each kind, such as the ``w1`` of all experts and then their ``w3``.
        operations: of transformers, in order.
    """

    sources: list[list[str]]
    operations: list[Any]


def checkpoint_names(model: PreTrainedModel, keys: Iterable[str], values: Mapping[str, Tensor]) -> Names:
    """Which tensor of a checkpoint is which weight of the model; nothing is read.

    Args:
        model: may be on the meta device.
        keys: names of all tensors of the checkpoint.
        values: the model's ``state_dict()``.
    """
    rename = _Renaming(model, values)
    same: dict[str, str] = {}
    made: dict[str, dict[str, list[str]]] = {}
    name_of: dict[str, str] = {}
    for key in sorted(keys, key=loading.dot_natural_key):
        name, pattern = rename(key)
        name_of[key] = name
        if pattern is not None:
            made.setdefault(name, {}).setdefault(pattern, []).append(key)
        else:
            same.setdefault(name, key)
    in_order = {name: same[name] for name in values if name in same}
    converted = {name: [key for keys in made[name].values() for key in keys] for name in values if name in made}
    return Names(in_order, converted, name_of, {name: rename.conversion(made[name]) for name in converted})


def published_names(model: PreTrainedModel, values: Mapping[str, Tensor]) -> tuple[Names, dict[str, tuple[int, ...]]]:
    """The names under which ``save_pretrained`` writes the weights of a model, and the shape of each tensor.

    A weight that would not be read back into its place keeps the model's name, which transformers reads as well.

    Args:
        model: in memory.
        values: its ``state_dict()``.
    """
    written = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
    with contextlib.suppress(Exception):  # a rule that cannot be reversed: transformers reads the model's names too
        written = loading.revert_weight_conversion(model, written)
    names = checkpoint_names(model, written, values)
    made = {name for name in names.converted if name not in names.key_of}
    kept = {name: name for name in values if name not in names.key_of and name not in made}
    names = replace(names, key_of={**names.key_of, **kept})
    shapes = {**{key: tuple(tensor.shape) for key, tensor in written.items()}}
    return names, {**shapes, **{name: tuple(values[name].shape) for name in kept}}


def expert_parts(
    parts: Mapping[str, Part], names: Names, values: Mapping[str, Tensor], shape: Callable[[str], tuple[int, ...]]
) -> dict[str, Part]:
    """For each weight of a separated expert, the part of a tensor of the checkpoint that it is; nothing is read.

    A weight whose conversion is not known, or for which tensors are missing, is left out.

    Args:
        parts: for each such weight, its part of a parameter of the model.
        names: of that parameter in the checkpoint.
        values: the parameters of the model.
        shape: the shape of a tensor of the checkpoint.
    """
    found: dict[str, Part] = {}
    for name, part in parts.items():
        if part.source in names.key_of:
            found[name] = Part(names.key_of[part.source], part.index, part.transposed)
        elif part.source in names.conversions:
            conversion = names.conversions[part.source]
            taken = _part_before(part, conversion, tuple(values[part.source].shape), shape)
            if taken is not None:
                found[name] = taken
    return found


def _part_before(
    part: Part, conversion: Conversion, whole: tuple[int, ...], shape: Callable[[str], tuple[int, ...]]
) -> Part | None:
    """The part of a tensor of the checkpoint that becomes this part of stacked experts; None if that is not known.

    The operations are those of transformers: the tensors of all experts are stacked; those of gate and up are put one
    after the other; two dimensions are exchanged; the outputs of gate and up, which come in turn, are put apart.
    """
    steps = [(type(each).__name__, getattr(each, "dim", None)) for each in conversion.operations]
    expert, *inner = part.index
    if not isinstance(expert, int):
        return None
    merged = steps[:1] == [("MergeModulelist", 0)]
    if any(len(keys) != (whole[0] if merged else 1) for keys in conversion.sources):
        return None
    keys = [each[expert if merged else 0] for each in conversion.sources]
    own: Index = () if merged else (expert,)
    steps = steps[merged:]
    if not steps and len(keys) == 1:
        return Part(keys[0], (*own, *inner), part.transposed)
    rows = inner[0] if len(inner) == 1 else None
    if steps == [("Concatenate", 1)] and isinstance(rows, slice):
        size = whole[1] // len(keys)
        if rows in [slice(start, start + size) for start in range(0, whole[1], size)]:
            return Part(keys[rows.start // size], own, part.transposed)
    if steps == [("Interleave", 1)] and not conversion.operations[-1].inverse and isinstance(rows, slice):
        half = whole[1] // 2
        if rows in (slice(0, half), slice(half, whole[1])):
            return Part(keys[0], (*own, slice(rows.start // half, None, 2)), part.transposed)
    if [name for name, _ in steps] == ["Transpose"] and {
        conversion.operations[0].dim0,
        conversion.operations[0].dim1,
    } == {1, 2}:
        if conversion.operations[0].check_dims and shape(keys[0]) == whole:
            return Part(keys[0], part.index, part.transposed)
        exchanged = inner[1:] if len(inner) == 2 else [slice(None), *inner] if inner else []
        return Part(keys[0], (*own, *exchanged), not part.transposed)
    return None


def refuse_converted(converted: Mapping[str, list[str]], model: PreTrainedModel, reader: CheckpointReader) -> None:
    """Refuses a checkpoint of which some tensors become weights of the model only by an operation, before the work.

    Args:
        converted: for each such weight of the model, the tensors that it is made of.
        model: built from the config.
        reader: of the checkpoint.

    Raises:
        ModelError: naming one of them.
    """
    if not converted:
        return
    name, keys = max(converted.items(), key=lambda item: len(item[1]))
    count = sum(len(each) for each in converted.values())
    made = f"{len(keys)} tensors such as {keys[0]} become" if len(keys) > 1 else f"{keys[0]} becomes"
    raise ModelError(
        f"transformers merges, splits or transposes {count} tensors of {reader.directory} while it loads a "
        f"{model.config.model_type} ({made} {name}), which is not supported from a directory: load it with "
        "transformers and pass the model to prune() with an exclude for these weights, or open an issue"
    )


def architecture_keys(model: PreTrainedModel, reader: CheckpointReader) -> set[str]:
    """The tensors that belong to the whole architecture that ``config.json`` names, where ``model`` is its text part.

    A multimodal directory opened as a language model has towers that the language model lacks. Empty where the config
    names no other architecture, or one that this transformers has not.
    """
    try:
        config = AutoConfig.from_pretrained(reader.directory)
    except Exception:  # modelling code of the checkpoint, which is not run for this
        return set()
    found: set[str] = set()
    for architecture in getattr(config, "architectures", None) or []:
        family: Any = getattr(transformers, str(architecture), None)
        known = isinstance(family, type) and issubclass(family, PreTrainedModel)
        if not known or family is type(model) or type(config) is type(model.config):
            continue
        try:
            with torch.device("meta"):
                whole = family(config)
        except Exception:  # sizes of a tower that do not go together: then nothing is known of it
            continue
        names = checkpoint_names(whole, list(reader), whole.state_dict())
        found.update(names.key_of.values(), *names.converted.values())
    return found


def tower_names(model: PreTrainedModel) -> list[str]:
    """The modules of a multimodal model that read no text: vision and audio towers, by name, outermost only.

    They are the models inside it that have a config of their own other than that of the text.
    """
    whole = model.config
    text = whole.get_text_config()
    own = [getattr(whole, key, None) for key in getattr(whole, "sub_configs", {}) if _SENSES.search(key)]
    kinds = (PretrainedConfig,) if text is not whole else tuple({type(each) for each in own if each is not None})
    towers: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or isinstance(module.config, (type(text), type(whole))):
            continue
        if isinstance(module.config, kinds) and not any(name.startswith(f"{tower}.") for tower in towers):
            towers.append(name)
    return towers


class _Renaming:
    """From the name of a tensor to the name of a weight: the steps of ``from_pretrained``."""

    def __init__(self, model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        rules = get_model_conversion_mapping(model, getattr(model, "_checkpoint_conversion_mapping", None) or None)
        self._renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]

    def conversion(self, made: dict[str, list[str]]) -> Conversion:
        """How a weight is made of tensors, which are given by the patterns that they match."""
        converter = next(rule for rule in self._converters if next(iter(made)) in rule.source_patterns)
        return Conversion([made[p] for p in converter.source_patterns if p in made], list(converter.operations))

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of a conversion if more than the name is changed on the way."""
        name, pattern = loading.rename_source_key(key, self._renamings, self._converters, self._prefix, self._values)
        if name not in self._values:
            prefix = f"{self._prefix}."
            for plain in (key, key.removeprefix(prefix), prefix + key):
                if plain in self._values:
                    return plain, None
        return name, pattern
