"""Embedding and head in the types of llama.cpp: what is measured, what is chosen, and what is written."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import RecipeError
from sparsellm.method.allocation import HeadForm
from sparsellm.method.solvers.rounding import to_nearest
from sparsellm.model import Feed, open_chain
from sparsellm.model.heads import outer_matrices
from sparsellm.run import head_forms
from sparsellm.run.head_forms import HeadTable
from sparsepack.grid import codes_of
from sparsepack.grids import GRIDS
from tests.files.small import tensors_of
from tests.models import save_tiny, tiny_llama, tiny_tokenizer, windows

FIELDS: dict[str, Any] = {"effort": 0, "batch_tokens": 80, "program": "llama.cpp"}


def wide(*, tied: bool) -> PreTrainedModel:
    """A Llama whose inputs are multiples of 32."""
    return tiny_llama(hidden_size=64, intermediate_size=160, tie_word_embeddings=tied)


def divergence(dense: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    with torch.no_grad():
        goal = functional.log_softmax(dense(ids).logits.double(), -1)
        result = functional.log_softmax(other(ids).logits.double(), -1)
    return float((goal.exp() * (goal - result)).sum(-1).mean())


def squares_by_hand(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The mean squares behind the last norm."""
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
    return hidden.square().mean((0, 1))


@pytest.mark.parametrize("tied", [False, True])
def test_each_matrix_is_measured_alone_and_the_model_stays(tied: bool) -> None:
    model = wide(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chain = open_chain(model, device=torch.device("cpu"))
    judges = Feed(chain, windows(3, seed=2), 80)
    tables = head_forms.measure_heads(judges)
    assert all(torch.equal(before[x], y) for x, y in model.state_dict().items())
    assert len(tables) == (1 if tied else 2)
    squares = squares_by_hand(model, judges.windows)
    for table in tables:
        is_head = tied or "lm_head" in table.keys[0]
        ratios = []  # divergence / error: one number for all types
        assert table.divergences == sorted(table.divergences, reverse=True)
        assert table.bytes == sorted(table.bytes)
        for values, size, measured in zip(
            table.values, table.bytes, table.divergences, strict=True
        ):
            other = copy.deepcopy(model)
            module = other.get_output_embeddings()
            costs = squares
            if not is_head:
                module = other.get_input_embeddings()
                costs = torch.ones(64)
            weight = module.weight.detach().clone()
            rounded = to_nearest(weight, costs, values, torch.float32)
            rows = slice(None) if is_head else judges.windows.unique()
            error = (rounded - weight)[rows].square() @ costs
            ratios.append(measured / float(error.sum()))
            # the embedding of a tied model stays: its errors are small beside those of the head
            module.weight = torch.nn.Parameter(rounded)
            expected = divergence(model, other, judges.windows)
            # the worst type is run, with squares of four digits; others are in proportion to their errors
            rel = 0.02 if measured == max(table.divergences) else 0.35
            assert measured == pytest.approx(expected, rel=rel, abs=1e-7)
            assert size == math.ceil(
                GRIDS[values].bits_per_weight(64) * weight.numel() / 8
            )
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.02)


def test_a_head_has_no_type_below_four_bits_and_none_twice() -> None:
    chain = open_chain(wide(tied=False), device=torch.device("cpu"))
    embedding, head = outer_matrices(chain)
    assert (embedding.is_head, head.is_head) == (False, True)
    # 256 does not divide 64, so types with such blocks stand for others
    assert set(head_forms.types_of(head)) == {"q8_0", "q5_0", "iq4_nl"}
    wider = tiny_llama(hidden_size=256, intermediate_size=256)
    embedding, head = outer_matrices(open_chain(wider, device=torch.device("cpu")))
    assert {"q6_k", "q4_k", "iq4_xs"} <= set(head_forms.types_of(head))
    assert {"q3_k", "q2_k"} == {
        *set(head_forms.types_of(embedding)) - set(head_forms.types_of(head))
    }


def table(name: str, sizes: list[int], divergences: list[float]) -> HeadTable:
    values = ["iq4_nl", "q5_0", "q8_0"][: len(sizes)]
    return HeadTable(
        keys=(name,),
        squares=(1.0, 2.0),
        values=values,
        bytes=sizes,
        divergences=divergences,
        in_q4_k_m=0.3,
    )


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        # linears gain 0.1 nats a byte: all else must give way
        (30, ("iq4_nl", "iq4_nl", 10)),
        # they cannot be smaller than 5, and gain nothing above 20
        (100, ("q8_0", "q8_0", 60)),
    ],
)
def test_the_pair_with_the_least_sum_is_taken(
    room: int, expected: tuple[str, str, int]
) -> None:
    tables = [
        table("embedding", [10, 12, 20], [0.5, 0.2, 0.1]),
        table("head", [10, 12, 20], [0.5, 0.2, 0.1]),
    ]

    def linears(size: int) -> float:
        return math.inf if size < 5 else 10 * max(0.0, 20 - size)

    heads = head_forms.best_heads(tables, room, linears)
    forms = heads.forms
    assert (forms["embedding"].values, forms["head"].values, heads.room) == expected
    assert forms["head"].squares == [1.0, 2.0]
    alone = {"iq4_nl": 0.5, "q5_0": 0.2, "q8_0": 0.1}
    assert heads.divergence == sum(alone[form.values] for form in forms.values())
    assert heads.total == pytest.approx(heads.divergence + linears(heads.room))


