"""The updates of the alternating minimisation. Each is the exact minimiser over its own variable, the others fixed.

Tokens are rows. A, Z, U and S are separable by token, so their updates work on any chunk of tokens. The weights are
fitted by least squares from moments over all tokens. Inputs are never changed. The published code takes gradient steps
on S and, in OPT, on W₂.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsellm.chain.units import Activation
from sparsellm.decomposition.objective import Coefficients, FeedForward, Linear, Variables
from sparsellm.patterns import require_finite
from sparsellm.statistics import CrossAccumulator, Fit, Gram, GramAccumulator, least_squares

# A tile of 2¹⁶ fp32 elements is 256 KiB, so the temporaries of an elementwise update stay in the cache of a CPU core.
# On an accelerator a tile is the chunk.
TILE = 1 << 16


@dataclass(frozen=True)
class ActivationFactor:
    """The factor of ``down`` in the update of A; computed once per weight, used for every chunk.

    ``gain`` (d_out, f) is ``W₂ (γ/β I + W₂ᵀW₂)⁻¹ = (γ/β I + W₂W₂ᵀ)⁻¹ W₂``.
    """

    down: Linear
    gain: Tensor


def activation_factor(down: Linear, *, beta: float, gamma: float) -> ActivationFactor:
    """Factorises the smaller of the two Gram matrices of W₂ (d_out, f), in fp64 if the device has it.

    Raises:
        NumericalError: a weight is not finite.
    """
    weight = down.weight
    require_finite(weight, "the weight of down in the update of its activations")
    wide = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    outputs, hidden = weight.shape
    woodbury = hidden > outputs
    square = wide @ wide.T if woodbury else wide.T @ wide
    square.diagonal().add_(gamma / beta)
    factor = torch.linalg.cholesky(square)
    gain = torch.cholesky_solve(wide, factor) if woodbury else torch.cholesky_solve(wide.T, factor).T
    return ActivationFactor(down, gain.to(weight.dtype).contiguous())


def update_activation(phi: Tensor, target: Tensor, factor: ActivationFactor) -> Tensor:
    """A = (γΦ + β(Y − b₂)W₂)(γI + βW₂ᵀW₂)⁻¹ (paper, eq. 6), written Φ + (Y − b₂ − ΦW₂ᵀ) · gain; (tokens, f).

    The second form adds a correction from the residual to Φ, so it loses no digits if Φ is already right.

    Args:
        phi: (tokens, f), φ(Z) or φ(S)∘U.
        target: (tokens, d_out), Y.
    """
    return torch.addmm(phi, target - factor.down(phi), factor.gain)


def update_linear_gate_branch(m: Tensor, a: Tensor, gate: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """U = (α m_u + γ g∘A) / (α + γ g²), the minimiser of α(u − m)² + γ(A − g u)². All (tokens, f); ``gate`` is φ(S)."""
    numerator = (gate * a).mul_(gamma).add_(m, alpha=alpha)
    return numerator.div_(gate.square().mul_(gamma).add_(alpha))


def update_preactivation(m: Tensor, a: Tensor, z: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Z = argmin α(z − m)² + γ(A − relu(z))², elementwise; never worse than the start z. All (tokens, f).

    It is the better of max((αm + γA)/(α + γ), 0) and min(m, 0) (the paper's eq. 8, for any α and γ): for z > 0 the
    objective is α(z − m)² + γ(a − z)², for z ≤ 0 it is α(z − m)² + γa², a parabola each.
    """
    out = torch.empty_like(m, memory_format=torch.contiguous_format)
    size = TILE if m.device.type == "cpu" else max(m.numel(), 1)
    tiles = ([t.reshape(-1)[start : start + size] for t in (m, a, z)] for start in range(0, m.numel(), size))
    for number, (m_, a_, z_) in enumerate(tiles):
        positive = (m_ * (alpha / (alpha + gamma))).add_(a_, alpha=gamma / (alpha + gamma)).clamp_(min=0)
        negative = m_.clamp(max=0)
        # The positive side is better by γ(a² − (a − p)²) = γ p (2a − p); exact where both sides are zero.
        saved = (2 * a_ - positive).mul_(positive).mul_(gamma)
        costs = (positive - m_).square_().sub_((negative - m_).square_()).mul_(alpha)
        best = torch.where(costs <= saved, positive, negative)
        before, after = (
            (t.relu().sub_(a_).square_().mul_(gamma).add_((t - m_).square_(), alpha=alpha).nan_to_num_(nan=torch.inf))
            for t in (z_, best)
        )
        # Rounding may make it worse than z by an ulp.
        out.view(-1)[number * size : number * size + size] = torch.where(after <= before, best, z_)
    return out


