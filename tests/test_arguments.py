"""Arguments of the public functions: what is accepted, and one line for everything else, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import DataError, RecipeError, SparseLLMError, shown
from tests.models import VOCABULARY, tiny_llama

TEXT = "The quick brown fox jumps over the lazy dog. " * 12
FAST = {"method": "magnitude", "sparsity": 0.5, "samples": 2, "seq_len": 16}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=1)


def refused(call: Callable[[], Any], error: type[SparseLLMError], *said: str) -> None:
    with pytest.raises(SparseLLMError) as caught:
        call()
    assert isinstance(caught.value, error), repr(caught.value)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert str(caught.value).isprintable()


def numbers(model: Any, text: Any, **options: Any) -> tuple[Any, ...]:
    """The parts of an evaluation that depend on its arguments only."""
    measured = sparsellm.evaluate(model, text, **options)
    return measured.perplexity, measured.protocol.digest, measured.protocol.window


IDS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
ROWS = IDS.tolist()


KINDS = [
    IDS,
    IDS.int(),
    IDS.numpy(),
    IDS.numpy().astype(numpy.uint16),
    ROWS,
    tuple(map(tuple, ROWS)),
    list(IDS),
]
KINDS += [
    list(IDS.numpy()),
    {"input_ids": IDS, "attention_mask": IDS + 1},
    Dataset.from_dict({"input_ids": ROWS}),
]


@pytest.mark.parametrize("ids", KINDS, ids=lambda value: type(value).__name__)
def test_token_ids_of_every_kind_are_the_same_windows(
    ids: Any, llama: Path, model: PreTrainedModel
) -> None:
    assert numbers(llama, ids) == numbers(llama, IDS)
    result = sparsellm.prune(model, FAST, calibration=ids)
    assert (result.recipe.samples, result.recipe.seq_len) == (3, 12)
    assert result.recipe.calibration == "token ids given in Python"


def test_rows_with_text_are_documents(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one two three four"}\n{"text": "five six seven eight nine"}\n'
    )
    rows = [
        {"text": "one two three four", "id": 1},
        {"text": "five six seven eight nine"},
    ]
    for given in (rows, Dataset.from_list(rows)):
        assert numbers(llama, given, seq_len=8) == numbers(
            llama, tmp_path / "a.jsonl", seq_len=8
        )
    result = sparsellm.prune(llama, {**FAST, "seq_len": 8}, calibration=rows)
    assert result.recipe.calibration == "documents given in Python"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (5, "is 5"),
        (None, "is None"),
        ("", "is empty"),
        ("self", "for calibration only"),
        ("nowhere.txt", "does not exist"),
        ("a\0.txt", "text file 'a\\x00.txt'"),
        (Path("pydoc"), "does not exist"),
        (["a text", "another"], "not windows of ids"),
        ([1, 2, 3], "must be integers of shape (windows"),
        ([[-1, 2]], "the vocabulary has"),
        (
            {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]},
            "has padding (attention_mask is 0",
        ),
        ([{"input_ids": [1, 2], "attention_mask": [0, 1]}], "has padding"),
        (torch.ones(3), "2 or more"),
        (numpy.full((2, 4), 2**64 - 1, dtype=numpy.uint64), "the vocabulary has"),
        (({"text": "a"} for _ in range(3)), "is <generator"),
        ([{"body": "a"}], "row 0, has no field 'text'"),
        ([{"text": "a"}, "b"], "and no list 'messages': 'b'"),
        (torch.ones(2, 200, dtype=torch.int64), "128 positions"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_what_is_no_text_is_refused(
    text: Any, said: str, llama: Path, model: PreTrainedModel
) -> None:
    refused(lambda: sparsellm.evaluate(llama, text), DataError, said)
    if text is not None and said != "for calibration only":
        before = {name: value.clone() for name, value in model.state_dict().items()}
        again = ({"text": "a"} for _ in range(3)) if said == "is <generator" else text
        refused(
            lambda: sparsellm.prune(model, FAST, calibration=again), DataError, said
        )
        assert all(
            torch.equal(value, before[name])
            for name, value in model.state_dict().items()
        )


def test_ids_decide_the_window(llama: Path) -> None:
    refused(
        lambda: sparsellm.evaluate(llama, IDS, seq_len=16),
        DataError,
        "seq_len is 16",
        "12",
    )
    refused(
        lambda: sparsellm.evaluate(llama, IDS, max_tokens=11),
        DataError,
        "max_tokens is 11",
    )
    assert (
        sparsellm.evaluate(llama, IDS, seq_len=12, max_tokens=25).protocol.tokens
        == 2 * 11
    )


REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (sparsellm.prune, {"model": None}, "model is None: give a checkpoint directory"),
    (sparsellm.prune, {"model": "a\0b"}, "null byte"),
    (sparsellm.prune, {"recipe": 5}, "recipe is 5"),
    (sparsellm.prune, {"out": 5}, "out is 5: give a path"),
    (sparsellm.prune, {"progress": "x"}, "progress is 'x': it should be callable"),
    (sparsellm.prune, {"teacher": 3}, "teacher is 3"),
    (
        sparsellm.evaluate,
        {"seq_len": 1},
        "seq_len is 1: it should be greater than or equal to 2",
    ),
    (sparsellm.evaluate, {"device": ""}, "device is ''"),
    (
        sparsellm.evaluate,
        {"dtype": torch.int8},
        "dtype is 'int8': it should be 'auto', 'float32'",
    ),
    (sparsellm.evaluate, {"against": 4}, "against is 4"),
    (
        sparsellm.evaluate,
        {"tasks": ["a"], "tasks_dir": "/nowhere"},
        "tasks_dir is '/nowhere'",
    ),
    (sparsellm.inspect, {"model": tiny_llama()}, "give a checkpoint directory"),
    (sparsellm.unpack, {"directory": 5}, "directory is 5"),
]


@pytest.mark.parametrize(("call", "changes", "said"), REFUSED)
def test_a_bad_argument_is_refused(
    call: Any, changes: dict[str, Any], said: str, llama: Path, tmp_path: Path
) -> None:
    given: dict[Any, dict[str, Any]] = {
        sparsellm.prune: {"model": llama, "recipe": FAST, "out": tmp_path / "out"},
        sparsellm.evaluate: {"model": llama, "text": "pydoc"},
        sparsellm.pack: {"model": llama, "out": tmp_path / "out"},
        sparsellm.unpack: {"out": tmp_path / "out"},
    }
    refused(lambda: call(**{**given.get(call, {}), **changes}), RecipeError, said)
    assert not list(tmp_path.iterdir())


def test_types_of_torch_and_numpy_are_taken_by_name(llama: Path) -> None:
    plain = numbers(llama, IDS, device="cpu", dtype="float32")
    assert numbers(llama, IDS, device=torch.device("cpu"), dtype=torch.float32) == plain
    assert numbers(str(llama), IDS, seq_len=numpy.int64(12)) == plain


def test_a_recipe_is_taken_as_mapping_and_as_file(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(Recipe(**FAST).to_yaml())
    for recipe in (Recipe(**FAST), FAST, tmp_path / "r.yaml", str(tmp_path / "r.yaml")):
        used = sparsellm.prune(llama, recipe, calibration=IDS).recipe
        assert used == Recipe(
            **{**FAST, "samples": 3, "seq_len": 12, "calibration": used.calibration}
        )


def test_a_message_is_one_printable_line() -> None:
    assert str(SparseLLMError("a\nb\x1b[31m \udcff é")) == "a\\nb\\x1b[31m \\udcff é"
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert shown(deep) == "a list"
    assert shown(10**5000) == "an integer of 16610 bits"
    text = shown("/data/" + "x" * 5000 + "/corpus.txt")
    assert len(text) == 160
    assert text.startswith("'/data/xx")
    assert text.endswith("/corpus.txt'")


def test_fields_of_the_recipe_are_keywords(model: PreTrainedModel, llama: Path) -> None:
    base = Recipe(**{**FAST, "sparsity": 0.75})
    for recipe, fields in ((None, FAST), (base, {"sparsity": 0.5})):
        result = sparsellm.prune(llama, recipe, calibration="pydoc", **fields)
        assert result.sparsity_asked == 0.5
        assert result.recipe.samples == FAST["samples"]
        assert len(repr(result)) < 160
    few = sparsellm.plan(llama, samples=2, seq_len=16)
    assert few.tokens["prune"] < sparsellm.plan(llama, seq_len=16).tokens["prune"]
    refused(
        lambda: sparsellm.prune(llama, sparsty=0.5),
        RecipeError,
        "unknown recipe field 'sparsty'; did you mean 'sparsity'?",
    )
    refused(
        lambda: sparsellm.prune(llama, sparsity="50%"),
        RecipeError,
        "sparsity is '50%'; write 0.5",
    )
