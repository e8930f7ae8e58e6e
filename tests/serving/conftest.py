"""A tiny packed model that talks: thousands of positions, a chat template, and no end of a text."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import sparsellm
from sparsepack.loading import load
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.pruned import prune_tiny

CONTEXT = 8192
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = prune_tiny(tiny_llama(max_position_embeddings=CONTEXT, eos_token_id=None))
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    source = save_tiny(model, tokenizer, tmp_path_factory.mktemp("chat") / "dense")
    return sparsellm.pack(source, out=source.parent / "packed").path


@pytest.fixture(scope="session")
def model(packed: Path) -> PreTrainedModel:
    return load(packed)


@pytest.fixture(scope="session")
def greedy(model: PreTrainedModel) -> Callable[[str, int], str]:
    """The likeliest tokens after a prompt, by transformers' own ``generate``."""

    def text(prompt: str, tokens: int) -> str:
        ids = tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
        )  # type: ignore[operator]
        return str(
            tiny_tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        )

    return text
