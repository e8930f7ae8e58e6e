"""Entries of ``config.json`` and checksums of ``packed.json``, without a model."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch

from sparsellm.errors import StorageError
from sparsepack.checkpoint import PackedEntry, config_digest, manifest, packed_entries, quantization_config
from sparsepack.codes import VALUE_TYPES

ENTRIES = {
    f"layer {index}": PackedEntry((3, 8), layout, values, dtype, (2, 4) if layout == "nm" else None, transposed)
    for index, (layout, values, dtype, transposed) in enumerate(
        itertools.product(
            ("bitmask", "nm"),
            VALUE_TYPES,
            (torch.float64, torch.float32, torch.float16, torch.bfloat16),
            (False, True),
        )
    )
}


def test_entries_are_read_as_they_were_written() -> None:
    assert packed_entries(quantization_config(ENTRIES)) == ENTRIES


def test_stored_shape_is_that_of_the_dense_tensor() -> None:
    assert PackedEntry((3, 8), "bitmask", "bf16", torch.float32).stored_shape == (3, 8)
    assert PackedEntry((3, 8), "bitmask", "bf16", torch.float32, transposed=True).stored_shape == (8, 3)


@pytest.mark.parametrize("content", [None, [], "x", {}, {"shape": [3, 8]}, {"shape": [3, 8, 1], "layout": []}])
def test_what_is_no_entry_is_refused_with_its_name(content: object) -> None:
    with pytest.raises(StorageError, match="describes 'some layer' wrongly"):
        PackedEntry.from_dict("some layer", content)


def test_the_checksum_of_the_config_is_the_documented_one(tmp_path: Path) -> None:
    text = '{"format_version":1,"linears":{"\\u00e9":[1,2.5,true,null]},"quant_method":"sparsellm"}'
    content = {"quant_method": "sparsellm", "linears": {"é": [1, 2.5, True, None]}, "format_version": 1}
    assert config_digest(content) == hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "config.json").write_text('{"a": 1, "quantization_config": ' + text + "}", encoding="utf-8")
    (tmp_path / "a.safetensors").write_bytes(b"123")
    assert manifest(tmp_path) == {
        "format_version": 4,
        "sha256": {"a.safetensors": hashlib.sha256(b"123").hexdigest()},
        "quantization_config_sha256": config_digest(content),
    }
