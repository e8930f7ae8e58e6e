"""The updates of the alternating minimisation: each is the exact minimiser over its own variable, all else fixed.

Tokens are rows. The objective of a two-layer unit (SparseLLM, arXiv 2402.17946, eq. 4, with biases) is

    α‖Z − m‖² + γ‖A − φ(Z)‖² + β‖Y − (A W₂ᵀ + b₂)‖²          m = X W₁ᵀ + b₁

and of a gated one, with a coefficient of its own for each branch,

    α_u‖U − m_u‖² + α_s‖S − m_s‖² + γ‖A − φ(S)∘U‖² + β‖Y − (A W_dᵀ + b_d)‖².

Every variable is separable by token, so a function here takes any chunk of tokens and nothing of the others. Inputs are
never changed. The update of the weights is ``weights.fit``: it needs moments over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm.decomposition.activations import Activation
from sparsellm.decomposition.feed_forward import Linear
from sparsellm.errors import NumericalError

# A tile of 2¹⁶ fp32 elements is 256 KiB: the dozen temporaries of one Newton step then stay in the cache of a CPU core,
# which is worth a factor of about two over whole chunks. On an accelerator a tile is the whole chunk.
TILE = 1 << 16


# ---------------------------------------------------------------------------------------------------- activation A


@dataclass(frozen=True)
class ActivationFactor:
    """What the update of A needs of ``down``; computed once per weight, used for every chunk.

    ``gain`` (d_out, f) is ``W₂ (γ/β I + W₂ᵀW₂)⁻¹ = (γ/β I + W₂W₂ᵀ)⁻¹ W₂``.
    """

    down: Linear
    gain: Tensor


def activation_factor(down: Linear, *, beta: float, gamma: float, woodbury: bool | None = None) -> ActivationFactor:
    """Factorises the smaller of the two Gram matrices of W₂ (d_out, f), in fp64 where the device has it.

    ``woodbury`` forces the d_out × d_out side (True) or the f × f side (False); by default the smaller one is taken.

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
    if woodbury is None:
        woodbury = hidden > outputs
    square = wide @ wide.T if woodbury else wide.T @ wide
    square.diagonal().add_(gamma / beta)
    factor = torch.linalg.cholesky(square)
    gain = torch.cholesky_solve(wide, factor) if woodbury else torch.cholesky_solve(wide.T, factor).T
    return ActivationFactor(down, gain.to(weight.dtype).contiguous())


def update_activation(phi: Tensor, target: Tensor, factor: ActivationFactor) -> Tensor:
    """A = (γΦ + β(Y − b₂)W₂)(γI + βW₂ᵀW₂)⁻¹ (paper, eq. 6), written Φ + (Y − b₂ − ΦW₂ᵀ) · gain.

    The second form moves Φ by what the residual asks for: it loses no digits where Φ is already right.

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


def update_preactivation_relu(m: Tensor, a: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Z for ReLU: the better of max((αm + γA)/(α + γ), 0) and min(m, 0) under α(z − m)² + γ(A − relu(z))².

    The paper's eq. 8 holds for α = γ; this is the general case. All (tokens, f).
    """
    return _relu_cases(m, a, None, alpha, gamma)


def _relu_cases(m: Tensor, a: Tensor, u: Tensor | None, alpha: float, gamma: float) -> Tensor:
    """Where s > 0 the problem is α(s − m)² + γ(a − u s)², where s ≤ 0 it is α(s − m)² + γa²: a parabola each."""
    if u is None:
        positive = (m * (alpha / (alpha + gamma))).add_(a, alpha=gamma / (alpha + gamma)).clamp_(min=0)
        made = positive
    else:
        positive = (u * a).mul_(gamma).add_(m, alpha=alpha).div_(u.square().mul_(gamma).add_(alpha)).clamp_(min=0)
        made = positive * u
    negative = m.clamp(max=0)
    # γ(a² − (a − made)²) = γ made (2a − made) is what the positive side saves; exact where both sides are zero
    saved = (2 * a - made).mul_(made).mul_(gamma)
    costs = (positive - m).square_().sub_((negative - m).square_()).mul_(alpha)
    return torch.where(costs <= saved, positive, negative)


def _relu2_cases(m: Tensor, a: Tensor, u: Tensor | None, alpha: float, gamma: float) -> Tensor:
    """φ(s) = max(s, 0)². For s > 0, half the derivative is the cubic g(s) = c₃s³ + c₁s + c₀ below, convex on s > 0.

    Its largest root is the only candidate besides s = 0 and s = min(m, 0). Newton's method from an upper bound of that
    root on a convex function comes down to it monotonically, so nothing has to be safeguarded.
    """
    u = torch.ones_like(m) if u is None else u
    cubic = u.square().mul_(2 * gamma).clamp_(min=torch.finfo(m.dtype).tiny)  # c₃
    linear = (u * a).mul_(-2 * gamma).add_(alpha)  # c₁
    constant = m * -alpha  # c₀
    bound = (-linear).clamp_(min=0).div_(cubic).sqrt_().add_((-constant).clamp_(min=0).div_(cubic).pow_(1 / 3))
    easier = torch.where(linear > 0, (-constant).clamp_(min=0) / linear, torch.inf)  # there c₃s³ ≥ 0 bounds it too
    s = torch.minimum(bound, easier)
    for _ in range(12):  # the bound is within a factor of two; each step gains at least a third, near the root all
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
    """Z = argmin α(z − m)² + γ(A − φ(z))², elementwise; never worse than the given z in any element.

    ReLU and ReLU² are solved exactly by cases; any other φ by ``steps`` safeguarded Newton steps from the best of
    three starts. All (tokens, f).
    """
    return _update(m, a, z, None, activation, alpha, gamma, steps)


def update_gate_preactivation(
    m: Tensor, a: Tensor, s: Tensor, u: Tensor, activation: Activation, *, alpha: float, gamma: float, steps: int = 2
) -> Tensor:
    """S = argmin α(s − m)² + γ(A − φ(s)∘U)², elementwise; never worse than the given s in any element.

    The paper's code takes two gradient steps here. All (tokens, f).
    """
    return _update(m, a, s, u, activation, alpha, gamma, steps)


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
            found = solve(m_, a_, u_, alpha, gamma)
            before, after = (_value(t, m_, a_, u_, activation, alpha, gamma) for t in (z_, found))
            found = torch.where(after <= before, found, z_)  # rounding can make the exact minimiser worse by an ulp
        else:
            found = _newton(m_, a_, z_, u_, activation, alpha, gamma, steps)
        out.view(-1)[part] = found
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

    Where F curves down, the Gauss–Newton curvature α + γ(uφ')² ≥ α > 0 takes the place of F''. A step that does not
    lower F is retried from the same point at a quarter of its length, so one evaluation of φ is spent per step.

    On gated units of a real model (SiLU) two steps come within 0.1 % of the global minimum of the sum, three within
    0.03 %, and z and m would be starts enough; the third one is for data in which A and m disagree more than there.
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
    """A start in the basin that suits a: where the identity, which these φ approach, makes it; else by φ's valley."""
    wanted = a if u is None else a / u
    return torch.where(wanted > 0, wanted, -1.0).clamp_(max=1e4)  # −1 for NaN too
