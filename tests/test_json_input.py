"""JSON with limits: a value, or one line that names the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsellm.errors import DataError, StorageError
from sparsellm.inputs.json_input import parse_json, read_object


def test_json_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\\u00e9"]}', "x") == {"a": [1, 2.5, None, "é"]}
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}', "x") == {
        "model_max_length": 1000000000000000019884624838656
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"a": }', "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "integer of 5000 digits"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_could_hurt_later_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        parse_json(data, "calibration.jsonl, line 3", DataError)
    assert str(caught.value).startswith("calibration.jsonl, line 3")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        read_object(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(StorageError, match="not an object"):
        read_object(tmp_path / "list.json")
