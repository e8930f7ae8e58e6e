"""Means over windows with confidence intervals, and the comparison with a dense model."""

from __future__ import annotations

import math
import sys
from statistics import NormalDist

from torch import Tensor

from sparsellm.evaluation.streamed import Scores
from sparsellm.records import Against, Interval

_Z = NormalDist().inv_cdf(0.975)  # standard errors from the mean to the end of a 95 % interval


def mean_of(windows: Tensor) -> Interval:
    """The mean of the windows' values ``(windows,)``, plus and minus 1.96 standard errors: their standard deviation
    divided by the square root of their number."""
    mean = float(windows.mean())
    if len(windows) < 2:
        return Interval(value=mean)
    half = _Z * float(windows.std()) / math.sqrt(len(windows))
    return Interval(value=mean, low=mean - half, high=mean + half)


def perplexity_of(losses: Tensor) -> Interval:
    """The perplexity for mean losses ``(windows,)`` in nats; its interval is that of the loss, exponentiated."""
    mean = mean_of(losses)
    if mean.low is None or mean.high is None:
        return Interval(value=_exp(mean.value))
    return Interval(value=_exp(mean.value), low=_exp(mean.low), high=_exp(mean.high))


def compared(model: str, scores: Scores) -> Against:
    """The comparison with the dense model of this name, from scores that include those against it."""
    assert scores.dense_loss is not None
    assert scores.kl is not None
    assert scores.agreement is not None
    kl = mean_of(scores.kl)
    return Against(
        model=model,
        perplexity=perplexity_of(scores.dense_loss),
        kl=max(0.0, kl.value),
        kl_low=None if kl.low is None else max(0.0, kl.low),
        kl_high=kl.high,
        agreement=float(scores.agreement.mean()),
        recovery=_exp(float(scores.dense_loss.mean() - scores.loss.mean())),
    )


def _exp(loss: float) -> float:
    """``exp``, and the largest float in place of an overflow."""
    return math.exp(loss) if loss < 709 else sys.float_info.max
