"""The updates of the alternating minimisation. All but two are exact minimisers over one variable, the others fixed.

Tokens are rows. A, Z, U and S are separable by token, so their updates work on any chunk of tokens. The weights are
fitted by least squares from moments over all tokens. No argument is changed. The other two are gradient steps of the
published code, on S and, in OPT, on W₂.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsellm.method.auxiliary.objective import (
    Coefficients,
    FeedForward,
    Linear,
    Variables,
)
from sparsellm.method.gram import CrossAccumulator, Fit, Gram, GramAccumulator
from sparsellm.model.units import Activation


def activation_gain(weight: Tensor, coefficients: Coefficients) -> Tensor:
    """``W₂ (γ/β I + W₂ᵀW₂)⁻¹ = (γ/β I + W₂W₂ᵀ)⁻¹ W₂`` of W₂ (d_out, f), for the update of A on every chunk, from the
    factorisation of the smaller of the two Gram matrices, in fp64."""
    narrow = weight.double()
    turned = len(narrow) >= narrow.shape[1]
    if turned:
        narrow = narrow.T
    square = narrow @ narrow.T
    square.diagonal().add_(coefficients.gamma / coefficients.beta)
    gain = torch.cholesky_solve(narrow, torch.linalg.cholesky(square))
    if turned:
        gain = gain.T
    return gain.to(weight.dtype).contiguous()


def update_activation(
    phi: Tensor, target: Tensor, down: Linear, gain: Tensor
) -> Tensor:
    """A = (γΦ + β(Y − b₂)W₂)(γI + βW₂ᵀW₂)⁻¹ (paper, eq. 6), written Φ + (Y − b₂ − ΦW₂ᵀ) · gain; (tokens, f).

    Φ (tokens, f) is φ(Z) or φ(S)∘U, Y the target, and the gain that of ``activation_gain``. The second form adds a
    correction from the residual to Φ, so it loses no digits if Φ is already right."""
    return torch.addmm(phi, target - down(phi), gain)


def update_linear_gate_branch(
    m: Tensor, a: Tensor, gate: Tensor, coefficients: Coefficients
) -> Tensor:
    """U = (α m_u + γ g∘A) / (α + γ g²), the minimiser of α(u − m)² + γ(A − g u)². All (tokens, f); ``gate`` is φ(S)."""
    numerator = (gate * a).mul_(coefficients.gamma).add_(m, alpha=coefficients.alpha)
    return numerator.div_(
        gate.square().mul_(coefficients.gamma).add_(coefficients.alpha)
    )


def update_preactivation(m: Tensor, a: Tensor, coefficients: Coefficients) -> Tensor:
    """Z = argmin α(z − m)² + γ(A − relu(z))², elementwise. All (tokens, f).

    It is the better of p = max((αm + γA)/(α + γ), 0) and min(m, 0) (the paper's eq. 8, for any α and γ): for z > 0 the
    objective is α(z − m)² + γ(a − z)², for z ≤ 0 it is α(z − m)² + γa², a parabola each."""
    alpha, _, gamma = coefficients
    positive = (
        (m * (alpha / (alpha + gamma)))
        .add_(a, alpha=gamma / (alpha + gamma))
        .clamp_(min=0)
    )
    negative = m.clamp(max=0)
    # The positive side is better by γ(a² − (a − p)²) = γ p (2a − p); exact where both sides are zero.
    saved = (2 * a - positive).mul_(positive).mul_(gamma)
    costs = (positive - m).square_().sub_((negative - m).square_()).mul_(alpha)
    return torch.where(costs <= saved, positive, negative)


def descend_gate_preactivation(
    m: Tensor,
    a: Tensor,
    s: Tensor,
    u: Tensor,
    activation: Activation,
    coefficients: Coefficients,
) -> Tensor:
    """S after the published code's two gradient steps of 0.01 on α‖s − m‖² + γ‖A − φ(s)∘U‖². All (tokens, f)."""
    for _ in range(2):
        value, first = activation.derivatives(s)
        # half the gradient
        slope = (
            coefficients.alpha * (s - m)
            + coefficients.gamma * (value * u - a) * first * u
        )
        s = s - 0.01 * 2 * slope
    return s


def move_variables(
    unit: FeedForward,
    products: Variables,
    variables: Variables,
    a: Tensor,
    coefficients: Coefficients,
) -> Variables:
    """The variables after one update: Z at its minimiser, or U at its minimiser and then gradient steps on S.
    ``products`` are the outputs m of the unit's first half, one for each variable; a (tokens, f) is A."""
    if variables.gate is None or products.gate is None:
        return Variables(update_preactivation(products.up, a, coefficients))
    u = update_linear_gate_branch(
        products.up, a, unit.activation(variables.gate), coefficients
    )
    return Variables(
        u,
        descend_gate_preactivation(
            products.gate, a, variables.gate, u, unit.activation, coefficients
        ),
    )


@dataclass(frozen=True)
class Moments:
    """Weighted second moments of a linear's inputs (in) and targets (out), averaged over tokens."""

    gram: Gram  # (in, in)
    cross: Tensor  # (out, in)
    bias: Tensor | None = None  # the fixed one, which is subtracted from the targets
    # those of inputs and targets, if the bias is fitted; moments are then centred
    means: tuple[Tensor, Tensor] | None = None
    # sums XᵀX and TᵀX in fp64, for a pseudo-inverse
    exact: tuple[Tensor, Tensor] | None = None

    def linear(self, weight: Tensor) -> Linear:
        """The linear with this weight, and with the optimal bias ``mean(T) − W mean(X)`` or the fixed one."""
        if self.means is None:
            return Linear(weight, self.bias)
        inputs, targets = self.means
        return Linear(weight, targets - weight @ inputs)


class MomentsAccumulator:
    """Accumulates inputs and targets of one linear into ``Moments``.

    For a given weight the best bias is mean(T) − W mean(X), so fitting both is the same least squares on centred inputs
    and targets. A linear without a bias stays without one.

    Args:
        gram: the Gram matrix of the same inputs, if it is known already.
        fit_bias: fit the bias, if there is one, together with the weight; False holds it fixed.
        exact: also sum in fp64, without weights of tokens.
    """

    def __init__(
        self,
        linear: Linear,
        gram: Gram | None = None,
        *,
        fit_bias: bool = True,
        exact: bool = False,
    ) -> None:
        outputs, inputs = linear.weight.shape
        device = linear.weight.device
        self._centred = fit_bias and linear.bias is not None
        self._bias = linear.bias  # the fixed one
        if self._centred:
            self._bias = None
        self._gram = gram or GramAccumulator(inputs, device)
        self._crosses = CrossAccumulator(outputs, inputs, device)
        self._shift: tuple[Tensor, Tensor] | None = None
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._sums = zeros(inputs), zeros(outputs)
        self._exact: tuple[Tensor, Tensor] | None = None
        if exact:
            self._exact = zeros(inputs, inputs), zeros(outputs, inputs)
        self._total = 0.0

    def update(
        self, x: Tensor, target: Tensor, token_weights: Tensor | None = None
    ) -> None:
        """Adds tokens: x (tokens, in), target (tokens, out), token_weights (tokens,) or None for equal ones."""
        if self._bias is not None:
            target = target - self._bias
        if self._centred:
            # Centred around the first chunk's mean at once, so that only a small rank-one term is subtracted at the
            # end: features whose mean is large against their spread lose no digits.
            self._shift = self._shift or (x.mean(dim=0), target.mean(dim=0))
            x = x - self._shift[0]
            target = target - self._shift[1]
            weights = token_weights
            if weights is None:
                weights = torch.ones(len(x), device=x.device)
            self._total += float(weights.double().sum())
            for total, value in zip(self._sums, (x, target), strict=True):
                total += (weights @ value).double()
        if isinstance(self._gram, GramAccumulator):
            self._gram.update(x, token_weights)
        self._crosses.update(target, x, token_weights)
        if self._exact is not None:
            wide = x.double()
            self._exact[0].addmm_(wide.T, wide)
            self._exact[1].addmm_(target.double().T, wide)

    def finish(self) -> Moments:
        """The moments of all tokens so far. A NumericalError says that there are none, or that a sum is not finite."""
        cross = self._crosses.finish()
        gram = self._gram
        if isinstance(gram, GramAccumulator):
            gram = gram.finish()
        if self._shift is None:
            return Moments(gram, cross, self._bias, exact=self._exact)
        # weighted means, from the shift
        mean_x, mean_t = (total / self._total for total in self._sums)
        mean_weight = self._total / self._crosses.tokens
        if gram is not self._gram:
            square = mean_weight * torch.outer(mean_x, mean_x)
            gram = Gram(gram.matrix - square.to(gram.matrix), gram.tokens)
        cross = cross - (mean_weight * torch.outer(mean_t, mean_x)).to(cross)
        shift_x, shift_t = (shift.double() for shift in self._shift)
        return Moments(
            gram,
            cross,
            means=((shift_x + mean_x).to(cross), (shift_t + mean_t).to(cross)),
        )


def pseudo_inverse_weight(moments: Moments) -> Fit:
    """``(T − b)ᵀ · pinv(X)ᵀ`` (out, in), as in the published code: without damping, through the Gram matrix in fp64.
    ``pinv(XᵀX) Xᵀ = pinv(X)``; its singular values below 1e-12 of the largest are noise of fp32 inputs."""
    assert moments.exact is not None, "accumulate with exact=True"
    square, cross = moments.exact
    return Fit(
        (cross @ torch.linalg.pinv(square, rtol=1e-12, hermitian=True)).to(
            moments.cross.dtype
        )
    )


def descend_weight(moments: Moments, weight: Tensor) -> Fit:
    """The weight after the published code's ten gradient steps of 0.01 on the mean of (t − W x − b)² over tokens and
    outputs: ``W ← W − 0.01 · 2 (W G − C) / outputs``."""
    for _ in range(10):
        weight = weight - 0.01 * 2 * (
            weight @ moments.gram.matrix - moments.cross
        ) / len(weight)
    return Fit(weight)