def descend_gate_preactivation(
    m: Tensor, a: Tensor, s: Tensor, u: Tensor, activation: Activation, *, alpha: float, gamma: float
) -> Tensor:
    """S after the published code's two gradient steps of 0.01 on α‖s − m‖² + γ‖A − φ(s)∘U‖². All (tokens, f)."""
    for _ in range(2):
        value, first = activation.derivatives(s)
        slope = alpha * (s - m) + gamma * (value * u - a) * first * u  # half the gradient
        s = s - 0.01 * 2 * slope
    return s


def move_variables(
    unit: FeedForward, products: Variables, variables: Variables, a: Tensor, prices: Coefficients
) -> Variables:
    """The variables after one update: Z at its minimiser, or U at its minimiser and then gradient steps on S.

    Args:
        unit: with its current weights.
        products: the outputs m of its first half's linears, one for each variable.
        variables: the current values.
        a: (tokens, f), A.
        prices: the coefficients.
    """
    alpha, gamma, phi = prices.alpha, prices.gamma, unit.activation
    if variables.gate is None or products.gate is None:
        return Variables(update_preactivation(products.up, a, variables.up, alpha=alpha, gamma=gamma))
    u = update_linear_gate_branch(products.up, a, phi(variables.gate), alpha=alpha, gamma=gamma)
    s = descend_gate_preactivation(products.gate, a, variables.gate, u, phi, alpha=alpha, gamma=gamma)
    return Variables(u, s)


@dataclass(frozen=True)
class Moments:
    """Weighted second moments of a linear's inputs (in) and targets (out), averaged over tokens.

    Attributes:
        gram: (in, in).
        cross: (out, in).
        target_square: mean of ‖t‖².
        bias: the fixed bias, which is subtracted from the targets; None if there is none or it is fitted.
        means: means of inputs (in,) and targets (out,) if the bias is fitted; all moments are then centred.
        exact: sums ``XᵀX`` and ``TᵀX`` in fp64, for a pseudo-inverse.
    """

    gram: Gram
    cross: Tensor
    target_square: float
    bias: Tensor | None = None
    means: tuple[Tensor, Tensor] | None = None
    exact: tuple[Tensor, Tensor] | None = None

    def error(self, weight: Tensor) -> float:
        """Mean of ‖t − W x − b‖² over tokens, with the bias of :meth:`linear`; from the moments, in fp64."""
        wide = weight.double()
        explained = 2 * (wide * self.cross.double()).sum() - ((wide @ self.gram.matrix.double()) * wide).sum()
        return self.target_square - float(explained)

    def linear(self, weight: Tensor) -> Linear:
        """The linear with this weight, and with the optimal bias ``mean(T) − W mean(X)`` or the fixed one."""
        return Linear(weight, self.bias if self.means is None else self.means[1] - weight @ self.means[0])


