"""Modules that later passes do not run: no bit of any result changes, and what returns anything else runs as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.files.scratch import Room, Scratch
from sparsellm.method.blocks import sublayers
from sparsellm.model import Stream
from sparsellm.run.budget import Budget
from tests.killing import ahead_of
from tests.method.sweep.helpers import ids_of, same_bits
from tests.models import tiny_llama
from tests.models.families import STAY_DENSE, family

IDS = ids_of(5, seed=4)
# Classes of modules that the last pass over a block leaves out. OPT's linears are in none; BLOOM's add the residual.
LEFT_OUT = {
    "Llama": {"LlamaAttention", "LlamaMLP"},
    "OPT": {"OPTAttention", "Linear"},
    "GPT2": {"GPT2Attention", "GPT2MLP"},
    "Phi": {
        "PhiAttention",
        "PhiMLP",
    },  # its feed-forward unit has the input of attention
    "Bloom": {"Linear"},
    "Mixtral": {"MixtralAttention"},
    "Gemma4Text": {
        "Linear",
        "Gemma4TextMLP",
    },  # its attention is given a dict, to which it writes keys and values
}


def pruned(model: PreTrainedModel, **options: Any) -> dict[str, Tensor]:
    recipe = Recipe(
        sparsity=0.5, effort=0, batch_tokens=48, options=options, allow_dense=STAY_DENSE
    )
    sparsellm.prune(model, recipe, calibration=IDS)
    return model.state_dict()


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The classes of modules that the forward after pruning did not run. That forward is compared with a plain one."""
    classes: set[str] = set()

    def compared(self: Stream, index: int) -> None:
        quick = list(self.run(index))
        classes.update(type(known.module).__name__ for known in self.known)
        self.forget()
        assert all(
            torch.equal(one, other)
            for one, other in zip(quick, self.run(index), strict=True)
        )

    ahead_of(monkeypatch, Stream, "advance", compared)
    return classes


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LEFT_OUT),
    ("Llama", {"refit": False}),
    (
        "OPT",
        {"iterations": 1},
    ),  # the linears of the feed-forward unit are pruned together
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_no_bit_changes(
    name: str, options: Any, left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = pruned(family(name), **options)
    assert left_out == (
        LEFT_OUT[name] if not options.get("iterations") else {"OPTAttention"}
    )
    monkeypatch.setattr(sublayers, "_shortcut", lambda *_: None)  # a plain run
    assert same_bits(quick, pruned(family(name), **options))


class Scaled(nn.Module):
    """An attention whose output is not its last linear's."""

    def __init__(self, inner: nn.Module, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.last(self.inner(*args, **kwargs)[0]), None


class Returning(Scaled):
    """An attention that returns a tensor more."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        first = self.inner(*args, **kwargs)[0]
        return first, first.mean()


@pytest.mark.parametrize(
    ("wrapper", "last", "module"),
    [
        (Scaled, lambda x: x * 2, "LlamaAttention"),
        (Scaled, lambda x: x.clamp(-9, 9), "LlamaAttention"),  # changes nothing here
        (
            Scaled,
            lambda x: x.mul_(2),
            "LlamaAttention",
        ),  # the same memory with other values
        (Scaled, lambda x: x, "Scaled"),
        (Returning, None, "Returning"),  # which the block does not read
    ],
    ids=["scaled", "clamped", "in place", "as it is", "two tensors"],
)
def test_a_module_that_does_more_than_its_writer_runs(
    wrapper: type[Scaled],
    last: Any,
    module: str,
    left_out: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrapped() -> PreTrainedModel:
        model = tiny_llama(num_hidden_layers=2)
        for layer in model.model.layers:
            layer.self_attn = wrapper(layer.self_attn, last)
        return model

    quick = pruned(wrapped())
    assert module in left_out
    monkeypatch.setattr(sublayers, "_shortcut", lambda *_: None)  # a plain run
    assert same_bits(quick, pruned(wrapped()))


@pytest.mark.parametrize(
    ("kept", "modules"), [(5 * 24 * 32 * 4, {"LlamaAttention"}), (0, set())]
)
def test_what_finds_no_room_is_run_again(
    kept: int, modules: set[str], left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the feed-forward unit, 80 instead of 32 numbers of each token are kept."""
    with_room = pruned(tiny_llama(num_hidden_layers=2))
    assert left_out == {"LlamaAttention", "LlamaMLP"}
    left_out.clear()
    monkeypatch.setattr(Budget, "scratch", lambda *_: Scratch(None, spare=Room(kept)))
    assert same_bits(with_room, pruned(tiny_llama(num_hidden_layers=2)))
    assert left_out == modules
