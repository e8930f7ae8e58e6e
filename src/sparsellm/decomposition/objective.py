"""The penalty objective of one feed-forward unit, and its coefficients.

    two-layer   α‖Z − m‖² + γ‖A − φ(Z)‖² + β‖Y − (A W₂ᵀ + b₂)‖²
    gated       α‖U − m_u‖² + α_gate‖S − m_s‖² + γ‖A − φ(S)∘U‖² + β‖Y − (A W_dᵀ + b_d)‖²

with m = X Wᵀ + b of the linear in question (SparseLLM, arXiv 2402.17946, eq. 4 and section 3.4). Sums run over tokens
and features, each token's squares times its weight, in fp64; divide by the tokens for a mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparsellm.decomposition.feed_forward import FeedForward, Linear


@dataclass(frozen=True)
class Coefficients:
    """The prices of the penalties: α of what ``up`` makes, α_gate of what ``gate`` makes, β of the output, γ of φ."""

    alpha: float
    beta: float
    gamma: float
    alpha_gate: float = 0.0


@dataclass(frozen=True)
class Terms:
    """The objective, term by term, each with its coefficient in it. Terms of chunks add up."""

    up: float = 0.0
    gate: float = 0.0
    activation: float = 0.0
    output: float = 0.0

    @property
    def total(self) -> float:
        return self.up + self.gate + self.activation + self.output

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Variables:
    """Auxiliary variables of a chunk: ``up`` is Z (U in a gated unit), ``gate`` is S; (tokens, f) each."""

    up: Tensor
    gate: Tensor | None = None

    def made(self, unit: FeedForward) -> Tensor:
        """Φ: φ(Z), or φ(S)∘U; (tokens, f)."""
        return unit.activation(self.up) if self.gate is None else unit.activation(self.gate) * self.up


def squares(difference: Tensor, token_weights: Tensor | None = None) -> float:
    """Σ_t w_t ‖difference_t‖² of a (tokens, features) tensor, accumulated in fp64 over tokens."""
    per_token = difference.square().sum(dim=1).double()  # (tokens,)
    if token_weights is not None:
        per_token = per_token * token_weights.to(per_token)
    return float(per_token.sum())


def chunk_terms(
    unit: FeedForward,
    x: Tensor,
    y: Tensor,
    variables: Variables,
    a: Tensor,
    coefficients: Coefficients,
    token_weights: Tensor | None = None,
) -> Terms:
    """Terms of one chunk: x (tokens, d), y (tokens, d_out), a (tokens, f)."""

    def misfit(linear: Linear | None, value: Tensor | None) -> float:
        return 0.0 if linear is None or value is None else squares(value - linear(x), token_weights)

    return Terms(
        up=coefficients.alpha * misfit(unit.up, variables.up),
        gate=coefficients.alpha_gate * misfit(unit.gate, variables.gate),
        activation=coefficients.gamma * squares(a - variables.made(unit), token_weights),
        output=coefficients.beta * squares(y - unit.down(a), token_weights),
    )


def objective(
    unit: FeedForward,
    chunks: Iterable[tuple[Tensor, Tensor, Variables, Tensor, Tensor | None]],
    coefficients: Coefficients,
) -> Terms:
    """Terms summed over a stream of chunks (x, y, variables, a, token weights or None)."""
    total = Terms()
    for x, y, variables, a, token_weights in chunks:
        total = total + chunk_terms(unit, x, y, variables, a, coefficients, token_weights)
    return total


def output_prices(down: Linear, y: Tensor) -> tuple[float, float]:
    """β, which makes the output term the relative error, and β times the mean squared column norm of ``down``: what a
    unit change of one of its inputs costs there. y (tokens, d_out)."""
    tiny = torch.finfo(torch.float32).tiny
    beta = 1 / max(squares(y) / len(y), tiny)
    column = float(down.weight.double().square().sum()) / down.weight.shape[1]
    return beta, max(beta * column, tiny)


def default_coefficients(
    unit: FeedForward, x: Tensor, y: Tensor, *, producer: float = 3.0, coupling: float = 3.0
) -> Coefficients:
    """Coefficients that make every term speak of the same thing: error at the output of the unit.

    A change δ in one entry of A changes the squared output error by about δ² c, where c is the mean squared column norm
    of W₂ (d_out, f); a change in Z by δ² φ'(Z)² c, in U by δ² φ(S)² c, in S by δ² (φ'(S) U)² c. So with β = 1/mean‖y‖²
    (the output term is then the relative error, tokens times over):

        γ = coupling · β c,   α = producer · β c · E[slope²],   slope = the factor of δ above, measured on the chunk.

    Scaling the inputs, the targets, or a layer's weights against its neighbour's leaves the minimiser as it was, which
    fixed numbers do not; ``producer`` and ``coupling`` are pure numbers, the same for every model.

    Args:
        x: (tokens, d), y: (tokens, d_out): one chunk is enough.
    """
    beta, price = output_prices(unit.down, y)
    z = unit.up(x)
    if unit.gate is None:
        slope, gate_slope = unit.activation.derivatives(z)[1], None
    else:
        slope, first, _ = unit.activation.derivatives(unit.gate(x))
        gate_slope = first * z

    def mean_square(value: Tensor) -> float:
        # the median over tokens of the mean over features: one massive activation must not set the price for all
        return max(float(value.square().mean(dim=1).median()), 1e-20)

    return Coefficients(
        alpha=producer * price * mean_square(slope),
        beta=beta,
        gamma=coupling * price,
        alpha_gate=0.0 if gate_slope is None else producer * price * mean_square(gate_slope),
    )
