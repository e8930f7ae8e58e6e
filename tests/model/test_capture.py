"""What a run leaves out because nobody reads it, and how linears are watched."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError
from sparsellm.model.capture import RunOrder, skipping, watch
from sparsellm.model.structure import LinearView
from tests.models import tiny_gpt2, tiny_llama, tiny_opt, windows


def view(name: str, inputs: int, outputs: int) -> LinearView:
    return LinearView(name, nn.Linear(inputs, outputs), torch.float32)


def test_a_skipped_linear_gives_zeros_and_is_then_restored() -> None:
    linear = view("a", 3, 5)
    linear.module.forward = lambda x: x + 1  # type: ignore[method-assign]
    with contextlib.suppress(KeyError), skipping([linear]):
        assert torch.equal(linear.module(torch.randn(2, 4, 3)), torch.zeros(2, 4, 5))
        raise KeyError
    assert torch.equal(linear.module(torch.ones(2)), torch.full((2,), 2.0))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 80), nn.Linear(80, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(input=torch.relu(self.up(input=hidden)))


def test_linears_called_by_keyword_are_pruned_like_others() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = ByKeyword()
    result = sparsellm.prune(
        model, Recipe(sparsity=0.5, batch_tokens=64), calibration=windows(8, 32)
    )
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert [
        warning for warning in result.warnings if "windows of its own" not in warning
    ] == []


@pytest.mark.parametrize(
    ("given", "name"), [((), "NoneType"), (([torch.ones(2)],), "list")]
)
def test_a_linear_that_takes_or_returns_no_tensor_is_one_line(
    given: tuple[object, ...], name: str
) -> None:
    linear = view("block.odd", 3, 5)
    linear.module.forward = lambda *args: (torch.ones(2), None)  # type: ignore[method-assign]
    told = rf"block\.odd, a Linear, takes {name} and returns tuple"
    with pytest.raises(ModelError, match=told), watch([linear], lambda *_: None):
        linear.module(*given)


def test_only_what_runs_after_everything_wanted_is_unread() -> None:
    a, b, c, never = (view(name, 2, 2) for name in ("a", "b", "c", "never"))
    order = RunOrder(["a", "b", "c", "b"])
    everything = [a, b, c, never]
    assert order.unread(everything, inputs=[a], outputs=[]) == [a, b, c]
    assert order.unread(everything, inputs=[], outputs=[a]) == [b, c]
    # b runs again at the very end
    assert order.unread(everything, inputs=[a], outputs=[b]) == []
    assert order.unread(everything, inputs=[c], outputs=[]) == [c]
    assert order.unread(everything, inputs=[never], outputs=[]) == []


@pytest.mark.parametrize(
    ("family", "method"), [(tiny_opt, "sparsegpt"), (tiny_gpt2, "sparsellm")]
)
def test_leaving_out_what_nobody_reads_is_exact(
    family: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped: list[str] = []
    unread = RunOrder.unread

    def noted(
        self: RunOrder, *args: list[LinearView], **kwargs: list[LinearView]
    ) -> list[LinearView]:
        linears = unread(self, *args, **kwargs)
        skipped.extend(linear.name for linear in linears)
        return linears

    models = []
    for leave_out in (noted, lambda *args, **kwargs: []):
        monkeypatch.setattr(RunOrder, "unread", leave_out)
        model = family()
        sparsellm.prune(
            model,
            Recipe(method=method, sparsity=0.5, batch_tokens=64),
            calibration=windows(8, 32),
        )
        models.append(model.state_dict())
    assert skipped
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
