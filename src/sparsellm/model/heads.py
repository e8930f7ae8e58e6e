"""Embedding and output head of a model, and their tensors in its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from sparsellm.model.chain import Chain


@dataclass(frozen=True)
class OuterMatrix:
    """The embedding, the output head, or one matrix that is both."""

    module: nn.Module
    keys: tuple[str, ...]  # its tensors: two where a tied head is stored a second time
    is_head: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The vocabulary and the width of hidden states."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        return rows, columns


def heads_of(chain: Chain) -> Iterator[tuple[nn.Module, str]]:
    """Embedding and output head, with the name that each weight has in the checkpoint. One that the model does not
    have, or that is stored as the other, is left out."""
    names = {id(module): name for name, module in chain.model.named_modules()}
    seen = set()
    for module in (
        chain.model.get_input_embeddings(),
        chain.model.get_output_embeddings(),
    ):
        key = chain.key_of.get(f"{names.get(id(module))}.weight")
        if key is not None and key not in seen:
            seen.add(key)
            yield module, key


def outer_matrices(chain: Chain) -> list[OuterMatrix]:
    """Embedding and head, as one where they are tied."""
    embedding = chain.model.get_input_embeddings()
    head = chain.model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    keys = list(heads_of(chain))
    if tied and keys:
        return [OuterMatrix(head, tuple(key for _, key in keys), is_head=True)]
    return [OuterMatrix(module, (key,), is_head=module is head) for module, key in keys]
