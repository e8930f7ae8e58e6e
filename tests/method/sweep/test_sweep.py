"""The sweep against autograd and ``torch.optim.Adam`` on the whole model; what must not change; where state is kept."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, NumericalError
from sparsellm.files.reader import CheckpointReader
from sparsellm.files.scratch import Room, Scratch
from sparsellm.method.sweep import head
from sparsellm.method.sweep import whole_model as module
from sparsellm.method.sweep.sweep_task import SweepTask
from sparsellm.method.sweep.training import adam_step, held_out_of
from sparsellm.method.sweep.whole_model import sweep
from sparsellm.model import Feed, open_chain
from sparsellm.records import SweepPass
from sparsellm.run.budget import can_be_resident
from tests.method.sweep import helpers
from tests.method.sweep.helpers import (
    CPU,
    block_parameters,
    divergence,
    halved,
    ids_of,
    linear_weights,
    same_bits,
    swept,
)
from tests.models import save_tiny, tiny_gpt2, tiny_llama


def in_memory(
    model: PreTrainedModel, dense: PreTrainedModel, *args: Any
) -> list[SweepPass]:
    return swept(open_chain(model, device=CPU), dense, *args)[0]


def test_divergences_are_rescaled_with_those_of_each_text() -> None:
    run, task = MagicMock(judge=lambda judges: (3.0, {})), MagicMock()
    history = [
        SweepPass(passes=n, held_out=kl, sources={"a": kl / 2})
        for n, kl in enumerate((4.0, 2.0))
    ]
    rescaled = module._rescaled(history, task, run, [])
    assert [(record.held_out, record.sources["a"]) for record in rescaled] == [
        (6.0, 3.0),
        (3.0, 1.5),
    ]


@pytest.mark.parametrize("head_tokens", [1 << 20, 12])
@pytest.mark.parametrize("family", helpers.FAMILIES, ids=lambda family: family.__name__)
def test_steps_are_those_of_adam_on_the_whole_model(
    family: helpers.Family, head_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the head in chunks of three positions."""
    monkeypatch.setattr(head, "HEAD_TOKENS", head_tokens)
    dense, model, ids = family(), halved(family()), ids_of(4)
    plain = copy.deepcopy(model)
    parameters, pruned = block_parameters(plain), linear_weights(plain)
    optimiser = torch.optim.Adam(
        [{"params": [p]} for p in parameters.values()], betas=(0.9, 0.95), eps=1e-8
    )
    certain = {
        name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()
    }
    rate, losses = 0.002, []
    # the first of three steps is warm; then the cosine begins
    for factor in (
        1.0,
        1.0,
        0.5,
    ):
        optimiser.zero_grad()
        loss = divergence(dense, plain, ids)
        loss.backward()
        losses.append(float(loss))
        for group, (name, p) in zip(
            optimiser.param_groups, parameters.items(), strict=True
        ):
            assert p.grad is not None
            if name in pruned:
                p.grad[p == 0] = 0.0
            # The direction of a step where the gradient is rounding noise (a key's bias) is chance.
            certain[name] &= (p.grad.abs() > 1e-3 * p.grad.abs().max()) & (
                p.grad.abs().max() > 1e-7
            )
            group["lr"] = rate * factor * float(p.detach().square().mean().sqrt())
        optimiser.step()
    before = {name: p.detach().clone() for name, p in block_parameters(model).items()}
    history = in_memory(model, dense, ids, 3, rate)
    assert [record.train for record in history[1:]] == pytest.approx(losses, rel=1e-4)
    # so the last state is what is kept
    assert min(record.held_out for record in history) == history[-1].held_out
    for name, result in block_parameters(model).items():
        moved = certain[name]
        moves, expected = (
            (result - before[name])[moved],
            (parameters[name] - before[name])[moved],
        )
        assert float((moves - expected).norm()) <= 0.01 * float(expected.norm()), name
    every = sum(mask.numel() for mask in certain.values())  # half are pruned
    assert sum(int(mask.sum()) for mask in certain.values()) > 0.4 * every


@pytest.mark.parametrize("two_of_four", [False, True])
def test_zeros_stay_and_the_rest_moves(two_of_four: bool) -> None:
    dense, model = tiny_gpt2(), halved(tiny_gpt2(), two_of_four)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    in_memory(model, dense, ids_of(4), 2, 0.003)
    weights = linear_weights(model)
    for name, after in model.named_parameters():
        if name in weights:
            zero = before[name] == 0
            assert int(zero.sum()) == zero.numel() // 2
            assert torch.equal(after == 0, zero)
            assert not bool(torch.signbit(after[zero]).any())
        assert torch.equal(after, before[name]) == (
            name not in block_parameters(model)
        ), name


