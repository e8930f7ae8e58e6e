"""The penalty objective of one feed-forward unit, its data, and its coefficients.

    two-layer   α‖Z − m‖² + γ‖A − φ(Z)‖² + β‖Y − (A W₂ᵀ + b₂)‖²
    gated       α‖U − m_u‖² + α‖S − m_s‖² + γ‖A − φ(S)∘U‖² + β‖Y − (A W_dᵀ + b_d)‖²

with m = X Wᵀ + b of the respective linear (SparseLLM, arXiv 2402.17946, eq. 4 and section 3.4). Tokens are rows. Sums
run over tokens and features, in fp64; each token's squares are multiplied by its weight. Divide by the number of tokens
for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsellm.chain.units import Activation
from sparsellm.errors import ModelError
from sparsellm.statistics.held_out import spread_evenly

# Penalties as multiples of what a change costs the unit's output. On two units of a real model at 70 % sparsity, values
# from 1 to 10 of each changed the error by at most 6 %.
PRODUCER, COUPLING = 3.0, 3.0


@dataclass(frozen=True)
class Linear:
    """``y = x weightᵀ + bias``: weight (out, in), bias (out,) or None, both fp32."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class FeedForward:
    """Two-layer ``down(φ(up(x)))``, or gated ``down(φ(gate(x)) ∘ up(x))`` when ``gate`` is given.

    up and gate (f, d), down (d_out, f).

    Raises:
        ModelError: the shapes of the linears do not fit each other.
    """

    up: Linear
    down: Linear
    activation: Activation
    gate: Linear | None = None

    def __post_init__(self) -> None:
        hidden = self.up.weight.shape[0]
        if self.down.weight.shape[1] != hidden or (self.gate and self.gate.weight.shape != self.up.weight.shape):
            shapes = {name: tuple(linear.weight.shape) for name, linear in self.linears().items()}
            raise ModelError(f"linears of a feed-forward unit do not fit each other: {shapes}")

    def first_half(self) -> dict[str, Linear]:
        """The linears by role: up, and gate if there is one."""
        return {"up": self.up, **({"gate": self.gate} if self.gate is not None else {})}

    def linears(self) -> dict[str, Linear]:
        """The linears by role, in the order in which they run: up, gate (if there is one), down."""
        return {**self.first_half(), "down": self.down}

    def products(self, x: Tensor) -> Variables:
        """The outputs m of the first half's linears on x (tokens, d), one for each variable."""
        return Variables(self.up(x), self.gate(x) if self.gate is not None else None)

    def activations(self, x: Tensor) -> Tensor:
        """The input of ``down``: (tokens, d) → (tokens, f)."""
        return self.products(x).made(self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """(tokens, d) → (tokens, d_out)."""
        return self.down(self.activations(x))


@dataclass(frozen=True)
class Variables:
    """Auxiliary variables of a chunk: ``up`` is Z (U in a gated unit), ``gate`` is S; (tokens, f) each."""

    up: Tensor
    gate: Tensor | None = None

    def made(self, activation: Activation) -> Tensor:
        """Φ: φ(Z), or φ(S)∘U; (tokens, f)."""
        return activation(self.up) if self.gate is None else activation(self.gate) * self.up


@dataclass(frozen=True)
class Chunk:
    """A chunk of tokens: inputs (tokens, d), target outputs (tokens, d_out), weights of tokens (tokens,) or None."""

    inputs: Tensor
    targets: Tensor
    token_weights: Tensor | None = None

    def to(self, device: torch.device) -> Chunk:
        weights = None if self.token_weights is None else self.token_weights.to(device, torch.float32)
        return Chunk(self.inputs.to(device, torch.float32), self.targets.to(device, torch.float32), weights)


class LazyChunks:
    """A sequence of chunks that are read, possibly from disk, when accessed; ``readers`` has a function for each."""

    def __init__(self, readers: Sequence[Callable[[], Chunk]]) -> None:
        self._readers = readers

    @classmethod
    def stored(
        cls, inputs: Sequence[Tensor], targets: Sequence[Tensor], token_weights: Sequence[Tensor] | None = None
    ) -> LazyChunks:
        """Chunks of sequences: inputs (tokens, d), targets (tokens, d_out), token_weights (tokens,) for each chunk."""

        def read(place: int) -> Chunk:
            return Chunk(inputs[place], targets[place], None if token_weights is None else token_weights[place])

        return cls([partial(read, place) for place in range(len(inputs))])

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> LazyChunks:
        return cls([partial(chunks.__getitem__, place) for place in range(len(chunks))])

    def __add__(self, other: LazyChunks) -> LazyChunks:
        return LazyChunks([*self._readers, *other._readers])

    def __getitem__(self, place: int) -> Chunk:
        return self._readers[place]()

    def __len__(self) -> int:
        return len(self._readers)

    def split(self, fraction: float = 0.125) -> tuple[LazyChunks, LazyChunks]:
        """(train, held out): held out are chunks spread evenly, or the tail if there is only one chunk.

        Chunks are held out as they are because neighbouring tokens are too similar to test a fit on each other.
        """
        if len(self) == 1:
            only = self[0]
            cut = len(only.inputs) - round(len(only.inputs) * fraction)
            parts = [
                Chunk(only.inputs[p], only.targets[p], None if only.token_weights is None else only.token_weights[p])
                for p in (slice(None, cut), slice(cut, None))
            ]
            return LazyChunks.of(parts[:1]), LazyChunks.of([part for part in parts[1:] if len(part.inputs)])
        count = min(max(round(len(self) * fraction), 1), len(self) - 1)
        chosen = spread_evenly(count, len(self))
        readers = list(enumerate(self._readers))
        return LazyChunks([r for i, r in readers if i not in chosen]), LazyChunks(
            [r for i, r in readers if i in chosen]
        )


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of the penalties: α for the variables, β for the output, γ for φ."""

    alpha: float
    beta: float
    gamma: float


def squares(difference: Tensor, token_weights: Tensor | None = None) -> float:
    """Σ_t w_t ‖difference_t‖² of a (tokens, features) tensor, accumulated in fp64 over tokens."""
    per_token = difference.square().sum(dim=1).double()  # (tokens,)
    if token_weights is not None:
        per_token = per_token * token_weights.to(per_token)
    return float(per_token.sum())


def objective(unit: FeedForward, chunk: Chunk, variables: Variables, a: Tensor, prices: Coefficients) -> float:
    """The objective of one chunk; a (tokens, f). Those of chunks add up."""
    products, weights = unit.products(chunk.inputs), chunk.token_weights
    misfits = squares(variables.up - products.up, weights)
    if variables.gate is not None and products.gate is not None:
        misfits += squares(variables.gate - products.gate, weights)
    coupling = squares(a - variables.made(unit.activation), weights)
    return (
        prices.alpha * misfits + prices.gamma * coupling + prices.beta * squares(chunk.targets - unit.down(a), weights)
    )


def default_coefficients(unit: FeedForward, x: Tensor, y: Tensor) -> Coefficients:
    """Coefficients that express every term in the same unit, the error at the output of a two-layer unit.

    A change δ in one entry of A changes the squared output error by about δ² c, where c is the mean squared column norm
    of W₂ (d_out, f); a change in Z by δ² φ'(Z)² c. So with β = 1/mean‖y‖² (the output term is then the relative error
    times the number of tokens):

        γ = COUPLING · β c,   α = PRODUCER · β c · E[φ'(Z)²], measured on the chunk.

    The minimiser then does not change if inputs, targets, or a layer's weights against its neighbour's are scaled.

    Args:
        x: (tokens, d), y: (tokens, d_out): one chunk is enough.
    """
    tiny = torch.finfo(torch.float32).tiny
    beta = 1 / max(squares(y) / len(y), tiny)
    column = float(unit.down.weight.double().square().sum()) / unit.down.weight.shape[1]
    price = max(beta * column, tiny)
    slope = unit.activation.derivatives(unit.up(x))[1]
    # The median over tokens of the mean over features, so that one massive activation does not set the coefficient.
    mean_square = max(float(slope.square().mean(dim=1).median()), 1e-20)
    return Coefficients(alpha=PRODUCER * price * mean_square, beta=beta, gamma=COUPLING * price)


def true_error(unit: FeedForward, chunks: LazyChunks | Sequence[Chunk]) -> float:
    """‖Y − FFN(X)‖² / ‖Y‖² over all tokens of the chunks, token-weighted; inf where a value is not finite."""
    missed = total = 0.0
    for index in range(len(chunks)):
        chunk = chunks[index].to(unit.up.weight.device)
        missed += squares(chunk.targets - unit(chunk.inputs), chunk.token_weights)
        total += squares(chunk.targets, chunk.token_weights)
    error = missed / total if total else missed
    return error if math.isfinite(error) else math.inf
