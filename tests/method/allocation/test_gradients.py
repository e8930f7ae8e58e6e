"""The backward sweep, block by block, against plain autograd of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparsellm import Recipe, prune
from sparsellm.errors import DataError, ModelError, NumericalError
from sparsellm.files.scratch import Room, Scratch
from sparsellm.method.sweep import gradients, head
from sparsellm.method.sweep.gradients import backward_sweep, loss_gradients
from sparsellm.model import Chain, Feed, LinearView, open_chain
from tests.method.allocation.helpers import IDS, Record, sizes_of
from tests.method.sweep.helpers import CPU, Family
from tests.models import save_tiny, tiny_llama, tiny_opt, tiny_tokenizer, windows
from tests.models.families import mixtral


def squares(
    chain: Chain, batch_tokens: int = 2048, names: list[str] | None = None
) -> dict[str, Tensor]:
    chosen = names if names is not None else [linear.name for linear in sizes_of(chain)]
    return loss_gradients(Feed(chain, IDS, batch_tokens), chosen).output_squares


def test_the_scored_positions_do_not_depend_on_batches() -> None:
    chain, ids = (
        open_chain(tiny_llama(max_position_embeddings=256), device=CPU),
        windows(4, 200),
    )
    one, two = (
        loss_gradients(Feed(chain, ids, tokens), ["model.layers.0.mlp.up_proj"])
        for tokens in (200, 800)
    )
    torch.testing.assert_close(one.output_squares, two.output_squares)


class Everything:
    """The inputs of linears and the gradients at their outputs, and the linears of each block."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.gradient: dict[str, list[Tensor]] = {}
        self.blocks: list[list[str]] = []

    def see(self, linear: LinearView, x: Tensor, gradient: Tensor) -> None:
        self.inputs.setdefault(linear.name, []).append(x.flatten(0, -2).clone())
        self.gradient.setdefault(linear.name, []).append(
            gradient.flatten(0, -2).clone()
        )

    def done(self, linears: list[LinearView]) -> None:
        self.blocks.append([linear.name for linear in linears])

    def swept(self, feed: Feed, fraction: float = 1.0) -> float:
        names = [linear.name for linear in sizes_of(feed.chain)]
        return backward_sweep(
            feed,
            names,
            see=self.see,
            done=self.done,
            fraction=fraction,
            reads_inputs=True,
        )


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("head_tokens", [256, 7])
def test_every_gradient_is_that_of_the_whole_model(
    family: Family,
    lazy: bool,
    head_tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # several chunks of a window, the last one shorter
    monkeypatch.setattr(head, "HEAD_TOKENS", head_tokens)
    model = family()
    chain = open_chain(
        save_tiny(model, tiny_tokenizer(), tmp_path / "m") if lazy else model,
        device=CPU,
    )
    names = [linear.name for linear in sizes_of(chain)]
    record, seen = Record(model, IDS, names), Everything()
    scratch = Scratch(Room(4000 if lazy else None), tmp_path)  # most of it on disk
    loss = seen.swept(Feed(chain, IDS, 45, scratch))
    assert loss == pytest.approx(float(record.loss.detach()) / (6 * 19), rel=1e-5)
    assert [name for block in reversed(seen.blocks) for name in block] == names
    assert seen.gradient.keys() == set(names)
    for name in names:
        torch.testing.assert_close(
            torch.cat(seen.inputs[name]), record.inputs[name], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            torch.cat(seen.gradient[name]), record.gradient[name], rtol=1e-3, atol=1e-6
        )


def test_gradients_of_a_share_of_the_positions_are_scaled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "LEAST_SCORED", 1)
    chain, seen, complete = (
        open_chain(tiny_llama(), device=CPU),
        Everything(),
        Everything(),
    )
    loss = seen.swept(Feed(chain, IDS, 45), fraction=0.4)
    # an estimate of the same
    assert abs(loss - complete.swept(Feed(chain, IDS, 45))) < 1
    # its gradient is that of the residual stream
    last, drawn = (
        "model.layers.2.mlp.down_proj",
        [],
    )
    for some, all_of_it in zip(
        seen.gradient[last], complete.gradient[last], strict=True
    ):
        scored = some.view(-1, 20, 32).abs().sum(dim=2) > 0
        assert scored.sum(1).eq(8).all()  # from 19
        rows = scored.flatten()
        torch.testing.assert_close(
            some[rows], all_of_it[rows] * (19 / 8) ** 0.5, rtol=1e-4, atol=1e-7
        )
        drawn.append(scored.tolist())
    assert drawn[0] != drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_short_windows_are_scored_whole() -> None:
    assert gradients._positions(gradients.LEAST_SCORED, 0.01, seed=0).tolist() == list(
        range(gradients.LEAST_SCORED)
    )
    some = gradients._positions(1000, 0.25, seed=0)
    assert some.tolist() == sorted(set(some.tolist()))
    assert (len(some), int(some.max()) < 1000) == (250, True)
    assert torch.equal(some, gradients._positions(1000, 0.25, seed=0))


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)]
)
def test_squares_of_named_linears_are_means_over_tokens(
    family: Family, dtype: torch.dtype, error: float
) -> None:
    """In fp32 whatever the model's dtype; hidden states of bf16 were rounded on their way."""
    model = family().to(dtype)
    chain = open_chain(model, device=CPU)
    names = [linear.name for linear in sizes_of(chain)][1::3]
    result = squares(chain, 40, names)
    record = Record(model.float(), IDS, names)  # the same weights
    assert result.keys() == set(names)
    for name in names:
        assert result[name].dtype == torch.float32
        expected = record.gradient[name].square().mean(0)
        assert float((result[name] - expected).norm() / expected.norm()) < error


