"""Auxiliary variables of attention: the values V, and A, what attention makes of them for its last linear.

With queries and keys as they are, attention is a linear map ``𝒫`` of the values: it mixes tokens by its pattern. So

    α‖V − (X W_vᵀ + b_v)‖² + γ‖A − 𝒫V‖² + β‖Y − (A W_oᵀ + b_o)‖²

is the objective of a feed-forward unit with ``𝒫`` in the place of φ. The update of A is that unit's
(``updates.update_activation`` with ``Φ = 𝒫V``); weights are fitted as everywhere (``weights``). The one of V is not
separable by token, and stands here. ``𝒫`` is only ever applied, forwards or as its adjoint: no pattern is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsellm.decomposition.feed_forward import Linear
from sparsellm.decomposition.objective import Coefficients, Terms, output_prices, squares

Map = Callable[[Tensor], Tensor]


class Moved(NamedTuple):
    values: Tensor  # V (windows, seq, f_v)
    mixed: Tensor  # 𝒫V (windows, seq, f_a)


def update_values(
    m: Tensor,
    a: Tensor,
    start: Moved,
    mix: Map,
    adjoint: Map,
    *,
    alpha: float,
    gamma: float,
    token_weights: Tensor | None = None,
    steps: int = 8,
) -> Moved:
    """V = argmin Σ_t ω_t (α‖V_t − m_t‖² + γ‖A_t − (𝒫V)_t‖²), by conjugate gradients, each window by itself.

    ``seq · f_v`` steps reach the minimiser, but the first ones come near it: the objective falls with each, and of a
    pattern few eigenvalues are large (tokens that all others look at). No window ends worse than it started.

    Args:
        m: (windows, seq, f_v), what the weights make of the values.
        a: (windows, seq, f_a), A.
        start: V and 𝒫V to begin with.
        mix: V → 𝒫V, linear, window by window.
        adjoint: its transpose, (windows, seq, f_a) → (windows, seq, f_v).
        token_weights: ω (windows, seq), or None for equal ones. A window whose weights are all zero stays as it is.
    """
    weights = m.new_ones(m.shape[:2]) if token_weights is None else token_weights.to(m)
    weights = weights[..., None]  # (windows, seq, 1)

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(dim=-1).double().sum(dim=-1)[:, None, None]  # (windows, 1, 1)

    def value(values: Tensor, mixed: Tensor) -> Tensor:
        apart, missed = values - m, mixed - a
        return alpha * dot(apart, apart * weights) + gamma * dot(missed, missed * weights)

    values, mixed = start
    residual = (m - values).mul_(weights).mul_(alpha).add_(adjoint((a - mixed).mul_(weights)), alpha=gamma)
    direction, square = residual, dot(residual, residual)
    for _ in range(steps):
        image = mix(direction)  # 𝒫d
        curved = (direction * weights).mul_(alpha).add_(adjoint(image * weights), alpha=gamma)
        curvature = dot(direction, curved)
        length = torch.where(curvature > 0, square / curvature, 0.0).to(m)
        values = values + length * direction
        residual = residual - length * curved
        before, square = square, dot(residual, residual)
        direction = residual + torch.where(before > 0, square / before, 0.0).to(m) * direction
    mixed = mix(values)  # anew: in half precision a sum of the images would be another map's
    better = value(values, mixed) <= value(*start)  # rounding can make the minimiser worse than a start that is near it
    return Moved(torch.where(better, values, start.values), torch.where(better, mixed, start.mixed))


def value_terms(
    output: Linear,
    m: Tensor,
    y: Tensor,
    moved: Moved,
    a: Tensor,
    prices: Coefficients,
    token_weights: Tensor | None = None,
) -> Terms:
    """The objective's terms: m (windows, seq, f_v), y (windows, seq, d), a (windows, seq, f_a)."""
    flat = None if token_weights is None else token_weights.flatten()

    def misfit(difference: Tensor) -> float:
        return squares(difference.flatten(0, -2), flat)

    return Terms(
        up=prices.alpha * misfit(moved.values - m),
        activation=prices.gamma * misfit(a - moved.mixed),
        output=prices.beta * misfit(y - output(a)),
    )


def default_value_coefficients(
    output: Linear, y: Tensor, mix: Map, values: Tensor, *, producer: float = 3.0, coupling: float = 3.0
) -> Coefficients:
    """As ``objective.default_coefficients``: every term in units of the error at the output.

    A change δ in one entry of A changes the squared output error by about δ² c, with c the mean squared column norm of
    W_o (d, f_a); one of V by δ² c times the mean of 𝒫ᵀ𝒫's diagonal, which one probe by random signs measures.

    Args:
        y: (windows, seq, d): the targets of some windows.
        values: (windows, seq, f_v): of the shape that ``mix`` takes.
    """
    beta, price = output_prices(output, y.flatten(0, -2))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, values.shape, generator=generator).to(values).mul_(2).sub_(1)
    slope = max(float(mix(signs).double().square().sum()) / signs.numel(), 1e-20)
    return Coefficients(alpha=producer * price * slope, beta=beta, gamma=coupling * price)
