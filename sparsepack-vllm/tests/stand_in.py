"""The part of vLLM's interface that sparsepack_vllm uses, for machines without vLLM: classes that hold sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

LINEAR = "vllm.model_executor.layers.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"
BASE = f"{QUANTIZATION}.base_config"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"

REGISTERED: dict[str, type] = {}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> str:
        return "renames nothing"


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """A layer of one rank; ``repeats`` ranks hold the same heads of k and v."""

    def __init__(self, rank: int = 0, repeats: int | None = None) -> None:
        super().__init__()
        self.tp_rank = rank
        if repeats is not None:
            self.num_kv_head_replicas = repeats


class VocabParallelEmbedding(nn.Module):
    """Rows ``begin:end`` of a vocabulary."""

    def __init__(self, rows: int, columns: int, begin: int = 0, end: int = 0) -> None:
        super().__init__()
        self.org_vocab_size = rows
        self.embedding_dim = columns
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=begin, org_vocab_end_index=end or rows
        )


class ParallelLMHead(VocabParallelEmbedding):
    pass


def register_quantization_config(name: str) -> Callable[[type], type]:
    def register(config: type) -> type:
        REGISTERED[name] = config
        return config

    return register


CONTENT: dict[str, tuple[Any, ...]] = {
    LINEAR: (LinearBase, LinearMethodBase, UnquantizedLinearMethod),
    QUANTIZATION: (register_quantization_config,),
    BASE: (QuantizationConfig,),
    EMBEDDING: (ParallelLMHead, VocabParallelEmbedding),
}


def install() -> None:
    """Puts the stand-in where ``import vllm`` finds it."""
    for path, members in CONTENT.items():
        words = path.split(".")
        for length in range(1, len(words) + 1):
            name = ".".join(words[:length])
            sys.modules.setdefault(name, ModuleType(name))
        for member in members:
            setattr(sys.modules[path], member.__name__, member)
