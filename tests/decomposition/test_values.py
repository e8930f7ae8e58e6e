"""The update of attention's values by a direct solve; what lies between value and output by attention itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsellm.chain import open_chain
from sparsellm.chain.streams import Stream
from sparsellm.chain.units import find_value_output
from sparsellm.decomposition import Linear
from sparsellm.decomposition.values import Moved, default_value_coefficients, update_values, value_terms
from sparsellm.methods.base import BlockTask
from sparsellm.methods.values import _Attention
from sparsellm.progress import PhaseClock
from tests.models import VOCABULARY, tiny_llama

WINDOWS, SEQ, VALUES, MIXED = 2, 5, 3, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def maps() -> Tensor:
    """A matrix for each window, ``(windows, seq · f_a, seq · f_v)``."""
    return normal(WINDOWS, SEQ * MIXED, SEQ * VALUES, seed=5)


def forwards(maps: Tensor, values: Tensor) -> Tensor:
    return (maps @ values.flatten(1)[..., None]).view(WINDOWS, SEQ, MIXED)


def backwards(maps: Tensor, mixed: Tensor) -> Tensor:
    return (maps.mT @ mixed.flatten(1)[..., None]).view(WINDOWS, SEQ, VALUES)


def objective(
    values: Tensor, m: Tensor, a: Tensor, maps: Tensor, alpha: float, gamma: float, weights: Tensor
) -> Tensor:
    apart, missed = (values - m).square().sum(-1), (a - forwards(maps, values)).square().sum(-1)
    return ((alpha * apart + gamma * missed) * weights).sum(1)


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 1.0), (0.3, 7.0), (5.0, 0.2)])
def test_the_values_are_those_of_a_direct_solve(maps: Tensor, alpha: float, gamma: float) -> None:
    m, a = normal(WINDOWS, SEQ, VALUES, seed=1), normal(WINDOWS, SEQ, MIXED, seed=2)
    start, weights = normal(WINDOWS, SEQ, VALUES, seed=3), normal(WINDOWS, SEQ, seed=4).square() + 0.1
    found = update_values(
        m, a, Moved(start, forwards(maps, start)), lambda v: forwards(maps, v), lambda r: backwards(maps, r),
        alpha=alpha, gamma=gamma, token_weights=weights, steps=60,
    )  # fmt: skip
    for window in range(WINDOWS):
        wide = maps[window].double()
        of_values = weights[window].repeat_interleave(VALUES).double()
        of_mixed = weights[window].repeat_interleave(MIXED).double()
        system = alpha * of_values.diag() + gamma * wide.T @ (of_mixed[:, None] * wide)
        wanted = alpha * of_values * m[window].flatten() + gamma * wide.T @ (of_mixed * a[window].flatten())
        exact = torch.linalg.solve(system, wanted).view(SEQ, VALUES)
        torch.testing.assert_close(found.values[window].double(), exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.mixed, forwards(maps, found.values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_no_window_ever_ends_worse(maps: Tensor, steps: int) -> None:
    m, a = normal(WINDOWS, SEQ, VALUES, seed=1), normal(WINDOWS, SEQ, MIXED, seed=2) * 1000
    start, weights = normal(WINDOWS, SEQ, VALUES, seed=3), torch.ones(WINDOWS, SEQ)
    weights[1] = 0  # held out: not moved
    found = update_values(
        m, a, Moved(start, forwards(maps, start)), lambda v: forwards(maps, v), lambda r: backwards(maps, r),
        alpha=1.0, gamma=2.0, token_weights=weights, steps=steps,
    )  # fmt: skip
    before, after = (objective(v, m, a, maps, 1.0, 2.0, weights) for v in (start, found.values))
    assert bool((after <= before).all())
    assert (float(after[0]) < float(before[0])) == (steps > 0)
    assert torch.equal(found.values[1], start[1])


def test_the_terms_are_the_objective(maps: Tensor) -> None:
    m, a = normal(WINDOWS, SEQ, VALUES, seed=1), normal(WINDOWS, SEQ, MIXED, seed=2)
    values, y = normal(WINDOWS, SEQ, VALUES, seed=3), normal(WINDOWS, SEQ, 4, seed=6)
    output, weights = Linear(normal(4, MIXED, seed=7), normal(4, seed=8)), normal(WINDOWS, SEQ, seed=9).square()
    prices = default_value_coefficients(output, y, lambda v: forwards(maps, v), values)
    terms = value_terms(output, m, y, Moved(values, forwards(maps, values)), a, prices, weights)
    inside = objective(values, m, a, maps, prices.alpha, prices.gamma, weights).sum()
    outside = prices.beta * ((y - a @ output.weight.T - output.bias).square().sum(-1) * weights).sum()
    assert terms.total == pytest.approx(float(inside + outside), rel=1e-5)


def test_prices_follow_the_scale_of_what_they_price(maps: Tensor) -> None:
    """Values and targets in other units leave the balance of the terms as it was."""
    values, y = normal(WINDOWS, SEQ, VALUES, seed=3), normal(WINDOWS, SEQ, 4, seed=6)
    plain = default_value_coefficients(Linear(normal(4, MIXED, seed=7)), y, lambda v: forwards(maps, v), values)
    bigger = default_value_coefficients(
        Linear(normal(4, MIXED, seed=7)), y * 10, lambda v: forwards(maps, v) * 3, values
    )
    assert bigger.beta == pytest.approx(plain.beta / 100, rel=1e-5)
    assert bigger.gamma == pytest.approx(plain.gamma / 100, rel=1e-5)
    assert bigger.alpha == pytest.approx(plain.alpha * 9 / 100, rel=1e-5)


def test_what_lies_between_is_attention_and_its_adjoint() -> None:
    model = tiny_llama(attn_implementation="eager")
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    chain = open_chain(model, device=torch.device("cpu"))
    stream = Stream(chain, ids, batch_tokens=60)
    linears = chain.linears(0)
    output = next(linear for linear in linears if linear.name.endswith("o_proj"))
    pair = find_value_output([x for x in linears if x is not output], output, lambda: stream.run_window(0))
    assert pair is not None
    task = BlockTask(0, linears, {}, stream, lambda text: None, PhaseClock())
    v, r = normal(3, 20, 16, seed=1), normal(3, 20, 32, seed=2)
    with _Attention(task, pair.value, pair.output, 0, [output]) as attention:
        mixed = attention.linearised(v)
        again, back = attention.mix(v), attention.adjoint(r)
        entering, given = attention.entering, attention.given
    torch.testing.assert_close(again, mixed)
    assert float((mixed * r).sum()) == pytest.approx(float((v * back).sum()), rel=1e-4)
    torch.testing.assert_close(given, entering @ pair.value.weight().T)
    patterns = model(ids, output_attentions=True).attentions[0]  # (windows, heads, seq, seq)
    heads = v.view(3, 20, 2, 8).repeat_interleave(2, dim=2)  # grouped queries: two heads share one of the values
    expected = torch.einsum("whts,wshf->wthf", patterns, heads).flatten(2)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


def test_a_failure_leaves_the_block_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    ids = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    chain = open_chain(model, device=torch.device("cpu"))
    stream = Stream(chain, ids, batch_tokens=20)
    linears = {linear.name.rpartition(".")[2]: linear for linear in chain.linears(0)}
    task = BlockTask(0, list(linears.values()), {}, stream, lambda text: None, PhaseClock())
    attention = _Attention(task, linears["v_proj"], linears["o_proj"], 0, [linears["o_proj"]])

    def fail(*arguments: object) -> Tensor:
        raise MemoryError

    plain = stream.run_batch(0, 0)
    monkeypatch.setattr(chain, "apply", fail)
    with pytest.raises(MemoryError), attention:
        pass
    monkeypatch.undo()
    assert torch.equal(stream.run_batch(0, 0), plain)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(linear.module._forward_hooks for linear in linears.values())