def test_it_judges_by_windows_it_does_not_train_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", 24)
    dense, model, ids = tiny_llama(), halved(tiny_llama()), ids_of(8)
    held = ids[4:5]  # the middle one of eight
    start = divergence(dense, model, held).item()
    history = in_memory(model, dense, ids, 4, 0.003)
    assert history[0].held_out == pytest.approx(start, rel=1e-4)
    assert (least := min(record.held_out for record in history)) < start
    assert divergence(dense, model, held).item() == pytest.approx(least, rel=1e-4)


def test_each_pass_and_each_seed_has_its_order_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", 24)
    orders: list[tuple[int, ...]] = []
    real = module._pass

    def recorded(task: Any, run: Any, steps: Any, **more: Any) -> float:
        taken: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(
                run, "step", lambda step, *_: taken.append(steps.index(step)) or 0.0
            )
            real(task, run, steps, **more)
        orders.append(tuple(taken))
        return 0.0

    monkeypatch.setattr(module, "_pass", recorded)
    for seed in (3, 4, 3):
        swept(
            open_chain(halved(tiny_llama()), device=CPU),
            tiny_llama(),
            ids_of(8),
            2,
            0.001,
            seed=seed,
        )
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({*orders}) == 4
    assert orders[:2] == orders[4:]


def test_windows_of_the_last_smaller_batch_count_by_their_tokens() -> None:
    """Three windows in batches of two: the mean is over tokens, not over batches."""
    dense, model, ids = tiny_llama(), halved(tiny_llama()), ids_of(3, seq=48)
    history = in_memory(model, dense, ids, 1, 1e-9)
    assert history[0].held_out == pytest.approx(
        divergence(dense, model, ids).item(), rel=1e-5
    )


def test_on_disk_in_memory_and_twice_are_the_same_bits(tmp_path: Path) -> None:
    dense, model, ids = (
        helpers.tiny_mistral(),
        halved(helpers.tiny_mistral()),
        ids_of(8),
    )
    path = save_tiny(model, None, tmp_path / "halved")
    runs = [
        swept(open_chain(copy.deepcopy(model), device=CPU), dense, ids, 2, 0.003),
        swept(open_chain(path, device=CPU), dense, ids, 2, 0.003),
    ]
    for memory in (0, 50_000):
        scratch = Scratch(Room(memory), tmp_path)
        chain = open_chain(path, device=CPU)
        runs.append(swept(chain, dense, ids, 2, 0.003, scratch))
    for history, written in runs[1:]:
        assert history == runs[0][0]
        assert same_bits(written, runs[0][1])
    assert min(record.held_out for record in runs[0][0]) < runs[0][0][0].held_out


def test_bfloat16_is_rounded_at_the_end_and_judged_as_rounded(tmp_path: Path) -> None:
    ids, source = (
        ids_of(4),
        save_tiny(tiny_llama().to(torch.bfloat16), None, tmp_path / "dense"),
    )
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    path = save_tiny(halved(tiny_llama().to(torch.bfloat16)), None, tmp_path / "halved")
    # the same numbers
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # 24 steps of at most a thousandth: each is less than half a unit in the last place of most weights of bf16.
    in_fp32 = swept(open_chain(copy.deepcopy(exact), device=CPU), dense, ids, 24, 0.001)
    in_bf16 = swept(
        open_chain(path, device=CPU, dtype=torch.float32), dense, ids, 24, 0.001
    )
    least = [
        min(record.held_out for record in history) for history, _ in (in_fp32, in_bf16)
    ]
    assert least[1] < 0.9 * in_bf16[0][0].held_out
    assert least[1] != least[0]
    for name, value in in_bf16[1].items():
        assert value.dtype == torch.bfloat16
        assert (
            float((value != in_fp32[1][name].to(torch.bfloat16)).float().mean()) < 0.02
        ), name
    exact.load_state_dict(
        {name: value.float() for name, value in in_bf16[1].items()}, strict=False
    )
    assert divergence(dense, exact, ids).item() == pytest.approx(least[1], rel=1e-4)


