"""Second moments of activations, accumulated in chunks: the only statistics of the calibration tokens that solvers use.

``G = XᵀX / N`` for inputs ``X (tokens, features)`` and ``C = TᵀX / N`` with targets ``T (tokens, out)``. Memory depends
on the features only, never on the number of tokens. Sums are additive, so accumulators of several processes add up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.errors import NumericalError
from sparsellm.patterns import require_finite

PANEL = 256  # rows of one panel: wide enough for a full-speed product, narrow enough that little is computed twice
TRIANGLE = 512  # rows of a triangular matrix that is inverted at once: products are faster beyond
CHUNK_ELEMENTS = 1 << 23  # elements converted to fp32 at a time: 32 MiB
# limit of the factorisations that one Gram keeps; beyond it the oldest is dropped
REMEMBERED_BYTES = 1 << 29
# mean squares of inputs whose products with weights, and inverses, fp32 can hold
SQUARES = (1e-26, 1e30)
DAMPING_TRIES = 8  # each is ten times the one before, so the last is larger than any ratio of fp32 rounding

CPU = torch.device("cpu")
T = TypeVar("T")


class Factor(NamedTuple):
    """A matrix from the factorisation of ``G + λI``, the relative damping it took, and notes for the user."""

    matrix: Tensor
    damping: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Gram:
    """Immutable ``G = XᵀX / N``, fp32 ``(features, features)``, over ``tokens`` tokens.

    Inverses are remembered by damping, so that linears that share an input (q, k, v) share one. Damping is relative:
    ``λ`` is that fraction of the mean diagonal of the live inputs. A dead input (zero in every token) is decoupled: its
    diagonal counts as one, so it does not affect other inputs, and a weight on it costs nothing."""

    matrix: Tensor
    tokens: int
    _memory: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require_finite(self.matrix, f"Gram matrix of {self.features} inputs")

    @property
    def features(self) -> int:
        return self.matrix.shape[0]

    @cached_property
    def diagonal(self) -> Tensor:
        """Mean square of each input, ``(features,)``."""
        return self.matrix.diagonal().clone()

    @cached_property
    def dead(self) -> Tensor:
        """Bool ``(features,)``: inputs that were zero in every token."""
        return self.diagonal <= 0

    @cached_property
    def mean_diagonal(self) -> float:
        """Mean square over the live inputs: the unit of damping; 1 where every input is dead."""
        # read once: a GPU would wait for a selection, too
        squares = self.diagonal.cpu()
        live = squares[squares > 0]
        if not len(live):
            return 1.0
        return float(live.mean())

    @cached_property
    def scale(self) -> Tensor:
        """Root mean square of each input, ``(features,)``; 1 for dead inputs."""
        return self.diagonal.sqrt().masked_fill(self.dead, 1.0)

    def divided_by(self, scale: Tensor) -> Tensor:
        """The matrix of the inputs divided by ``scale (features,)``."""
        return (self.matrix / scale).div_(scale[:, None])

    def energy(self, weight: Tensor, minus: Tensor | None = None) -> Tensor:
        """``‖W G^½‖²_F``, fp64 ``()``, a token's mean ``‖W x‖²``, for ``weight (out, features)`` or ``weight − minus``.

        Products are fp32, sums fp64. Some rows at a time: a copy of a large weight would take most of the memory."""
        total = self.matrix.new_zeros((), dtype=torch.float64)
        rows = max(1, CHUNK_ELEMENTS // self.features)
        for top in range(0, weight.shape[0], rows):
            part = weight[top : top + rows]
            if minus is not None:
                part = part - minus[top : top + rows]
            # G is symmetric: products with columns past the panel count twice.
            for start in range(0, self.features, PANEL):
                rest = part[:, start:]  # (rows, features - start)
                products = (
                    rest[:, :PANEL] @ self.matrix[start : start + PANEL, start:]
                ).mul_(rest)
                total += (
                    2 * products.sum(dim=1).double().sum()
                    - products[:, :PANEL].sum(dim=1).double().sum()
                )
        return total.clamp_(min=0.0)

    def inverse(self, damping: float) -> Factor:
        """``(G + λI)⁻¹``, symmetric; damping as in ``cholesky``."""

        def invert() -> Factor:
            factor = self.cholesky(damping)
            torch.cholesky_inverse(factor.matrix, out=factor.matrix)
            # The inverse is symmetric except for the last bits; the transpose turns LAPACK's columns into rows.
            return factor._replace(matrix=factor.matrix.mT)

        return self.remember(("inverse", damping), invert)

    def inverse_cholesky(self, damping: float) -> Factor:
        """Upper triangular ``U`` with ``UᵀU = (G + λI)⁻¹``; damping as in ``cholesky``.

        With inputs reversed, ``G + λI = R Rᵀ`` for an upper triangular ``R``, so ``U = R⁻¹``: one factorisation and a
        triangular inverse, more accurate than factorising an inverse."""

        def factorise() -> Factor:
            factor = self.cholesky(damping, reverse=True)
            lower = factor.matrix.mT.flip(0, 1)  # Rᵀ
            invert_lower_(lower)
            return factor._replace(matrix=lower.mT)

        return self.remember(("inverse_cholesky", damping), factorise)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """The cached return value of ``make``, about as large as this matrix; the oldest is dropped at the limit."""
        if key not in self._memory:
            while (
                self._memory
                and (len(self._memory) + 1) * self.matrix.nbytes > REMEMBERED_BYTES
            ):
                # before the next is made, to make room for it
                del self._memory[next(iter(self._memory))]
            self._memory[key] = make()
        value: T = self._memory[key]
        return value

    def cholesky(self, damping: float, *, reverse: bool = False) -> Factor:
        """Lower triangular ``L`` with ``L Lᵀ = G + λI``, not cached; ``reverse`` reverses the order of inputs first.

        If the factorisation fails, damping is raised tenfold (from 0 to 1e-6), at most seven times, and a note says so.
        A NumericalError says that it failed at every damping."""
        asked = damping
        name = f"the Gram matrix of {self.features} inputs over {self.tokens} tokens"
        for _ in range(DAMPING_TRIES):
            matrix = self.matrix.clone()
            diagonal = matrix.diagonal()
            diagonal.add_(damping * self.mean_diagonal).masked_fill_(self.dead, 1.0)
            if reverse:
                matrix = matrix.flip(0, 1)
            diagonal = matrix.diagonal().clone()
            # In place: the transpose of a symmetric matrix is equal to it, and has the column order of LAPACK.
            failed = torch.empty((), dtype=torch.int32, device=matrix.device)
            lower = matrix.mT
            torch.linalg.cholesky_ex(lower, out=(lower, failed))
            # A pivot that lost every digit to cancellation is a failure, even if rounding left its sign positive.
            pivots = lower.diagonal().square() / diagonal
            if bool((pivots > 4 * torch.finfo(matrix.dtype).eps).all() & (failed == 0)):
                if damping == asked:
                    return Factor(lower, damping)
                raised = f"damping raised from {asked:g} to {damping:g}: {name} could not be factorised"
                return Factor(lower, damping, (raised,))
            if damping:
                damping *= 10
            else:
                damping = 1e-6
        tried = f"{name} could not be factorised with any damping from {asked:g} to {damping / 10:g}"
        raise NumericalError(
            f"{tried}; use more calibration tokens, or look for inputs of enormous size"
        )


class GramAccumulator:
    """Sums ``XᵀX`` over chunks of tokens: products in fp32, their sum in fp64.

    Rounded to fp32, the sum is the same for any order of chunks and any number of processes, but for rare ties.
    Only panels of rows, from the diagonal on, are computed and kept, in the memory of one Gram matrix in fp32."""

    def __init__(self, features: int, device: torch.device = CPU) -> None:
        self.features = features
        self.device = device
        self.tokens = 0
        self.silent = True  # every input was 0 in every token
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        self.panels = [
            empty.new_zeros(min(PANEL, size), size)
            for size in range(features, 0, -PANEL)
        ]

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """Adds tokens ``x (..., features)``; one of weight w ≥ 0 adds ``w x xᵀ``, and N stays the token count."""
        for product, rows in _chunks((x,), token_weights, self.device):
            self.silent = self.silent and not bool(rows.any())
            for panel in self.panels:
                right = rows[:, self.features - panel.shape[1] :]
                panel += product(right[:, : len(panel)], right)
            self.tokens += len(rows)

    def reduce(self) -> None:
        """Adds up the accumulators of all processes, in every one of them."""
        for panel in self.panels:
            parallel.all_sum_(panel)
        self.tokens = int(parallel.total(self.tokens))
        self.silent = not parallel.total(not self.silent)

    def finish(self) -> Gram:
        """The mean over the tokens so far. A NumericalError says that there are none, that a sum is not finite, or that
        fp32 cannot hold the squares of the inputs."""
        matrix = torch.empty(self.features, self.features, device=self.device)
        for panel in self.panels:
            start = self.features - panel.shape[1]
            stop = start + len(panel)
            matrix[start:stop, start:] = panel / self.tokens
            square = matrix[start:stop, start:stop]
            # the halves of a product may differ in the last bit
            square.copy_(square.triu() + square.triu(1).T)
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        gram = Gram(matrix, self.tokens)
        if self.silent:
            return gram
        least, most = SQUARES
        largest = float(gram.diagonal.max())
        if not least <= largest <= most:
            raise NumericalError(
                f"its inputs do not suit fp32: the largest mean square is {largest:.3g}, not {least:g} to "
                f"{most:g}; the weights before it are damaged, or leave it out (exclude)"
            )
        return gram


class CrossAccumulator:
    """Sums ``TᵀX (out, features)`` over chunks of tokens: products in fp32, their sum in fp64."""

    def __init__(self, out: int, features: int, device: torch.device = CPU) -> None:
        self.tokens = 0
        self.total = torch.zeros(out, features, dtype=torch.float64, device=device)

    def update(
        self, target: Tensor, x: Tensor, token_weights: Tensor | None = None
    ) -> None:
        """Adds tokens ``target (..., out)``, ``x (..., features)``; weights as in ``GramAccumulator``."""
        for product, target_rows, rows in _chunks(
            (target, x), token_weights, self.total.device
        ):
            self.total += product(target_rows, rows)
            self.tokens += len(rows)

    def reduce(self) -> None:
        """Adds up the accumulators of all processes, in every one of them."""
        parallel.all_sum_(self.total)
        self.tokens = int(parallel.total(self.tokens))

    def finish(self) -> Tensor:
        """``C = TᵀX / N`` (out, features), fp32. NumericalError if there are no tokens, or a sum is not finite."""
        matrix = (self.total / self.tokens).float()
        require_finite(matrix, f"cross moment of shape {tuple(matrix.shape)}")
        return matrix


class Fit(NamedTuple):
    """The weights (out, features) that solve a damped least-squares problem, and notes for the user."""

    weight: Tensor
    notes: tuple[str, ...] = ()


def least_squares(gram: Gram, cross: Tensor, damping: float, prior: Tensor) -> Fit:
    """``argmin_W ‖T − X Wᵀ‖² / N + λ‖W − W₀‖²``, that is ``W = W₀ + (C − W₀ G)(G + λI)⁻¹``, for ``C = TᵀX / N``.

    In directions that the tokens hardly excite, ``W`` shrinks towards the prior ``W₀ (out, features)``. Weights on dead
    inputs equal the prior. Damping and errors are as in ``Gram.cholesky``."""
    factor = gram.cholesky(damping)
    residual = cross - prior @ gram.matrix  # (out, features)
    change = torch.cholesky_solve(residual.T, factor.matrix).T
    return Fit(prior + change.masked_fill(gram.dead, 0.0), factor.notes)


def invert_lower_(matrix: Tensor) -> None:
    """Replaces a lower triangular matrix by its inverse, by halves, so that nearly all the work is matrix products:
    ``[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]``. Entries above the diagonal must be zero."""
    size = len(matrix)
    if size <= TRIANGLE:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = size // 2
    first = matrix[:half, :half]
    last = matrix[half:, half:]
    below = matrix[half:, :half]
    invert_lower_(first)
    invert_lower_(last)
    below.copy_((last @ below) @ first).neg_()


Product = Callable[[Tensor, Tensor], Tensor]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``LᵀR`` of fp32 factors ``(tokens, ...)``."""
    return left.T @ right