def test_an_input_that_is_changed_in_place_afterwards_is_refused() -> None:
    model = tiny_opt()
    layer = model.model.decoder.layers[0]
    given: list[Tensor] = []
    layer.fc1.register_forward_pre_hook(
        lambda module, args: given.append(args[0].detach())
    )

    def spoil(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        given[-1].mul_(2)

    layer.fc2.register_forward_hook(spoil)
    with pytest.raises(ModelError, match="fc1"):
        Everything().swept(Feed(open_chain(model, device=CPU), IDS, 2048))
    # squares of outputs do not read inputs
    assert squares(open_chain(model, device=CPU))


def test_gradients_that_are_not_finite_are_named() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return gradient[0] * torch.nan

    model = tiny_llama()
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: Broken.apply(output)
    )
    recipe = Recipe(sparsity=0.5, effort=0)
    for asking in (recipe, recipe.updated(allocation="uniform")):
        with pytest.raises(
            NumericalError,
            match=r"gradients at model\.layers\.1\..* not finite; .* do without",
        ):
            prune(model, asking, calibration=IDS)


def test_experts_that_no_token_was_routed_to_are_left_out() -> None:
    chain = open_chain(mixtral(), device=CPU)
    names = [linear.name for linear in sizes_of(chain)]
    result = loss_gradients(Feed(chain, windows(1, 3), 2048), names, saliency=True)
    assert result.output_squares.keys() == result.saliency.keys()
    assert 0 < len(result.saliency) < len(names)


def changing(inplace: bool) -> PreTrainedModel:
    """Every block doubles its input first."""

    class Doubling(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
            return super().forward(
                hidden_states.mul_(2) if inplace else hidden_states * 2, **call
            )

    model = tiny_llama()
    for layer in model.model.layers:
        layer.__class__ = Doubling
    return model


def test_a_block_may_change_in_place_what_it_is_given() -> None:
    """It runs several times on what enters it, and gradients are of what entered."""
    changed, copied = (
        squares(open_chain(changing(inplace), device=CPU), 40)
        for inplace in (True, False)
    )
    assert all(torch.equal(changed[name], copied[name]) for name in copied)
    one, other = changing(True), changing(False)
    for model in (one, other):
        prune(model, Recipe(sparsity=0.5, passes=1), calibration=IDS)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_a_block_without_a_gradient_is_named_if_one_is_needed() -> None:
    class Closed(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
            with torch.no_grad():
                return super().forward(hidden_states, **call)

    model = tiny_llama()
    model.model.layers[1].__class__ = Closed
    recipe = Recipe(sparsity=0.5, effort=0)
    advice = r"model\.layers\.1 has no gradient .*; do without: take allocation uniform and, in sparsellm, effort 0 and"
    for asking in (
        recipe,
        recipe.updated(allocation="uniform"),
        recipe.updated(options={"output_metric": 0}),
    ):
        with pytest.raises(ModelError, match=advice):
            prune(model, asking, calibration=IDS)
    asking = recipe.updated(
        allocation="uniform", effort=0, options={"output_metric": 0}
    )
    assert prune(model, asking, calibration=IDS).sparsity > 0.49
    assert (
        prune(model, Recipe(pattern="2:4", effort=0), calibration=IDS).sparsity > 0.49
    )


def test_windows_without_a_next_token_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3, 1\)"):
        Everything().swept(
            Feed(open_chain(tiny_opt(), device=CPU), windows(3, 1), 2048)
        )
