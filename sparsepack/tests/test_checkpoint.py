"""Entries of ``config.json`` and checksums of ``packed.json``, without a model."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import product
from pathlib import Path

import pytest

from sparsepack.checkpoint import (
    PackedEntry,
    check_files,
    config_digest,
    manifest,
    packed_entries,
    quantization_config,
)
from sparsepack.codes import WRITTEN_TYPES
from sparsepack.errors import FormatError

CHOICES = product(
    ("bitmask", "nm"),
    WRITTEN_TYPES,
    ("float64", "float32", "float16", "bfloat16"),
    (False, True),
)


def test_entries_are_read_as_they_were_written() -> None:
    entries = {}
    for index, (layout, values, dtype, transposed) in enumerate(CHOICES):
        stored = {
            "layout": layout,
            "pattern": (2, 4) if layout == "nm" else None,
            "value_type": values,
        }
        entries[f"layer {index}"] = PackedEntry(
            shape=(3, 8), dtype=dtype, transposed=transposed, **stored
        )
    assert packed_entries(quantization_config(entries)) == entries
    assert {entry.stored_shape for entry in entries.values() if entry.transposed} == {
        (8, 3)
    }
    plain = {
        "shape": [3, 8],
        "layout": "bitmask",
        "value_type": "bf16",
        "dtype": "float64",
    }
    assert entries["layer 0"].to_dict() == plain


@pytest.mark.parametrize(
    "content",
    [None, [], "x", {}, {"shape": [3, 8]}, {"shape": [3, 8, 1], "layout": []}],
)
def test_a_malformed_entry_is_refused_with_its_name(content: object) -> None:
    with pytest.raises(FormatError, match="describes 'some layer' wrongly"):
        packed_entries({"format_version": 4, "linears": {"some layer": content}})


WHOLE = {
    "shape": [3, 8],
    "layout": "nm",
    "value_type": "bf16",
    "dtype": "float32",
    "pattern": [2, 4],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"more": 1}, "more is unknown"),
        ({"shape": [3, 0]}, "shape.1 is 0: it should be greater than or equal to 1"),
        ({"shape": [3, 8, 1]}, "shape is [3, 8, 1]: it should be two numbers"),
        ({"shape": [3, 2**31]}, "shape.1 is 2147483648"),
        ({"pattern": "24"}, "pattern is '24': it should be a valid list"),
        ({"layout": "csr"}, "layout is 'csr': it should be 'bitmask', 'nm' or 'dense'"),
        ({"value_type": ["int3"]}, "value_type is ['int3']: it should be 'bf16'"),
        ({"dtype": None}, "dtype is None: it should be 'float64'"),
        ({"transposed": 1}, "transposed is 1: it should be a valid boolean"),
    ],
)
def test_a_wrong_field_of_an_entry_is_named(
    change: dict[str, object], said: str
) -> None:
    with pytest.raises(FormatError, match=re.escape(f"wrongly: {said}")):
        packed_entries({"format_version": 4, "linears": {"x": WHOLE | change}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "sha256 is None: it should be a valid dictionary"),
        ({"sha256": {"a.safetensors": 5}}, "sha256.a.safetensors is 5"),
        ({"sha256": {"a.safetensors": "F" * 64}}, "64 hexadecimal digits"),
        (
            {"sha256": {}, "quantization_config_sha256": "0"},
            "quantization_config_sha256 is '0'",
        ),
    ],
)
def test_a_malformed_list_of_checksums_is_refused(
    content: dict[str, object], said: str, tmp_path: Path
) -> None:
    (tmp_path / "packed.json").write_text(json.dumps(content | {"format_version": 4}))
    with pytest.raises(FormatError, match="is not a list of checksums") as caught:
        check_files(tmp_path, [], quantization_config={})
    assert said in str(caught.value)


def test_the_checksum_of_the_config_is_the_documented_one(tmp_path: Path) -> None:
    text = '{"format_version":1,"linears":{"\\u00e9":[1,2.5,true,null]},"quant_method":"sparsellm"}'
    content = {
        "quant_method": "sparsellm",
        "linears": {"é": [1, 2.5, True, None]},
        "format_version": 1,
    }
    assert config_digest(content) == hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "config.json").write_text(
        '{"a": 1, "quantization_config": ' + text + "}", encoding="utf-8"
    )
    (tmp_path / "a.safetensors").write_bytes(b"123")
    assert manifest(tmp_path) == {
        "format_version": 5,
        "sha256": {"a.safetensors": hashlib.sha256(b"123").hexdigest()},
        "quantization_config_sha256": config_digest(content),
    }
