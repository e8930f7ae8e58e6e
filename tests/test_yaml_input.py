"""YAML with limits: plain values only, and never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsellm.errors import DataError, RecipeError, SparseLLMError
from sparsellm.inputs.yaml_input import dump_yaml, parse_yaml, read_yaml


def test_plain_values_are_read() -> None:
    text = "a: 1e-3\nb: 2:4\nc: 2024-01-01\nd: 0x10\ne: yes\nf: ~\ng:\nh: -.5\ni: 0o17\nj: 010\nk: '1'\nl: [1., x]\n"
    assert parse_yaml(text, "r") == {
        "a": 0.001, "b": "2:4", "c": "2024-01-01", "d": 16, "e": True, "f": None, "g": None, "h": -0.5, "i": 15,
        "j": 10, "k": "1", "l": [1.0, "x"],
    }  # fmt: skip
    assert parse_yaml(b"\xef\xbb\xbfa: [1]", "r") == {"a": [1]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a: &a [*a]", "the alias *a is not read"),
        ("a: *b", "the alias *b is not read"),
        ("[" * 100_000, "nested deeper than 32"),
        ("- " * 1000 + "1", "nested deeper than 32"),
        ("a: " + "9" * 5000, "5000 characters"),
        ("a: 0x" + "f" * 5000, "5002 characters"),
        ("a: 0." + "1" * 5000, "5002 characters"),
        ("a: 1\na: 2", "occurs twice"),
        ("a: !!python/object/apply:os.getcwd []", "tag"),
        ("a: !!int ''", "tag"),
        ("!", "tag"),
        ('a: "\\ud800"', "surrogate"),
        ('a: "\\U00110000"', "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("? [1]\n: 2", "unhashable"),
        ("<<: 3", "merging"),
        ("a: 1\n---\nb: 1", "another document"),
        (b"\xff\xfea", "not UTF-8 (byte 0)"),
        ("x" * 300_000, "more than 256 KiB"),
    ],
)
def test_yaml_that_could_hurt_later_is_refused(data: bytes | str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_yaml(data, "the file", DataError)
    assert said in str(caught.value)
    assert str(caught.value).startswith("the file")
    assert str(caught.value).isprintable()


def test_a_device_without_an_end_is_read_to_the_limit_only() -> None:
    with pytest.raises(RecipeError, match="more than 256 KiB"):
        read_yaml(Path("/dev/zero"))


@given(st.one_of(st.binary(max_size=200), st.text(max_size=100), st.text("[]{}&*!:-?#|>'\"%@ \n\tab1.", max_size=60)))
def test_anything_is_a_value_or_one_line(data: bytes | str) -> None:
    said = ""
    try:
        parse_yaml(data, "r")
    except SparseLLMError as error:
        said = str(error)
    assert said.isprintable()


plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(allow_nan=False),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20),
        st.sampled_from(["2:4", "1e-3", "yes", "010", "1_000", "2024-01-01", "<<", "=", "~", "0o7", ".5", "a\nb"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
)  # fmt: skip


@given(plain)
def test_what_is_written_is_read_back(value: object) -> None:
    assert parse_yaml(dump_yaml(value), "r") == value
