"""A damaged weight is found wherever it stands, in every dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsellm.errors import NumericalError
from sparsellm.storage import reader
from sparsellm.storage.reader import CheckpointReader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_found_and_named(
    dtype: torch.dtype, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_PIECE", 16)
    tensors = {name: torch.randn(5, 9).to(dtype) for name in ("a", "b")}
    tensors["empty"], tensors["counts"] = torch.empty(0, 3, dtype=dtype), torch.arange(4)
    save_file(tensors, tmp_path / "model.safetensors")
    CheckpointReader(tmp_path).digests()
    for position in ((0, 0), (3, 4), (4, 8)):
        broken = {**tensors, "b": tensors["b"].clone()}
        broken["b"][position] = value
        broken["b"][2, 2] = value
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(NumericalError, match=r"weight b in .* has 2 NaN or infinite values"):
            CheckpointReader(tmp_path).digests()
