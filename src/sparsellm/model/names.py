"""The names of a model's weights in its checkpoint, by transformers' own rules.

transformers renames weights while it loads them: GPT-NeoX is published with ``embed_out.weight`` for
``lm_head.weight``, and names in a multimodal directory have prefixes. What is written goes back under the names of the
checkpoint, so that every other tool still reads it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from sparsellm.errors import ModelError
from sparsellm.files.reader import CheckpointReader
from sparsellm.model.experts import Index, Part
from sparsellm.model.open import DIFFER

# Buffers of older releases of transformers, which newer ones make themselves.
_OLD_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq|(^|\.)position_ids$|att(n|ention)\.(masked_)?bias$"
)


@dataclass(frozen=True)
class Conversion:
    """How transformers makes a weight of tensors of a checkpoint."""

    # the names of the tensors of each kind, such as the w1 of all experts, then their w3
    sources: list[list[str]]
    operations: list[Any]  # transformers' own, in order

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources for key in keys]


@dataclass(frozen=True)
class Names:
    """The weights that the tensors of a checkpoint become."""

    # for each weight that is one tensor of the checkpoint, the name of that tensor
    key_of: dict[str, str]
    # for each that transformers makes of other tensors, or by an operation
    conversions: dict[str, Conversion]
    # for every tensor, the name that transformers looks for in the model
    name_of: dict[str, str]


def checkpoint_names(
    model: PreTrainedModel, keys: Iterable[str], values: dict[str, Tensor]
) -> Names:
    """The weights of a model with state dict ``values`` that a checkpoint's ``keys`` become in ``from_pretrained``."""
    rules = get_model_conversion_mapping(
        model, getattr(model, "_checkpoint_conversion_mapping", None) or None
    )
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    base = str(getattr(model, "base_model_prefix", "") or "")
    same: dict[str, str] = {}
    # name → pattern of a converter → tensors
    made: dict[str, dict[str, list[str]]] = {}
    name_of: dict[str, str] = {}
    # some rules wait for the first tensor of a kind
    for key in sorted(keys, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(
            key, renamings, converters, base, values
        )
        if name not in values:
            plain = (key, key.removeprefix(f"{base}."), f"{base}.{key}")
            if known := [candidate for candidate in plain if candidate in values]:
                name = known[0]
                pattern = None
        name_of[key] = name
        if pattern is not None:
            made.setdefault(name, {}).setdefault(pattern, []).append(key)
        else:
            same.setdefault(name, key)
    conversions = {}
    for name in filter(made.__contains__, values):
        tensors = made[name]
        first = next(iter(tensors))
        rule = next(rule for rule in converters if first in rule.source_patterns)
        sources = [
            tensors[pattern] for pattern in rule.source_patterns if pattern in tensors
        ]
        conversions[name] = Conversion(sources, list(rule.operations))
    key_of = {name: same[name] for name in values if name in same}
    return Names(key_of, conversions, name_of)


def published_names(
    model: PreTrainedModel, values: dict[str, Tensor]
) -> tuple[Names, dict[str, tuple[int, ...]]]:
    """The names under which ``save_pretrained`` writes the weights of a model, and the shape of each tensor.

    A weight that would not be read back into its place keeps the model's name, which transformers reads as well."""
    written = {
        name: torch.empty_like(value, device="meta") for name, value in values.items()
    }
    # a rule that cannot be reversed: the model's names are read as well
    with contextlib.suppress(Exception):
        written = loading.revert_weight_conversion(model, written)
    names = checkpoint_names(model, written, values)
    kept = {
        name: name
        for name in values
        if name not in names.key_of and name not in names.conversions
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in written.items()}
    shapes |= {name: tuple(values[name].shape) for name in kept}
    return Names({**names.key_of, **kept}, names.conversions, names.name_of), shapes


def expert_parts(
    parts: Mapping[str, Part],
    names: Names,
    values: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Part]:
    """For each weight of a separated expert, which is a part of a parameter in ``values``, the part of a tensor of the
    checkpoint, whose tensors have ``shapes``, unless its conversion is not known or tensors are missing."""
    before: dict[str, Part | None] = {}
    for name, part in parts.items():
        if part.source in names.key_of:
            before[name] = replace(part, source=names.key_of[part.source])
        elif part.source in names.conversions:
            shape = tuple(values[part.source].shape)
            before[name] = _part_before(
                part, names.conversions[part.source], shape, shapes
            )
    return {name: part for name, part in before.items() if part is not None}


def _part_before(
    part: Part,
    conversion: Conversion,
    stack: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> Part | None:
    """The part of a tensor of the checkpoint that becomes this part of a stack of experts; None if that is not known.

    Operations of transformers: the tensors of all experts are stacked; gate and up are put one after the other; two
    dimensions are exchanged; the outputs of gate and up, which come in turn, are put apart."""
    steps = [
        (type(operation).__name__, getattr(operation, "dim", None))
        for operation in conversion.operations
    ]
    last = conversion.operations[-1]
    expert, *inner = part.index
    if not isinstance(expert, int):
        return None
    merged = steps[:1] == [("MergeModulelist", 0)]
    if any(len(keys) != (stack[0] if merged else 1) for keys in conversion.sources):
        return None
    keys = [names[expert if merged else 0] for names in conversion.sources]
    before: Index = () if merged else (expert,)
    steps = steps[merged:]
    rows = inner[0] if len(inner) == 1 else None
    if not steps and len(keys) == 1:
        return Part(keys[0], (*before, *inner), part.transposed)
    if steps == [("Concatenate", 1)] and isinstance(rows, slice):
        size = stack[1] // len(keys)
        if rows in [slice(start, start + size) for start in range(0, stack[1], size)]:
            return Part(keys[rows.start // size], before, part.transposed)
    if steps == [("Interleave", 1)] and not last.inverse and isinstance(rows, slice):
        half = stack[1] // 2
        if rows in (slice(0, half), slice(half, stack[1])):
            return Part(
                keys[0], (*before, slice(rows.start // half, None, 2)), part.transposed
            )
    if [name for name, _ in steps] == ["Transpose"] and {last.dim0, last.dim1} == {
        1,
        2,
    }:
        if last.check_dims and shapes[keys[0]] == stack:
            return Part(keys[0], part.index, part.transposed)
        exchanged = inner[1:]
        if len(inner) == 1:
            exchanged = [slice(None), *inner]
        return Part(keys[0], (*before, *exchanged), not part.transposed)
    return None


def refuse_converted(
    converted: Mapping[str, list[str]], model: PreTrainedModel, reader: CheckpointReader
) -> None:
    """Refuses a checkpoint with weights that transformers makes of tensors, by name, in a way that is not known."""
    if not converted:
        return
    name, keys = max(converted.items(), key=lambda item: len(item[1]))
    count = sum(len(tensors) for tensors in converted.values())
    made = f"{keys[0]} becomes"
    if len(keys) > 1:
        made = f"{len(keys)} tensors such as {keys[0]} become"
    raise ModelError(
        f"transformers merges, splits or transposes {count} tensors of {reader.directory} while it loads a "
        f"{model.config.model_type} ({made} {name}), which is not supported from a directory: load it with "
        "transformers and pass the model to prune() with an exclude for these weights, or open an issue"
    )


def unused_tensors(
    model: PreTrainedModel,
    reader: CheckpointReader,
    list_name: str,
    depth: int,
    names: Names,
) -> list[str]:
    """The tensors of a checkpoint that the model does not use, without those that its class tells to ignore. A
    ModelError says that some belong to blocks beyond the ``depth`` blocks of the list."""
    ignored = [
        re.compile(pattern)
        for pattern in model._keys_to_ignore_on_load_unexpected or ()
    ]
    taken = {
        *names.key_of.values(),
        *(key for conversion in names.conversions.values() for key in conversion.keys),
    }
    unused = [
        name
        for name in reader
        if name not in taken
        and not _OLD_BUFFERS.search(name)
        # The class may ignore a tower: its matrices are named in a warning, other tensors are not.
        and (
            len(reader.shape(name)) > 1
            or not any(p.search(name) or p.search(names.name_of[name]) for p in ignored)
        )
    ]
    prefix = f"{model.base_model_prefix}."
    in_list = re.compile(
        rf"(?:{re.escape(prefix)})?{re.escape(list_name.removeprefix(prefix))}\.(\d{{1,9}})\."
    )
    matches = (in_list.match(names.name_of[key]) for key in unused)
    layers = max((int(match[1]) + 1 for match in matches if match), default=0)
    ahead = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None)
    most = depth
    if type(ahead) is int:  # layers that predict further tokens come last
        most += ahead
    if layers > most:
        raise ModelError(
            f"{reader.directory / 'config.json'} says {depth} layers, the weights have {layers}; {DIFFER}"
        )
    return unused