@pytest.mark.parametrize("goal", [1.9, 0.9, 0.55, 0.31])
def test_the_smallest_file_with_a_divergence_is_found(goal: float) -> None:
    """All pairs of types are tried by hand; divergence of linears halves every ten bytes."""
    sizes = {"iq4_nl": 100, "q5_0": 120, "q8_0": 200}
    lost = {"iq4_nl": 0.5, "q5_0": 0.2, "q8_0": 0.1}
    tables = [
        table(name, [*sizes.values()], [*lost.values()])
        for name in ("embedding", "head")
    ]

    def linears(size: int) -> float:
        return math.inf if size < 50 else 2 ** (-(size - 50) / 10)

    files = []
    for embedding, head in itertools.product(sizes, sizes):
        allowed = goal - lost[embedding] - lost[head]
        if allowed > 0:
            file = (
                sizes[embedding] + sizes[head] + max(50, 50 - 10 * math.log2(allowed))
            )
            files.append(file)
    heads = head_forms.smallest_heads(tables, goal, 50, 250, linears)
    file = heads.room + sum(sizes[form.values] for form in heads.forms.values())
    assert min(files) <= file <= min(files) + 2
    assert heads.total <= goal


def test_what_linears_leave_goes_to_embedding_and_head() -> None:
    tables = [
        table("embedding", [10, 12, 20], [0.5, 0.2, 0.1]),
        table("head", [10, 12, 20], [0.5, 0.2, 0.1]),
    ]
    least = {name: HeadForm("iq4_nl", [1.0, 2.0]) for name in ("embedding", "head")}
    for rest, expected in (
        (1, ("iq4_nl", "iq4_nl")),
        (2, ("q5_0", "iq4_nl")),
        (9, ("q5_0", "q5_0")),
        (20, ("q8_0", "q8_0")),
    ):
        forms = head_forms.with_rest(least, tables, rest)
        assert (forms["embedding"].values, forms["head"].values) == expected


def test_divergences_between_sizes_are_interpolated_in_their_logarithm() -> None:
    between = head_forms.between_sizes([100, 300], [0.4, 0.1], least=50)
    assert between(200) == pytest.approx(0.2)
    assert between(60) == pytest.approx(0.4)
    assert between(49) == math.inf
    tables = [table("embedding", [10, 20], [0.5, 0.1])]
    assert head_forms.some_sizes(tables, 100, 30) == [80, 85, 90]
    assert head_forms.some_sizes(tables, 100, 95) == [90]


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_writes_them_on_their_grids(tied: bool, tmp_path: Path) -> None:
    model = wide(tied=tied)
    dense = save_tiny(model, tiny_tokenizer(), tmp_path / "dense")
    linears = sum(
        module.weight.numel()
        for module in model.model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    )
    outer = model.get_input_embeddings().weight.numel() * (1 if tied else 2)
    size = round((linears + outer) * 5.2 / 8)
    recipe = Recipe(**{**FIELDS, "size": size})
    result = sparsellm.prune(
        dense, recipe, calibration=windows(12), out=tmp_path / "pruned"
    )
    keys = {"model.embed_tokens.weight"} if tied else set(result.heads)
    assert set(result.heads) == keys
    assert len(keys) == (1 if tied else 2)
    written = tensors_of(tmp_path / "pruned")
    took = 0.0
    for key, values in result.heads.items():
        weight = written[key]
        codes_of(weight, GRIDS[values], key)  # raises where it is on no grid
        assert not torch.equal(weight, tensors_of(dense)[key])
        took += GRIDS[values].bits_per_weight(64) * weight.numel() / 8
    assert result.bits_per_weight is not None
    took += result.bits_per_weight * linears / 8
    assert 0.93 * size < took <= size
    assert result.allocation["heads"] == result.heads


def test_the_smallest_size_has_types_of_embedding_and_head_too(tmp_path: Path) -> None:
    dense = save_tiny(wide(tied=False), tiny_tokenizer(), tmp_path / "dense")
    heads: dict[float, dict[str, str]] = {}
    for nats in (3e-2, 3e-4):
        recipe = Recipe(**FIELDS, divergence=nats)
        result = sparsellm.prune(
            dense, recipe, calibration=windows(12), out=tmp_path / f"{nats}"
        )
        heads[nats] = result.heads
    assert set(heads[3e-2]) == {"model.embed_tokens.weight", "lm_head.weight"}
    bits = {
        nats: sum(GRIDS[values].bits_per_weight(64) for values in by_key.values())
        for nats, by_key in heads.items()
    }
    assert bits[3e-2] < bits[3e-4]


def test_a_size_that_is_impossible_or_of_a_model_in_memory_is_refused(
    tmp_path: Path,
) -> None:
    model = wide(tied=False)
    with pytest.raises(RecipeError, match="give the model by its directory"):
        sparsellm.prune(model, Recipe(**FIELDS, size=10**6), calibration=windows(12))
    dense = save_tiny(model, tiny_tokenizer(), tmp_path / "dense")
    with pytest.raises(RecipeError, match=r"size 100 is too few bytes .* at least \d+"):
        sparsellm.prune(
            dense,
            Recipe(**FIELDS, size=100),
            calibration=windows(12),
            out=tmp_path / "out",
        )
    # 34 bytes for 32 weights
    matrices = sum(x.numel() for x in model.parameters() if x.ndim == 2)
    most = matrices * 34 // 32
    said = f"size {2 * most} is too large .* at most {most} bytes are possible"
    with pytest.raises(RecipeError, match=said):
        sparsellm.prune(
            dense,
            Recipe(**FIELDS, size=2 * most),
            calibration=windows(12),
            out=tmp_path / "out",
        )
