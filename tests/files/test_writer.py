"""Shards of a checkpoint that is written in one go."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparsellm
from sparsellm.files import writer
from sparsellm.files.writer import joined
from tests.files.small import tensors_of
from tests.method.sweep.helpers import same_bits
from tests.models import save_tiny, tiny_llama
from tests.models.pruned import prune_tiny


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([], []),
        ([90], [[0]]),
        ([3, 3, 4, 1], [[0, 1, 2], [3]]),
        ([11, 1, 9, 11, 0], [[0], [1, 2], [3], [4]]),
        ([0, 0], [[0, 1]]),
    ],
)
def test_parts_join_up_to_a_size(
    sizes: list[int], parts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 10)
    assert joined(sizes) == parts


@pytest.mark.parametrize(("limit", "shards"), [(1 << 20, 1), (1, 4)])
def test_small_blocks_share_a_shard_and_large_ones_do_not(
    limit: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks, and what is outside of them; unpacked, each tensor is a part."""
    source = save_tiny(prune_tiny(tiny_llama()), None, tmp_path / "dense")
    monkeypatch.setattr(writer, "SHARD_BYTES", limit)
    packed = sparsellm.pack(source, out=tmp_path / "packed").path
    assert len(list(packed.glob("*.safetensors"))) == shards
    again = sparsellm.unpack(packed, out=tmp_path / "again").path
    assert same_bits(tensors_of(source), tensors_of(again))
    assert len(list(again.glob("*.safetensors"))) == (
        1 if shards == 1 else len(tensors_of(source))
    )