class MomentsAccumulator:
    """Accumulates inputs and targets of one linear into ``Moments``.

    For a given weight the best bias is mean(T) − W mean(X), so fitting both is the same least squares on centred inputs
    and targets. A linear without a bias stays without one.

    Args:
        linear: the linear.
        gram: the Gram matrix of the same inputs, if it is known already.
        fit_bias: fit the bias, if there is one, together with the weight; False holds it fixed.
        exact: also sum in fp64.
    """

    def __init__(self, linear: Linear, gram: Gram | None = None, *, fit_bias: bool = True, exact: bool = False) -> None:
        outputs, inputs = linear.weight.shape
        device = linear.weight.device
        self._centred = fit_bias and linear.bias is not None
        self._bias = None if self._centred else linear.bias
        self._gram = gram
        self._grams = GramAccumulator(inputs, device) if gram is None else None
        self._crosses = CrossAccumulator(outputs, inputs, device)
        self._shift: tuple[Tensor, Tensor] | None = None
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._sums = [zeros(n) for n in (inputs, outputs)]
        self._exact = (zeros(inputs, inputs), zeros(outputs, inputs)) if exact else None
        self._square = 0.0
        self._total = 0.0

    def update(self, x: Tensor, target: Tensor, token_weights: Tensor | None = None) -> None:
        """x (tokens, in), target (tokens, out), token_weights (tokens,) or None for equal ones."""
        weights = torch.ones(len(x), device=x.device) if token_weights is None else token_weights.float()
        if self._bias is not None:
            target = target - self._bias
        if self._centred:
            if self._shift is None:
                # Inputs are centred around the first chunk's mean at once, so that only a small rank-one term is
                # subtracted at the end. So no digits are lost for features whose mean is large against their spread.
                self._shift = (x.mean(dim=0), target.mean(dim=0))
            x, target = x - self._shift[0], target - self._shift[1]
            for total, value in zip(self._sums, (x, target), strict=True):
                total += (weights @ value).double()
        self._total += float(weights.double().sum())
        self._square += float((target.square().sum(dim=1).double() * weights).sum())
        if self._grams is not None:
            self._grams.update(x, token_weights)
        self._crosses.update(target, x, token_weights)
        if self._exact is not None:
            wide, weighted = x.double(), (target * weights[:, None]).double()
            self._exact[0].addmm_((wide * weights[:, None]).T, wide)
            self._exact[1].addmm_(weighted.T, wide)

    def finish(self) -> Moments:
        """The moments of all tokens so far.

        Raises:
            NumericalError: there was no token, or a sum is not finite.
        """
        cross = self._crosses.finish()
        gram = self._gram if self._grams is None else self._grams.finish()
        assert gram is not None
        tokens = self._crosses.tokens
        if self._shift is None or self._total == 0:
            return Moments(gram, cross, self._square / tokens, self._bias, exact=self._exact)
        mean_x, mean_t = (total / self._total for total in self._sums)  # weighted means, from the shift
        share = self._total / tokens
        if self._grams is not None:
            gram = Gram(gram.matrix - (share * torch.outer(mean_x, mean_x)).to(gram.matrix), gram.tokens)
        cross = cross - (share * torch.outer(mean_t, mean_x)).to(cross)
        square = self._square / tokens - share * float(mean_t.square().sum())
        shift_x, shift_t = (shift.double() for shift in self._shift)
        return Moments(gram, cross, square, means=((shift_x + mean_x).to(cross), (shift_t + mean_t).to(cross)))


def ridge_weight(moments: Moments, reference: Tensor, damping: float) -> Fit:
    """W̃ = R + (C − R G)(G + λI)⁻¹, the least-squares weight (out, in), ridged towards the reference R instead of zero.

    For λ → 0 this is C G⁻¹, the paper's pseudo-inverse (eq. 5). With λ it changes R only in directions in which the
    inputs vary. If R already reproduces the targets, the result is exactly R. C(G + λI)⁻¹ would not be: a few massive
    features set the scale of λ (relative to the mean of the diagonal of G), and all other directions would shrink.

    Raises:
        NumericalError: moments are not finite, or no damping made G + λI positive definite.
    """
    return least_squares(moments.gram, moments.cross, damping, prior=reference)


def pseudo_inverse_weight(moments: Moments) -> Fit:
    """``(T − b)ᵀ · pinv(X)ᵀ`` (out, in), as in the published code: without damping, through the Gram matrix in fp64.

    ``pinv(XᵀX) Xᵀ = pinv(X)``; singular values of the Gram matrix below 1e-12 of the largest are noise of fp32 inputs.

    Raises:
        NumericalError: a moment is not finite.
    """
    assert moments.exact is not None, "accumulate with exact=True"
    square, cross = moments.exact
    for moment in (square, cross):
        require_finite(moment, "moments of a pseudo-inverse")
    inverse = torch.linalg.pinv(square, rtol=1e-12, hermitian=True)
    return Fit((cross @ inverse).to(moments.cross.dtype))


def descend_weight(moments: Moments, weight: Tensor) -> Fit:
    """The weight after the published code's ten gradient steps of 0.01 on the mean of (t − W x − b)² over tokens and
    outputs.

    Each step is ``W ← W − 0.01 · 2 (W G − C) / outputs``, so the moments suffice.
    """
    for _ in range(10):
        weight = weight - 0.01 * 2 * (weight @ moments.gram.matrix - moments.cross) / len(weight)
    return Fit(weight)
