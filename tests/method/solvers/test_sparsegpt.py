"""SparseGPT against the column-by-column algorithm, written here anew, and the surgeon's closed form."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from extension import child
from sparsellm.method.gram import Gram
from sparsellm.method.solvers import SOLVERS
from sparsellm.patterns import NM, Pattern
from tests.method.solvers.problems import (
    best_on,
    column_by_column,
    gram_of,
    loss,
    weight_of,
)
from tests.shares import Share

sparsegpt = SOLVERS["sparsegpt"].function


@pytest.mark.parametrize(
    ("pattern", "panel"),
    [
        *itertools.product([Share(0.3), Share(0.7)], [1, 7, 20, 128]),
        (NM(2, 4), 4),
        (NM(3, 7), 7),
        (NM(5, 35), 35),
    ],
    ids=str,
)
def test_equals_column_by_column(
    pattern: Pattern, panel: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sparsellm.method.solvers.sparsegpt.PRUNED_TOGETHER", panel)
    weight, gram = weight_of(6, 140), gram_of(140)
    result = sparsegpt(weight, gram, pattern)
    expected = column_by_column(weight, gram, pattern, panel)
    assert torch.equal(result.weight != 0, expected != 0)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-3, atol=1e-4)


def by_the_kernel() -> None:
    """Called in a child: Triton's interpreter has to be chosen before Triton is imported."""
    from sparsellm.method.solvers import panels

    weight, gram = weight_of(33, 140), gram_of(140)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sparsellm.method.solvers.sparsegpt.kernels_for", lambda _: panels
        )
        tied = sparsegpt(torch.ones(2, 140), Gram(torch.eye(140), 140), NM(2, 4)).mask
        assert torch.equal(tied, (torch.arange(140) % 4 < 2).expand(2, -1))
        for pattern, panel in (
            (Share(0.7), 128),
            (NM(2, 4), 4),
            (NM(50, 140), 140),
        ):
            result, expected = (
                sparsegpt(weight, gram, pattern),
                column_by_column(weight, gram, pattern, panel),
            )
            assert torch.equal(result.mask, expected != 0)
            torch.testing.assert_close(
                result.weight.double(), expected, rtol=1e-3, atol=1e-4
            )


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
def test_the_kernel_equals_column_by_column() -> None:
    done = child(
        "from tests.method.solvers.test_sparsegpt import by_the_kernel; by_the_kernel()",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr


def test_one_pruned_weight_is_made_up_for_in_closed_form():
    """Pruning the first input of an output: the others take the values of the normal equation without it."""
    weight, gram = weight_of(1, 5), gram_of(5)
    weight[0, 0] = 1e-3  # so that it is the one to go
    result = sparsegpt(weight, gram, Share(0.2), damping=0.0)
    expected = best_on(torch.tensor([[False, True, True, True, True]]), weight, gram)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-4, atol=1e-6)
    inverse = torch.linalg.inv(gram.matrix.double())
    assert loss(result.weight, weight, gram) == pytest.approx(
        1e-6 / float(inverse[0, 0]), rel=1e-3
    )


def test_a_singular_gram_is_said_in_the_notes():
    gram = gram_of(40, tokens=5)
    assert (
        "damping raised from 0 to"
        in sparsegpt(weight_of(8, 40), gram, Share(0.5), damping=0.0).notes[0]
    )
    assert sparsegpt(weight_of(8, 40), gram, Share(0.5), damping=0.01).notes == ()
