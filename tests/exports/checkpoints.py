"""Tiny checkpoints on the grids of other programs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from tests.models import families, save_tiny, tiny_llama, tiny_tokenizer, windows

IDS = windows(4, 32)
# whole groups of 32 columns
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}


def wide_llama(**changes: Any) -> PreTrainedModel:
    """A Llama in bf16."""
    return tiny_llama(**{**WIDE, "num_hidden_layers": 2, **changes}).to(torch.bfloat16)


def family(name: str, **changes: Any) -> PreTrainedModel:
    """A model of a family in bf16."""
    return families.family(name, **{**WIDE, **changes}).to(torch.bfloat16)


mixtral = partial(family, "Mixtral")


def pruned(model: PreTrainedModel, place: Path, grid: str, **settings: Any) -> Path:
    """The checkpoint of a run, half of it zeros, next to its dense model."""
    dense = save_tiny(model, tiny_tokenizer(), place / "dense")
    recipe = Recipe(
        **{
            "sparsity": 0.5,
            "grid": grid,
            "samples": 4,
            "seq_len": 32,
            "effort": 0,
            **settings,
        }
    )
    return sparsellm.prune(
        dense, recipe, out=place / f"pruned-{grid}", calibration=IDS
    ).path


def logits(directory: Path, **options: Any) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, **options)(IDS).logits
