"""JSON and YAML from outside, within limits: plain values, or one line that names the text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsellm.errors import RecipeError, SparseLLMError, StorageError
from sparsellm.inputs import (
    dump_yaml,
    parse_json,
    parse_yaml,
    read_object,
    read_yaml,
    without_folders,
)


def test_plain_values_are_read() -> None:
    text = "a: 1e-3\nb: 2:4\nc: 2024-01-01\nd: 0x10\ne: yes\nf: ~\ng:\nh: -.5\ni: 0o17\nj: 010\nk: '1'\nl: [1., x]\n"
    assert parse_yaml(text, "r") == {
        "a": 0.001, "b": "2:4", "c": "2024-01-01", "d": 16, "e": True, "f": None, "g": None, "h": -0.5, "i": 15,
        "j": 10, "k": "1", "l": [1.0, "x"],
    }  # fmt: skip
    assert parse_yaml(b"\xef\xbb\xbfa: [1]", "r") == {"a": [1]}


@pytest.mark.parametrize(
    ("parse", "data", "said"),
    [
        (parse_yaml, "a: &a [*a]", "the alias *a is not read"),
        (parse_yaml, "a: *b", "the alias *b is not read"),
        (parse_yaml, "[" * 100_000, "nested deeper than 32"),
        (parse_yaml, "a: " + "9" * 5000, "4300 digits"),
        (parse_yaml, "a: 1\na: 2", "occurs twice"),
        (parse_yaml, "a: !!python/object/apply:os.getcwd []", "tag"),
        (parse_yaml, "!", "tag"),
        (parse_yaml, 'a: "\\ud800"', "surrogate"),
        (parse_yaml, 'a: "\\U00110000"', "cannot be read"),
        (parse_yaml, "a: \0", "cannot be read"),
        (parse_yaml, "? [1]\n: 2", "unhashable"),
        (parse_yaml, "<<: 3", "merging"),
        (parse_yaml, "a: 1\n---\nb: 1", "another document"),
        (parse_yaml, b"\xff\xfea", "not UTF-8 (byte 0)"),
        (parse_yaml, "x" * 300_000, "more than 256 KiB"),
        (parse_json, b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (parse_json, b'{"a": }', "not valid JSON"),
        (parse_json, b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (parse_json, b"[" + b"9" * 5000 + b"]", "4300 digits"),
        (parse_json, b'{"text": "\\ud800"}', "surrogate"),
        (parse_json, b"", "not valid JSON"),
    ],
    ids=lambda value: None if callable(value) else value[:30],
)
def test_text_that_could_hurt_later_is_refused(
    parse: Any, data: bytes | str, said: str
) -> None:
    error = RecipeError if parse is parse_yaml else StorageError
    with pytest.raises(error, match=f"^the file .*{re.escape(said)}") as caught:
        parse(data, "the file")
    assert str(caught.value).isprintable()


def test_a_device_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path / "link"):
        if path.name == "pipe":
            os.mkfifo(path)
        if path.name == "link":
            path.symlink_to(tmp_path / "pipe")
        for read, error in ((read_yaml, RecipeError), (read_object, StorageError)):
            with pytest.raises(error, match="not an ordinary file"):
                read(path)
    reader, writer = os.pipe()  # as a shell makes it for <(command)
    os.write(writer, b"seed: 3")
    os.close(writer)
    assert read_yaml(Path(f"/dev/fd/{reader}")) == {"seed": 3}


@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100),
        st.text("[]{}&*!:-?#|>'\"%@ \n\tab1.", max_size=60),
    )
)
def test_anything_is_a_value_or_one_line(data: bytes | str) -> None:
    said = ""
    try:
        parse_yaml(data, "r")
    except SparseLLMError as error:
        said = str(error)
    assert said.isprintable()


numbers = st.integers(-(10**40), 10**40) | st.floats(
    allow_nan=False, allow_infinity=False
)
words = st.sampled_from(
    [
        "2:4",
        "1e-3",
        "yes",
        "010",
        "1_000",
        "2024-01-01",
        "<<",
        "=",
        "~",
        "0o7",
        ".5",
        "a\nb",
    ]
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.text(st.characters(codec="utf-8"), max_size=20)
    | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
)


@given(plain)
def test_what_is_written_is_read_back(value: object) -> None:
    assert parse_yaml(dump_yaml({"a": value, "b": 1}), "r") == {"a": value, "b": 1}


def test_json_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\\u00e9"]}', "x") == {
        "a": [1, 2.5, None, "é"]
    }
    huge = 1000000000000000019884624838656
    assert parse_json(f'{{"model_max_length": {huge}}}', "x") == {
        "model_max_length": huge
    }


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("pydoc", "pydoc"),
        ("/home/me/model/", "model"),
        ("../me/a b.txt", "a b.txt"),
        ("~/model", "model"),
        (r"C:\Users\me\model", "model"),
        ("file:/home/me/a.txt", "file:a.txt"),
        ("wikitext2:/home/me/w.parquet", "wikitext2:w.parquet"),
        ("--out=/home/me/out", "--out=out"),
        ("--set=calibration=file:/home/me/a.txt", "--set=calibration=file:a.txt"),
        (
            "--calibration=/home/me/a.txt:0.5, hub:o/n:c:2,~/b.txt:1",
            "--calibration=a.txt:0.5,hub:o/n:c:2,b.txt:1",
        ),
        ("owner/name", "owner/name"),
        ("hub:owner/name:config", "hub:owner/name:config"),
        ("folder/name", "name"),
        ("*.mlp.*", "*.mlp.*"),
    ],
)
def test_a_written_path_has_no_folder(
    given: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert without_folders(given) == left


def test_a_file_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        read_object(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(StorageError, match="not an object"):
        read_object(tmp_path / "list.json")
