"""What an optimiser steps on, and what is held out to judge it by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsellm.chain import open_chain
from sparsellm.chain.streams import Feed
from sparsellm.sweep.training import adam_step, held_out_of
from tests.models import tiny_opt
from tests.sweep.helpers import CPU, ids_of


def test_pieces_are_whole_windows_that_cover_each_batch_once() -> None:
    chain = open_chain(tiny_opt(), device=CPU)
    stream = Feed(chain, ids_of(100, seq=32), 3200).stream(pieces=2048)
    assert [(piece.batch, piece.rows) for piece in stream.pieces] == [(0, slice(0, 64)), (0, slice(64, 128))]
    stream = Feed(chain, ids_of(5), 48).stream(pieces=2048)
    assert [(piece.batch, piece.rows) for piece in stream.pieces] == [(i, slice(0, 85)) for i in range(3)]
    assert all(len(piece.calls) == len(chain) for piece in stream.pieces)


@pytest.mark.parametrize(
    ("count", "held"),
    [(3, []), (4, [2]), (8, [4]), (16, [4, 12]), (200, [12, 37, 62, 87, 112, 137, 162, 187])],
)
def test_what_is_held_out(count: int, held: list[int]) -> None:
    train, judges = held_out_of(list(range(count)))
    assert train == [i for i in range(count) if i not in held]
    assert judges == (held or list(range(count)))


@pytest.mark.parametrize(("rate", "step"), [(1e-4, 5e-4), (7e-4, 1e-3)])
def test_factors_take_longer_steps(rate: float, step: float) -> None:
    """Adam's first step is the rate against the gradient's sign, here relative to a root mean square of 1."""
    parameters = {name: nn.Parameter(torch.ones(4)) for name in ("w", "w.factors")}
    for parameter in parameters.values():
        parameter.grad = torch.tensor([3.0, -0.1, 1e-3, 2.0])
    adam_step(parameters, torch.zeros(2, 8), rate, 1, factors={"w.factors"})
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert torch.allclose(1 - parameters["w"].detach(), rate * signs, rtol=1e-3)
    assert torch.allclose(1 - parameters["w.factors"].detach(), step * signs, rtol=1e-3)
