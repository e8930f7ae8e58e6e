"""N:M and the values of attention: a basis in which pruning costs less.

Attention averages values over tokens. So an orthogonal matrix R for each head of values can be put into v and taken out
of o, ``W_v → R W_v``, ``b_v → R b_v``, ``W_o → W_o Rᵀ``, and the model computes the same. R minimises the error that
removing weights causes, to second order (the optimal brain surgeon, arXiv 2301.00774, equation 3): the sum of
``w² / [(G + λI)⁻¹]_jj`` over the weights that the pattern would prune, in v and in o, each relative to the energy of
its outputs. ``R = (I + S)⁻¹ (I − S)`` for a skew-symmetric S is Cayley's map, and Adam changes S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.method.blocks.channels import Channels
from sparsellm.method.gram import Gram
from sparsellm.model import LinearView
from sparsellm.patterns import NM, Pattern

STEPS = 80
RATE = 0.02  # Adam's, for the entries of S
DAMPING = 0.01  # λ, as in sparsegpt


@torch.no_grad()
def rotate_channels(
    rotating: list[Channels], grams: Mapping[str, Gram], patterns: Mapping[str, Pattern]
) -> None:
    """Rotates channels by the Gram matrices of the inputs of their linears, by name. The first process chooses the
    rotations. Of the linears' ``patterns`` only those of N:M count."""
    fixed = {
        name: pattern for name, pattern in patterns.items() if isinstance(pattern, NM)
    }
    for channels in rotating:
        rotation = parallel.from_main(partial(best_rotation, channels, grams, fixed))
        channels.rotate(rotation.to(channels.inputs.device))


def best_rotation(
    channels: Channels, grams: Mapping[str, Gram], patterns: Mapping[str, NM]
) -> Tensor:
    """The matrices ``(heads, width, width)`` for channels of attention, on the CPU, so that any process can take them.
    Linears without a pattern stay dense."""
    cost = _cost(channels, grams, patterns)
    heads, width = channels.inputs.shape[1:]
    free = torch.zeros(
        heads, width, width, device=channels.inputs.device, requires_grad=True
    )
    adam = torch.optim.Adam([free], lr=RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            adam.zero_grad()
            cost(cayley(free)).backward()  # type: ignore[no-untyped-call]
            adam.step()
    return min(
        torch.eye(width, device=free.device).repeat(heads, 1, 1),
        cayley(free.detach()),
        key=cost,
    ).cpu()


def cayley(free: Tensor) -> Tensor:
    """Orthogonal matrices ``(..., width, width)`` from the entries below the diagonals of ``free``."""
    below = free.tril(-1)
    skew = below - below.mT
    identity = torch.eye(free.shape[-1], device=free.device)
    matrices: Tensor = torch.linalg.solve(identity + skew, identity - skew)
    return matrices


def _cost(
    channels: Channels, grams: Mapping[str, Gram], patterns: Mapping[str, NM]
) -> Callable[[Tensor], Tensor]:
    """A function that returns what pruning costs after a rotation; its formula is in the head of this file."""
    inverses = {name: gram.inverse(DAMPING).matrix for name, gram in grams.items()}

    def relative(linear: LinearView, rows: Tensor | slice = slice(None)) -> Tensor:
        # where q, k and v are one linear, only v is rotated
        weight = linear.weight()[rows]
        return weight.div_(
            math.sqrt(grams[linear.name].energy(weight.flatten(0, -2)) or 1.0)
        )

    reader = channels.reader
    places = channels.inputs  # (copies, heads, width)
    # (copies, heads, width, width)
    blocks = inverses[reader.name][places[..., :, None], places[..., None, :]]
    columns = relative(reader)[:, places]  # (out, copies, heads, width)
    sources = [(x, rows[0]) for x, rows in channels.sources if x.name in patterns]
    scaled = [
        (relative(x, rows) * inverses[x.name].diagonal().rsqrt(), patterns[x.name])
        for x, rows in sources
    ]

    def cost(rotation: Tensor) -> Tensor:
        pivots = torch.einsum("hkj,chji,hki->chk", rotation, blocks, rotation)
        total = _pruned(
            torch.einsum("ochj,hkj->ochk", columns, rotation).square() / pivots,
            channels.pattern,
        )
        for rows, pattern in scaled:  # (heads, width, in)
            total = total + _pruned((rotation @ rows).square(), pattern)
        return total

    return cost


def _pruned(errors: Tensor, pattern: NM) -> Tensor:
    """The sum of the errors of the weights that the pattern prunes, which are the smallest of each group."""
    return (
        errors
        * pattern.mask(errors.detach().flatten(0, -2)).logical_not_().view(errors.shape)
    ).sum()
