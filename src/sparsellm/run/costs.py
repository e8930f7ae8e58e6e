"""The seconds of each phase of a run, predicted from shapes and tokens. Only their proportions count, since
:class:`sparsellm.progress.Forecast` corrects them by finished phases."""

from __future__ import annotations

import time
from functools import cache

import torch

from sparsellm.chain import Chain
from sparsellm.run.choice import Choice
from sparsellm.run.memory import checkpoint_bytes
from sparsellm.sweep.gradients import LEAST_WINDOWS, SHARE, TOKENS
from sparsellm.sweep.whole_model import STEP_TOKENS, SWEEP_SHARE

DISK = 1e9  # bytes read, checked or written in a second
MEMORY = 5e9  # bytes of parameters and moments that a step of Adam moves in a second
BUSY = 0.5  # the share of a large product's speed that a block reaches
PASSES = 2  # runs of a block over all tokens while it is pruned: for statistics, and for the outputs
REPEATED = 3.3  # the same where pruned sublayers run again for each later group: q, k, v five times, down twice
BACKWARD = 3  # passes that a backward pass costs: the block again, and twice that for the gradients
SALIENCY = 3  # passes that the squared gradients of the weights cost
WRITING = 10  # passes that a token costs which the model writes itself


def predicted_seconds(
    chain: Chain,
    choice: Choice,
    tokens: int,
    seq_len: int,
    *,
    finished: int = 0,
    written: int = 0,
    kept: bool = True,
    swept: int | None = None,
) -> dict[str, float]:
    """Seconds of each phase after the model is opened, by the names of the phases in events.

    Args:
        tokens: tokens of the calibration windows of this process, in windows of ``seq_len``.
        finished: blocks that an earlier process has pruned; it has chosen the sparsities, too.
        written: tokens that the model writes itself.
        kept: whether there is memory for the outputs of pruned sublayers.
        swept: tokens of all passes of the sweep; None for those of new windows.
    """
    sizes = [(linear.in_features, linear.out_features) for linear in chain.linears(0)]
    config, speed = chain.config.get_text_config(), _speed(chain.device)
    blocks, stored, needs = len(chain), checkpoint_bytes(chain), choice.needs
    weights = sum(inputs * outputs for inputs, outputs in sizes)
    token = (2 * weights + 4 * seq_len * config.hidden_size) / (BUSY * speed)  # through one block
    head = 2 * config.vocab_size * config.hidden_size / (BUSY * speed)
    gram = sum(2 * inputs**2 for inputs, _ in sizes) / speed  # for one token
    solve = sum(choice.workspace.products * 2 * inputs**2 * outputs for inputs, outputs in sizes) / speed
    adam = 8 * 4 * weights * blocks / MEMORY  # parameters, two moments and gradients in fp32, read and written
    asked = choice.allocation_needs.gradient_tokens or TOKENS * needs.output_costs
    differentiated = min(tokens, max(asked, LEAST_WINDOWS * seq_len)) if asked and not finished else 0
    surveyed = tokens if choice.allocates and not asked and not finished else 0
    swept_tokens = choice.passes * SWEEP_SHARE * tokens if swept is None else swept
    passes = walked_passes(choice, kept=kept and chain.device.type == "cpu")
    return {
        "calibration": written * WRITING * blocks * token,
        "check": stored / DISK,
        "gradients": differentiated * (blocks * (1 + BACKWARD + SALIENCY) * token + 3 * SHARE * head),
        "survey": surveyed * blocks * token,
        "replay": finished * choice.sets * tokens * token,
        "prune": (blocks - finished) * (tokens * (passes * token + gram) + solve) + 2 * stored / DISK,
        "sweep": swept_tokens * (blocks * (2 + BACKWARD) * token + 4 * head) + swept_tokens / STEP_TOKENS * adam,
        "save": stored / DISK,
    }


def walked_passes(choice: Choice, *, kept: bool) -> float:
    """Passes of a block over all tokens in the walk, where outputs of pruned sublayers are kept or not
    (:mod:`sparsellm.chain.shortcuts`)."""
    again = choice.method.workspace.writers > 0 and not kept
    return (REPEATED if again else PASSES) + choice.sets - 1


@cache
def _speed(device: torch.device) -> float:
    """Operations a second in a large matrix product, by one that takes some milliseconds."""
    matrix = torch.ones(768, 768, device=device)
    (matrix @ matrix)[0, 0].item()  # starts threads and libraries
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()
    return 2.0 * 768**3 / max(time.perf_counter() - start, 1e-9)
