"""What is written piece by piece against the format's own library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsellm.storage import writer
from sparsellm.storage.reader import CheckpointReader, memory_of
from sparsellm.storage.writer import TensorSource, write_shard


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 5, generator=generator)
    return {
        "b.wide": wide,
        "a.transposed": wide.T,
        "c.half": wide.to(torch.bfloat16),
        "d.scalar": torch.tensor(2.5),
        "e.mask": torch.tensor([True, False, True]),
        "f.counts": torch.arange(4),
        "g.empty": torch.empty(0, 3),
        "h.byte": torch.arange(5, dtype=torch.uint8),
        "i.float8": wide.to(torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("piece", [3, 1 << 22])
def test_a_shard_is_what_the_library_reads_and_its_digest_is_the_file_s(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PIECE", piece)
    path = tmp_path / "model.safetensors"
    with path.open("wb", buffering=0) as file:
        digest = write_shard(file, {name: TensorSource.of(value) for name, value in tensors().items()})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert memory_of(found[name]) == memory_of(value), name
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert (8 + len(header)) % 8 == 0
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors()[name].element_size() == 0  # readers map it as it lies


def test_it_is_converted_on_the_way_and_no_zero_is_negative(tmp_path: Path) -> None:
    value = torch.tensor([-0.0, 1.00390625, -3.0])
    with (tmp_path / "model.safetensors").open("wb", buffering=0) as file:
        write_shard(file, {"w": TensorSource.of(value, torch.bfloat16)})
    found = CheckpointReader(tmp_path).get("w")
    assert torch.equal(found, value.to(torch.bfloat16))
    assert not bool(torch.signbit(found)[0])


def test_reading_converts_floating_point_and_leaves_integers(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb", buffering=0) as file:
        write_shard(file, {name: TensorSource.of(value) for name, value in tensors().items()})
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.get("c.half", dtype=torch.float32), tensors()["c.half"].float())
    assert reader.get("f.counts", dtype=torch.float32).dtype is torch.int64
