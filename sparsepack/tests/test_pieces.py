"""Pieces of packed weights and joined ones against the same cut of the dense weight, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from by_hand import exponents_of, packed_of, sparse_weight, two_of_four
from sparsepack.errors import FormatError
from sparsepack.layout import PackedWeight, as_bitmask, pack, unpack
from sparsepack.pieces import columns_of, joined, rows_of, with_rows
from sparsepack.validation import validate

ROWS = 7
COLUMNS = 256
FORMS = [
    ("bf16", "bitmask"),
    ("fp32", "nm"),
    ("int8", "bitmask"),
    ("int8", "dense"),
    ("int6", "bitmask"),
    ("int5", "dense"),
    ("int4", "bitmask"),
    ("int4", "nm"),
    ("int3", "bitmask"),
    ("int3", "dense"),
]


def weight_of(values: str, layout: str, seed: int = 0) -> PackedWeight:
    weight = sparse_weight(ROWS, COLUMNS, 0.5, seed=seed)
    if layout == "nm":
        weight = two_of_four(weight)
    exponents = exponents_of(COLUMNS) if values in ("int8", "int4") else None
    packed = pack(weight, values, layout, exponents, group=64)
    assert packed is not None
    return as_bitmask(packed)


def dense(packed: PackedWeight) -> Tensor:
    """The dense weight of a piece, which a kernel may read."""
    validate(packed, "piece")
    assert all(tensor.is_contiguous() for tensor in packed.tensors.values())
    return unpack(packed, torch.float32)


@pytest.mark.parametrize(("values", "layout"), FORMS)
def test_rows_are_those_of_the_dense_weight(values: str, layout: str) -> None:
    packed = weight_of(values, layout)
    for first, last in ((0, 3), (3, 7), (1, 2), (0, 7)):
        piece = rows_of(packed, first, last)
        assert torch.equal(dense(piece), dense(packed)[first:last])


@pytest.mark.parametrize(("values", "layout"), FORMS)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_columns_are_those_of_the_dense_weight(
    values: str, layout: str, parts: int
) -> None:
    packed = weight_of(values, layout)
    pieces = [columns_of(packed, part, parts, "x") for part in range(parts)]
    assert torch.equal(torch.cat(list(map(dense, pieces)), dim=1), dense(packed))


def test_columns_that_do_not_divide_are_refused_by_name() -> None:
    packed = weight_of("int4", "bitmask")
    with pytest.raises(
        FormatError, match=r"layers\.3\.down_proj has 256 columns, which 3 ranks"
    ):
        columns_of(packed, 0, 3, "layers.3.down_proj")
    wide = pack(sparse_weight(ROWS, COLUMNS, 0.5), "int4", "bitmask", group=256)
    assert wide is not None
    with pytest.raises(FormatError, match="in multiples of 256; take fewer ranks"):
        columns_of(wide, 0, 2, "x")


@pytest.mark.parametrize(("values", "layout"), FORMS)
def test_weights_of_one_form_become_one(values: str, layout: str) -> None:
    weights = [weight_of(values, layout, seed) for seed in range(3)]
    (one,) = joined(weights)
    assert torch.equal(dense(one), torch.cat(list(map(dense, weights))))


def test_weights_of_other_forms_stay_apart() -> None:
    first = weight_of("int8", "bitmask")
    weight = sparse_weight(ROWS, COLUMNS, 0.5)
    others = [
        weight_of("int4", "bitmask"),
        weight_of("int8", "dense"),
        packed_of(weight, "int8"),  # it has no exponents
        weight_of("int6", "bitmask"),  # a scale for each group
    ]
    for other in others:
        assert joined([first, other]) == [first, other]
    assert len(joined([first, others[0], others[0], first])) == 3


@pytest.mark.parametrize(("values", "layout"), FORMS)
def test_rows_of_zeros_are_added(values: str, layout: str) -> None:
    packed = weight_of(values, layout)
    longer = dense(with_rows(packed, 9))
    assert torch.equal(longer[:ROWS], dense(packed))
    assert longer.shape == (9, COLUMNS)
    assert not longer[ROWS:].any()
