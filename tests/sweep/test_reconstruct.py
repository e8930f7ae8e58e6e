"""The reconstruction of one block against autograd, and what it must leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm.chain import open_chain, streams
from sparsellm.chain.streams import Stream
from sparsellm.chain.structure import find_blocks
from sparsellm.methods.base import BlockTask
from sparsellm.patterns import Unstructured
from sparsellm.progress import PhaseClock
from sparsellm.sweep import reconstruct as module
from sparsellm.sweep.reconstruct import reconstruct
from sparsellm.sweep.training import Adam, held_out_of
from tests.models import tiny_gpt2, tiny_llama, tiny_opt
from tests.sweep.helpers import CPU, FAMILIES, Family, halved, ids_of, linear_weights, tiny_mistral

TOKENS = 96


def task_of(model: PreTrainedModel, ids: Tensor) -> tuple[BlockTask, list[Tensor]]:
    """Block 0 of a model halved, and what it gave before."""
    stream = Stream(open_chain(model, device=CPU), ids, batch_tokens=TOKENS, pieces=streams.PIECE_TOKENS)
    targets = list(stream.run(0))
    halved(model)
    linears = stream.chain.linears(0)
    patterns = {linear.name: Unstructured(0.5) for linear in linears}
    return BlockTask(0, linears, patterns, stream, lambda _: None, PhaseClock()), targets


def outputs(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What enters and leaves block 0 in the plain model's own forward."""
    seen: list[Tensor] = []

    def see(block: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen.extend([args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out])

    handle = find_blocks(model)[1][0].register_forward_hook(see, with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    return seen[0], seen[1]


def missed(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, weights: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        entering, wanted = outputs(dense, ids)
    found = outputs(model, ids)[1]
    weights = torch.ones(ids.shape) if weights is None else weights
    size = (weights[..., None] * (wanted - entering).square()).sum()
    return (weights[..., None] * (found - wanted).square()).sum() / size


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_gradients_are_those_of_autograd(family: Family, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of a batch of four are a step, so that a mask with a row for each window must be theirs."""
    monkeypatch.setattr(streams, "PIECE_TOKENS", 48)
    found: list[dict[str, Tensor]] = []

    class Recorded(Adam):
        def step(self, rate: float, number: int) -> None:
            found.append({name: p.grad.clone() for name, p in self._parameters.items() if p.grad is not None})
            for p in self._parameters.values():
                p.grad = None

    monkeypatch.setattr(module, "Adam", Recorded)
    ids, model, dense = ids_of(4), family(), family()
    weights = torch.rand(4, 24, generator=torch.Generator().manual_seed(1)) if weighted else None
    task, targets = task_of(model, ids)
    history = reconstruct(task, targets, [weights] if weights is not None else None, steps=2, learning_rate=0.01)
    halves = [(ids[part], weights[part] if weights is not None else None) for part in (slice(2), slice(2, 4))]
    name = find_blocks(model)[0]
    wanted = []
    for part, some in halves:
        model.zero_grad()
        missed(model, dense, part, some).backward()
        wanted.append({n: p.grad for n, p in model.named_parameters() if n.startswith(f"{name}.0.")})
    total = {n: wanted[0][n] + wanted[1][n] for n in wanted[0]}  # type: ignore[operator]
    assert found[0].keys() == total.keys()
    for each, gradient in total.items():
        both = found[0][each] + found[1][each]
        torch.testing.assert_close(both, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-9, msg=each)
    assert history[0]["held_out_error"] == pytest.approx(missed(model, dense, ids, weights).item(), rel=1e-4)


@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2, tiny_mistral], ids=lambda family: family.__name__)
def test_what_is_kept_is_the_best_of_the_looks_on_windows_held_out(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PIECE_TOKENS", 24)
    ids, model, dense = ids_of(8), family(), family()
    task, targets = task_of(model, ids)
    zeros = {name: weight == 0 for name, weight in linear_weights(model).items()}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if ".0." not in n}
    held = ids[4:5]
    start = missed(model, dense, held).item()
    history = reconstruct(task, targets, None, steps=16, learning_rate=0.005)
    assert [look["step"] for look in history] == [0, 4, 8, 12, 16]
    assert history[0]["held_out_error"] == pytest.approx(start, rel=1e-4)
    least = min(look["held_out_error"] for look in history)
    assert least < start
    assert missed(model, dense, held).item() == pytest.approx(least, rel=1e-4)
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in linear_weights(model).items())
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)


@pytest.mark.parametrize("rate", [100.0, 1e30])
def test_a_start_that_was_better_is_kept_to_the_bit(rate: float) -> None:
    model = tiny_opt()
    task, targets = task_of(model, ids_of(4))
    before = copy.deepcopy(model.state_dict())
    history = reconstruct(task, targets, None, steps=4, learning_rate=rate)
    assert not any(look["held_out_error"] < history[0]["held_out_error"] for look in history)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("steps", "looks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (7, [2, 4, 5, 7])])
def test_it_looks_at_most_four_times_and_at_the_end(steps: int, looks: list[int]) -> None:
    task, targets = task_of(tiny_opt(), ids_of(2))
    history = reconstruct(task, targets, None, steps=steps, learning_rate=0.002)
    assert [look["step"] for look in history] == [0, *looks]


def test_pieces_are_whole_windows_that_cover_each_batch_once() -> None:
    chain = open_chain(tiny_opt(), device=CPU)
    stream = Stream(chain, ids_of(100, seq=32), batch_tokens=3200, pieces=2048)
    assert [(piece.batch, piece.rows) for piece in stream.pieces] == [(0, slice(0, 64)), (0, slice(64, 128))]
    stream = Stream(chain, ids_of(5), batch_tokens=48, pieces=2048)
    assert [(piece.batch, piece.rows) for piece in stream.pieces] == [(i, slice(0, 85)) for i in range(3)]
    assert all(len(piece.calls) == len(chain) for piece in stream.pieces)


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [
        (3, 0.5, []),
        (4, 0.125, [2]),
        (8, 0.125, [4]),
        (16, 0.125, [4, 12]),
        (16, 0.0, []),
        (5, 0.4, [1, 3]),
        (200, 0.125, [12, 37, 62, 87, 112, 137, 162, 187]),
    ],
)
def test_what_is_held_out(count: int, fraction: float, held: list[int]) -> None:
    train, judges = held_out_of(list(range(count)), fraction)
    assert train == [i for i in range(count) if i not in held]
    assert judges == (held or list(range(count)))


def test_bf16_is_judged_as_it_is_written() -> None:
    """The block that is left misses by just what the best look said, though Adam worked on fp32 copies."""
    ids, dense = ids_of(4), tiny_gpt2().to(torch.bfloat16)
    model = copy.deepcopy(dense)
    task, targets = task_of(model, ids)
    history = reconstruct(task, targets, None, steps=12, learning_rate=0.003)
    least = min(look["held_out_error"] for look in history)
    assert least < history[0]["held_out_error"]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    entering, wanted = (outputs(dense, ids)[0].float(), torch.cat(targets).float())
    exact = copy.deepcopy(model).float()
    call = task.stream.pieces[0].calls[0].to(torch.float32)
    found = call.on(find_blocks(exact)[1][0], entering)
    found = found[0] if isinstance(found, tuple) else found
    error = (found - wanted).square().sum() / (wanted - entering).square().sum()
    assert error.item() == pytest.approx(least, rel=1e-4)
