"""The penalty objective of one feed-forward unit, its data, and its coefficients.

    two-layer   α‖Z − m‖² + γ‖A − φ(Z)‖² + β‖Y − (A W₂ᵀ + b₂)‖²
    gated       α‖U − m_u‖² + α‖S − m_s‖² + γ‖A − φ(S)∘U‖² + β‖Y − (A W_dᵀ + b_d)‖²

with m = X Wᵀ + b of the respective linear (SparseLLM, arXiv 2402.17946, eq. 4 and section 3.4). Tokens are rows. Sums
over features are in fp32, those over tokens in fp64; each token's squares are multiplied by its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsellm.model.units import Activation, FeedForwardUnit
from sparsellm.text.windows import spread_evenly

# Penalties as multiples of what a change costs the unit's output. On two units of a real model at 70 % sparsity, values
# from 1 to 10 of each changed the error by at most 6 %.
PRODUCER = 3.0
COUPLING = 3.0
HELD_OUT = 0.125  # fraction of the tokens that choose the iteration


@dataclass(frozen=True)
class Linear:
    """``y = x weightᵀ + bias``: weight (out, in), bias (out,) or None, both fp32."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class FeedForward(FeedForwardUnit[Linear]):
    """A unit that is computed from its weights alone."""

    def products(self, x: Tensor) -> Variables:
        """The outputs m of the first half's linears on x (tokens, d), one for each variable."""
        if self.gate is None:
            return Variables(self.up(x))
        return Variables(self.up(x), self.gate(x))

    def activations(self, x: Tensor) -> Tensor:
        """The input of ``down``, (tokens, f), for x (tokens, d)."""
        return self.products(x).activated(self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the unit, (tokens, d_out), for x (tokens, d)."""
        return self.down(self.activations(x))


class Variables(NamedTuple):
    """Auxiliary variables of a chunk: ``up`` is Z (U in a gated unit), ``gate`` is S; (tokens, f) each."""

    up: Tensor
    gate: Tensor | None = None

    def activated(self, activation: Activation) -> Tensor:
        """Φ: φ(Z), or φ(S)∘U; (tokens, f)."""
        if self.gate is None:
            return activation(self.up)
        return activation(self.gate) * self.up


class Chunk(NamedTuple):
    """A chunk of tokens: inputs (tokens, d), target outputs (tokens, d_out), weights of tokens (tokens,) or None."""

    inputs: Tensor
    targets: Tensor
    token_weights: Tensor | None = None


Chunks = Sequence[Callable[[], Chunk]]
"""Functions that each read a chunk, possibly from disk."""


def stored(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
) -> Chunks:
    """Chunks of sequences of inputs (tokens, d), targets (tokens, d_out) and token weights (tokens,)."""

    def read(place: int) -> Chunk:
        chunk = Chunk(inputs[place].float(), targets[place].float())
        if weights is None:
            return chunk
        return chunk._replace(token_weights=weights[place])

    return [partial(read, place) for place in range(len(inputs))]


def split(chunks: Chunks) -> tuple[Chunks, Chunks]:
    """The chunks to train on, and those held out: spread evenly, since neighbours are similar. Of a single chunk the
    last tokens are held out."""
    if len(chunks) == 1:
        x, y, weights = chunks[0]()
        held = round(len(x) * HELD_OUT)
        if not held:
            return chunks, []
        sizes = [len(x) - held, held]
        parts = None
        if weights is not None:
            parts = weights.split(sizes)
        halves = stored(x.split(sizes), y.split(sizes), parts)
        return halves[:1], halves[1:]
    chosen = spread_evenly(max(round(len(chunks) * HELD_OUT), 1), len(chunks))
    train = [chunk for place, chunk in enumerate(chunks) if place not in chosen]
    return train, [chunks[place] for place in sorted(chosen)]


class Coefficients(NamedTuple):
    """The coefficients of the penalties: α for the variables, β for the output, γ for φ."""

    alpha: float
    beta: float
    gamma: float


def squares(difference: Tensor, token_weights: Tensor | None = None) -> float:
    """Σ_t w_t ‖difference_t‖² of a (tokens, features) tensor, accumulated in fp64 over tokens."""
    per_token = difference.square().sum(dim=1).double()  # (tokens,)
    if token_weights is not None:
        per_token = per_token * token_weights
    return float(per_token.sum())


def objective(
    unit: FeedForward,
    chunk: Chunk,
    variables: Variables,
    a: Tensor,
    coefficients: Coefficients,
) -> float:
    """The objective of one chunk, with its activations a (tokens, f). That of all tokens is the sum over the chunks."""
    pairs = zip(variables, unit.products(chunk.inputs), strict=True)
    misfits = sum(
        squares(value - m, chunk.token_weights)
        for value, m in pairs
        if value is not None and m is not None
    )
    coupling = squares(a - variables.activated(unit.activation), chunk.token_weights)
    missed = squares(chunk.targets - unit.down(a), chunk.token_weights)
    return (
        coefficients.alpha * misfits
        + coefficients.gamma * coupling
        + coefficients.beta * missed
    )


def default_coefficients(unit: FeedForward, x: Tensor, y: Tensor) -> Coefficients:
    """Coefficients that express every term in the same unit, the error at the output of a two-layer unit.

    A change δ in one entry of A changes the squared output error by about δ² c, where c is the mean squared column norm
    of W₂ (d_out, f); a change in Z by δ² φ'(Z)² c. So with β = 1/mean‖y‖² (the output term is then the relative error
    times the number of tokens):

        γ = COUPLING · β c,   α = PRODUCER · β c · E[φ'(Z)²], measured on x (tokens, d) and y (tokens, d_out).

    The minimiser then does not change if inputs, targets, or a layer's weights against its neighbour's are scaled."""
    tiny = torch.finfo(torch.float32).tiny
    beta = 1 / max(squares(y) / len(y), tiny)
    column = float(unit.down.weight.double().square().sum()) / unit.down.weight.shape[1]
    price = max(beta * column, tiny)
    slope = unit.activation.derivatives(unit.up(x))[1]
    # The median over tokens of the mean over features, so that one massive activation does not set the coefficient.
    mean_square = max(float(slope.square().mean(dim=1).median()), 1e-20)
    return Coefficients(
        alpha=PRODUCER * price * mean_square, beta=beta, gamma=COUPLING * price
    )


def true_error(unit: FeedForward, chunks: Chunks) -> float:
    """‖Y − FFN(X)‖² / ‖Y‖² over all tokens of the chunks, token-weighted; not finite where a value is not."""
    missed = total = 0.0
    for read in chunks:
        chunk = read()
        missed += squares(chunk.targets - unit(chunk.inputs), chunk.token_weights)
        total += squares(chunk.targets, chunk.token_weights)
    if total:
        return missed / total
    return missed
