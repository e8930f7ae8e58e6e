"""The same model with fewer experts: its config, and its blocks, made of the weights of the model's own."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsellm.chain import Chain
from sparsellm.chain.chain import empty_model
from sparsellm.chain.experts import DOWN, GATE, UP
from sparsellm.errors import ModelError, RecipeError
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.writer import TensorSource

NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # keys of configs
_PER_TOKEN = ("num_experts_per_tok", "moe_top_k")
_INNER = ("text_config", "ffn_config")  # parts of a config that may have these keys


@dataclass(frozen=True)
class Routing:
    """The numbers of a model's mixtures, which are the same in every block with a mixture."""

    experts: int
    per_token: int
    groups: int  # consecutive groups of experts that routing compares; 1 without groups
    chosen_groups: int  # groups from which a token takes experts

    @classmethod
    def of(cls, chain: Chain) -> Routing:
        """The routing of a model. Raises ModelError if it has no mixtures, or they differ in a way not supported."""
        sizes = {len(mixture) for index in range(len(chain)) for mixture in chain.mixtures(index)}
        kind = chain.config.model_type
        if not sizes:
            raise ModelError(f"a {kind} has no mixture of experts whose experts can be removed; leave experts out")
        if len(sizes) > 1 or any(len(chain.mixtures(index)) > 1 for index in range(len(chain))):
            raise ModelError(f"the mixtures of this {kind} differ in size or share a block; leave experts out")
        text = chain.config.get_text_config()
        groups = _number(text, ("n_group",)) or 1
        return cls(sizes.pop(), _number(text, _PER_TOKEN) or 1, groups, _number(text, ("topk_group",)) or groups)

    def keep(self, experts: float) -> int:
        """The experts that stay: a share below 1 of those that go, or the number that stays. A RecipeError says that
        too few are left for the routing."""
        keep = self.experts - round(experts * self.experts) if experts < 1 else int(experts)
        pairs = 2 if self.groups > 1 else 1  # the routing compares groups by their two best experts
        if keep >= self.experts:
            raise RecipeError(f"experts {experts:g} removes none of {self.experts} experts; give a larger share")
        least = self.groups * max(pairs, -(-self.per_token // self.chosen_groups))
        if keep < least or keep % self.groups:
            parts = f", in {self.groups} equal groups" if self.groups > 1 else ""
            raise RecipeError(
                f"experts {experts:g} leaves {keep} of {self.experts} experts, and routing needs {least} or more{parts}"
                "; give a smaller share, or the number to keep"
            )
        return keep


def _number(config: Any, names: Sequence[str]) -> int | None:
    """The first whole number that a config, or a part of it, has under one of these names."""
    for holder in (config, *(getattr(config, inner, None) for inner in _INNER)):
        for name in names:
            if type(value := getattr(holder, name, None)) is int and value > 0:
                return value
    return None


class FewerExperts:
    """A twin of a chain's model with fewer experts, one block of which has weights at a time.

    Attributes:
        chain: the twin as a chain of its own; its blocks run in place of those of the model.
        keep: the experts of each mixture.
    """

    def __init__(self, dense: Chain, experts: int, keep: int) -> None:
        self.dense, self.keep, full = dense, keep, dense.config.to_dict()
        parts = {"": full, **{inner: full[inner] for inner in _INNER if isinstance(full.get(inner), dict)}}
        # Names that have the number of experts, by the part of the config, "" for the config itself.
        self._numbers = {part: [name for name in NUMBERS if parts[part].get(name) == experts] for part in parts}
        config = copy.deepcopy(dense.config)
        for part, names in self._numbers.items():
            for name in names:
                setattr(getattr(config, part) if part else config, name, keep)
        assert dense.reader is not None
        self.chain = Chain(empty_model(config, dense.reader.directory, False), None, device=dense.device, dtype=None)
        self.chain.device, self.chain.dtype = dense.device, dense.dtype
        for index in range(len(dense)):
            if [len(mixture) for mixture in self.chain.mixtures(index)] != [keep] * len(dense.mixtures(index)):
                raise ModelError(
                    f"a {dense.config.model_type} has no number in its config that sets how many experts its blocks "
                    "have; leave experts out"
                )

    def change(self, config: dict[str, Any]) -> None:
        """Puts the number of experts into the contents of a ``config.json``, also one that it leaves to its default."""
        for part, names in self._numbers.items():
            holder = config.get(part) if part else config
            if isinstance(holder, dict):
                holder.update(dict.fromkeys(names, self.keep))

    def fill(self, index: int, kept: Sequence[int]) -> None:
        """Gives the block weights of the model's block, which is loaded: those of the ``kept`` experts."""
        mixtures = "|".join(re.escape(f"{self.dense.block_names[index]}.{m.name}") for m in self.dense.mixtures(index))
        number = re.compile(rf"^({mixtures})\.(\d+)(?=\.(?:{GATE}|{UP}|{DOWN})\.)")
        for name in self.chain.names_of(index):
            source = number.sub(lambda match: f"{match[1]}.{kept[int(match[2])]}", name) if mixtures else name
            value, shape = self.dense.value(source), self.chain.value(name).shape
            if value.shape != shape:  # that of a router
                across = next(d for d, (many, few) in enumerate(zip(value.shape, shape, strict=True)) if many != few)
                value = value.index_select(across, torch.tensor(kept, device=value.device))
            self.chain.assign(name, value)

    def read(self, index: int, shard: CheckpointReader) -> None:
        """Gives the block the weights of a finished shard."""
        for name in self.chain.names_of(index):
            value = self.chain.parameter(name, shard).to(self.chain.device)
            self.chain.assign(name, value.to(self.chain.dtype) if value.is_floating_point() else value)

    def settle(self, index: int) -> None:
        """Rounds the weights of the block to the dtypes in which they are written."""
        for name in self.chain.names_of(index):
            value = self.chain.value(name)
            if value.is_floating_point():  # the model has a weight of the same name
                self.chain.assign(name, value.to(self.dense.stored_dtype(name)).to(value.dtype))

    def tensors(self, index: int) -> dict[str, TensorSource]:
        """The weights of the block under the names and in the dtypes of the checkpoint."""
        dtypes = {self.chain.key_of[name]: self.dense.stored_dtype(name) for name in self.chain.names_of(index)}
        sources = self.chain.block_tensors(index).items()
        return {key: replace(source, dtype=dtypes[key]) for key, source in sources}

    def release(self, index: int) -> None:
        """Takes the weights from the block."""
        for name in self.chain.names_of(index):
            self.chain.assign(name, self.chain.value(name).to("meta"))