def _widening(left: Tensor, right: Tensor) -> Tensor:
    """``LᵀR`` in fp32 of factors of 16 bits ``(tokens, ...)`` on a GPU."""
    return torch.mm(left.T, right, out_dtype=torch.float32)


def _by_amx(left: Tensor, right: Tensor) -> Tensor:
    """``LᵀR`` of fp32 factors ``(tokens, ...)`` that bf16 holds exactly, by the bf16 units of a CPU."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return left.T @ right
    finally:
        matmul.fp32_precision = before


@cache
def _product_for(device: torch.device, dtype: torch.dtype) -> Product:
    """How a device multiplies tokens of a dtype. Where it has units that multiply 16 bits and add up in fp32, by those:
    products are exact there, so the sum is as good as that of fp32 factors, for a fraction of the time."""
    if (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    ):
        return _by_amx
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return _product
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    with suppress(RuntimeError, TypeError):  # the GPU or this release of torch does not
        if bool((_widening(ones, ones) == 8).all()):
            return _widening
    return _product


def _chunks(
    tensors: tuple[Tensor, ...], weights: Tensor | None, device: torch.device
) -> Iterator[tuple[Any, ...]]:
    """Yields a product and the tokens of each tensor ``(..., features)`` to give it: ``(tokens, features)`` fp32, times
    √weight. On a GPU that multiplies factors of 16 bits, tokens of weight 1, which are nearly all, keep their dtype."""
    flat = [tensor.detach().flatten(0, -2) for tensor in tensors]
    product: Product = _product
    dtype = torch.float32
    if len({tensor.dtype for tensor in tensors}) == 1:
        product = _product_for(device, tensors[0].dtype)
    if product is _widening:
        dtype = tensors[0].dtype
    root = None
    if weights is not None:
        root = weights.detach().reshape(-1, 1).to(device, torch.float32).sqrt()
    step = max(256, CHUNK_ELEMENTS // max(tensor.shape[-1] for tensor in tensors))
    for start in range(0, len(flat[0]), step):
        parts = [rows[start : start + step].to(device, dtype) for rows in flat]
        if root is None:
            yield product, *parts
            continue
        roots = root[start : start + step]
        if product is not _product:
            plain = roots[:, 0] == 1
            if bool(plain.any()):
                yield product, *(part[plain] for part in parts)
            parts = [part[~plain] for part in parts]
            roots = roots[~plain]
        if len(roots):
            yield _product, *(part.float() * roots for part in parts)
