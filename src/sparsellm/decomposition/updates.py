"""The updates of the alternating minimisation. Each is the exact minimiser over its own variable, the others fixed.

Tokens are rows. The objective of a two-layer unit (SparseLLM, arXiv 2402.17946, eq. 4, with biases) is

    α‖Z − m‖² + γ‖A − φ(Z)‖² + β‖Y − (A W₂ᵀ + b₂)‖²          m = X W₁ᵀ + b₁

and of a gated one, with a coefficient of its own for each branch,

    α_u‖U − m_u‖² + α_s‖S − m_s‖² + γ‖A − φ(S)∘U‖² + β‖Y − (A W_dᵀ + b_d)‖².

A, Z, U and S are separable by token, so their updates work on any chunk of tokens. The weights are fitted by least
squares from moments over all tokens. Inputs are never changed.

The published code takes gradient steps on S and, in OPT, on W₂; they are here beside the exact updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsellm.chain.activations import Activation
from sparsellm.decomposition.objective import Coefficients, FeedForward, Linear, Variables
from sparsellm.errors import NumericalError
from sparsellm.statistics import CrossAccumulator, Fit, Gram, GramAccumulator, least_squares

# A tile of 2¹⁶ fp32 elements is 256 KiB, so the dozen temporaries of a Newton step stay in the cache of a CPU core.
# That is about twice as fast as whole chunks. On an accelerator a tile is the whole chunk.
TILE = 1 << 16


# ---------------------------------------------------------------------------------------------------- activation A


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
        NumericalError: γ/β is not positive, or a weight is not finite.
    """
    weight = down.weight
    if not (gamma > 0 and beta > 0):
        raise NumericalError(f"the update of the activations needs beta and gamma above 0; got {beta}, {gamma}")
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("the weight of down is not finite, so its activations cannot be updated")
    wide = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    outputs, hidden = weight.shape
    woodbury = hidden > outputs
    square = wide @ wide.T if woodbury else wide.T @ wide
    square.diagonal().add_(gamma / beta)
    factor = torch.linalg.cholesky(square)
    gain = torch.cholesky_solve(wide, factor) if woodbury else torch.cholesky_solve(wide.T, factor).T
    return ActivationFactor(down, gain.to(weight.dtype).contiguous())


def update_activation(phi: Tensor, target: Tensor, factor: ActivationFactor) -> Tensor:
    """A = (γΦ + β(Y − b₂)W₂)(γI + βW₂ᵀW₂)⁻¹ (paper, eq. 6), written Φ + (Y − b₂ − ΦW₂ᵀ) · gain.

    The second form adds a correction from the residual to Φ, so it loses no digits if Φ is already right.

    Args:
        phi: (tokens, f), φ(Z) or φ(S)∘U.
        target: (tokens, d_out), Y.
    Returns: (tokens, f).
    """
    return torch.addmm(phi, target - factor.down(phi), factor.gain)


# ------------------------------------------------------------------------------------- elementwise: closed forms


