"""What is written piece by piece against the format's own library, and what is read: converted, and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsellm.errors import NumericalError
from sparsellm.files import reader, writer
from sparsellm.files.reader import CheckpointReader, memory_of
from sparsellm.files.writer import TensorSource, write_shard


def tensors() -> dict[str, Tensor]:
    wide = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    made = {
        "b.wide": wide,
        "a.transposed": wide.T,
        "c.half": wide.to(torch.bfloat16),
        "d.scalar": torch.tensor(2.5),
    }
    made |= {
        "e.mask": torch.tensor([True, False, True]),
        "f.counts": torch.arange(4),
        "g.empty": torch.empty(0, 3),
    }
    return made | {
        "h.byte": torch.arange(5, dtype=torch.uint8),
        "i.float8": wide.to(torch.float8_e4m3fn),
    }


def written(path: Path, sources: Mapping[str, TensorSource | Tensor]) -> str:
    with path.open("wb", buffering=0) as file:
        return write_shard(file, sources)


@pytest.mark.parametrize("piece", [3, 1 << 22])
def test_a_shard_is_what_the_library_reads(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PIECE", piece)
    path = tmp_path / "model.safetensors"
    assert written(path, tensors()) == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded, ours = load_file(path), CheckpointReader(tmp_path)
    assert loaded.keys() == tensors().keys() == {*ours}
    for name, value in tensors().items():
        assert loaded[name].dtype == value.dtype == ours.get(name).dtype
        assert loaded[name].shape == value.shape == ours.get(name).shape
        assert (
            memory_of(loaded[name]) == memory_of(value) == memory_of(ours.get(name))
        ), name
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert (8 + len(header)) % 8 == 0
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            # readers map it as it lies
            assert entry["data_offsets"][0] % tensors()[name].element_size() == 0
    assert torch.equal(
        ours.get("c.half", dtype=torch.float32), tensors()["c.half"].float()
    )
    assert ours.get("f.counts", dtype=torch.float32).dtype is torch.int64


def test_it_is_converted_on_the_way_and_no_zero_is_negative(tmp_path: Path) -> None:
    value = torch.tensor([-0.0, 1.00390625, -3.0])
    written(
        tmp_path / "model.safetensors",
        {"w": TensorSource(torch.bfloat16, value.shape, value.detach)},
    )
    read = CheckpointReader(tmp_path).get("w")
    assert torch.equal(read, value.to(torch.bfloat16))
    assert not bool(torch.signbit(read)[0])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_named(
    dtype: torch.dtype, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PIECE", 16)
    sound = {name: torch.randn(5, 9).to(dtype) for name in ("a", "b")}
    sound |= {"empty": torch.empty(0, 3, dtype=dtype), "counts": torch.arange(4)}
    save_file(sound, tmp_path / "model.safetensors")
    CheckpointReader(tmp_path).digests()
    for position in ((0, 0), (3, 4), (4, 8)):
        broken = {**sound, "b": sound["b"].clone()}
        broken["b"][position] = broken["b"][2, 2] = value
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(
            NumericalError, match=r"weight b in .* has 2 NaN or infinite values"
        ):
            CheckpointReader(tmp_path).digests()


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """Its one tensor is a hole in the file: 1 TiB that takes no room."""
    size = 1 << 40
    header = json.dumps(
        {"hole": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    ).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert CheckpointReader(tmp_path).bytes == size
