"""sparsepack: the packed format of sparse language models, and its runtime. It needs nothing of sparsellm.

A packed model:

    load(DIR)                              a transformers model whose linears stay packed in memory
    generate(model, tokenizer, prompt)     the continuation of a text, with its speed
    compare(PACKED, DENSE)                 speed and memory of two checkpoints

``AutoModelForCausalLM.from_pretrained`` loads packed directories too, after this import.

The contract with a program that prunes, rounds and writes checkpoints, as sparsellm does:

    codes       the integers of each type (``Levels``), exponents of columns
    grid        ``Groups``, ``on_grid``: round a weight so that packing it is exact
    layout      ``pack(weight, value_type)`` → ``PackedWeight`` or None; ``unpack``; ``predicted_bytes``
    checkpoint  ``PackedEntry``, ``quantization_config`` and ``manifest`` to write; ``PackedTensors`` to read

Errors are subclasses of ``PackError``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsepack.registration import register_when_needed

if TYPE_CHECKING:
    from sparsepack.bench import compare
    from sparsepack.errors import PackError
    from sparsepack.generation import generate
    from sparsepack.layout import PackedWeight, pack, unpack
    from sparsepack.loading import load

_HOME = {
    "PackError": "errors",
    "PackedWeight": "layout",
    "compare": "bench",
    "generate": "generation",
    "load": "loading",
    "pack": "layout",
    "unpack": "layout",
}

__all__ = ["PackError", "PackedWeight", "compare", "generate", "load", "pack", "unpack"]

register_when_needed()  # so that from_pretrained loads packed checkpoints


def __getattr__(name: str) -> Any:
    """Imports torch and transformers when they are first needed."""
    if name in _HOME:
        return getattr(importlib.import_module(f"sparsepack.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sparsepack' has no attribute {name!r}")
