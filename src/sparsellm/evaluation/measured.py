"""The result of an evaluation, with confidence intervals from the spread between windows."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from torch import Tensor

from sparsellm.evaluation.perplexity import Perplexity
from sparsellm.evaluation.streamed import Scores
from sparsellm.storage.results import (
    AgainstRecord,
    EvaluationRecord,
    IntervalRecord,
    MetricRecord,
    ProtocolRecord,
    Stamp,
)

_Z = NormalDist().inv_cdf(0.975)  # standard errors from the mean to the end of a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval.

    The interval is the mean of the windows plus and minus 1.96 standard errors, which are the standard deviation of
    the windows' means divided by the square root of their number. The interval of a perplexity is that of the loss,
    exponentiated. It says how much the value would change with other windows of the same kind of text, and nothing
    about other texts. None where there is one window only.
    """

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of_mean(cls, windows: Tensor) -> Interval:
        """The mean of values ``(windows,)`` and its interval."""
        mean = float(windows.mean())
        if len(windows) < 2:
            return cls(mean, None, None)
        half = _Z * float(windows.std()) / math.sqrt(len(windows))
        return cls(mean, mean - half, mean + half)

    @classmethod
    def of_perplexity(cls, losses: Tensor) -> Interval:
        """The perplexity for mean losses ``(windows,)`` in nats, and its interval."""
        mean = cls.of_mean(losses)
        return cls(*(None if end is None else _exp(end) for end in (mean.value, mean.low, mean.high)))  # type: ignore[arg-type]

    def to_dict(self) -> IntervalRecord:
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return "" if self.low is None or self.high is None else f"95 %: {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True)
class Against:
    """A comparison with a dense model on the same windows.

    Attributes:
        model: the name of the dense model.
        perplexity: of the dense model.
        kl: ``KL(dense ‖ model)`` in nats, the mean over the scored tokens.
        agreement: the fraction of the scored tokens for which both models have the same first choice.
        recovery: the dense perplexity divided by the model's, ``exp(dense loss - loss)``: 1 if nothing was lost.
    """

    model: str
    perplexity: Interval
    kl: Interval
    agreement: float
    recovery: float

    def to_dict(self) -> AgainstRecord:
        return {
            "model": self.model,
            "perplexity": self.perplexity.to_dict(),
            "kl": self.kl.value,
            "kl_low": self.kl.low,
            "kl_high": self.kl.high,
            "agreement": self.agreement,
            "recovery": self.recovery,
        }


@dataclass(frozen=True)
class Evaluation(Perplexity):
    """The result of :func:`sparsellm.evaluate`: a perplexity, and what was measured beside it.

    Two results are equal if their perplexities are.

    Attributes:
        low, high: the 95 % confidence interval of the perplexity; None if there was one window only.
        protocol: the conditions.
        against: the comparison with a dense model, if one was named.
        tasks: value and standard error of every metric of the lm-eval tasks, if some were named.
        stamp: version, processor and time of the measurement.
    """

    low: float | None = field(compare=False)
    high: float | None = field(compare=False)
    protocol: ProtocolRecord = field(compare=False)
    against: Against | None = field(compare=False)
    tasks: Mapping[str, dict[str, MetricRecord]] | None = field(compare=False)
    stamp: Stamp = field(compare=False)

    @property
    def perplexity(self) -> Interval:
        return Interval(self.value, self.low, self.high)

    def to_dict(self) -> EvaluationRecord:
        """All fields as plain JSON values, as in results.json."""
        record: EvaluationRecord = {
            "protocol": self.protocol,
            "perplexity": self.perplexity.to_dict(),
            "sparsellm": self.stamp["sparsellm"],
            "machine": self.stamp["machine"],
            "date": self.stamp["date"],
        }
        if self.against is not None:
            record["against"] = self.against.to_dict()
        if self.tasks is not None:
            record["tasks"] = dict(self.tasks)
        return record


def compared(model: str, scores: Scores) -> Against:
    """The comparison with a dense model of this name.

    Args:
        model: the name.
        scores: with those against the dense model.
    """
    assert scores.dense_loss is not None
    assert scores.kl is not None
    assert scores.agreement is not None
    kl = Interval.of_mean(scores.kl)
    low = None if kl.low is None else max(0.0, kl.low)
    return Against(
        model,
        Interval.of_perplexity(scores.dense_loss),
        Interval(max(0.0, kl.value), low, kl.high),
        float(scores.agreement.mean()),
        _exp(float(scores.dense_loss.mean() - scores.loss.mean())),
    )


def _exp(loss: float) -> float:
    """``exp``, and the largest float in place of an overflow."""
    return math.exp(loss) if loss < 709 else sys.float_info.max