def test_blocks_that_share_weights_are_swept_as_one(tmp_path: Path) -> None:
    """Zamba: a transformer that every other block runs through."""
    small = ["*.x_proj_weight", "*.dt_proj_weight", "*.A_log", "*.conv1d"]
    ids, recipe = (
        ids_of(4),
        Recipe(sparsity=0.5, samples=4, seq_len=24, sweep_rate=0.001, exclude=small),
    )
    source = save_tiny(helpers.tiny_zamba(), None, tmp_path / "dense")
    result = sparsellm.prune(
        helpers.tiny_zamba(), recipe, calibration=ids, out=tmp_path / "p"
    )
    assert result.sweeps[1].held_out < result.sweeps[0].held_out
    sparsellm.prune(source, recipe, calibration=ids, out=tmp_path / "q")
    first, second = (CheckpointReader(tmp_path / out) for out in "pq")
    assert set(first) == set(second) == set(CheckpointReader(source))
    assert all(torch.equal(first.get(name), second.get(name)) for name in first)
    for ranks in (1, 2):  # several processes would divide them
        chain = open_chain(source, device=CPU)
        assert can_be_resident(chain, unrounded=False, ranks=ranks) == (ranks == 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    shared = "shared_transf.feed_forward.up_proj.weight"
    weights = [
        value for name, value in loaded.state_dict().items() if name.endswith(shared)
    ]
    assert len(weights) == 2
    assert torch.equal(weights[0], weights[1])
    (linear,) = [
        linear
        for linear in result.linears
        if linear.name.endswith(shared.removesuffix(".weight"))
    ]
    assert int((weights[0] == 0).sum()) == linear.zeros > 0


def test_a_weight_used_outside_the_blocks_is_refused_at_the_door() -> None:
    model = tiny_llama()
    model.model.layers[2].input_layernorm.weight = model.model.norm.weight
    recipe = Recipe(method="sparsellm", sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ModelError,
        match=r"layers\.2\.input_layernorm\.weight is used outside the blocks.*passes=0",
    ):
        sparsellm.prune(model, recipe, calibration=ids_of(2))
    assert same_bits(model.state_dict(), before)
    sparsellm.prune(model, recipe.updated(passes=0), calibration=ids_of(2))


def test_a_divergence_that_is_not_finite_is_said() -> None:
    dense, model = tiny_llama(), halved(tiny_llama())
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match="diverges"):
        in_memory(model, dense, ids_of(2), 1, 0.001)


def test_a_gradient_that_is_not_finite_moves_no_zero() -> None:
    weight = nn.Parameter(torch.tensor([[0.0, 2.0]]))
    weight.grad = torch.tensor([[torch.inf, 1.0]])
    adam_step({"w": weight}, torch.zeros(2, 2), 0.1, 1, pruned={"w"})
    assert weight[0, 0] == 0
    assert weight[0, 1] < 2


def test_a_linear_that_is_left_out_keeps_the_zeros_it_had() -> None:
    model = halved(tiny_llama())
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    recipe = Recipe(
        method="sparsellm",
        sparsity=0.6,
        exclude=["*.down_proj"],
        passes=2,
        sweep_rate=0.003,
    )
    sparsellm.prune(model, recipe, calibration=ids_of(6))
    after = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)


