"""The update of a weight: least squares on what is now wanted of a linear, from moments, then a local solver prunes it.

How a bias is treated: a linear without one stays without one. A linear that has one has it fitted together with the
weight. For a given weight W the best bias is mean(T) − W mean(X), so the problem in W alone is the same least squares
on centred inputs and targets; solver and refit see the centred Gram matrix, and the bias follows the sparse weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm.decomposition.feed_forward import Linear
from sparsellm.statistics import CrossAccumulator, Fit, Gram, GramAccumulator, least_squares


@dataclass(frozen=True)
class Moments:
    """Of the inputs (in) of a linear and of what is wanted of it (out): sums of weighted squares over the tokens.

    For a linear with a bias everything is centred: ``mean_input`` (in,) and ``mean_target`` (out,) are then given.
    """

    gram: Gram  # (in, in)
    cross: Tensor  # (out, in)
    target_square: float  # of ‖t‖², centred where the rest is
    mean_input: Tensor | None = None
    mean_target: Tensor | None = None

    def error(self, weight: Tensor) -> float:
        """Mean of ‖t − W x − b‖² over tokens, with the best bias where there is one: from moments alone, in fp64."""
        wide = weight.double()
        explained = 2 * (wide * self.cross.double()).sum() - ((wide @ self.gram.matrix.double()) * wide).sum()
        return self.target_square - float(explained)


class MomentsAccumulator:
    """Streams (inputs, targets) of one linear into ``Moments``. ``gram`` reuses that of the same stream of inputs."""

    def __init__(self, linear: Linear, gram: Gram | None = None) -> None:
        outputs, inputs = linear.weight.shape
        device = linear.weight.device
        self._centred = linear.bias is not None
        self._gram = gram
        self._grams = GramAccumulator(inputs, device) if gram is None else None
        self._crosses = CrossAccumulator(outputs, inputs, device)
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sums = [torch.zeros(n, dtype=torch.float64, device=device) for n in (inputs, outputs)]
        self._square = 0.0
        self._total = 0.0

    def update(self, x: Tensor, target: Tensor, token_weights: Tensor | None = None) -> None:
        """x (tokens, in), target (tokens, out), token_weights (tokens,) or None for equal ones."""
        weights = torch.ones(len(x), device=x.device) if token_weights is None else token_weights.float()
        if self._centred:
            if self._shift is None:
                # Centring around the first chunk's mean at once leaves only a small rank-one term to subtract at the
                # end: no digits are lost where a feature's mean is large against its spread, as massive ones are.
                self._shift = (x.mean(dim=0), target.mean(dim=0))
            x, target = x - self._shift[0], target - self._shift[1]
            for total, value in zip(self._sums, (x, target), strict=True):
                total += (weights @ value).double()
        self._total += float(weights.double().sum())
        self._square += float((target.square().sum(dim=1).double() * weights).sum())
        if self._grams is not None:
            self._grams.update(x, token_weights)
        self._crosses.update(target, x, token_weights)

    def finish(self) -> Moments:
        """Raises NumericalError where no token was seen or a sum is not finite."""
        cross = self._crosses.finish()
        gram = self._gram if self._grams is None else self._grams.finish()
        assert gram is not None
        tokens = self._crosses.tokens
        if self._shift is None or self._total == 0:
            return Moments(gram, cross, self._square / tokens)
        mean_x, mean_t = (total / self._total for total in self._sums)  # weighted means, from the shift
        share = self._total / tokens
        if self._grams is not None:
            gram = Gram(gram.matrix - (share * torch.outer(mean_x, mean_x)).to(gram.matrix), gram.tokens)
        cross = cross - (share * torch.outer(mean_t, mean_x)).to(cross)
        square = self._square / tokens - share * float(mean_t.square().sum())
        shift_x, shift_t = (shift.double() for shift in self._shift)
        return Moments(gram, cross, square, (shift_x + mean_x).to(cross), (shift_t + mean_t).to(cross))


def wanted_weight(moments: Moments, reference: Tensor, *, damping: float = 0.01) -> Fit:
    """W̃ = R + (C − R G)(G + λI)⁻¹, the least-squares weight (out, in), ridged towards the reference R instead of zero.

    For λ → 0 this is C G⁻¹, what the paper's pseudo-inverse gives (eq. 5). With λ it changes R only in directions in
    which the inputs vary, so a target that R already makes gives back R exactly, which C(G + λI)⁻¹ does not: a few
    massive features set the scale of λ, and every other direction would be shrunk.

    Args:
        damping: λ relative to the mean of the diagonal of G.
    Raises:
        NumericalError: moments are not finite, or no damping made G + λI positive definite.
    """
    return least_squares(moments.gram, moments.cross, damping, prior=reference)


def with_bias(weight: Tensor, moments: Moments) -> Linear:
    """The linear with this weight and, where the moments are centred, the best bias for it."""
    if moments.mean_input is None or moments.mean_target is None:
        return Linear(weight)
    return Linear(weight, moments.mean_target - weight @ moments.mean_input)
