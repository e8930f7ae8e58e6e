"""Perplexity and divergence against brute force in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsellm.errors import DataError, NumericalError
from sparsellm.evaluation import kl_divergence, nll_from_logits, perplexity
from tests.models import POSITIONS, VOCABULARY, tiny_gpt2, tiny_llama, tiny_opt


def windows_of(count: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_is_that_of_a_double_precision_computation(build: Any, batch_size: int) -> None:
    model, windows = build(), windows_of(5, 40)
    expected = 0.0
    with torch.no_grad():
        for window in windows:
            log_p = model(input_ids=window[None]).logits[0].double().log_softmax(-1)  # (T, vocabulary)
            expected -= sum(log_p[t, window[t + 1]].item() for t in range(39))
    result = perplexity(model, windows, batch_size=batch_size)
    assert result.tokens == 5 * 39
    assert result.window == 40
    assert result.nll == pytest.approx(expected / (5 * 39), rel=1e-5)
    assert result.value == pytest.approx(math.exp(result.nll))


def test_perplexity_leaves_the_model_in_its_mode_and_reports_progress() -> None:
    model, steps = tiny_llama().train(), []
    perplexity(model, windows_of(3, 8), batch_size=2, progress=lambda done, all_: steps.append((done, all_)))
    assert model.training
    assert steps == [(2, 3), (3, 3)]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, windows_of(2, POSITIONS)).value == pytest.approx(VOCABULARY, rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericalError, match="window 0 to 0 is nan"):
        perplexity(model, windows_of(2, 8))
    assert not model.training


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_windows_that_hold_no_prediction_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="shape"):
        perplexity(tiny_llama(), torch.zeros(shape, dtype=torch.int64))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 700), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_chunks_do_not_change_the_sum(length: int, batch: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn(batch, length, 11, generator=generator).to(dtype)
    ids = torch.randint(11, (batch, length), generator=generator)
    log_p = logits.double().log_softmax(-1)[:, :-1]
    expected = -log_p.gather(-1, ids[:, 1:, None]).sum().item()
    total, count = nll_from_logits(logits, ids)
    assert count == batch * (length - 1)
    assert total == pytest.approx(expected, rel=1e-5)


def test_divergence_is_that_of_a_double_precision_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = torch.randn(2, 2, 300, 17, generator=generator)
    p = dense.double().softmax(-1)
    expected = (p * (p.log() - other.double().log_softmax(-1))).sum(-1).mean().item()
    assert kl_divergence(dense, other) == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(dense, dense) == 0


def test_divergence_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(DataError, match="compared"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(NumericalError):
        kl_divergence(torch.full((1, 3), math.nan), torch.zeros(1, 3))
