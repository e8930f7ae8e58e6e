"""The published SparseLLM algorithm, step by step, to compare with; ``loop`` is what this library uses.

SparseLLM, arXiv 2402.17946 (NeurIPS 2024), checked against the authors' public code (``model_utils.py``, the functions
for OPT and LLaMA). What is kept on purpose, although ``loop`` does otherwise:

* the target is the dense unit on the very inputs given, and ``down`` is fitted to the auxiliary A, not to what the
  pruned first half produces;
* no damping in the least squares (a pseudo-inverse there; the normal equations in fp64 here, the same answer), while
  the solver's damping of the Gram matrix of X is added to the stored matrix at every epoch and so accumulates;
* the update of U assumes α = γ; S takes two gradient steps of 0.01; every linear is fitted with its bias left alone;
* the last iterate is kept, whatever its error.

What is not: fp16 (this is fp32), and, for OPT at 80 % sparsity and beyond, ten gradient steps in place of the
least-squares update of fc2 (that update here at every sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsellm.decomposition.feed_forward import FeedForward, Linear
from sparsellm.decomposition.objective import Coefficients, squares
from sparsellm.decomposition.updates import activation_factor, update_activation, update_preactivation_relu
from sparsellm.errors import ModelError, NumericalError
from sparsellm.patterns import Pattern
from sparsellm.solvers import Solver
from sparsellm.statistics import Gram, GramAccumulator

GRADIENT_STEPS, LEARNING_RATE, SOLVER_DAMPING = 2, 0.01, 0.01

# The code has had several values; these are the ones it holds for each family at the version that was read.
OPT = (Coefficients(alpha=0.1, beta=0.1, gamma=0.1, alpha_gate=0.1), 10)
LLAMA = (Coefficients(alpha=5.0, beta=5.0, gamma=5.0, alpha_gate=5.0), 8)


@dataclass(frozen=True)
class Published:
    """The last iterate, and ‖Y − FFN(X)‖²/‖Y‖² on the given tokens after each epoch."""

    unit: FeedForward
    errors: list[float]


@torch.no_grad()
def prune_as_published(
    dense: FeedForward,
    x: Tensor,
    solver: Solver,
    pattern: Pattern,
    coefficients: Coefficients | None = None,
    epochs: int | None = None,
) -> Published:
    """Algorithm 1 of the paper on one unit.

    Args:
        x: (tokens, d), all at once: the published code keeps about ten copies of tokens × f, and so does this.
        solver: the paper's is SparseGPT with a damping of 0.01.
        coefficients, epochs: None takes those of the published code, by whether the unit is gated.

    Raises:
        ModelError: a two-layer unit whose activation is not ReLU; the paper has no update for it.
        NumericalError: it diverged to numbers that are not finite; the message has the errors of the epochs before.
    """
    if dense.gate is None and dense.activation.name != "relu":
        raise ModelError(f"the published algorithm knows ReLU in a two-layer unit, not {dense.activation.name!r}")
    family = LLAMA if dense.gate else OPT
    prices, epochs = coefficients or family[0], family[1] if epochs is None else epochs
    y = dense(x)
    z, s = dense.up(x), dense.gate(x) if dense.gate else None
    a = dense.activations(x)
    unit = dense
    errors: list[float] = []
    gram_x = _gram(x)
    for epoch in range(epochs):
        if epoch > 0:
            unit = replace(
                unit,
                up=_fit(unit.up, x, z),
                down=_fit(unit.down, a, y),
                gate=_fit(unit.gate, x, s) if unit.gate and s is not None else None,
            )
        try:
            pruned = {
                role: replace(
                    linear, weight=solver(linear.weight, _gram(a) if role == "down" else gram_x, pattern).weight
                )
                for role, linear in unit.linears().items()
            }
        except NumericalError as failure:
            shown = ", ".join(f"{error:.3g}" for error in errors)
            raise NumericalError(
                f"the published algorithm diverged in epoch {epoch} (relative errors of the epochs before it: "
                f"{shown or 'none'}): {failure}"
            ) from failure
        unit = replace(unit, up=pruned["up"], down=pruned["down"], gate=pruned.get("gate"))
        gram_x = _damped(gram_x)
        errors.append(squares(y - unit(x)) / squares(y))

        phi = unit.activation(z) if s is None else unit.activation(s) * z
        a = update_activation(phi, y, activation_factor(unit.down, beta=prices.beta, gamma=prices.gamma))
        if unit.gate is None or s is None:
            z = update_preactivation_relu(unit.up(x), a, alpha=prices.alpha, gamma=prices.gamma)
            continue
        gate = unit.activation(s)
        z = (unit.up(x) + gate * a) / (gate.square() + 1)
        m = unit.gate(x)
        for _ in range(GRADIENT_STEPS):
            value, first, _ = unit.activation.derivatives(s)
            slope = prices.alpha * (s - m) + prices.gamma * (value * z - a) * first * z
            s = s - LEARNING_RATE * 2 * slope
    return Published(unit, errors)


def _gram(x: Tensor) -> Gram:
    accumulator = GramAccumulator(x.shape[1], x.device)
    accumulator.update(x)
    return accumulator.finish()


def _damped(gram: Gram) -> Gram:
    matrix = gram.matrix.clone()
    matrix.diagonal().add_(SOLVER_DAMPING * float(matrix.diagonal().mean()))
    return Gram(matrix, gram.tokens)


def _fit(linear: Linear, x: Tensor, target: Tensor) -> Linear:
    """(target − b) · pinv(x): x (tokens, in), target (tokens, out); through the Gram matrix in fp64."""
    wide, wanted = x.double(), target.double()
    if linear.bias is not None:
        wanted = wanted - linear.bias.double()
    # pinv(XᵀX) Xᵀ = pinv(X); singular values below 1e-12 of the largest are noise of the fp32 inputs
    inverse = torch.linalg.pinv(wide.T @ wide, rtol=1e-12, hermitian=True)
    return replace(linear, weight=((wanted.T @ wide) @ inverse).to(linear.weight.dtype))