def update_linear_gate_branch(m: Tensor, a: Tensor, gate: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """U = (α m_u + γ g∘A) / (α + γ g²), the minimiser of α(u − m)² + γ(A − g u)². All (tokens, f); ``gate`` is φ(S)."""
    numerator = (gate * a).mul_(gamma).add_(m, alpha=alpha)
    return numerator.div_(gate.square().mul_(gamma).add_(alpha))


def _relu_cases(m: Tensor, a: Tensor, u: Tensor | None, alpha: float, gamma: float) -> Tensor:
    """The better of max((αm + γA)/(α + γ), 0) and min(m, 0), and likewise with U (the paper's eq. 8, for any α and γ).

    For s > 0 the objective is α(s − m)² + γ(a − u s)², for s ≤ 0 it is α(s − m)² + γa²: a parabola each.
    """
    if u is None:
        positive = (m * (alpha / (alpha + gamma))).add_(a, alpha=gamma / (alpha + gamma)).clamp_(min=0)
        made = positive
    else:
        positive = (u * a).mul_(gamma).add_(m, alpha=alpha).div_(u.square().mul_(gamma).add_(alpha)).clamp_(min=0)
        made = positive * u
    negative = m.clamp(max=0)
    # The positive side is better by γ(a² − (a − made)²) = γ made (2a − made); exact where both sides are zero.
    saved = (2 * a - made).mul_(made).mul_(gamma)
    costs = (positive - m).square_().sub_((negative - m).square_()).mul_(alpha)
    return torch.where(costs <= saved, positive, negative)


def _relu2_cases(m: Tensor, a: Tensor, u: Tensor | None, alpha: float, gamma: float) -> Tensor:
    """φ(s) = max(s, 0)². For s > 0, half the derivative is the cubic g(s) = c₃s³ + c₁s + c₀ below, convex on s > 0.

    Its largest root is the only candidate besides s = 0 and s = min(m, 0). Since g is convex, Newton's method from an
    upper bound decreases monotonically to that root, so no safeguard is needed.
    """
    u = torch.ones_like(m) if u is None else u
    cubic = u.square().mul_(2 * gamma).clamp_(min=torch.finfo(m.dtype).tiny)  # c₃
    linear = (u * a).mul_(-2 * gamma).add_(alpha)  # c₁
    constant = m * -alpha  # c₀
    bound = (-linear).clamp_(min=0).div_(cubic).sqrt_().add_((-constant).clamp_(min=0).div_(cubic).pow_(1 / 3))
    easier = torch.where(linear > 0, (-constant).clamp_(min=0) / linear, torch.inf)  # there c₃s³ ≥ 0 bounds it too
    s = torch.minimum(bound, easier)
    for _ in range(12):  # the bound is within a factor of two; a step gains a third or more, near the root all
        square = s.square()
        slope = (square * cubic).mul_(3).add_(linear)
        step = (square.mul_(cubic).add_(linear).mul_(s).add_(constant)).div_(slope)
        s = torch.where((slope > 0) & (step > 0), s - step, s).clamp_(min=0)
    negative = m.clamp(max=0)
    made = s.square() * u
    saved = (2 * a - made).mul_(made).mul_(gamma)
    costs = (s - m).square_().sub_((negative - m).square_()).mul_(alpha)
    return torch.where(costs <= saved, s, negative)


# ------------------------------------------------------------------------------------- elementwise: any other φ


def update_preactivation(
    m: Tensor, a: Tensor, z: Tensor, activation: Activation, *, alpha: float, gamma: float, steps: int = 2
) -> Tensor:
    """Z = argmin α(z − m)² + γ(A − φ(z))², elementwise; never worse than the start z in any element.

    ReLU and ReLU² are solved exactly by cases; any other φ by ``steps`` safeguarded Newton steps from the best of
    three starts. All (tokens, f).
    """
    return _update(m, a, z, None, activation, alpha, gamma, steps)


def update_gate_preactivation(
    m: Tensor, a: Tensor, s: Tensor, u: Tensor, activation: Activation, *, alpha: float, gamma: float, steps: int = 2
) -> Tensor:
    """S = argmin α(s − m)² + γ(A − φ(s)∘U)², elementwise; never worse than the start s in any element.

    All (tokens, f).
    """
    return _update(m, a, s, u, activation, alpha, gamma, steps)


def descend_gate_preactivation(
    m: Tensor, a: Tensor, s: Tensor, u: Tensor, activation: Activation, *, alpha: float, gamma: float
) -> Tensor:
    """S after the published code's two gradient steps of 0.01 on α‖s − m‖² + γ‖A − φ(s)∘U‖². All (tokens, f)."""
    for _ in range(2):
        value, first, _ = activation.derivatives(s)
        slope = alpha * (s - m) + gamma * (value * u - a) * first * u  # half the gradient
        s = s - 0.01 * 2 * slope
    return s


def move_variables(
    unit: FeedForward, products: Variables, variables: Variables, a: Tensor, prices: Coefficients, *, exact: bool = True
) -> Variables:
    """The variables after one update: Z at its minimiser, or U and then S.

    Args:
        unit: with its current weights.
        products: the outputs m of its first half's linears, one for each variable.
        variables: the current values.
        a: (tokens, f), A.
        exact: False for the published code's gradient steps on S.
    """
    alpha, gamma, phi = prices.alpha, prices.gamma, unit.activation
    if variables.gate is None or products.gate is None:
        return Variables(update_preactivation(products.up, a, variables.up, phi, alpha=alpha, gamma=gamma))
    u = update_linear_gate_branch(products.up, a, phi(variables.gate), alpha=alpha, gamma=gamma)
    update = update_gate_preactivation if exact else descend_gate_preactivation
    return Variables(u, update(products.gate, a, variables.gate, u, phi, alpha=prices.alpha_gate, gamma=gamma))


def _update(
    m: Tensor, a: Tensor, z: Tensor, u: Tensor | None, activation: Activation, alpha: float, gamma: float, steps: int
) -> Tensor:
    if activation.name == "relu":
        solve = _relu_cases
    elif activation.name == "relu2":
        solve = _relu2_cases
    else:
        solve = None
    out = torch.empty_like(m, memory_format=torch.contiguous_format)
    size = TILE if m.device.type == "cpu" else max(m.numel(), 1)
    flat = [t.reshape(-1) for t in (m, a, z)]
    flat_u = None if u is None else u.reshape(-1)
    for start in range(0, m.numel(), size):
        part = slice(start, start + size)
        m_, a_, z_ = (t[part] for t in flat)
        u_ = None if flat_u is None else flat_u[part]
        if solve is not None:
            minimiser = solve(m_, a_, u_, alpha, gamma)
            before, after = (_value(t, m_, a_, u_, activation, alpha, gamma) for t in (z_, minimiser))
            minimiser = torch.where(after <= before, minimiser, z_)  # rounding may make it worse than z by an ulp
        else:
            minimiser = _newton(m_, a_, z_, u_, activation, alpha, gamma, steps)
        out.view(-1)[part] = minimiser
    return out


def _value(
    z: Tensor, m: Tensor, a: Tensor, u: Tensor | None, activation: Activation, alpha: float, gamma: float
) -> Tensor:
    """α(z − m)² + γ(a − φ(z)u)²; NaN counts as infinite, so that it never wins a comparison."""
    made = activation(z)
    residual = made.sub_(a) if u is None else made.mul_(u).sub_(a)
    return residual.square_().mul_(gamma).add_((z - m).square_(), alpha=alpha).nan_to_num_(nan=torch.inf)


def _newton(
    m: Tensor, a: Tensor, z: Tensor, u: Tensor | None, activation: Activation, alpha: float, gamma: float, steps: int
) -> Tensor:
    """Newton's method on F(z) = α(z − m)² + γ(a − φ(z)u)², elementwise, accepted only where F falls.

    Where F'' is not positive, the Gauss–Newton curvature α + γ(uφ')² ≥ α > 0 replaces it. A step that does not lower F
    is retried from the same point at a quarter of its length, so each step takes one evaluation of φ.

    On gated units of a real model (SiLU) two steps come within 0.1 % of the global minimum of the sum, three within
    0.03 %. The starts z and m were enough there; the third is for data in which A and m disagree more.
    """
    best, least = z, _value(z, m, a, u, activation, alpha, gamma)
    for start in (m, _other_side(a, u)):
        value = _value(start, m, a, u, activation, alpha, gamma)
        best, least = torch.where(value < least, start, best), torch.minimum(value, least)

    trial, step = best, torch.zeros_like(m)
    for index in range(steps):
        made, first, second = activation.derivatives(trial)
        if u is not None:
            made, first, second = made.mul_(u), first.mul_(u), second.mul_(u)
        residual = made.sub_(a)
        offset = trial - m
        bent = second.mul_(residual).mul_(gamma)
        slope = (first * residual).mul_(gamma).add_(offset, alpha=alpha)
        gauss = first.square_().mul_(gamma).add_(alpha)
        curvature = bent.add_(gauss)
        curvature = torch.where(curvature > gauss * 0.1, curvature, gauss)
        newton = slope.div_(curvature).neg_()
        if index == 0:
            step = newton
        else:
            value = residual.square_().mul_(gamma).add_(offset.square_(), alpha=alpha)
            lower = value < least
            best, least = torch.where(lower, trial, best), torch.where(lower, value, least)
            step = torch.where(lower, newton, step.mul_(0.25))
        trial = best + step
    value = _value(trial, m, a, u, activation, alpha, gamma)
    return torch.where(value < least, trial, best)


def _other_side(a: Tensor, u: Tensor | None) -> Tensor:
    """A start for Newton's method: a/u if that is positive, since these φ approach the identity; else −1, near their
    minimum."""
    wanted = a if u is None else a / u
    return torch.where(wanted > 0, wanted, -1.0).clamp_(max=1e4)  # −1 for NaN too


# ----------------------------------------------------------------------------------------------------- the weights


@dataclass(frozen=True)
class Moments:
    """Weighted second moments of a linear's inputs (in) and targets (out), averaged over tokens.

    Attributes:
        gram: (in, in).
        cross: (out, in).
        target_square: mean of ‖t‖².
        bias: the fixed bias, which is subtracted from the targets; None if there is none or it is fitted.
        means: of inputs (in,) and targets (out,) if the bias is fitted; all moments are then centred.
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
        gram: of the same inputs, if it is known already.
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
            wide, wanted = x.double(), (target * weights[:, None]).double()
            self._exact[0].addmm_((wide * weights[:, None]).T, wide)
            self._exact[1].addmm_(wanted.T, wide)

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


def wanted_weight(moments: Moments, reference: Tensor, *, damping: float = 0.01) -> Fit:
    """W̃ = R + (C − R G)(G + λI)⁻¹, the least-squares weight (out, in), ridged towards the reference R instead of zero.

    For λ → 0 this is C G⁻¹, the paper's pseudo-inverse (eq. 5). With λ it changes R only in directions in which the
    inputs vary. If R already reproduces the targets, the result is exactly R. C(G + λI)⁻¹ would not be: a few massive
    features set the scale of λ, and all other directions would shrink.

    Args:
        damping: λ relative to the mean of the diagonal of G.
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
    if not bool(torch.isfinite(square).all() and torch.isfinite(cross).all()):
        raise NumericalError("the moments of a pseudo-inverse are not finite")
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