def test_the_rate_follows_the_square_of_the_distance(
    steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CAREFUL", 0.0)  # nothing is tried out
    for mangle in (
        lambda model: model,
        lambda model: model.lm_head.weight.data.mul_(30),
    ):
        model, dense = halved(tiny_llama()), tiny_llama()
        mangle(model)
        mangle(dense)
        steps.clear()
        history = in_memory(model, dense, ids_of(4), 1, None)
        assert steps[0][1] == pytest.approx(
            module.RATE * min(1, (history[0].held_out / module.FAR) ** 2)
        )
        assert history[0].rate == steps[0][1]
    # and before it was less: both sides of the bend were seen
    assert history[0].held_out > module.FAR


@pytest.mark.parametrize("windows", [8, 12])
def test_a_small_distance_tries_rates_and_takes_the_best(
    windows: int, steps: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "STEP_TOKENS", 24)
    dense, ids = tiny_llama(), ids_of(windows)
    history = in_memory(halved(tiny_llama()), dense, ids, 1, None)
    assert history[0].held_out < module.CAREFUL
    # the last is the pass itself
    tried = [rate for _, rate, number, _ in steps if number == 1][:-1]
    assert tried[0] == module.LOWEST_PROBED
    assert all(
        later == pytest.approx(module.FASTER * rate)
        for rate, later in itertools.pairwise(tried)
    )
    assert tried[-1] <= module.PROBED
    assert history[0].rate in tried
    by_rule = in_memory(
        halved(tiny_llama()),
        dense,
        ids,
        1,
        module.RATE * (history[0].held_out / module.FAR) ** 2,
    )
    assert by_rule[0].held_out == history[0].held_out, (
        "the trials left something behind"
    )
    assert history[1].held_out < by_rule[1].held_out


def test_the_rate_rises_over_ten_steps_also_when_moments_begin_anew() -> None:
    rates = [module.schedule(step, 40, step + 1) for step in (*range(11), 25)]
    assert rates == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 0.5]
    )
    assert module.schedule(25, 40, 2) == pytest.approx(0.2 * 0.5)
    assert [module.schedule(step, 4, step + 1) for step in range(4)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5]
    )


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_harm_is_undone_and_the_next_pass_slower(
    where: str, tmp_path: Path, steps: Any
) -> None:
    """One window is all there is: the loss before the first step of each pass is that of where it begins."""
    ids, dense = ids_of(1), tiny_llama()
    model = halved(tiny_llama())
    chain = open_chain(
        model if where == "memory" else save_tiny(model, None, tmp_path / "halved"),
        device=CPU,
    )
    history, _ = swept(chain, dense, ids, 8, 1.0)
    harmful = module.harmful_passes(history)
    assert 1 in harmful
    losses, rates, numbers, _ = zip(*steps, strict=True)
    least, cuts = losses[0], 0
    for number, record in enumerate(history[1:-1], start=1):
        cuts += record.passes in harmful
        least = min(least, record.held_out * ids.numel())
        assert rates[number] == pytest.approx(
            module.CUT**cuts * module.schedule(number, 8, numbers[number])
        )
        if record.passes in harmful:
            assert losses[number] == pytest.approx(least, rel=1e-5)
            assert numbers[number] == 1
        else:
            assert numbers[number] == numbers[number - 1] + 1


def test_what_harm_is() -> None:
    divergences = [1.0, 1.005, 0.5, 0.6, float("nan"), 0.504, 0.4]
    assert module.harmful_passes(
        [SweepPass(passes=n, held_out=v) for n, v in enumerate(divergences)]
    ) == [3, 4]


@pytest.mark.parametrize(
    ("count", "held"),
    [(3, []), (4, [2]), (8, [4]), (16, [4, 12]), (200, [*range(12, 200, 25)])],
)
def test_what_is_held_out(count: int, held: list[int]) -> None:
    train, judges = held_out_of(list(range(count)))
    assert train == [i for i in range(count) if i not in held]
    assert judges == (held or list(range(count)))
    # alternating, as windows of a mixture
    kinds = ["a"] * 2 + ["b", "c"] * (count // 2 - 1) + ["d"] * (count % 2)
    _, judges = held_out_of(list(range(count)), kinds)
    assert {kinds[i] for i in judges} == set(kinds)
    assert held_out_of([0, 1, 2, 3], "abcd") == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_the_divergence_of_each_text_is_that_of_its_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a step has windows of two texts."""
    monkeypatch.setattr(module, "STEP_TOKENS", 48)
    dense, model, ids = tiny_llama(), halved(tiny_llama()), ids_of(6)
    feed, names = (
        Feed(open_chain(model, device=CPU), ids, helpers.TOKENS),
        ["a", "b", "a", "a", "b", "a"],
    )
    end = helpers.dense_end(dense, ids, helpers.TOKENS)
    start, _ = sweep(
        SweepTask(feed, end, 1, 3, lambda _: None, learning_rate=0.0, sources=names)
    )
    alone = {
        name: divergence(dense, model, ids[[source == name for source in names]]).item()
        for name in "ab"
    }
    assert start.sources == pytest.approx(alone, rel=1e-4)
    assert start.held_out == pytest.approx(
        (4 * alone["a"] + 2 * alone["b"]) / 6, rel=1e-4
    )


@pytest.mark.parametrize(("rate", "step"), [(1e-4, 5e-4), (7e-4, 1e-3)])
def test_factors_take_longer_steps(rate: float, step: float) -> None:
    """Adam's first step is the rate against the gradient's sign, here relative to a root mean square of 1."""
    parameters, signs = (
        {n: nn.Parameter(torch.ones(4)) for n in ("w", "w.factors")},
        torch.tensor([1.0, -1, 1, 1]),
    )
    for parameter in parameters.values():
        parameter.grad = signs * torch.tensor([3.0, 0.1, 1e-3, 2.0])
    adam_step(parameters, torch.zeros(2, 8), rate, 1, factors={"w.factors"})
    assert torch.allclose(1 - parameters["w"].detach(), rate * signs, rtol=1e-3)
    assert torch.allclose(1 - parameters["w.factors"].detach(), step * signs, rtol=1e-3)
