"""The same model with fewer experts: its config, and its blocks, made of the weights of the model's own."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, Self

import torch

from sparsellm.errors import ModelError, RecipeError
from sparsellm.model import Chain
from sparsellm.model.chain import empty_model
from sparsellm.model.experts import DOWN, GATE, UP
from sparsellm.records import Record

# keys of configs
NUMBERS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k",
)
_INNER = ("text_config", "ffn_config")  # parts of a config that may have these keys


class Routing(Record):
    """The mixtures of a model, and whether experts of them can be removed."""

    experts: dict[int, int]  # by block
    per_token: int | None  # experts that a token takes; None if the config does not say
    shared: int  # experts that all tokens take, which stay
    groups: int  # consecutive groups of experts that routing compares; 1 without groups
    least: int  # the fewest experts that the routing needs, a multiple of the groups
    why: str  # experts cannot be removed; empty if they can

    @classmethod
    def of(cls, chain: Chain) -> Self:
        """The routing of a model."""
        kind = chain.config.model_type
        mixtures = [chain.mixtures(index) for index in range(len(chain))]
        experts = {
            index: len(mixture)
            for index, of_block in enumerate(mixtures)
            for mixture in of_block
        }
        per_token = experts_of_token(chain)
        groups = _number(chain, ("n_group",)) or 1
        why = ""
        if not experts:
            why = f"a {kind} has no mixture of experts whose experts can be removed"
        elif len({*experts.values()}) > 1 or max(map(len, mixtures)) > 1:
            why = f"the mixtures of this {kind} differ in size or share a block"
        elif any(
            "." not in mixture.name for of_block in mixtures for mixture in of_block
        ):
            why = f"the experts of a {kind} are not in a module with their router"
        elif per_token is None:
            why = f"the config of a {kind} does not say how many experts a token takes"
        elif _number(chain, NUMBERS) not in experts.values():
            why = f"a {kind} has no number in its config that sets how many experts its blocks have"
        has_shared = any(
            "shared" in name
            for block in chain.blocks
            for name, _ in block.named_modules()
        )
        shared = 0
        if has_shared:
            shared = _number(chain, ("n_shared_experts",)) or 1
        chosen = _number(chain, ("topk_group",)) or groups
        of_group = -(-(per_token or 1) // chosen)
        if groups > 1:  # routing compares groups by their two best experts
            of_group = max(2, of_group)
        least = groups * of_group
        if not why and least >= max(experts.values()):
            why = f"routing needs all {max(experts.values())} experts"
        return cls(
            experts=experts,
            per_token=per_token,
            shared=shared,
            groups=groups,
            least=least,
            why=why,
        )

    def keep(self, experts: float) -> int:
        """The number of experts to keep. ModelError if none can go, RecipeError if it is all or routing forbids it."""
        if self.why:
            raise ModelError(f"{self.why}; leave experts out")
        many = next(iter(self.experts.values()))
        keep = int(experts)
        if experts < 1:
            keep = many - round(experts * many)
        if keep >= many:
            raise RecipeError(
                f"experts {experts:g} removes none of {many} experts; give a larger share"
            )
        if keep < self.least or keep % self.groups:
            needs = f"routing needs {self.least} or more"
            if self.groups > 1:
                needs += f", in {self.groups} equal groups"
            raise RecipeError(
                f"experts {experts:g} leaves {keep} of {many} experts, and {needs}; give a smaller share, or the "
                "number to keep"
            )
        return keep


def experts_of_token(chain: Chain) -> int | None:
    """The experts that a token takes in a mixture, by the names that configs have for it; None if there is none."""
    return _number(chain, _PER_TOKEN)


def _number(chain: Chain, names: Sequence[str]) -> int | None:
    """The first whole number that the config of a text model, or a part of it, has under one of these names."""
    config = chain.config.get_text_config()
    for holder in (config, *(getattr(config, inner, None) for inner in _INNER)):
        for name in names:
            if type(value := getattr(holder, name, None)) is int and value > 0:
                return value
    return None


def _part(config: Any, name: str) -> Any:
    """The part of a config with this name; for an empty name, the config itself."""
    if name:
        return getattr(config, name)
    return config


class FewerExperts:
    """A twin of a chain's model with fewer experts, one block of which has weights at a time.

    ``chain`` is the twin as a chain by its config alone, ``routing`` that of the model, ``keep`` the experts of each
    mixture that stay, by ``experts`` of a recipe. ModelError if none can go, RecipeError if too many."""

    def __init__(self, dense: Chain, experts: float) -> None:
        self.dense = dense
        self.routing = Routing.of(dense)
        full = dense.config.to_dict()
        self.keep = keep = self.routing.keep(experts)
        parts = {
            "": full,
            **{
                inner: full[inner]
                for inner in _INNER
                if isinstance(full.get(inner), dict)
            },
        }
        # Names that have the number of experts, by the part of the config, "" for the config itself.
        many = next(iter(self.routing.experts.values()))
        self._numbers = {
            part: [name for name in NUMBERS if fields.get(name) == many]
            for part, fields in parts.items()
        }
        config = copy.deepcopy(dense.config)
        for part, names in self._numbers.items():
            for name in names:
                setattr(_part(config, part), name, keep)
        assert dense.reader is not None
        place = dense.reader.directory
        self.chain = Chain(
            empty_model(config, place, False), None, device=dense.device, dtype=None
        )
        self.chain.describe(place, dense.device, dense.dtype, like=dense)
        self.chain.products = dense.products
        for index in range(len(dense)):
            if [len(mixture) for mixture in self.chain.mixtures(index)] != [keep] * len(
                dense.mixtures(index)
            ):
                raise ModelError(
                    f"the config of a {config.model_type} does not set all its experts; leave experts out"
                )

    def change(self, config: dict[str, Any]) -> None:
        """Puts the number of experts into the contents of a ``config.json``, also one that it leaves to its default."""
        kind = self.chain.config.model_type
        parts = [x for x in config.values() if isinstance(x, dict)]
        # where it is nested
        config = next(
            (nested for nested in parts if nested.get("model_type") == kind), config
        )
        for part, names in self._numbers.items():
            holder: object = config
            if part:
                holder = config.get(part)
            if isinstance(holder, dict):
                aliases = _part(self.chain.config, part).attribute_map
                holder.update(
                    {
                        name: self.keep
                        for name in (*names, *holder)
                        if aliases.get(name, name) in names
                    }
                )

    def fill(self, index: int, kept: Sequence[int]) -> None:
        """Gives the block weights of the model's block, which is loaded: those of the ``kept`` experts."""
        mixtures = "|".join(
            re.escape(f"{self.dense.block_names[index]}.{m.name}")
            for m in self.dense.mixtures(index)
        )
        number = re.compile(rf"^({mixtures})\.(\d+)(?=\.(?:{GATE}|{UP}|{DOWN})\.)")
        for name in self.chain.names_of(index):
            source = number.sub(lambda match: f"{match[1]}.{kept[int(match[2])]}", name)
            value = self.dense.value(source)
            shape = self.chain.value(name).shape
            if value.shape != shape:  # that of a router
                across = next(
                    d
                    for d, (many, few) in enumerate(
                        zip(value.shape, shape, strict=True)
                    )
                    if many != few
                )
                value = value.index_select(
                    across, torch.tensor(kept, device=value.device)
                )
            self.chain.assign(name, value)

    def release(self, index: int) -> None:
        """Takes the weights from the block."""
        for name in self.chain.names_of(index):
            self.chain.assign(name, self.chain.value(name).to("meta"))
