"""Reconstruction of a pruned block: its kept weights, biases and norms follow given outputs (arXiv 2510.14444)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain.products import bf16_products
from sparsellm.chain.streams import Piece
from sparsellm.sweep.training import (
    Adam,
    Float32Calls,
    Shuffled,
    as_written,
    held_out_of,
    of_all,
    running_on,
    schedule,
    share_gradients,
    trained_elements,
)

if TYPE_CHECKING:
    from sparsellm.methods.base import BlockTask

CHECKS = 4  # looks at the held-out windows, the last one at the end


def reconstruct(
    task: BlockTask,
    targets: Sequence[Tensor],
    weights: list[Tensor] | None,
    *,
    steps: int,
    learning_rate: float,
    held_out: float = 0.125,
) -> list[dict[str, float]]:
    """Adam on everything in the block that may change; zeros of linears stay exactly zero.

    It works on fp32 copies. Some windows are held out; of the state at the start and those at four moments of the run,
    each rounded as it will be written, the best on them is what the block gets: by that measure it never gets worse.

    Args:
        task: the pruned block, with the hidden states that enter it.
        targets: what should leave it, batches ``(batch, seq, hidden)``.
        weights: of each token, batches ``(batch, seq)``, or None.
        steps: of Adam, each on about two thousand tokens.
        learning_rate: relative to the root mean square of each parameter; rises, then falls along a cosine.
        held_out: share of the windows that decides; with fewer than four steps' worth of windows, all decide.

    Returns:
        A record for each look: step, error on the held-out windows ‖out − target‖² / ‖target − in‖², weighted.
    """
    chain, index, hidden = task.stream.chain, task.index, task.stream.hidden
    in_fp32 = Float32Calls()
    own, dtypes = chain.block_parameters(index), chain.written_dtypes(index)
    parameters = {
        name: nn.Parameter(p.detach().to(torch.float32, copy=True), requires_grad=not chain.is_shared(name))
        for name, p in own.items()
    }
    pruned = {linear.weight_name for linear in chain.linears(index)}  # one that is left out may have been pruned before
    state = torch.zeros(2, trained_elements(parameters), device=chain.device)
    adam = Adam(parameters, pruned, state)
    pieces = task.stream.pieces
    # Each is in one process, which computes its gradient; all take the step.
    train, judges = held_out_of(of_all(range(len(pieces))), held_out)
    order = Shuffled(len(train), seed=index)

    def error(piece: Piece) -> tuple[Tensor, Tensor]:
        entering, wanted = (each[piece.batch][piece.rows].float() for each in (hidden, targets))
        missed = (chain.apply(index, entering, in_fp32(piece.calls[index])) - wanted).square().sum(-1)  # (rows, seq)
        size = (wanted - entering).square().sum(-1)
        if weights is not None:
            missed, size = (each * weights[piece.batch][piece.rows] for each in (missed, size))
        return missed.sum(), size.sum()

    def rounded() -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(as_written(p, dtypes[name]), requires_grad=False) for name, p in parameters.items()}

    @torch.no_grad()
    def judge() -> float:
        with running_on(chain, index, rounded()):
            sums = [
                torch.stack(error(pieces[number])).tolist() for process, number in judges if process == parallel.rank()
            ]
        missed, size = torch.tensor([each for _, each in of_all(sums)], dtype=torch.float64).sum(0).tolist()
        return float(missed / max(size, 1e-30))

    with running_on(chain, index, parameters):
        history = [{"step": 0.0, "held_out_error": judge()}]
        least, best = history[0]["held_out_error"], None
        looks = {round(steps * (look + 1) / CHECKS) for look in range(CHECKS)}
        for step in range(steps):
            process, number = train[next(order)]
            if process == parallel.rank():
                with torch.enable_grad():
                    missed, size = error(pieces[number])
                    with bf16_products(chain.products_in_bf16):
                        (missed / size.clamp(min=1e-30)).backward()
            share_gradients(parameters.values(), process)
            adam.step(learning_rate * schedule(step, steps), step + 1)
            if step + 1 in looks:
                history.append({"step": float(step + 1), "held_out_error": judge()})
                if history[-1]["held_out_error"] < least:
                    least = history[-1]["held_out_error"]
                    best = {name: p.detach().clone() for name, p in rounded().items()}
    if best is not None:
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(best[name])
    return history
