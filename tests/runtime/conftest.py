"""A tiny pruned Llama on disk, dense and packed; tests that change a file copy the directory first."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

import sparsellm
from sparsellm.files import writer
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.pruned import prune_tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        prune_tiny(tiny_llama()),
        tiny_tokenizer(),
        tmp_path_factory.mktemp("llama") / "dense",
    )


@pytest.fixture(scope="session")
def packed(llama: Path) -> Path:
    """With a shard for each block, as large models have."""
    with patch.object(writer, "SHARD_BYTES", 0):
        return sparsellm.pack(llama, out=llama.parent / "packed").path
