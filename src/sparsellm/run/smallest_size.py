"""The smallest size whose divergence from the dense model is at most a goal.

The goal is a number of nats, or the divergence of llama.cpp's mixture Q4_K_M. Both are measured by one quick pass, that
in which candidates of one size are compared. The weights of Q4_K_M are rounded to nearest there, as llama.cpp stores
them: nothing makes up for its errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from sparsellm.method.allocation import LinearSize
from sparsellm.method.allocation.forms import Form

Q4_K_M: Final = "Q4_K_M"
# llama.cpp gives these kinds six bits in some blocks
SIX_BITS = frozenset(
    {
        *("v_proj", "value"),
        *("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2"),
    }
)
ROUNDS = 3  # passes over the windows
SIZES = 4  # between a size that is too small and one that is not, in each pass


def q4_k_m(sizes: Sequence[LinearSize]) -> dict[str, Form]:
    """The form of each linear in Q4_K_M, by name: q6_k for values and the last linear of a feed-forward unit in the
    first and last eighth of the blocks and in every third between (``use_more_bits`` of llama.cpp), else q4_k."""
    blocks = max(size.block for size in sizes) + 1
    eighth = blocks // 8
    forms = {}
    for size in sizes:
        ends = size.block < eighth or size.block >= 7 * blocks // 8
        more = ends or (size.block - eighth) % 3 == 2
        kind = size.name.rpartition(".")[2]
        six = more and kind in SIX_BITS
        forms[size.name] = Form("q6_k" if six else "q4_k")
    return forms


def smallest(
    low: float,
    high: float,
    goal: float,
    divergences_at: Callable[[Sequence[float]], Sequence[float]],
) -> float:
    """The smallest number of bits whose divergence is at most ``goal``, to a part of 125 of the way from ``low`` to
    ``high``, where it is known to be at most that. ``divergences_at`` measures several numbers of bits, ascending."""
    for _ in range(ROUNDS):
        step = (high - low) / (SIZES + 1)
        between = [low + step * number for number in range(1, SIZES + 1)]
        found = divergences_at(between)
        for bits, divergence in zip(between, found, strict=True):
            if divergence <= goal:
                high = bits
                break
            low = bits
    return high
