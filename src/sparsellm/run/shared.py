"""Results that several runs over one model share: calibration windows, and gradients of the dense model's loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from sparsellm.sweep.saliency import LossGradients


@dataclass
class Shared:
    """A memory of one process. What is asked for with the same key is computed once.

    Attributes:
        windows: calibration windows by their source and settings.
        gradients: by model, windows, computing dtype and linears.
    """

    windows: dict[Hashable, Tensor] = field(default_factory=dict)
    gradients: dict[Hashable, LossGradients] = field(default_factory=dict)

    def windows_of(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key not in self.windows:
            self.windows[key] = make()
        return self.windows[key]

    def gradients_of(self, key: Hashable, make: Callable[[], LossGradients], *, saliency: bool) -> LossGradients:
        """The gradients for a key; made again if those that are known lack the saliency."""
        if key not in self.gradients or (saliency and not self.gradients[key].saliency):
            self.gradients[key] = make()
        return self.gradients[key]
